"""Evictions: what they keep, that the rest is gone, that nothing else changes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvselect import (
    ColumnRank,
    Coverage,
    KVCache,
    MaxMin,
    Rope,
    Selection,
    SnapKV,
    decode_step,
    prefill,
    recovered_mass,
    reference,
)
from kvselect.evictable_cache import EvictableKVCache
from kvselect.policies.coverage import greedy_cover
from kvselect.policies.eviction import EvictionPolicy
from kvselect.policies.max_min import far_apart
from kvselect.reference import eviction as plain
from kvselect.testing import TOLERANCE, make_qkv, rel_err

DIM, HEADS = 32, 2
POLICIES: list[type[Any]] = [SnapKV, MaxMin, Coverage, ColumnRank]


class Run:
    """A prefill and decode steps of an eviction, beside a cache that keeps everything."""

    def __init__(
        self,
        policy: EvictionPolicy,
        seqlens: tuple[int, ...] = (120, 90),
        *,
        group: int = 2,
        starts: list[int] | None = None,
        dtype: torch.dtype = torch.float32,
        rope: Rope | None = None,
        seed: int = 0,
    ) -> None:
        batch, longest = len(seqlens), max(seqlens)
        self.policy, self.rope, self.group = policy, rope, group
        self.q, self.new_k, self.new_v = make_qkv(
            batch, longest, longest, group * HEADS, HEADS, DIM, dtype=dtype, seed=seed
        )
        self.cache = EvictableKVCache(batch, HEADS, DIM, dtype=dtype)
        self.whole = KVCache(batch, HEADS, DIM, dtype=dtype, sketch=None)
        for cache in (self.cache, self.whole):
            if starts is not None:
                cache.set_starts(starts)
            cache.append(self.new_k, self.new_v, list(seqlens))
        self.state = policy.new_state(self.cache)
        self.seqlens, self.seed = seqlens, seed
        self.out = prefill(self.q, self.cache, policy, self.state)[0]

    def append(self, count: int = 1) -> Tensor:
        self.seed += 1
        batch = self.cache.batch
        sizes = (self.group * HEADS, HEADS, DIM)
        q, k, v = make_qkv(batch, count, count, *sizes, dtype=self.cache.dtype, seed=self.seed)
        self.cache.append(k, v)
        self.whole.append(k, v)
        return q

    def step(self, **options: Any) -> tuple[Tensor, Tensor]:
        """A decode step: its query, its output."""
        q = self.append()
        out, info = decode_step(q, self.cache, self.policy, self.state, rope=self.rope, **options)
        assert info.selection is not None  # the positions of what is attended to
        assert torch.equal(info.selection.topk_length, self.kept().topk_length)
        width = info.selection.indices.shape[2]
        assert torch.equal(info.selection.indices, self.kept().indices[..., :width])
        return q, out

    def kept(self) -> Selection:
        """What remains, found by the keys, as lists over the whole rows."""
        rows = self.cache.rows
        assert rows is not None
        lists = torch.full((self.cache.batch, HEADS, self.whole.max_seqlen), -1, dtype=torch.int32)
        for row in range(self.cache.batch):
            for head in range(HEADS):
                at = row * HEADS + head
                keys = rows.k[at, : rows.lengths[at], 0]
                same = (self.whole.k[row, :, head, None] == keys).all(-1)  # [tokens, kept]
                same[self.whole.lengths[row] :] = False
                found = same.any(1).nonzero()[:, 0]
                assert len(found) == rows.lengths[at]
                assert torch.equal(rows.v[at, : len(found), 0], self.whole.v[row, found, head])
                lists[row, head, : len(found)] = found.int()
        return Selection(lists, rows.cache_seqlens.view(self.cache.batch, HEADS).clone())


def small(kind: type[Any], **changes: Any) -> Any:
    options: dict[str, Any] = {
        "topk": 20,
        "num_sink_tokens": 3,
        "num_recent_tokens": 9,
        "num_window_queries": 8,
    }
    return kind(**(options | changes))


# ---- all of them


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_a_budget_for_everything_is_dense(kind: type[Any], group: int) -> None:
    run = Run(small(kind, topk=200), group=group, starts=[0, 4])
    assert rel_err(run.out, reference.sparse_attention(run.q, run.whole)[0]) <= 3e-6
    for _ in range(3):
        q, out = run.step()
        assert rel_err(out, reference.sparse_attention(q, run.whole)[0]) <= 2e-6
    assert run.cache.rows is not None


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("seqlen_q", [1, 6])
def test_next_call_drops_before_the_question_is_read(kind: type[Any], seqlen_q: int) -> None:
    kept = []
    for seed in (0, 5):  # of the question
        run = Run(small(kind, evict_at="next_call"), starts=[0, 4])
        assert run.cache.rows is None
        run.seed = seed
        q = run.append(seqlen_q)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = prefill(q, run.cache, run.policy, run.state)[0]
        found = run.kept()
        assert found.topk_length.tolist() == [[32 + seqlen_q] * HEADS] * 2
        for row, length in enumerate(run.seqlens):
            listed = found.indices[row, :, : 32 + seqlen_q]
            # The question, and the recent tokens of the prompt.
            expected = torch.arange(length - 9, length + seqlen_q, dtype=torch.int32)
            assert torch.equal(listed[:, -9 - seqlen_q :], expected.expand(HEADS, -1))
        kept.append(found.indices[..., :32])
        for j in range(seqlen_q):  # causal: query j sees what is kept, and the question up to it
            later = seqlen_q - 1 - j
            seen = Selection(
                found.indices[..., : 32 + j + 1].contiguous(), found.topk_length - later
            )
            one = reference.sparse_attention(q[:, j : j + 1], run.whole, seen)[0]
            assert rel_err(out[:, j : j + 1], one) <= 2e-6
        q, out = run.step()
        assert rel_err(out, reference.sparse_attention(q, run.whole, run.kept())[0]) <= 2e-6
        run.cache.crop(seqlen_q + 1)  # another question may be asked
        assert run.cache.num_real_tokens == (120, 86)
        run.whole.crop(seqlen_q + 1)
        q = run.append(2)
        prefill(q, run.cache, run.policy, run.state)
        assert torch.equal(run.kept().indices[..., :32], kept[-1])
    assert torch.equal(*kept)


@pytest.mark.parametrize("kind", POLICIES)
def test_next_call_at_full_budget_is_dense(kind: type[Any]) -> None:
    run = Run(small(kind, topk=200, evict_at="next_call"))
    q = run.append(5)
    out = prefill(q, run.cache, run.policy, run.state)[0]
    assert run.cache.rows is not None
    assert rel_err(out, reference.sparse_attention(q, run.whole)[0]) <= 2e-6


def test_no_more_can_be_cropped_than_every_head_has() -> None:
    """A state that never saw the prompt protects the recent tokens, the newest among them."""
    run = Run(small(SnapKV))
    run.state = run.policy.new_state(run.cache)
    run.step()
    with pytest.raises(
        ValueError, match=r"num_tokens: got 10, allowed: 0\.\.9 \(tokens at the end"
    ):
        run.cache.crop(10)
    run.cache.crop(9)


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_attended_exactly(kind: type[Any], dtype: torch.dtype) -> None:
    run = Run(small(kind), starts=[0, 4], dtype=dtype)
    before = run.cache.nbytes
    for number in range(12):
        q, out = run.step()
        kept = run.kept()
        assert kept.topk_length.tolist() == [[33 + number] * HEADS] * 2
        for row, (start, length) in enumerate(zip((0, 4), run.seqlens)):
            for head in range(HEADS):
                listed = kept.indices[row, head, : 33 + number].tolist()
                new = range(run.whole.lengths[row] - number - 1, run.whole.lengths[row])
                tail = [*range(length - 9, length), *new]
                assert (
                    listed[:3] == [start, start + 1, start + 2] and listed[-10 - number :] == tail
                )
        wanted = reference.sparse_attention(q, run.whole, kept)[0]
        assert rel_err(out, wanted) <= TOLERANCE[dtype]
    assert run.cache.nbytes < 0.5 * before  # 33 of 120 and 90 tokens, and room for an eighth
    assert run.cache.k.isnan().all() and run.cache.k.untyped_storage().nbytes() <= 4
    assert run.cache.lengths == run.whole.lengths
    counts = run.state.decode.to_dict()
    assert counts["tokens_attended"] == sum(4 * (33 + i) for i in range(12))
    assert counts["tokens_visible"] == sum(2 * (121 + 87 + 2 * i) for i in range(12))


@pytest.mark.parametrize("kind", POLICIES)
def test_each_row_is_evicted_by_itself(kind: type[Any]) -> None:
    both, one = Run(small(kind)), Run(small(kind), (120,))
    one.cache.reset()
    one.whole.reset()
    for cache in (one.cache, one.whole):
        cache.append(both.new_k[:1], both.new_v[:1])
    one.state = one.policy.new_state(one.cache)
    prefill(both.q[:1], one.cache, one.policy, one.state)
    both.step()
    q, k, v = make_qkv(1, 1, 1, 2 * HEADS, HEADS, DIM, seed=50)
    one.cache.append(k, v)
    one.whole.append(k, v)
    decode_step(q, one.cache, one.policy, one.state)
    for head in range(HEADS):
        alone, together = one.kept().indices[0, head], both.kept().indices[0, head]
        assert alone[:32].tolist() == together[:32].tolist()


@pytest.mark.parametrize("kind", POLICIES)
def test_a_span_protects_what_is_outside(kind: type[Any]) -> None:
    run = Run(small(kind, span=(40, 80), ratio=0.25), (120,), starts=None)
    run.step()
    kept = run.kept()
    for head in range(HEADS):
        listed = set(kept.indices[0, head, : int(kept.topk_length[0, head])].tolist())
        assert {*range(40), *range(80, 121)} <= listed and len(listed) == 81 + 10


@pytest.mark.parametrize("kind", POLICIES)
def test_prefill_in_chunks_changes_nothing(kind: type[Any]) -> None:
    whole, parts = Run(small(kind), (120,)), Run(small(kind), (120,))
    parts.cache.reset()
    parts.state = parts.policy.new_state(parts.cache)
    for begin, end in ((0, 70), (70, 115), (115, 120)):
        parts.cache.append(parts.new_k[:, begin:end], parts.new_v[:, begin:end])
        prefill(parts.q[:, begin:end], parts.cache, parts.policy, parts.state)
    whole.step()
    parts.cache.append(*make_qkv(1, 1, 1, 4, HEADS, DIM, seed=1)[1:])
    decode_step(parts.q[:, -1:], parts.cache, parts.policy, parts.state)
    assert whole.cache.rows is not None and parts.cache.rows is not None
    assert torch.equal(whole.cache.rows.k, parts.cache.rows.k)


@pytest.mark.parametrize("kind", POLICIES)
def test_equal_keys_are_kept_once_each(kind: type[Any]) -> None:
    """All keys alike: as many tokens as the budget says, and the same ones every time."""
    policy = small(kind)
    cache = EvictableKVCache(1, HEADS, DIM)
    k, v = torch.ones(1, 60, HEADS, DIM), torch.randn(1, 60, HEADS, DIM)
    lengths = set()
    for _ in range(2):
        cache.reset()
        cache.append(k, v)
        state = policy.new_state(cache)
        prefill(torch.ones(1, 60, 4, DIM), cache, policy, state)
        cache.append(k[:, :1], v[:, :1])
        decode_step(torch.ones(1, 1, 4, DIM), cache, policy, state)
        assert cache.rows is not None
        lengths.add((cache.rows.lengths, float(cache.rows.v.sum())))
    assert len(lengths) == 1 and lengths.pop()[0] == (33, 33)


def test_a_second_question_is_warned_of_once() -> None:
    run = Run(small(SnapKV))
    run.step()
    for expected in (1, 0):
        q = run.append(5)
        kept = run.kept()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out, lse = prefill(q, run.cache, run.policy, run.state)
        assert len(caught) == expected
        wanted, wanted_lse = reference.sparse_attention(q, run.whole, kept)
        assert rel_err(out, wanted) <= 3e-6 and rel_err(lse, wanted_lse) <= 2e-6
    assert "SnapKV dropped tokens before this prompt came" not in str(caught)
    assert not SnapKV.revocable and not MaxMin.query_aware and SnapKV.query_aware


def test_options_of_the_softmax() -> None:
    run = Run(small(SnapKV), group=4)
    options: dict[str, Any] = {
        "sink_logits": torch.linspace(-1, 2, 8),
        "softcap": 6.0,
        "softmax_scale": 0.3,
    }
    q, out = run.step(**options)
    wanted = reference.sparse_attention(q, run.whole, run.kept(), **options)[0]
    assert rel_err(out, wanted) <= 3e-6


# ---- the cache


def test_crop_reorder_and_reset() -> None:
    run = Run(small(SnapKV))
    run.step()
    run.append(2)
    for cache in (run.cache, run.whole):
        cache.crop(10)  # the three that came since, and seven of nine recent ones
    kept = run.kept()
    with pytest.raises(ValueError, match=r"num_tokens: got 3, allowed: 0..2 \(tokens at the end"):
        run.cache.crop(3)
    for cache in (run.cache, run.whole):
        cache.reorder([1, 1, 0])
    assert run.kept().topk_length.tolist() == kept.topk_length[[1, 1, 0]].tolist()
    assert run.cache.lengths == run.whole.lengths
    assert torch.equal(run.cache.cache_seqlens, run.whole.cache_seqlens)
    with pytest.raises(ValueError, match="index: got"):
        run.cache.reorder([3])
    for selection in (run.cache.listed(), run.kept()):
        width = run.cache.listed().indices.shape[2]
        assert torch.equal(selection.indices[..., :width], run.kept().indices[..., :width])
    run.cache.reset()
    assert run.cache.rows is None and run.cache.max_seqlen == 0
    with pytest.raises(ValueError, match="cache: got 'all tokens', allowed: a cache that dropped"):
        run.cache.listed()


def test_what_the_cache_refuses() -> None:
    run = Run(small(SnapKV), starts=[0, 4])
    run.step()
    with pytest.raises(ValueError, match="k_pages, v_pages: got 'dropped tokens'"):
        _ = run.cache.k_pages
    with pytest.raises(ValueError, match="k_pages, v_pages: got"):
        recovered_mass(run.q[:, :1], run.cache, run.kept())
    with pytest.raises(ValueError, match="cache: got 'tokens dropped before'"):
        run.cache.evict(run.kept().indices, run.kept().topk_length, 1)
    with pytest.raises(ValueError, match=r"starts: got \[0, 5\], allowed: \[0, 4\]"):
        run.cache.set_starts([0, 5])
    run.cache.set_starts([0, 4])
    with pytest.raises(ValueError, match="seqlens: got"):
        run.cache.append(run.new_k[:, :1], run.new_v[:, :1], [1])
    with pytest.raises(ValueError, match="selection: got 'lists'"):
        from kvselect import sparse_attention

        sparse_attention(run.q[:, :1], run.cache, run.kept())
    plain_cache = KVCache(1, HEADS, DIM, sketch=None)
    plain_cache.append(run.new_k[:1], run.new_v[:1])
    policy = small(SnapKV)
    with pytest.raises(ValueError, match=r"cache: got 'KVCache', allowed: a kvselect.evictable_"):
        decode_step(run.q[:1, :1], plain_cache, policy, policy.new_state(plain_cache))


def test_nonfinite_tokens_are_counted_once() -> None:
    policy = small(SnapKV)
    cache = EvictableKVCache(1, HEADS, DIM)
    q, k, v = make_qkv(1, 60, 60, 4, HEADS, DIM)
    v[0, 0, 1] = torch.inf
    cache.append(k, v)
    state = policy.new_state(cache)
    prefill(q, cache, policy, state)
    v[0, 1] = torch.nan
    cache.append(k[:, 1:2], v[:, 1:2])
    decode_step(q[:, :1], cache, policy, state)
    assert cache.rows is not None and cache.num_nonfinite.tolist() == [[1, 2]]


# ---- what each one keeps


def spans(run: Run, row: int, head: int) -> tuple[Tensor, Tensor]:
    """Weights and keys of the tokens that compete, in float64."""
    start = 0 if run.whole.starts is None else int(run.whole.starts[row])
    length = run.seqlens[row]
    q = run.q[row, -8:, head * run.group : (head + 1) * run.group]
    k = run.whole.k[row, start:length, head]
    weights = plain.window_weights(q, k, DIM**-0.5)
    return weights[:, 3 : length - start - 9], k[3 : length - start - 9]


@pytest.mark.parametrize("pool_width", [1, 5])
def test_snapkv_keeps_what_the_window_looked_at(pool_width: int) -> None:
    run = Run(small(SnapKV, pool_width=pool_width), starts=[0, 4])
    run.step()
    for row, start in enumerate((0, 4)):
        for head in range(HEADS):
            weights, _ = spans(run, row, head)
            scores = plain.pooled(weights.mean(0).tolist(), pool_width)
            wanted = [i + 3 + start for i in plain.best(scores, 20)]
            listed = run.kept().indices[row, head, 3:23].tolist()
            assert len(set(wanted) & set(listed)) >= 19  # pooled neighbours tie in float32


def test_heads_share_a_budget() -> None:
    run = Run(small(SnapKV, budgets="layer", pool_width=1), (120,))
    run.new_k[:, :, 0] *= 3  # a sharp head needs fewer tokens
    for cache in (run.cache, run.whole):
        cache.reset()
        cache.append(run.new_k, run.new_v)
    run.state = run.policy.new_state(run.cache)
    prefill(run.q, run.cache, run.policy, run.state)
    q, out = run.step()
    kept = run.kept()
    first, second = kept.topk_length[0].tolist()
    assert first != second and first + second == 2 * 33
    assert rel_err(out, reference.sparse_attention(q, run.whole, kept)[0]) <= 3e-6
    assert run.cache.rows is not None
    pages = sum(-(-n // 16) for n in (first, second))
    assert run.cache.nbytes <= (pages + pages // 8 + 1) * 16 * DIM * 4 * 2


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), num_tokens=st.integers(2, 24), copies=st.booleans())
def test_max_min_is_the_references(seed: int, num_tokens: int, copies: bool) -> None:
    keys = torch.randn(2, num_tokens, 8, generator=torch.Generator().manual_seed(seed)).double()
    if copies:
        keys[:, num_tokens // 2 :] = keys[:, : num_tokens - num_tokens // 2]
    unit = torch.nn.functional.normalize(keys, dim=-1)
    budget = max(num_tokens // 2, 1)
    kept, distances = far_apart(unit, budget)
    assert (kept.sum(1) == budget).all()
    assert (distances[:, 1:].diff() <= 1e-12).all()  # from the second pick on, ever nearer
    if not copies:
        for head in range(2):
            wanted = plain.far_apart(keys[head], budget)
            assert kept[head].nonzero()[:, 0].tolist() == sorted(wanted)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), num_tokens=st.integers(2, 12), share=st.floats(0.1, 0.9))
def test_greedy_coverage_is_near_the_best(seed: int, num_tokens: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(6, num_tokens, generator=generator).double().mul(2).softmax(1)
    keys = torch.randn(num_tokens, 8, generator=generator).double()
    policy = Coverage(alpha=0.5)
    rows = policy.rows(weights, torch.nn.functional.normalize(keys, dim=-1))
    assert rel_err(rows, plain.coverage_rows(weights, keys, 0.5, 0.2)) <= 1e-12
    budget = max(round(share * num_tokens), 1)
    picked = greedy_cover(rows, budget)
    assert picked == plain.greedy_cover(rows, budget)
    best = plain.best_cover(rows, budget)
    assert plain.covered(rows, picked) >= (1 - 1 / math.e) * best - 1e-12


def test_keys_are_compared_before_their_rotation() -> None:
    """Keys that differ by their rotation only are one to MaxMin, where it knows the rotation."""
    rope = Rope.from_frequencies(100.0 ** (-torch.arange(DIM // 2) / (DIM // 2)), 256)
    for known in (rope, Rope(rope.cos, rope.sin), None):
        run = Run(small(MaxMin, topk=2), (80,), rope=known)
        run.cache.reset()
        k = torch.randn(1, 2, HEADS, DIM).repeat(1, 40, 1, 1)  # two keys, in turn
        rotated = rope.rotate(k, torch.arange(80)[None])
        run.whole.reset()
        for cache in (run.cache, run.whole):
            cache.append(rotated, run.new_v)
        run.state = run.policy.new_state(run.cache)
        prefill(run.q, run.cache, run.policy, run.state)
        run.step()
        places = run.kept().indices[0, :, 3:5].sum(1) % 2
        if known is not None:
            assert places.tolist() == [1, 1]  # one of either


@pytest.mark.parametrize(
    "kind, changes, error, message",
    [
        (SnapKV, {"topk": -1}, ValueError, "topk: got -1"),
        (SnapKV, {"ratio": 0.0}, ValueError, r"ratio: got 0.0, allowed: None or a float in \(0"),
        (SnapKV, {"span": (5, 3)}, ValueError, r"span: got \(5, 3\), allowed: None or \(begin"),
        (SnapKV, {"span": (5,)}, ValueError, r"span: got \(5,\)"),
        (SnapKV, {"span": 5}, TypeError, "span: got int 5"),
        (SnapKV, {"num_sink_tokens": -1}, ValueError, "num_sink_tokens: got -1"),
        (SnapKV, {"num_recent_tokens": 0}, ValueError, "num_recent_tokens: got 0"),
        (SnapKV, {"num_window_queries": 0}, ValueError, "num_window_queries: got 0"),
        (SnapKV, {"evict_at": "once"}, ValueError, "evict_at: got 'once', allowed: 'decode' or"),
        (SnapKV, {"pool_width": 4}, ValueError, "pool_width: got 4"),
        (SnapKV, {"budgets": "row"}, ValueError, "budgets: got 'row'"),
        (Coverage, {"alpha": -0.5}, ValueError, "alpha: got -0.5"),
        (Coverage, {"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        (MaxMin, {"topk": 1.5}, TypeError, "topk: got float 1.5"),
    ],
)
def test_every_bound_is_checked(
    kind: type[Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(**changes)


def test_the_window_follows_crops_and_new_orders_of_the_rows() -> None:
    policy = small(SnapKV)
    run, plain_run = Run(policy, (120, 120)), Run(policy, (120, 120))
    for cache in (run.cache, run.whole):
        cache.reorder([1, 0])
    new = plain_run.append()
    for cache in (run.cache, run.whole):
        cache.append(*(x[:, -1:].flip(0) for x in (plain_run.whole.k, plain_run.whole.v)))
    decode_step(new, plain_run.cache, policy, plain_run.state)
    decode_step(new.flip(0), run.cache, policy, run.state)
    assert torch.equal(run.kept().indices, plain_run.kept().indices.flip(0))

    # A question is put, taken back, and another is put that is shorter than the window.
    asked, fresh = EvictableKVCache(2, HEADS, DIM), EvictableKVCache(2, HEADS, DIM)
    for cache in (asked, fresh):
        state = policy.new_state(cache)
        calls = [(0, 100), (100, 120), (100, 103)] if cache is asked else [(0, 100), (100, 103)]
        for begin, end in calls:
            cache.crop(cache.max_seqlen - begin)
            cache.append(run.new_k[:, begin:end], run.new_v[:, begin:end])
            prefill(run.q[:, begin:end], cache, policy, state)
            window = state.window
            assert window is not None and window.shape[1] <= policy.num_window_queries
        # Of what was taken back nothing is left, nor of what it had pushed out.
        assert torch.equal(window, run.q[:, (95 if cache is fresh else 100) : 103])
        cache.append(run.new_k[:, 103:104], run.new_v[:, 103:104])
        decode_step(run.q[:, 103:104], cache, policy, state)
