"""kvselect inside vLLM: what a request gets is what it gets alone under `attach`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from vllm_engine import NEW_TOKENS, SMALL, attached, engine, greedy, prompts, stored

import kvselect
from kvselect.eval.checkpoint import embedded_model_path
from kvselect.integrations.vllm import shim
from kvselect.policies.base import Policy

ASKED = prompts()
ORIGINAL = kvselect.TokenSelect(**SMALL)
COMPACT = kvselect.TokenSelect(**SMALL, positions="compact")
# Prefill cut elsewhere (chunks, hits, recompute) selects for other blocks of queries; dense prefill
# does not depend on where it is cut.
UNCUT = kvselect.TokenSelect(**SMALL, dense_prefill=True)
REUSING = kvselect.TokenSelect(**SMALL, dense_prefill=True, similarity_threshold=0.6, max_age=6)
QUEST = kvselect.Quest(token_budget=224, dense_layers=())  # prefill is dense
BLOCKS: dict[str, Any] = {
    "topk_blocks": 6,
    "block_size": 16,
    "num_sink_tokens": 16,
    "num_recent_tokens": 64,
    "q_block_size": 64,
}
LANDMARK = kvselect.Landmark(**BLOCKS, attention="residual")
STINGY = kvselect.Landmark(**BLOCKS, positions="stingy")
ACTQKV = kvselect.ActQKV(**BLOCKS, layer_budget="fixed")
DENSE_THEN_COMPACT = kvselect.TokenSelect(**SMALL, dense_prefill=True, positions="compact")


@cache
def expected(policy: Policy) -> list[list[int]]:
    return attached(policy, ASKED)


# ---- vLLM is where we think it is


@pytest.mark.quick
def test_this_version_was_tested() -> None:
    assert shim.version() in shim.TESTED_VERSIONS


@pytest.mark.quick
@pytest.mark.parametrize("name", shim.PLACES)
def test_every_name_is_there(name: str) -> None:
    if name in shim.NOT_IN.get(shim.version(), ()):
        with pytest.raises(ImportError, match=f"without {name} in"):
            getattr(shim, name)
        return
    assert getattr(shim, name) is not None


@pytest.mark.quick
def test_what_we_override_takes_what_we_think() -> None:
    def arguments(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)[1:]

    implementation = shim.CPUAttentionBackendImpl
    assert arguments(implementation.__init__) == [
        "num_heads",
        "head_size",
        "scale",
        "num_kv_heads",
        "alibi_slopes",
        "sliding_window",
        "kv_cache_dtype",
        "logits_soft_cap",
        "attn_type",
        "kv_sharing_target_layer_name",
        "sinks",
    ]
    update = ["layer", "key", "value", "kv_cache", "slot_mapping"]
    assert arguments(implementation.do_kv_cache_update) == update
    forward = ["layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
    assert arguments(implementation.forward)[:7] == forward
    build = ["common_prefix_len", "common_attn_metadata", "fast_build"]
    assert arguments(shim.CPUAttentionMetadataBuilder.build) == build
    assert shim.CPUAttentionBackend.forward_includes_kv_cache_update is False
    names = shim.CPUAttentionMetadata.__dataclass_fields__
    assert {"seq_lens", "block_table", "query_start_loc", "causal"} <= set(names)
    common = import_module("vllm.v1.attention.backend").CommonAttentionMetadata
    assert {"num_reqs", "query_start_loc_cpu", "is_prefilling"} <= set(common.__dataclass_fields__)


@pytest.mark.quick
def test_the_entry_point_is_found() -> None:
    from importlib.metadata import entry_points

    found = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert found["kvselect"] == "kvselect.integrations.vllm.plugin:register"


# ---- the same tokens


@pytest.mark.quick
def test_a_budget_that_covers_everything_equals_vllm() -> None:
    with engine(None) as running:
        assert all(layer._policy is None for layer in running.layers)
        own = running.generate(ASKED)
        assert all(layer._served is None for layer in running.layers)
    for policy in (kvselect.Dense(), kvselect.TokenSelect(topk=4096)):
        with engine(policy) as running:
            assert running.generate(ASKED) == own
            assert all(layer._served is not None for layer in running.layers)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(ORIGINAL, marks=pytest.mark.quick),
        COMPACT,
        kvselect.TokenSelect(**SMALL, scope="layer", sketch=None, dense_layers=(0,)),
        kvselect.StreamingLLM(num_recent_tokens=160, q_block_size=64),
        pytest.param(QUEST, marks=pytest.mark.quick),
        LANDMARK,
        STINGY,
        ACTQKV,
    ],
    ids=[
        "original",
        "compact",
        "layer-exact",
        "streaming",
        "quest",
        "landmark",
        "stingy",
        "actqkv",
    ],
)
def test_sixteen_requests_at_once_equal_attach(policy: Policy) -> None:
    with engine(policy) as running:
        got = running.generate(ASKED)
        served = [layer._served for layer in running.layers]
        if policy.dense_layers:
            assert served.pop(0) is None
        for layer in served:
            counts = layer.state.decode
            assert 0 < counts.tokens_attended < counts.tokens_visible
    assert got == expected(policy)


@pytest.mark.parametrize(
    "policy",
    [pytest.param(UNCUT, marks=pytest.mark.quick), QUEST],
    ids=["tokens", "quest"],
)
def test_chunked_prefill_among_decoding_requests(policy: Policy) -> None:
    with engine(policy, max_num_batched_tokens=192, max_num_seqs=6) as running:
        assert running.generate(ASKED) == expected(policy)


def test_where_a_prompt_is_cut_changes_nothing() -> None:
    """The last piece has as many tokens as the budget left: 1, 8, 16, 17 of them."""
    from vllm import SamplingParams, TokensPrompt

    asked = prompts((372, 379, 387, 388), seed=9)
    inputs = [TokensPrompt(prompt_token_ids=tokens) for tokens in asked]
    everything = SamplingParams(
        temperature=0.0, max_tokens=3, ignore_eos=True, detokenize=False, logprobs=512
    )
    found = []
    for budget in (4096, 371):
        options = {"max_num_batched_tokens": budget, "max_num_seqs": 1, "max_logprobs": 512}
        with engine(UNCUT, **options) as running:
            outputs = running.llm.generate(inputs, everything, use_tqdm=False)
            steps = [step for output in outputs for step in output.outputs[0].logprobs]
            found.append([[step[token].logprob for token in range(512)] for step in steps])
            assert all(layer._served.state.decode.num_calls == 8 for layer in running.layers)
    whole, cut = torch.tensor(found)
    # Of rounding 1.4e-5 was seen; a piece that is taken for decode steps and selects: 2e-2 to 1e-1.
    assert (whole - cut).abs().max() < 2e-4


@pytest.mark.quick
def test_preempted_requests_start_again() -> None:
    with engine(UNCUT, num_gpu_blocks_override=22, max_model_len=1024) as running:
        preempted = 0
        preempt = running.scheduler._preempt_request

        def count(*args: Any, **options: Any) -> Any:
            nonlocal preempted
            preempted += 1
            return preempt(*args, **options)

        running.scheduler._preempt_request = count
        asked = prompts((250, 380, 254, 383, 300, 511, 253, 640))
        got = running.generate(asked, new_tokens=24)
        assert preempted > 0
    assert got == attached(UNCUT, asked, new_tokens=24)


@pytest.mark.parametrize(
    "policy",
    [
        REUSING,
        dataclasses.replace(REUSING, dense_prefill=False, positions="compact"),
        dataclasses.replace(REUSING, scope="layer", similarity_on="rotated"),
    ],
    ids=["original", "compact", "layer-rotated"],
)
def test_lists_are_reused_as_under_attach(policy: Policy) -> None:
    asked, hits = ASKED[6:], list[int]()
    wanted = attached(policy, asked, new_tokens=24, hits=hits)
    whole = policy.dense_prefill
    options = {"max_num_batched_tokens": 512, "max_num_seqs": 6} if whole else {}
    with engine(policy, **options) as running:  # requests come and go: rows move
        assert running.generate(asked, new_tokens=24) == wanted
        counts = [layer._served.state.decode for layer in running.layers]
        assert sum(count.num_hits for count in counts) == sum(hits)
        assert all(count.num_hits > 0 for count in counts)
        assert all(count.num_misses > 0 for count in counts)


def test_preempted_requests_select_anew() -> None:
    """They reuse what was selected since, never what another request left in their blocks."""
    asked, hits = prompts((250, 380, 254, 383, 300, 511, 253, 640)), list[int]()
    wanted = attached(REUSING, asked, new_tokens=24, hits=hits)
    options = {"max_model_len": 1024, "num_gpu_blocks_override": 22}
    with engine(REUSING, **options) as running:
        answered: dict[str, int] = {}  # by preempted requests, when they first were
        preempt = running.scheduler._preempt_request

        def count(request: Any, *args: Any, **more: Any) -> Any:
            answered.setdefault(request.request_id.split("-")[0], request.num_output_tokens)
            return preempt(request, *args, **more)

        running.scheduler._preempt_request = count
        got = running.generate(asked, new_tokens=24)
        counts = [layer._served.state.decode for layer in running.layers]
        assert answered and 0 < sum(count.num_hits for count in counts) < sum(hits)
    for index, (tokens, right) in enumerate(zip(got, wanted)):
        exact = answered.get(str(index), 24)
        assert tokens[:exact] == right[:exact], index


@pytest.mark.parametrize(
    "policy",
    [pytest.param(UNCUT, marks=pytest.mark.quick), QUEST],
    ids=["sketch", "bounds"],
)
def test_prefix_hits_find_what_lies_with_their_pages(policy: Policy) -> None:
    long, short = prompts((2047, 700))
    asked = [long, short, [*long[:1500], *short[-80:]], long, [*short[:513], *long[-9:]]]
    with engine(policy, enable_prefix_caching=True) as running:
        found: list[int] = []
        lookup = running.scheduler.kv_cache_manager.get_computed_blocks

        def count(request: Any) -> Any:
            blocks, num_tokens, *rest = lookup(request)
            found.append(num_tokens)
            return (blocks, num_tokens, *rest)

        running.scheduler.kv_cache_manager.get_computed_blocks = count
        got = [running.generate([tokens])[0] for tokens in asked]  # one after another: hits
        again = running.generate(asked)
        assert sum(found) > 1000
    wanted = attached(policy, asked)
    assert got == wanted and again == wanted


def test_aborted_requests_leave_nothing_behind() -> None:
    from vllm import TokensPrompt

    with engine(UNCUT, max_num_batched_tokens=256, num_gpu_blocks_override=64) as running:
        core = running.llm.llm_engine
        got: dict[str, list[int]] = {}
        for index, tokens in enumerate(ASKED):
            prompt = TokensPrompt(prompt_token_ids=tokens)
            core.add_request(str(index), prompt, greedy(NEW_TOKENS))
        steps = 0
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    got[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
            steps += 1
            if steps in (2, 5, 9):
                core.abort_request([str(3 * steps % 16)])
        manager = running.scheduler.kv_cache_manager
        assert manager.block_pool.get_num_free_blocks() == 63  # all but vLLM's null block
        assert len(got) >= 13
        for request, tokens in got.items():
            if len(tokens) == NEW_TOKENS:
                assert tokens == expected(UNCUT)[int(request)]


# ---- other dtypes, other layers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    """A budget that covers everything gives vLLM's answers; lists of a part still find them."""
    asked = ASKED[8:]
    with engine(None, dtype=dtype) as running:
        own = running.generate(asked, new_tokens=3)
    found = {}
    for policy in (kvselect.Dense(), ORIGINAL):
        with engine(policy, dtype=dtype) as running:
            found[policy] = running.generate(asked, new_tokens=3)
            layers = [layer._served for layer in running.layers]
            assert all(layer.cache.dtype == getattr(torch, dtype) for layer in layers)
    same = [a == b for a, b in zip(found[kvselect.Dense()], own)]
    assert sum(same) >= len(own) - 1, same  # rounding may decide between two words
    counts = layers[0].state.decode
    assert 0 < counts.tokens_attended < counts.tokens_visible
    exact = expected(ORIGINAL)[8:]
    assert sum(a == b[:3] for a, b in zip(found[ORIGINAL], exact)) >= len(exact) - 1


WINDOW = {"sliding_window": 96}
CHUNKS = {
    "intermediate_size_mlp": 128,
    "num_local_experts": 1,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 4,
    "moe_layers": [],
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 128,
}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Llama", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
        ("Llama4", CHUNKS | {"layer_types": ["chunked_attention", "full_attention"]}),
    ],
    ids=["sliding", "chunked"],
)
def test_layers_with_a_window_run_vllms_own(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    options = stored(tmp_path, family, config)
    asked = [tokens[:700] for tokens in ASKED[6:12]]
    with engine(None, **options) as running:
        own = running.generate(asked)
    streaming = kvselect.StreamingLLM(num_recent_tokens=160, positions="original")
    for policy, streams in ((kvselect.Dense(), False), (streaming, True)):
        with engine(policy, **options) as running:
            assert (running.generate(asked) != own) == streams
            local, whole = (layer._served for layer in running.layers)
            assert local is None and whole is not None


# ---- refusals, before anything is served


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 64}, r"page_block_size: got 64, allowed: a multiple of 128 with sketch="),
        ({"kv_cache_dtype": "fp8_e5m2"}, r"kv_cache_dtype: got 'fp8_e5m2', allowed: 'auto' under"),
        (
            {"additional_config": {"kvselect": {"policy": "Magic"}}},
            r"policy: got 'Magic', allowed: ",
        ),
        (
            {"additional_config": {"kvselect": {"policy": "TokenSelect", "positions": "compact"}}},
            r"policy.capacity: got \d+, allowed: at most 512, the trained length",
        ),
        (
            {"additional_config": {"kvselect": DENSE_THEN_COMPACT.to_dict()}},
            r"max_model_len: got 4096, allowed: at most 512, the trained length of the model, with",
        ),
        (
            {"hf_overrides": {"max_position_embeddings": 256}, "max_model_len": 256},
            r"rotary table: got 256, allowed: at least 512 positions",
        ),
        (
            {"num_gpu_blocks_override": 2**26},
            r"KV cache \(VLLM_CPU_KVCACHE_SPACE\): got '\d+.00 GiB', allowed: at most",
        ),
        (
            {"kv_cache_memory_bytes": 2**44},
            r"KV cache \(VLLM_CPU_KVCACHE_SPACE\): got '16384.00 GiB', allowed: at most",
        ),
    ],
)
def test_the_server_does_not_start(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "kv_cache_memory_bytes" in options:  # the variable would win
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    with pytest.raises(Exception, match=message), engine(ORIGINAL, **options):
        pass


def test_a_model_without_a_layer_that_selects(tmp_path: Path) -> None:
    options = stored(tmp_path, "Llama", WINDOW | {"layer_types": ["sliding_attention"] * 2})
    message = r"layers that select: got '0 of 2', allowed: at least 1 \(windows, dense_layers"
    with pytest.raises(Exception, match=message), engine(kvselect.Dense(), **options):
        pass


def test_a_model_that_is_not_known(tmp_path: Path) -> None:
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = r"model: got 'GPTNeoXForCausalLM', allowed: LlamaForCausalLM or"
    with (
        pytest.raises(Exception, match=message),
        engine(ORIGINAL, model=str(tmp_path), load_format="dummy"),
    ):
        pass


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"model": str(tmp_path), "load_format": "dummy", "hf_overrides": {}}
    message = r"attention: got 'MLA', allowed: models without MLA"
    with pytest.raises(Exception, match=message), engine(kvselect.Dense(), **options):
        pass


def test_draft_models_are_refused() -> None:
    """Last: what vLLM imports for them keeps later engines of this process from starting."""
    options = {
        "method": "draft_model",
        "model": str(embedded_model_path()),
        "num_speculative_tokens": 2,
    }
    message = r"speculative: got 'draft_model', allowed: None or 'ngram' under kvselect"
    with pytest.raises(Exception, match=message), engine(ORIGINAL, speculative_config=options):
        pass
