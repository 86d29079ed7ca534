"""What a server is asked to run, and what it refuses: without vLLM."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvselect
from kvselect.engine_cache import sketch_share
from kvselect.integrations.vllm import config, plugin, shim
from kvselect.integrations.vllm.config import (
    LayerFacts,
    ServerFacts,
    averages_unrotated,
    compares_unrotated,
    configured_policy,
    extra_share,
    needs_rotation,
    require_attention,
    require_layer,
    require_memory,
    require_policy,
    require_server,
)
from kvselect.policies.base import Policy

POLICY = kvselect.TokenSelect(topk=64, num_recent_tokens=128)
LAYER: dict[str, Any] = {
    "attn_type": "decoder",
    "head_dim": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "has_alibi": False,
    "shares_kv": False,
    "page_block_size": 128,
    "device_type": "cpu",
    "softcap": 0.0,
}
SERVER: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "rope_type": "default",
    "speculative_method": None,
    "num_speculative_tokens": 0,
    "kv_connector": None,
    "context_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 2,
    "num_kv_heads": 2,
    "num_layers": 4,
    "num_ubatches": 1,
}


def environ(policy: Policy | str) -> dict[str, str]:
    text = policy if isinstance(policy, str) else json.dumps(policy.to_dict())
    return {"KVSELECT_VLLM_POLICY": text}


def test_off_by_default() -> None:
    assert configured_policy({}) is None
    assert configured_policy({}, {}) is None
    assert configured_policy({}, {"other": 1}) is None
    assert configured_policy(environ("  ")) is None


def test_either_place_or_both_alike() -> None:
    entry = {"kvselect": POLICY.to_dict()}
    assert configured_policy(environ(POLICY)) == POLICY
    assert configured_policy({}, entry) == POLICY
    assert configured_policy(environ(POLICY), entry) == POLICY
    with pytest.raises(ValueError, match=r"^additional_config\['kvselect'\]: got TokenSelect"):
        configured_policy(environ(kvselect.Dense()), entry)


def test_the_variable_is_read_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSELECT_VLLM_POLICY", json.dumps({"policy": "StreamingLLM"}))
    assert configured_policy() == kvselect.StreamingLLM()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"^KVSELECT_VLLM_POLICY: got '\{', allowed: a policy's dict as JSON \(Expecting"),
        ("[]", r"^settings: got list \[\], allowed: a dict made by"),
        ('{"policy": "Magic"}', r"^policy: got 'Magic', allowed: "),
        ('{"policy": "Dense", "topk": 3}', r"^settings of Dense: got \['topk'\]"),
        (
            '{"policy": "InfLLM"}',
            r"^policy: got 'InfLLM', allowed: TokenSelect or StreamingLLM or Q",
        ),
        ('{"policy": "TokenSelect", "num_segments": 4}', r"^num_segments: got 4, allowed: None u"),
        (
            '{"policy": "TokenSelect", "layer_budget": "entropy_pool"}',
            r"^layer_budget: got 'entropy_pool', allowed: 'fixed' under vLLM",
        ),
        ('{"policy": "ActQKV"}', r"^layer_budget: got 'entropy_pool', allowed: 'fixed' under vLLM"),
        (
            '{"policy": "ActQKV", "layer_budget": "fixed", "probe_statistics": "running"}',
            r"^probe_statistics: got 'running', allowed: 'window' under vLLM \(what is remembered",
        ),
    ],
)
def test_what_is_no_policy_of_a_server(text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        configured_policy(environ(text))


def test_a_layer_that_can_be_served() -> None:
    require_layer(POLICY, LayerFacts(**LAYER))
    exact = kvselect.TokenSelect(topk=64, sketch=None)
    require_layer(exact, LayerFacts(**LAYER | {"page_block_size": 16}))
    require_layer(POLICY, LayerFacts(**LAYER | {"kv_cache_dtype": "bfloat16"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_type": "encoder_decoder"}, r"^attn_type: got 'encoder_decoder', allowed: 'decod"),
        ({"head_dim": 112}, r"^head_dim: got 112, allowed: 32 or 64"),
        ({"dtype": torch.float64}, r"^dtype: got torch.float64, allowed: "),
        ({"kv_cache_dtype": "fp8_e5m2"}, r"^kv_cache_dtype: got 'fp8_e5m2', allowed: 'auto'"),
        ({"kv_cache_dtype": "float16"}, r"^kv_cache_dtype: got 'float16', allowed: 'auto' under"),
        ({"has_alibi": True}, r"^alibi_slopes: got 'slopes', allowed: None"),
        ({"shares_kv": True}, r"^kv_sharing_target_layer_name: got 'a layer', allowed: None"),
        ({"page_block_size": 64}, r"^page_block_size: got 64, allowed: a multiple of 128 with"),
    ],
)
def test_a_layer_that_cannot(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_layer(POLICY, LayerFacts(**LAYER | change))


def test_a_cap_that_a_dense_kernel_does_not_know_is_refused_before_anything_is_served() -> None:
    capped = LAYER | {"softcap": 50.0}
    require_layer(POLICY, LayerFacts(**capped))
    copying = dataclasses.replace(POLICY, prefill_attention="dense_kernel")
    require_layer(copying, LayerFacts(**LAYER))
    with pytest.raises(ValueError, match=r"^softcap: got 50.0, allowed: none with torch's dense k"):
        require_layer(copying, LayerFacts(**capped))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "GPT2LMHeadModel"}, r"^model: got 'GPT2LMHeadModel', allowed: LlamaFor"),
        ({"rope_type": "dynamic"}, r"^rope_type: got 'dynamic', allowed: 'default' or"),
        ({"speculative_method": "eagle"}, r"^speculative: got 'eagle', allowed: None or 'ngram'"),
        (
            {"speculative_method": "ngram", "num_speculative_tokens": 16},
            r"^num_speculative_tokens: got 16, allowed: at most 15, tail_q_block_size - 1",
        ),
        ({"kv_connector": "LMCache"}, r"^kv_connector: got 'LMCache', allowed: None"),
        ({"context_parallel_size": 2}, r"^context_parallel_size: got 2, allowed: 1"),
        ({"num_ubatches": 2}, r"^ubatches: got 2, allowed: 1 under kvselect \(no --enable-dbo"),
        ({"tensor_parallel_size": 4}, r"^tensor_parallel_size: got 4, allowed: at most 2, the mo"),
    ],
)
def test_a_server_that_cannot(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_server(POLICY, ServerFacts(**SERVER | change))


def test_what_ranks_cannot_decide_together() -> None:
    policy = kvselect.Landmark(scope="layer")
    require_server(policy, ServerFacts(**SERVER | {"tensor_parallel_size": 1}))
    message = (
        r"^tensor_parallel_size: got 2, allowed: 1 \(scope='layer' takes maxima over all heads"
    )
    with pytest.raises(ValueError, match=message):
        require_server(policy, ServerFacts(**SERVER))


def test_ranks_that_share_a_kv_head_may_attend_by_no_query() -> None:
    facts = ServerFacts(**SERVER | {"tensor_parallel_size": 4})
    for policy in (kvselect.Dense(), kvselect.StreamingLLM()):
        require_server(policy, facts)


def test_drafts_without_layers_of_their_own() -> None:
    drafts = {"speculative_method": "ngram", "num_speculative_tokens": 15}
    act_qkv = kvselect.ActQKV(layer_budget="fixed")
    others = (kvselect.Dense(), kvselect.StreamingLLM(), kvselect.Quest(), kvselect.Landmark())
    for policy in (POLICY, act_qkv, *others):
        require_server(policy, ServerFacts(**SERVER | drafts))


def test_dense_layers_are_layers_of_the_model() -> None:
    policy = kvselect.TokenSelect(topk=64, dense_layers=(3, 4))
    message = r"^dense_layers: got \[4\], allowed: indices of this model's layers, 0..3$"
    with pytest.raises(ValueError, match=message):
        require_server(policy, ServerFacts(**SERVER))
    require_server(policy, ServerFacts(**SERVER | {"num_layers": 5}))


def test_models_whose_rotation_is_unknown_may_leave_it_alone() -> None:
    foreign = ServerFacts(**SERVER | {"architecture": "GPT2LMHeadModel", "rope_type": "none"})
    after = kvselect.TokenSelect(topk=64, average_queries="after_rope")
    for policy in (kvselect.Dense(), after, kvselect.TokenSelect(topk=64, dense_prefill=True)):
        assert not needs_rotation(policy)
        require_server(policy, foreign)
    compact = kvselect.TokenSelect(topk=64, positions="compact")
    assert needs_rotation(compact) and not averages_unrotated(compact)
    assert needs_rotation(POLICY) and averages_unrotated(POLICY)
    reusing = kvselect.TokenSelect(topk=64, dense_prefill=True, similarity_threshold=0.9)
    assert needs_rotation(reusing) and compares_unrotated(reusing)
    rotated = dataclasses.replace(reusing, similarity_on="rotated")
    assert not needs_rotation(rotated)
    assert not compares_unrotated(dataclasses.replace(compact, similarity_threshold=0.9))


def test_lists_are_reused_where_ranks_need_not_agree() -> None:
    reusing = kvselect.TokenSelect(topk=64, similarity_threshold=0.9)
    require_server(reusing, ServerFacts(**SERVER))
    joined = dataclasses.replace(reusing, scope="layer")
    require_server(joined, ServerFacts(**SERVER | {"tensor_parallel_size": 1}))
    message = r"^similarity_threshold: got 0.9, allowed: None with scope='layer' in tensor parallel"
    with pytest.raises(ValueError, match=message):
        require_server(joined, ServerFacts(**SERVER))
    message = r"^similarity_threshold: got 0.9, allowed: None in pipeline parallel"
    with pytest.raises(ValueError, match=message):
        require_server(reusing, ServerFacts(**SERVER | {"pipeline_parallel_size": 2}))
    require_server(POLICY, ServerFacts(**SERVER | {"pipeline_parallel_size": 2}))


def test_pages_hold_whole_blocks() -> None:
    quest = kvselect.Quest(page_size=48)
    require_layer(quest, LayerFacts(**LAYER | {"page_block_size": 96}))
    message = r"^page_block_size: got 128, allowed: a multiple of 48, the tokens of a block of the"
    with pytest.raises(ValueError, match=message):
        require_layer(quest, LayerFacts(**LAYER))
    # Two bfloat16 vectors, a flag per token and a float32 count, per 16 keys and values.
    share = extra_share(kvselect.Quest(), 128, 128, 2)
    assert share == (2 * 128 * 2 + 16 + 4) / (2 * 16 * 128 * 2)


def test_more_than_attention_is_refused() -> None:
    require_attention("Attention", False)
    message = r"^attention layer: got 'StaticSinkAttention', allowed: Attention under kvselect, or"
    with pytest.raises(ValueError, match=message):
        require_attention("StaticSinkAttention", False)
    message = r"^attention: got 'tokens that attend to later ones', allowed: causal attention"
    with pytest.raises(ValueError, match=message):
        require_attention("Attention", True)


def test_memory_is_asked_for_before_it_is_taken() -> None:
    gib = 2**30
    share = extra_share(POLICY, 128, 128, 2)
    assert share == sketch_share("int4", 128, 2)
    require_memory(8 * gib, round(share * 8 * gib), 10 * gib)
    message = (
        r"^KV cache \(VLLM_CPU_KVCACHE_SPACE\): got '9.00 GiB', allowed: at most 8.83 GiB: "
        r"10.00 GiB are free, and kvselect takes 13% of the cache on top$"
    )
    with pytest.raises(ValueError, match=message):
        require_memory(9 * gib, round(share * 9 * gib), 10 * gib)
    require_memory(10 * gib, 0, 10 * gib)


def test_every_rank_of_a_machine_takes_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(total=100, available=70))
    monkeypatch.setitem(sys.modules, "psutil", psutil)  # vLLM brings it
    assert shim.available_bytes("cpu") == 70
    cache = SimpleNamespace(
        kv_cache_memory_bytes=8, num_gpu_blocks_override=None, num_gpu_blocks=None
    )
    ranks = SimpleNamespace(local_world_size=2)
    vllm_config = SimpleNamespace(cache_config=cache, parallel_config=ranks)
    assert shim.asked_cache_bytes(vllm_config, "cpu") == 16
    assert shim.asked_cache_bytes(vllm_config, "cuda") == 8  # each rank has a GPU
    cache.kv_cache_memory_bytes = None  # a share of memory: known when weights have theirs
    assert shim.asked_cache_bytes(vllm_config, "cpu") is None
    cache.kv_cache_memory_bytes, cache.num_gpu_blocks_override = 8, 5
    assert shim.asked_cache_bytes(vllm_config, "cpu") is None
    spec = SimpleNamespace(page_size_bytes=10)
    assert shim.allocated_cache_bytes(vllm_config, spec, 3, "cuda") is None  # vLLM measures
    with pytest.raises(ValueError, match=r"^num_gpu_blocks: got None, allowed: an int, before"):
        shim.allocated_cache_bytes(vllm_config, spec, 3, "cpu")
    cache.num_gpu_blocks = 5
    assert shim.allocated_cache_bytes(vllm_config, spec, 3, "cpu") == 5 * 10 * 3 * 2
    assert shim.allocated_cache_bytes(vllm_config, spec, 3, "cuda") == 5 * 10 * 3


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 4)
    assert shim.available_bytes("cuda") == 53
    message = r"^KV cache \(--gpu-memory-utilization\): got '0.00 GiB', allowed: at most 0.00 GiB"
    with pytest.raises(ValueError, match=message):
        require_memory(50, 5, 53, "cuda")


def test_a_step_without_its_layer_is_no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"metadata": None}
    context = SimpleNamespace(
        get_forward_context=lambda: SimpleNamespace(attn_metadata=found["metadata"])
    )
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(forward_context=context))
    monkeypatch.setitem(sys.modules, "vllm.forward_context", context)
    assert shim.step_metadata("layers.0") is None
    found["metadata"] = {"layers.0": "step"}
    assert shim.step_metadata("layers.0") == "step"
    message = r"^attention metadata: got 'dict', allowed: an entry of layers.1 \(kvselect would"
    with pytest.raises(ValueError, match=message):
        shim.step_metadata("layers.1")
    found["metadata"] = [{"layers.0": "step"}]  # a batch in parts
    with pytest.raises(ValueError, match=r"^attention metadata: got 'list', allowed: an entry of"):
        shim.step_metadata("layers.0")


def test_what_layers_say_of_themselves() -> None:
    plain = SimpleNamespace()
    assert not shim.is_local(plain) and not shim.sees_later_tokens(plain)
    assert shim.is_local(SimpleNamespace(attention_chunk_size=128))
    assert shim.sees_later_tokens(SimpleNamespace(use_mm_prefix=True))


class Platform:
    """The parts of vLLM that the plug-in touches."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: str) -> None:
        self.overrides: list[dict[str, str]] = []
        patch.setattr(shim, "platform_name", lambda: kind)
        patch.setattr(shim, "vllm_backends", lambda: ["FLASH_ATTN"])
        patch.setattr(shim, "override_backends", self.override)

    def override(self, class_paths: dict[str, str], *, keep_others: bool = False) -> None:
        self.overrides.append(class_paths)
        self.keep_others = keep_others


def test_the_plug_in_registers_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSELECT_VLLM_POLICY", raising=False)
    platform = Platform(monkeypatch, "cpu")
    plugin.register()
    plugin.register()
    assert platform.overrides == [plugin.CPU_BACKENDS] * 2


def test_the_plug_in_registers_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSELECT_VLLM_POLICY", raising=False)
    platform = Platform(monkeypatch, "cuda")
    wanted = {
        "CUSTOM": "kvselect.integrations.vllm.cuda_backend.SelectingCudaBackend",
        "FLASH_ATTN": "kvselect.integrations.vllm.cuda_choice.FLASH_ATTN",
    }
    plugin.register()  # additional_config may name a policy
    assert platform.overrides == [wanted] and platform.keep_others
    monkeypatch.setenv("KVSELECT_VLLM_POLICY", '{"policy": "Dense"}')
    with_cuda = {"cuda_loaded": True, "cuda_archs": ["90a"], "torch": "2.13.0"}
    monkeypatch.setattr(config, "build_info", lambda: with_cuda)
    plugin.register()
    assert platform.overrides == [wanted] * 2 and not platform.keep_others


@pytest.mark.parametrize(
    ("archs", "got"), [([], "none"), (["90a"], "one that torch 2.13.0 does not load")]
)
def test_the_plug_in_without_cuda_kernels(
    archs: list[str], got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = Platform(monkeypatch, "cuda")
    without = {"cuda_loaded": False, "cuda_archs": archs, "torch": "2.13.0"}
    monkeypatch.setattr(config, "build_info", lambda: without)
    monkeypatch.setenv("KVSELECT_VLLM_POLICY", '{"policy": "Dense"}')
    message = (
        rf"^kvselect's CUDA module: got '{got}', allowed: one beside a torch with CUDA \(build"
    )
    with pytest.raises(ValueError, match=message):
        plugin.register()
    assert platform.overrides == []


def test_the_plug_in_on_another_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSELECT_VLLM_POLICY", raising=False)
    platform = Platform(monkeypatch, "rocm")
    plugin.register()
    assert platform.overrides == []
    monkeypatch.setenv("KVSELECT_VLLM_POLICY", '{"policy": "Dense"}')
    with pytest.raises(
        ValueError, match=r"^vLLM platform: got 'rocm', allowed: cpu or cuda with K"
    ):
        plugin.register()


def test_custom_is_for_a_policy() -> None:
    require_policy(POLICY)
    message = (
        r"^policy: got None, allowed: one \(KVSELECT_VLLM_POLICY, or additional_config\) with -"
    )
    with pytest.raises(ValueError, match=message):
        require_policy(None)


def test_lengths_are_read_where_nobody_waits() -> None:
    class OnDevice:
        device = torch.device("cuda")

        def __getitem__(self, part: slice) -> torch.Tensor:
            return torch.tensor([9, 8, 0])[part]

    bound = torch.tensor([9, 10, 0])
    common = SimpleNamespace(seq_lens=OnDevice(), seq_lens_cpu_upper_bound=bound, num_reqs=2)
    assert shim.host_seq_lens(common, has_drafts=False) == [9, 10]
    assert shim.host_seq_lens(common, has_drafts=True) == [9, 8]  # one draft was rejected
    common.seq_lens_cpu_upper_bound = None
    assert shim.host_seq_lens(common, has_drafts=False) == [9, 8]
    common.seq_lens, common.seq_lens_cpu_upper_bound = torch.tensor([7, 6]), bound
    assert shim.host_seq_lens(common, has_drafts=False) == [7, 6]


def test_votes_are_summed_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(world_size=2, cpu_group="gloo", device_group="nccl")
    place = SimpleNamespace(get_tp_group=lambda: group)
    monkeypatch.setitem(sys.modules, shim.PLACES["get_tp_group"], place)
    assert shim.tensor_parallel_group("cpu") == "gloo"
    assert shim.tensor_parallel_group("cuda") == "nccl"
    group.world_size = 1
    assert shim.tensor_parallel_group("cuda") is None


def test_the_plug_in_refuses_an_unknown_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform(monkeypatch, "cpu")
    monkeypatch.setenv("KVSELECT_VLLM_POLICY", '{"policy": "Magic"}')
    with pytest.raises(ValueError, match=r"^policy: got 'Magic'"):
        plugin.register()
    assert platform.overrides == []


def test_backends_that_a_release_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[str, str]] = []
    registry = SimpleNamespace(
        AttentionBackendEnum=SimpleNamespace(__members__={"CPU_ATTN": "cpu"}),
        register_backend=lambda *what: registered.append(what),
    )
    monkeypatch.setitem(sys.modules, shim.PLACES["register_backend"], registry)
    monkeypatch.setattr(shim, "version", lambda: "0.28.0")
    shim.override_backends({"CPU_ATTN": "ours", "AMX_MLA": "ours too"})
    assert registered == [("cpu", "ours")]
    monkeypatch.setattr(shim, "version", lambda: "0.33.0")
    with pytest.raises(
        ImportError, match=r"^vllm: got 0.33.0 without the backend AMX_MLA, allowed"
    ):
        shim.override_backends({"AMX_MLA": "ours too"})


def test_backends_that_somebody_else_registered_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[str] = []
    taken = {"A": None, "B": "kvselect.b", "C": "other.c"}
    members = {
        name: SimpleNamespace(
            name=name,
            is_overridden=lambda path=path: path is not None,
            get_path=lambda path=path: path,
        )
        for name, path in taken.items()
    }
    registry = SimpleNamespace(
        AttentionBackendEnum=SimpleNamespace(__members__=members),
        register_backend=lambda what, path: registered.append(what.name),
    )
    monkeypatch.setitem(sys.modules, shim.PLACES["register_backend"], registry)
    shim.override_backends(dict.fromkeys("ABC", "kvselect.ours"), keep_others=True)
    assert registered == ["A", "B"]
    shim.override_backends(dict.fromkeys("ABC", "kvselect.ours"))
    assert registered == ["A", "B", "A", "B", "C"]


def test_a_vllm_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shim.PLACES, "get_forward_context", "math")
    with pytest.raises(ImportError, match=r"^vllm: got .* without get_forward_context in math \("):
        shim.get_forward_context  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        shim.nothing  # noqa: B018
