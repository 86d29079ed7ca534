"""Quest: pages by an upper bound of their logits, the last page always, decode only."""

from __future__ import annotations

from typing import Any

import hf_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import StaticCache

from kvselect import (
    InfLLM,
    KVCache,
    Landmark,
    Policy,
    Quest,
    attach,
    decode_step,
    prefill,
    recovered_mass,
    reference,
)
from kvselect.block_scores import block_logits, signed_parts, soft_votes
from kvselect.block_statistics import BlockStatistics
from kvselect.fixed_cache import FixedKVCache
from kvselect.selection import select_tokens
from kvselect.testing import make_qkv, rel_err

DIM, HEADS = 32, 2


def filled(
    seqlens: tuple[int, ...],
    group: int = 2,
    starts: list[int] | None = None,
    seqlen_q: int = 1,
    dim: int = DIM,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, KVCache]:
    batch = len(seqlens)
    q, k, v = make_qkv(
        batch, seqlen_q, max(seqlens), group * HEADS, HEADS, dim, seed=5, dtype=dtype
    )
    cache = KVCache(batch, HEADS, dim, sketch=None, dtype=dtype)
    if starts is not None:
        cache.set_starts(starts)
    cache.append(k, v, list(seqlens))
    return q, cache


def listed(info: Any, row: int, head: int) -> list[int]:
    selection = info.selection
    positions: list[int] = selection.indices[row, head].tolist()
    count = int(selection.topk_length[row, head])
    assert all(position == -1 for position in positions[count:])
    return positions[:count]


def expected(q: Tensor, cache: KVCache, policy: Quest, row: int, head: int) -> list[int]:
    """The list of a decode step by the float64 reference."""
    group = q.shape[2] // HEADS
    pages = reference.blocks_of_row(cache, row, policy.page_size)  # type: ignore[arg-type]
    own = q[row, -1, head * group : (head + 1) * group]
    sizes = policy.page_size, policy.num_pages
    chosen = reference.quest_pages(own, cache, row, head, *sizes, cache.head_dim**-0.5)  # type: ignore[arg-type]
    tokens = [position for page in chosen for position in pages[page]]
    finite = cache.k[row, :, head].isfinite().all(-1)
    return [position for position in tokens if finite[position]]


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    group=st.sampled_from([1, 4, 7]),
    size=st.sampled_from([1, 5, 16]),
    spread=st.floats(0.01, 30.0),
)
def test_the_bound_is_at_least_every_logit_of_the_page(
    seed: int, group: int, size: int, spread: float
) -> None:
    q, k, v = make_qkv(1, 1, 70, group * HEADS, HEADS, DIM, seed=seed)
    cache, pages = KVCache(1, HEADS, DIM, sketch=None), BlockStatistics(size, ("min_max",))
    cache.append(spread * k, v)
    pages.follow(cache)
    count = -(-70 // size)
    bounds = block_logits(signed_parts(q), pages.min_max[:, :, :count], DIM**-0.5)[0, :, 0].double()
    keys = cache.k[0].double().transpose(0, 1)  # [heads, tokens, dim]
    logits = q[0, 0].double().view(HEADS, group, DIM) @ keys.mT * DIM**-0.5
    of_token = bounds.repeat_interleave(size, -1)[..., :70]
    slack = 1e-5 * logits.abs().amax()
    assert (of_token + slack >= logits).all()
    for page, block in enumerate(reference.blocks_of_row(cache, 0, size)):  # type: ignore[arg-type]
        own = reference.finite_keys(cache, 0, 1, block)  # type: ignore[arg-type]
        exact = reference.page_bound(q[0, 0, group], own, DIM**-0.5)
        assert bounds[1, 0, page].item() == pytest.approx(exact, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode(group: int, dtype: Any) -> None:
    policy = Quest(token_budget=80)
    q, cache = filled((300, 289, 97, 288), group, [0, 13, 0, 0], dtype=dtype)
    state = policy.new_state(cache)
    out, info = decode_step(q, cache, policy, state)
    for row in range(4):
        for head in range(HEADS):
            assert listed(info, row, head) == expected(q, cache, policy, row, head)
    bound = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}[dtype]
    assert rel_err(out, reference.sparse_attention(q, cache, info.selection)[0]) <= bound
    assert info.kept_mass is None
    assert (recovered_mass(q, cache, info.selection) > 0).all()


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 79, 80, 81, 95, 96, 97])
def test_budget_at_least_the_length_is_dense(group: int, seqlen: int) -> None:
    q, cache = filled((seqlen, max(seqlen - 7, 1)), group)
    for budget, through_lists in ((96, False), (112, True)):
        policy = Quest(token_budget=budget)
        if through_lists:  # a long row beside them: short rows go through lists of everything
            q, cache = filled((seqlen, 400, max(seqlen - 7, 1)), group)
        out, info = decode_step(q, cache, policy, policy.new_state(cache))
        dense = reference.sparse_attention(q, cache)[0]
        assert (info.selection is None) == (not through_lists and seqlen <= 96)
        rows = [0, 2] if through_lists else [0, 1]
        if info.selection is not None and not through_lists:
            continue
        assert rel_err(out[rows], dense[rows]) <= 2e-6


def test_prefill_is_dense_and_a_draft_is_its_steps() -> None:
    policy = Quest(token_budget=64)
    q, cache = filled((200, 177), seqlen_q=200)
    out, _ = prefill(q, cache, policy, policy.new_state(cache))
    assert rel_err(out, reference.sparse_attention(q, cache)[0]) <= 2e-6

    state = policy.new_state(cache)
    draft, _ = prefill(q[:, -9:].contiguous(), cache, policy, state)
    for back in range(9):
        shorter = KVCache(2, HEADS, DIM, sketch=None)
        shorter.append(cache.k, cache.v, [200 - back, 177 - back])
        token = q[:, 199 - back : 200 - back].contiguous()
        one, _ = decode_step(token, shorter, policy, policy.new_state(shorter))
        assert torch.equal(one[:, 0], draft[:, 8 - back])


def test_batched_equals_one_by_one_and_twice_the_same_bits() -> None:
    policy = Quest(token_budget=64)
    q, cache = filled((300, 211), starts=[0, 20])
    out, info = decode_step(q, cache, policy, policy.new_state(cache))
    again, _ = decode_step(q, cache, policy, policy.new_state(cache))
    assert torch.equal(out, again)
    for row, (start, end) in enumerate([(0, 300), (20, 211)]):
        alone = KVCache(1, HEADS, DIM, sketch=None)
        alone.append(cache.k[row : row + 1, start:end], cache.v[row : row + 1, start:end])
        one, one_info = decode_step(q[row : row + 1], alone, policy, policy.new_state(alone))
        for head in range(HEADS):
            positions = [position - start for position in listed(info, row, head)]
            assert positions == listed(one_info, 0, head)
        assert torch.equal(one[0], out[row])


def test_steps_follow_the_cache() -> None:
    """Appends, a crop into a page and a new order of rows leave what a new state would find."""
    policy = Quest(token_budget=64)
    q, cache = filled((300, 280))
    state = policy.new_state(cache)
    generator = torch.Generator().manual_seed(1)
    for step in range(24):
        if step == 8:
            cache.crop(5)
        if step == 16:
            cache.reorder([1, 0])
        k, v = torch.randn((2, 2, 1, HEADS, DIM), generator=generator)
        cache.append(k, v)
        out, info = decode_step(q, cache, policy, state)
        fresh, fresh_info = decode_step(q, cache, policy, policy.new_state(cache))
        assert torch.equal(info.selection.indices, fresh_info.selection.indices)
        assert torch.equal(out, fresh)


def test_keys_that_are_not_finite_are_never_listed() -> None:
    policy = Quest(token_budget=128)
    q, cache = filled((300,))
    clean = decode_step(q, cache, policy, policy.new_state(cache))[1]
    poisoned = KVCache(1, HEADS, DIM, sketch=None)
    k = cache.k.clone()
    hit = listed(clean, 0, 0)[20]
    k[0, hit, 0, 3] = torch.nan
    k[0, 297, 1] = torch.inf
    k[0, 16:32, 1] = torch.nan
    poisoned.append(k, cache.v)
    out, info = decode_step(q, poisoned, policy, policy.new_state(poisoned))
    assert hit not in listed(info, 0, 0) and len(listed(info, 0, 0)) >= 100
    assert 297 not in listed(info, 0, 1) and 299 in listed(info, 0, 1)
    assert not set(range(16, 32)) & set(listed(info, 0, 1))
    assert out.isfinite().all()
    for head in range(HEADS):
        assert listed(info, 0, head) == expected(q, poisoned, policy, 0, head)


def test_equal_pages_are_taken_from_the_front() -> None:
    q, cache = filled((300,))
    same = KVCache(1, HEADS, DIM, sketch=None)
    same.append(torch.ones_like(cache.k), cache.v)
    policy = Quest(token_budget=64)
    info = decode_step(q, same, policy, policy.new_state(same))[1]
    assert listed(info, 0, 0) == [*range(48), *range(288, 300)]


@pytest.mark.parametrize("dim", [80, 96, 128])
def test_heads_whose_bounds_no_scan_takes_are_scored_alike(dim: int) -> None:
    """The scan takes tables of twice these widths; torch takes any: the same votes."""
    q, cache = filled((300, 200), dim=dim)
    pages = BlockStatistics(16, ("min_max",))
    pages.follow(cache)
    visible, parts = torch.tensor([[18], [12]], dtype=torch.int32), signed_parts(q)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    for options in ({}, {"softcap": 5.0}, {"sink_logits": sinks}):
        votes = soft_votes(parts, pages.min_max, visible, 19, scale=0.1, **options)  # type: ignore[arg-type]
        wide = torch.nn.functional.pad(parts, (0, 7))  # a width that no kernel has
        table = torch.nn.functional.pad(pages.min_max, (0, 7))
        other = soft_votes(wide, table, visible, 19, scale=0.1, **options)  # type: ignore[arg-type]
        assert rel_err(other, votes) <= 1e-5  # of exponentials of sums in another order
        assert not votes[1, 0, :, 12:].any()


@pytest.mark.parametrize("width", [128, 135], ids=["scan", "torch"])
def test_bounds_are_read_by_pages(width: int) -> None:
    """The same bits as of a gathered table; pages that are nobody's hold NaN."""
    generator = torch.Generator().manual_seed(0)
    in_pages = torch.randn(9, HEADS, 8, width, generator=generator)
    in_pages[0] = torch.nan
    rows = torch.tensor([[3, 8, 1], [5, -1, -1]], dtype=torch.int32)
    q = torch.randn(2, 2, 2 * HEADS, width, generator=generator)
    visible = torch.tensor([[19, 20], [7, 8]], dtype=torch.int32)
    table = torch.zeros(2, HEADS, 24, width)
    for row, pages in enumerate(((3, 8, 1), (5,))):
        for place, page in enumerate(pages):
            table[row, :, 8 * place : 8 * place + 8] = in_pages[page]
    wanted = soft_votes(q, table, visible, 20, scale=0.1)
    votes = soft_votes(q, in_pages, visible, 20, scale=0.1, block_table=rows)
    assert torch.equal(votes, wanted) and votes.isfinite().all()


def test_on_a_wide_head_by_torch() -> None:
    policy = Quest(token_budget=64)
    q, cache = filled((300,), dim=160)
    info = decode_step(q, cache, policy, policy.new_state(cache))[1]
    for head in range(HEADS):
        assert listed(info, 0, head) == expected(q, cache, policy, 0, head)


def test_kept_mass_grows_with_the_budget_and_token_selection_keeps_more() -> None:
    """At equal tokens, one by one beats whole pages of random keys (METHODS.md 3.3)."""
    q, cache = filled((2048,))
    masses = []
    for budget in (64, 128, 256, 512, 1024):
        policy = Quest(token_budget=budget)
        selection = decode_step(q, cache, policy, policy.new_state(cache))[1].selection
        assert selection is not None
        masses.append(float(recovered_mass(q, cache, selection).mean()))
        scores = reference.score_tokens(q, cache).float()  # type: ignore[arg-type]
        best = select_tokens(scores, cache.cache_seqlens, topk=budget - 16, num_recent_tokens=16)
        assert float(recovered_mass(q, cache, best).mean()) > masses[-1]
    assert masses == sorted(masses) and masses[-1] > 0.6


def test_a_cache_whose_lengths_no_host_knows() -> None:
    policy = Quest(token_budget=64)
    q, cache = filled((290, 240))
    fixed = FixedKVCache(2, HEADS, DIM, capacity=320, sketch=None)
    fixed.append(cache.k, cache.v, cache.cache_seqlens.clone())
    state, plain = policy.new_state(fixed), policy.new_state(cache)
    assert policy.prepare_capture(state, fixed, 4, None)
    assert not policy.prepare_capture(state, fixed, 4, None)
    with fixed.known_lengths():
        policy.update(state, fixed)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        k, v = torch.randn((2, 2, 1, HEADS, DIM), generator=generator)
        cache.append(k, v)
        fixed.append(k, v)
        out, info = decode_step(q, fixed, policy, state)
        expect, expect_info = decode_step(q, cache, policy, plain)
        for row in range(2):
            for head in range(HEADS):
                assert listed(info, row, head) == listed(expect_info, row, head)
        assert rel_err(out, expect) <= 2e-6


def test_through_attach() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 120)
    settings_: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with attach(model, Quest(token_budget=48, dense_layers=(0,))) as handle:
        model.generate(ids, **settings_)
        static = {"cache_implementation": "static", "disable_compile": True}
        short = model.generate(ids, **settings_, **static)
        dynamic = model.generate(ids, **settings_)
        assert torch.equal(short, dynamic)
        report = handle.report().to_dict()
        assert handle.verify(prompt_tokens=40, decode_tokens=4).logit_error.keys() == {"dense"}
    layers = report["layers"]
    assert layers[0]["decode"]["num_calls"] == 0
    counts = layers[1]["decode"]
    assert counts["num_calls"] == 3 * 7 and counts["num_dense_calls"] == 0
    assert counts["tokens_attended"] <= 48 * 2 * 3 * 7 < counts["tokens_visible"]


@pytest.mark.parametrize(
    "policy",
    [
        Quest(token_budget=48, dense_layers=()),
        Landmark(topk_blocks=3, block_size=16, num_recent_tokens=32, q_block_size=16),
        InfLLM(
            topk_blocks=2,
            block_size=16,
            num_sink_tokens=4,
            num_recent_tokens=24,
            positions="original",
        ),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_captured_steps(policy: Policy) -> None:
    """All block policies: a graph of a step without a break gives what eager steps give."""
    model = hf_models.build(hf_models.config("llama", num_hidden_layers=1))
    ids = hf_models.tokens(1, 100)
    with attach(model, policy) as handle, torch.no_grad():
        run = torch.compile(model, backend="eager", fullgraph=True)
        for capacity in (140, 150):  # at the second one the compiler takes sizes for variables
            caches = [StaticCache(config=model.config, max_cache_len=capacity) for _ in range(2)]
            for cache in caches:
                model(ids[:, :90], past_key_values=cache)
            for at in range(90, 96):
                token = ids[:, at : at + 1]
                found = run(token, past_key_values=caches[0]).logits
                assert torch.equal(found, model(token, past_key_values=caches[1]).logits)
        decode = handle.report().to_dict()["layers"][0]["decode"]
        assert decode["num_calls"] == 24 and decode["num_dense_calls"] == 0
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_budget": -5}, ValueError, "token_budget: got -5, allowed: an int >= 1"),
        ({"token_budget": 1e3}, TypeError, "token_budget: got float 1000.0"),
        ({"page_size": 0}, ValueError, "page_size: got 0, allowed: an int >= 1"),
        ({"dense_layers": [0]}, TypeError, "dense_layers: got list"),
        ({"dense_layers": (-1,)}, ValueError, "dense_layers: got -1"),
    ],
)
def test_every_bound_is_checked(change: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Quest(**change)


def test_at_least_three_pages() -> None:
    assert Quest(token_budget=1).num_pages == 3 and Quest(token_budget=1).capacity == 48
    assert Quest(token_budget=2048).num_pages == 128 and Quest().dense_layers == (0, 1)
