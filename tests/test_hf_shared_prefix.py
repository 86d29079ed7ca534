"""Prompts that begin alike, through attach: the stock model's tokens, each prefix held once."""

from __future__ import annotations

import inspect
import re
import weakref
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin

from kvselect import Dense, Landmark, StreamingLLM, TokenSelect
from kvselect.eval.checkpoint import embedded_model_path, load_checkpoint
from kvselect.integrations.hf import attach
from kvselect.prefix_plan import PrefixGroup, PrefixPlan, plan_prefixes

# Chunked prefill of transformers 5.17 splits the whole prompt, whatever the cache holds already.
CHUNKS_COUNT_THE_CACHE = "prefill_ids" in inspect.getsource(GenerationMixin._prefill)
PAGE = Path(__file__).parents[1] / "docs" / "policies.md"
GREEDY: dict[str, Any] = {
    "max_new_tokens": 8,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FIRST = hf_models.tokens(1, 90, seed=9)[0].tolist()
SECOND = hf_models.tokens(1, 51, seed=8)[0].tolist()
PROMPTS = [
    [*FIRST, 5, 6, 7],
    [*SECOND, 3, 4],
    [*FIRST, *range(20, 41)],
    [*SECOND, 6, 5, 4, 3, 7, 9],
    [*FIRST, 9],
    [4, 5, 6, 7, 8, 9, 33],
]


def alone(model: Any, prompts: list[list[int]] = PROMPTS, **changes: Any) -> list[list[int]]:
    """New tokens of every prompt by itself."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **(GREEDY | changes))
        found.append(out[0, len(prompt) :].tolist())
    return found


def together(model: Any, shared: Any, **changes: Any) -> list[list[int]]:
    out: Tensor = model.generate(**shared, **(GREEDY | changes))
    return out[:, shared.num_columns :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama_yarn"])
def test_tokens_are_those_of_the_stock_model(name: str) -> None:
    model = hf_models.model(name)
    wanted = alone(model)
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes(PROMPTS)
        assert [group.num_tokens for group in shared.plan.groups] == [90, 51, 0]
        assert together(model, shared) == wanted


def test_logits_are_those_of_the_stock_model() -> None:
    model = hf_models.model("llama")
    stock = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes(PROMPTS)
        mask, skipped = shared.attention_mask, shared.past_key_values.get_seq_length()
        positions = (mask.cumsum(-1) - 1)[:, skipped:]
        ids = shared.input_ids[:, skipped:]
        got = model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=shared.past_key_values,
        ).logits[:, -1]
    assert (got - torch.stack(stock)).abs().max() <= 2e-5 * torch.stack(stock).abs().max()


def test_embedded_model_with_long_prefixes() -> None:
    """Beyond 32 query rows per KV head, in tiles; the groups by another page size."""
    checkpoint = load_checkpoint(embedded_model_path())
    model: Any = checkpoint.model
    generator = torch.Generator().manual_seed(1)
    size = model.config.vocab_size
    prefix = torch.randint(size, (300,), generator=generator).tolist()
    prompts = [
        prefix + torch.randint(size, (count,), generator=generator).tolist()
        for count in (40, 3, 17, 1, 29)
    ]
    wanted = alone(model, prompts, max_new_tokens=24)
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes(prompts, plan=plan_prefixes(prompts, page_block_size=64))
        assert [group.num_tokens for group in shared.plan.groups] == [256]
        assert together(model, shared, max_new_tokens=24) == wanted


def test_a_prefix_is_held_once_and_read_once_for_all() -> None:
    model = hf_models.model("llama")
    first = hf_models.tokens(1, 600, seed=9)[0].tolist()
    prompts = [[*first, number] for number in range(3, 11)]
    with attach(model, Dense()) as handle:
        assert handle.report().layers[0].shared_prefix is None
        shared = handle.share_prefixes(prompts)
        layers = shared.past_key_values.layers
        together(model, shared)
        report = handle.report()
    per_token = 2 * 2 * 32 * 4  # keys and values, heads, channels, bytes
    for layer in layers:
        (prefix, rows), *others = layer.groups.prefixes()
        assert not others and rows.tolist() == list(range(8)) and prefix.num_tokens == 600
        assert 600 * per_token <= layer.groups.nbytes <= 640 * per_token
        # Everything that a layer holds: the prefix, and room for 128 tokens of each of 8 rows.
        assert layer.groups.nbytes + layer.cache.nbytes <= (640 + 8 * 128) * per_token
        assert layer.keys.shape == (8, 2, 8, 32) and layer.get_seq_length() == 608
    for found in report.layers:
        assert found.shared_prefix == {
            "num_steps": 8,  # own prompts of one token are steps, too
            "bytes_per_step": 600 * per_token,  # 16 query rows per KV head: one pass
            "separate_bytes_per_step": 8 * 600 * per_token,
            "held_bytes": layers[0].groups.nbytes,
            "separate_held_bytes": 8 * layers[0].groups.nbytes,
        }
        assert found.cache_layer == "KVSelectPrefixLayer"
        assert found.tokens_per_step == found.context_per_step == 600 + 4.5
    assert "a decode step reads 0.92 MB of them, 8.00 times less" in str(report)
    # Prefill of the prefix in blocks of 128, then 8 steps of as many rows.
    blocks = sum(600 - later for later in range(0, 600, 128))
    seen = blocks + 8 * (8 * 600 + sum(range(1, 9)))
    assert report.layers[0].dense_bytes_read == seen * per_token
    assert report.layers[0].bytes_read == (seen - 7 * 8 * 600) * per_token


def test_members_finish_one_by_one() -> None:
    model = hf_models.model("llama")
    wanted = alone(model, max_new_tokens=10)
    ends = sorted({row[3] for row in wanted[::2]} | {row[6] for row in wanted[1::2]})
    stopped = alone(model, max_new_tokens=10, eos_token_id=ends)
    assert len({len(row) for row in stopped}) > 1
    with attach(model, Dense()) as handle:
        got = together(model, handle.share_prefixes(PROMPTS), max_new_tokens=10, eos_token_id=ends)
    for row, expect in zip(got, stopped):
        assert row[: len(expect)] == expect and not any(row[len(expect) :])


def test_members_leave_and_the_last_one_frees_the_prefix() -> None:
    model = hf_models.model("llama")
    wanted = alone(model)
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes(PROMPTS)
        cache, rows = shared.past_key_values, [2, 4]
        out = model.generate(**shared, **(GREEDY | {"max_new_tokens": 4}))
        second = weakref.ref(cache.layers[0].groups.prefixes()[1][0].cache)
        known = shared.input_ids, shared.attention_mask[rows], shared.num_columns
        del shared
        assert second() is not None
        cache.batch_select_indices(torch.tensor(rows))
        assert second() is None
        mask = torch.nn.functional.pad(known[1], (0, 4), value=1)
        out = model.generate(
            out[rows],
            attention_mask=mask,
            past_key_values=cache,
            **(GREEDY | {"max_new_tokens": 4}),
        )
    assert out[:, known[2] :].tolist() == [wanted[row] for row in rows]


def test_beams_after_repeating_the_rows() -> None:
    model = hf_models.model("llama")
    wanted = alone(model, num_beams=3)
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes(PROMPTS)
        with pytest.raises(ValueError, match=r"got 18, allowed: 6 \(rows that share.*interleave"):
            together(model, shared, num_beams=3)
        shared = handle.share_prefixes(PROMPTS, known=shared)
        shared.past_key_values.batch_repeat_interleave(3)
        assert together(model, shared, num_beams=3) == wanted


def test_crop_goes_back_to_the_prefixes() -> None:
    model = hf_models.model("llama")
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes(PROMPTS)
        first = together(model, shared)
        cache = shared.past_key_values
        own = cache.layers[0].num_own_tokens
        with pytest.raises(ValueError, match=f"crop: got -{own + 1}, allowed: at least -{own}"):
            cache.crop(-own - 1)
        with pytest.raises(ValueError, match="tokens_to_remove: got 3"):
            cache.crop(3)
        cache.crop(-own)
        assert together(model, shared) == first
        cache.crop(-cache.layers[0].num_own_tokens)
        cache.batch_select_indices(torch.tensor([0, 3]))
        rows: dict[str, Any] = {name: shared[name][[0, 3]] for name in list(shared)[:2]}
        out = model.generate(**rows, past_key_values=cache, **GREEDY)
        assert out[:, shared.num_columns :].tolist() == [first[0], first[3]]


def test_known_prefixes_are_not_read_again() -> None:
    model = hf_models.model("llama")
    turn = [[*FIRST, 77, 78], [*FIRST, 5, 99, 98, 97]]
    wanted = alone(model, turn)
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes(PROMPTS)
        together(model, shared)
        before = handle.report().layers[0].prefill["num_calls"]
        again = handle.share_prefixes(turn, known=shared)
        assert handle.report().layers[0].prefill["num_calls"] == before
        stored = [
            x.past_key_values.layers[0].groups.prefixes()[0][0].cache for x in (shared, again)
        ]
        assert stored[0] is stored[1]
        assert together(model, again) == wanted


def test_prefixes_that_another_model_read_are_refused() -> None:
    first, second = (hf_models.build(hf_models.config("llama"), seed=seed) for seed in (0, 1))
    with attach(first, Dense()) as handle, attach(second, Dense()) as other:
        shared = handle.share_prefixes(PROMPTS)
        with pytest.raises(ValueError, match="known: got 'prefixes that another model read'"):
            other.share_prefixes(PROMPTS, known=shared)


def _dynamic_llama() -> Any:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    sizes: dict[str, Any] = {"max_position_embeddings": 128, "rope_parameters": rope}
    return hf_models.build(hf_models.config("llama", **sizes))


@pytest.mark.parametrize("name", ["dynamic", "phi3_longrope"])
def test_prompts_that_are_rotated_otherwise_than_their_prefix(name: str) -> None:
    model = _dynamic_llama() if name == "dynamic" else hf_models.model(name)
    limit = 128 if name == "dynamic" else 512
    more = hf_models.tokens(1, limit, seed=3)[0].tolist()
    prompts = [[*FIRST, *more[: limit - 90]], [*FIRST, 7]]
    wanted = alone(model, prompts, max_new_tokens=1)
    message = f"longest prompt: got {limit + 1}, allowed: at most {limit} tokens"
    with attach(model, Dense()) as handle:
        assert together(model, handle.share_prefixes(prompts), max_new_tokens=1) == wanted
        with pytest.raises(ValueError, match=message):
            handle.share_prefixes([[*prompts[0], 5], prompts[1]])


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_own_tokens_in_chunks(chunk: int) -> None:
    """Some chunks are nothing but padding for some rows."""
    model = hf_models.model("llama")
    wanted = alone(model)
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes(PROMPTS)
        if CHUNKS_COUNT_THE_CACHE:
            assert together(model, shared, prefill_chunk_size=chunk) == wanted
        else:
            with pytest.raises(ValueError, match=r"columns of attention_mask: got \d+, allowed: "):
                together(model, shared, prefill_chunk_size=chunk)


def test_assisted_generation_is_refused() -> None:
    """It sends a filled cache the whole prompt, and the stock model answers wrongly then."""
    model = hf_models.model("llama")
    prompt = [*FIRST, 5, 6, 7, 5, 6]
    plan = PrefixPlan((PrefixGroup((0,), 90),), 95, 95)
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes([prompt], plan=plan)
        position_ids = r"position_ids: got 'others', .* assisted generation"
        columns = r"columns of attention_mask: got \d+, allowed: "  # of other releases
        with pytest.raises(ValueError, match=f"{position_ids}|{columns}"):
            together(model, shared, prompt_lookup_num_tokens=3)


def selecting(**changes: Any) -> TokenSelect:
    fields: dict[str, Any] = {
        "topk": 24,
        "overselect": 1.0,
        "num_sink_tokens": 4,
        "num_recent_tokens": 32,
        "sketch": None,
        "dense_prefill": True,
        "dense_below_tokens": 0,
    }
    return TokenSelect(**(fields | changes))


@pytest.mark.parametrize("layers", [(), (1,)])
def test_token_select_of_one_member_is_that_of_a_row(layers: tuple[int, ...]) -> None:
    """With a query head per KV head the order of scores is that of the keys, whatever they are
    normalised over: lists, and so tokens, are those of a row by itself."""
    model = hf_models.build(hf_models.config("llama", num_key_value_heads=4))
    policy = selecting(dense_layers=layers, topk=6)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[1]]
    groups = tuple(PrefixGroup((row,), n) for row, n in enumerate((90, 88, 51)))
    with attach(model, policy) as handle:
        wanted = alone(model, prompts)
        alone_report = handle.report()
    with attach(model, policy) as handle:
        shared = handle.share_prefixes(prompts, plan=PrefixPlan(groups, 300, 300))
        assert together(model, shared) == wanted
        report = handle.report()
    assert wanted != alone(model, prompts)  # something was left out
    for got, expect in zip(report.layers, alone_report.layers):
        assert got.selects == expect.selects
        if got.selects:
            assert got.tokens_per_step == pytest.approx(expect.tokens_per_step)
            assert got.tokens_per_step < got.context_per_step - 5


def test_token_select_of_a_group_reads_the_union() -> None:
    model = hf_models.model("llama")
    policy = selecting()
    with attach(model, policy) as handle:
        shared = handle.share_prefixes(PROMPTS)
        together(model, shared)
        report = handle.report()
    layer = report.layers[0]
    assert layer.shared_prefix is not None and layer.decode["num_dense_calls"] == 0
    read, apart = (layer.shared_prefix[f"{x}bytes_per_step"] for x in ("", "separate_"))
    assert read < apart < 2 * 2 * 32 * 4 * (3 * 90 + 2 * 51)
    assert layer.bytes_read < layer.dense_bytes_read
    wide = selecting(topk=512)
    wanted = alone(model)
    with attach(model, wide) as handle:
        assert together(model, handle.share_prefixes(PROMPTS)) == wanted


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (StreamingLLM(), "policy: got 'StreamingLLM', allowed: Dense or TokenSelect"),
        (Landmark(), "policy: got 'Landmark', allowed: Dense or TokenSelect"),
        (selecting(dense_prefill=False), "dense_prefill: got False, allowed: True"),
        (selecting(similarity_threshold=0.9), "similarity_threshold: got 0.9, allowed: None"),
        (selecting(positions="compact"), "positions: got 'compact', allowed: 'original'"),
        (selecting(scope="layer"), "scope: got 'layer', allowed: 'kv_head'"),
        (selecting(pool_width=3), "pool_width: got 3, allowed: 1"),
    ],
)
def test_policies_without_a_list_for_a_group(policy: Any, message: str) -> None:
    model = hf_models.model("llama")
    with attach(model, policy) as handle, pytest.raises(ValueError, match=re.escape(message)):
        handle.share_prefixes(PROMPTS)


def test_another_policy_on_a_cache_with_prefixes() -> None:
    model = hf_models.model("llama")
    handle = attach(model, Dense())
    shared = handle.share_prefixes(PROMPTS)
    together(model, shared)
    handle.detach()
    message = "cache layer: got 'a KVSelectPrefixLayer', allowed: a call of an attached model"
    with pytest.raises(ValueError, match=message):
        together(model, shared)
    with pytest.raises(ValueError, match="handle: got 'a detached model'"):
        handle.share_prefixes(PROMPTS)
    shared.past_key_values.crop(-shared.past_key_values.layers[0].num_own_tokens)
    with (
        attach(model, Landmark()),
        pytest.raises(ValueError, match="policy: got 'Landmark'"),
    ):
        together(model, shared)
    with attach(model, hf_models.wide("compact")), pytest.raises(ValueError, match="got 'compact'"):
        together(model, shared)
    with attach(model, Dense()) as handle, handle.stock():  # noqa: SIM117
        with pytest.raises(ValueError, match=message):
            together(model, shared)


def test_models_and_audits_that_cannot() -> None:
    sliding = hf_models.model("qwen2_mixed")
    refused = pytest.raises(ValueError, match=r"layers of Qwen2ForCausalLM: got \['1: Dynamic")
    with attach(sliding, Dense()) as handle, refused:
        handle.share_prefixes(PROMPTS)
    model = hf_models.model("llama")
    refused = pytest.raises(ValueError, match="audit_every: got 'an int', allowed: None")
    with attach(model, selecting(), audit_every=2) as handle, refused:
        handle.share_prefixes(PROMPTS)


def test_prompts_and_plans_that_do_not_fit() -> None:
    model = hf_models.model("llama")
    one = PrefixPlan((PrefixGroup((0, 1), 5),), 0, 0)
    with attach(model, Dense()) as handle:
        for prompts, plan, error, message in (
            ([], None, ValueError, r"prompts: got \[\]"),
            ([[1], []], None, ValueError, r"prompts\[1\]: got \[\]"),
            (["text"], None, TypeError, r"prompts\[0\]: got str 'text'"),
            ([[1.5]], None, TypeError, r"prompts\[0\]: got float 1.5"),
            (None, None, TypeError, "prompts: got NoneType None, allowed: a sequence of prompts"),
            (
                [[1], [4, 500]],
                None,
                ValueError,
                r"prompts\[1\]: got 'token 500', allowed: ids",
            ),
            ([[-1, 4]], None, ValueError, r"prompts\[0\]: got 'token -1', allowed: ids in 0"),
            ([torch.zeros(2, 3).long()], None, ValueError, r"prompts\[0\]: got 'torch.int64"),
            (PROMPTS[:2], [(0, 1)], TypeError, "plan: got"),
            (PROMPTS[:3], one, ValueError, r"plan: got 'prompts \[0, 1\]'"),
            (PROMPTS[:2], one, ValueError, "plan: got 'a shared prefix of 5 tokens for prompt 1'"),
            (
                [[3, 4], [3, 4]],
                PrefixPlan((PrefixGroup((0, 1), 2),), 4, 2),
                ValueError,
                "plan: got",
            ),
        ):
            with pytest.raises(error, match=message):
                handle.share_prefixes(prompts, plan=plan)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="known: got"):
            handle.share_prefixes(PROMPTS, known=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="pad_token_id: got 500, allowed: an int in 0"):
            handle.share_prefixes(PROMPTS, pad_token_id=500)
        with pytest.raises(ValueError, match="pad_token_id: got -1"):
            handle.share_prefixes(PROMPTS, pad_token_id=-1)


def test_masks_and_positions_that_do_not_fit() -> None:
    model = hf_models.model("llama")
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes(PROMPTS)
        cache, ids, mask = shared.past_key_values, shared.input_ids[:, 90:], shared.attention_mask
        positions = (mask.cumsum(-1) - 1)[:, 90:]

        def call(**changes: Any) -> None:
            given = {"attention_mask": mask, "position_ids": positions} | changes
            model(ids, past_key_values=cache, **given)

        cut, longer, holes = mask.clone(), mask.clone(), mask.clone()
        cut[0, 3], longer[1, 0], holes[2, 95] = 0, 1, 0
        shifted = (holes.cumsum(-1) - 1)[:, 90:]
        for changes, message in (
            ({"attention_mask": None}, "attention_mask: got None, allowed: the mask that share"),
            ({"attention_mask": cut}, "attention_mask: got 'one that cuts or lengthens a shared"),
            ({"attention_mask": longer}, "attention_mask: got 'one that cuts or lengthens"),
            ({"attention_mask": mask[:, None, None]}, "attention_mask: got 'a Tensor'"),
            ({"position_ids": None}, "position_ids: got None, allowed: positions that count"),
            (
                {"attention_mask": mask[:, 1:]},
                f"columns of attention_mask: got {mask.shape[1] - 1}",
            ),
            ({"position_ids": positions + 1}, "position_ids: got 'others'"),
            ({"attention_mask": holes, "position_ids": shifted}, "got 'holes in the padding"),
        ):
            with pytest.raises(ValueError, match=message):
                call(**changes)
            assert cache.layers[0].num_own_tokens == 0
        with pytest.raises(ValueError, match=r"cache layer: got 'reset\(\)', allowed: crop"):
            cache.reset()
        with pytest.raises(ValueError, match="offloading: got True"):
            cache.layers[0].offload()
        call()


def test_a_mapping_and_a_sight() -> None:
    model = hf_models.model("llama")
    with attach(model, Dense()) as handle:
        shared = handle.share_prefixes([torch.tensor(prompt) for prompt in PROMPTS], pad_token_id=1)
    assert list(shared) == ["input_ids", "attention_mask", "past_key_values"] and len(shared) == 3
    with pytest.raises(KeyError):
        shared["plan"]
    assert "6 prompts, 2 shared prefixes" in repr(shared)
    assert "prefixes=2, rows=6, tokens=90" in repr(shared.past_key_values.layers[0])
    for row, prompt in zip(zip(shared.input_ids, shared.attention_mask), PROMPTS):
        ids, mask = row
        assert ids[mask.bool()].tolist() == prompt and (ids[~mask.bool()] == 1).all()


def test_the_example_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    begin = text.index("## Shared prefix")
    section = text[begin : text.index("\n## ", begin)]
    (example,) = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    model = hf_models.model("llama")
    scope: dict[str, Any] = {"model": model, "prompts": PROMPTS}
    exec(compile(example, str(PAGE), "exec"), scope)
    assert scope["answers"].tolist() == alone(model)
    assert "a decode step reads" in capsys.readouterr().out
