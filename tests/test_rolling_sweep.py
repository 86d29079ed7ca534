"""rolling_sweep against the float64 reference: what it looks at, what it lists, what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_calls import ONE_IMPLEMENTATION, Case, int32, make_case, score, select, sweep
from torch import Tensor

from kvselect import KVCache
from kvselect.reference import (
    BLOCK_TOKENS,
    BlockLists,
    QueryBlocks,
    SweepState,
    SweptLists,
    rolling_sweep,
)
from kvselect.testing import LAYOUTS, make_qkv, rel_err, rope_tables

# Votes are float32; as for scores (test_score_tokens.py), exp doubles STYLE.md's bound.
TOLERANCE = 4e-6
# Queries meet sketch codes as small integers: what that costs all votes together (the bounds of
# test_score_tokens.py), and what it may cost two single votes that compete.
SUM_TOLERANCE = {None: TOLERANCE, "int8": 2e-4, "int4": 3e-2}
TIE_TOLERANCE = {None: 1e-5, "int8": 2e-3, "int4": 0.15}

pytestmark = pytest.mark.usefixtures("implementation")


class Decoding:
    """A cache that grows, and the state that a sweep leaves from step to step."""

    def __init__(
        self,
        lengths: list[int],
        *,
        room: int = 0,
        num_lists: int = 2,
        num_segments: int = 4,
        pool_width: int = 30,
        group_size: int = 2,
        head_dim: int = 32,
        dtype: torch.dtype = torch.float32,
        sketch: str | None = None,
        starts: Tensor | None = None,
        layout: str = "head_major",
        sinks: int = 3,
        recent: int = 20,
        seed: int = 0,
    ) -> None:
        self.lengths, self.room, self.sketch, self.starts = lengths, room, sketch, starts
        self.layout, self.sinks, self.recent = layout, sinks, recent
        seqlen = max(lengths) + room
        self.q, self.k, self.v = make_qkv(
            len(lengths), room + 1, seqlen, 2 * group_size, 2, head_dim, dtype=dtype, seed=seed
        )
        self.state = SweepState.empty(len(lengths), num_lists, num_segments, pool_width)
        self.added = 0

    def query(self) -> Tensor:
        return self.q[:, self.added].float().contiguous()

    def case(self) -> Case:
        seqlens = int32(*self.now())
        # Rows with padding: blocks count from the first real token, so build the sketch from there.
        case = make_case(
            self.k, self.v, seqlens, starts=self.starts, layout=self.layout, sketch=None
        )
        if self.sketch is not None:
            case.plain.sketch_format = self.sketch
            case.plain.sketch_data = self.sketch_data()
        return case

    def sketch_data(self) -> Tensor | None:
        cache = KVCache(
            len(self.lengths), 2, self.k.shape[-1], dtype=self.k.dtype, sketch=self.sketch
        )
        if self.starts is not None:
            cache.set_starts(self.starts)
        cache.append(self.k, self.v, list(self.now()))
        return cache.sketch_data

    def now(self) -> list[int]:
        return [length + self.added if length else 0 for length in self.lengths]

    def blocks(self) -> QueryBlocks:
        return QueryBlocks(
            cache_seqlens=int32(*self.now()),
            seqlen_q=1,
            starts=self.starts,
            num_sink_tokens=self.sinks,
            num_recent_tokens=self.recent,
        )

    def expected(self, state: SweepState, case: Case, keep: int, **options: Any) -> SweptLists:
        return rolling_sweep(
            self.query() if "q" not in options else options.pop("q"),
            case.plain,
            self.blocks(),
            state,
            keep=keep,
            softmax_scale=self.k.shape[-1] ** -0.5,
            source="keys" if self.sketch is None else "sketch",
            **options,
        )

    def step(self, keep: int = 25, **options: Any) -> SweptLists:
        """One sweep, held against the reference from the same state; what the op gave."""
        case, before = self.case(), clone(self.state)
        expected = self.expected(before, case, keep, **options)
        q = options.pop("q", self.query())
        got = sweep(
            case,
            q,
            self.blocks(),
            self.state,
            keep=keep,
            sketch=self.sketch is not None,
            width=case.plain.k.shape[1] + 1,
            **options,
        )
        tolerance = TIE_TOLERANCE[self.sketch]
        assert torch.equal(got[3], expected.num_seen)
        assert torch.equal(got[4], expected.num_nonfinite)
        assert torch.equal(got[1], expected.topk_length)
        assert rel_err(got[2], expected.kept_score) <= SUM_TOLERANCE[self.sketch]
        assert torch.equal(self.state.pool_length, before.pool_length)
        assert torch.equal(self.state.scanned_to, before.scanned_to)
        assert torch.equal(self.state.next_segment, before.next_segment)
        for row in range(len(self.lengths)):
            at = self.blocks().range(row, 0)
            for n in range(self.state.pool.shape[1]):
                votes = expected.votes[row, n]
                listed = listed_at(got, row, n)
                assert listed == sorted(set(listed))
                assert (got[0][row, n, len(listed) :] == -1).all()
                want = listed_at(expected, row, n)
                always = {*range(at.start, at.sink_end), *range(at.window_start, at.end)}
                assert always & set(listed) == always & set(want)
                assert_as_good(set(listed) - always, set(want) - always, votes, tolerance)
                for s in range(self.state.pool.shape[2]):
                    length = int(self.state.pool_length[row, n, s])
                    kept = self.state.pool[row, n, s, :length].tolist()
                    assert kept == sorted(set(kept))
                    best = set(before.pool[row, n, s, :length].tolist())
                    assert_as_good(set(kept), best, votes, tolerance)
        self.added += 1
        return SweptLists(*got, expected.votes)


def assert_as_good(got: set[int], want: set[int], votes: Tensor, tolerance: float) -> None:
    """Another choice of as many tokens, whose votes tie with the best within the tolerance."""
    assert len(got) == len(want)
    extra, missed = [[float(votes[i]) for i in part] for part in (got - want, want - got)]
    if missed:
        assert min(extra) >= max(missed) * (1 - tolerance) - 1e-12


def clone(state: SweepState) -> SweepState:
    return SweepState(*(tensor.clone() for tensor in state))


def listed_at(lists: Any, row: int, n: int) -> list[int]:
    length = int(lists[1][row, n])
    positions: list[int] = lists[0][row, n, :length].tolist()
    return positions


def assert_same(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def pools(state: SweepState, row: int, n: int) -> list[list[int]]:
    return [
        state.pool[row, n, s, : int(state.pool_length[row, n, s])].tolist()
        for s in range(state.pool.shape[2])
    ]


# ---- against the reference


@pytest.mark.parametrize("sketch", [None, "int4", "int8"])
@pytest.mark.parametrize("num_lists", [1, 2])
@pytest.mark.parametrize("num_segments", [2, 3, 8])
def test_steps_equal_the_reference(sketch: str | None, num_lists: int, num_segments: int) -> None:
    decoding = Decoding(
        [700, 0, 1, 131, 560],
        room=num_segments + 2,
        num_lists=num_lists,
        num_segments=num_segments,
        sketch=sketch,
        starts=int32(0, 0, 0, 0, 37),
        recent=130,
    )
    for _ in range(decoding.room):
        decoding.step()
    assert (decoding.state.scanned_to[0] > 0).all()


@pytest.mark.parametrize("candidates_only", [False, True])
@pytest.mark.parametrize("num_lists", [1, 2])
def test_capped_logits_and_sinks(num_lists: int, candidates_only: bool) -> None:
    sinks = torch.tensor([0.0, 4.0, -torch.inf, 1.0])
    decoding = Decoding([420, 290], room=4, num_lists=num_lists)
    for added in ({"softcap": 0.5}, {"sink_logits": sinks}, {"softcap": 0.5, "sink_logits": sinks}):
        decoding.step(normalise_candidates_only=candidates_only, **added)
    q = decoding.query()
    q[0, 1] = torch.nan  # the columns of finite queries move together
    decoding.step(q=q, sink_logits=sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 192, 256, 512])
def test_every_head_dim_and_dtype(head_dim: int, dtype: torch.dtype) -> None:
    for sketch in (None, "int8"):
        decoding = Decoding([420, 290], room=3, head_dim=head_dim, dtype=dtype, sketch=sketch)
        for _ in range(3):
            decoding.step()


@pytest.mark.parametrize("group_size", [1, 3, 4, 7])
@pytest.mark.parametrize("num_lists", [1, 2])
def test_groups(group_size: int, num_lists: int) -> None:
    decoding = Decoding([400], room=4, group_size=group_size, num_lists=num_lists)
    for _ in range(4):
        decoding.step()


@pytest.mark.parametrize("sinks, recent", [(0, 1), (0, 200), (130, 20), (300, 140), (500, 3)])
def test_windows_around_blocks(sinks: int, recent: int) -> None:
    decoding = Decoding([513, 384, 129, 128], room=5, sinks=sinks, recent=recent)
    for _ in range(5):
        decoding.step()


@pytest.mark.parametrize("keep", [0, 1, 16, 61, 10_000])
@pytest.mark.parametrize("pool_width", [1, 15, 10_000])
def test_counts(keep: int, pool_width: int) -> None:
    decoding = Decoding([600, 200], room=4, pool_width=pool_width)
    for _ in range(4):
        decoding.step(keep)


@pytest.mark.parametrize("options", [{"normalise_candidates_only": True}, {"rope": True}], ids=str)
@pytest.mark.parametrize("sketch", [None, "int4"])
def test_options(options: dict[str, Any], sketch: str | None) -> None:
    starts = int32(0, 50)
    decoding = Decoding([500, 390], room=4, sketch=sketch, starts=starts, recent=130)
    if "rope" in options:
        cos, sin = rope_tables(300, 16)
        rope = SimpleNamespace(cos=cos, sin=sin, start=0, interleaved=False)
        options = {"rope": rope, "q_local": decoding.query().flip(1).contiguous()}
    for _ in range(4):
        decoding.step(keep=25, **options)


def test_scale_is_used() -> None:
    decoding = Decoding([500])
    case = decoding.case()
    expected = rolling_sweep(
        decoding.query(),
        case.plain,
        decoding.blocks(),
        clone(decoding.state),
        keep=9,
        softmax_scale=0.5,
    )
    got = sweep(case, decoding.query(), decoding.blocks(), decoding.state, keep=9, scale=0.5)
    assert rel_err(got[2], expected.kept_score) <= 3 * TOLERANCE  # logits 2.8 times as large


# ---- what is looked at


@pytest.mark.parametrize("sketch", [None, "int4"])
@pytest.mark.parametrize("num_lists", [1, 2])
def test_a_void_state_is_an_ordinary_full_scan(sketch: str | None, num_lists: int) -> None:
    """And so is scan_all, which leaves the pools alone."""
    decoding = Decoding([700, 333], sketch=sketch, num_lists=num_lists, recent=130)
    case, q, blocks = decoding.case(), decoding.query(), decoding.blocks()
    scores, _, _ = score(case, q[:, None, None], blocks, sketch=sketch is not None)
    votes = scores.sum(2, keepdim=True) if num_lists == 1 else scores
    lists = select(votes, blocks, keep=40, width=256)
    filled = decoding.state
    for state, options in (
        (filled, {}),
        (clone(filled), {"scan_all": torch.ones(2, num_lists, dtype=torch.int32)}),
    ):
        before = clone(state)
        got = sweep(
            case, q, blocks, state, keep=40, sketch=sketch is not None, width=256, **options
        )
        assert torch.equal(got[0], lists[0][:, 0]) and torch.equal(got[1], lists[1][:, 0])
        assert rel_err(got[2], lists[2][:, 0]) <= TOLERANCE
        assert got[3].tolist() == [[[700, 0]] * num_lists, [[333, 0]] * num_lists]
        if options:
            assert_same(state, before)
    assert (filled.scanned_to == blocks.cache_seqlens[:, None, None] - 130).all()
    assert filled.pool_length.tolist() == [[[30] * 4] * num_lists, [[30, 30, 0, 0]] * num_lists]


def test_pools_that_hold_everything_equal_a_full_scan() -> None:
    rolling = Decoding([900, 400], room=9, pool_width=400)
    for _ in range(9):
        case, q, blocks = rolling.case(), rolling.query(), rolling.blocks()
        got = rolling.step(keep=50)
        scores, _, _ = score(case, q[:, None, None], blocks)
        full = select(scores, blocks, keep=50, width=got.indices.shape[-1])
        assert torch.equal(got.indices, full[0][:, 0])
        assert (got.num_seen.sum(-1) == blocks.cache_seqlens[:, None]).all()
    assert (got.num_seen[..., 1] > 0).all()


def test_only_what_is_looked_at_is_read() -> None:
    """Keys of all other tokens, and their sketch, may hold anything."""
    for sketch in (None, "int4"):
        decoding = Decoding([1000], room=3, sketch=sketch, recent=130)
        decoding.step()
        case, state, blocks = decoding.case(), decoding.state, decoding.blocks()
        seen = decoding.expected(clone(state), case, 25).votes[0] != -1.0
        first = clone(state)
        want = sweep(case, decoding.query(), blocks, first, keep=25, sketch=sketch is not None)
        scanned = seen.clone()
        at = blocks.range(0, 0)
        for n in range(2):
            for s in range(4):
                if s != int(state.next_segment[0, n]):
                    scanned[n, pools(state, 0, n)[s]] = False
        for head in range(2):
            assert 0 < int(seen[head].sum()) < 700
            unread = ~seen[head] if sketch is None else ~seen[head] | scanned[head]
            unread[: at.sink_end] = unread[at.window_start :] = False
            case.stored.k_cache[0, :1001, head][unread[:1001]] = torch.nan
            if sketch is not None:
                assert case.plain.sketch_data is not None
                for block in range(case.plain.sketch_data.shape[2]):
                    span = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
                    if not scanned[head, span].any():
                        case.plain.sketch_data[0, head, block] = 255
        second = clone(state)
        got = sweep(case, decoding.query(), blocks, second, keep=25, sketch=sketch is not None)
        assert_same(got, want)
        assert_same(first, second)


def test_segments_take_turns_and_only_their_pool_changes() -> None:
    decoding = Decoding([1200], room=10, num_segments=4)
    decoding.step()
    for step in range(9):
        before, at = clone(decoding.state), decoding.blocks().range(0, 0)
        votes = decoding.step().votes[0]
        segment = step % 4
        for n in range(2):
            old, new = pools(before, 0, n), pools(decoding.state, 0, n)
            assert [old[s] == new[s] for s in range(4) if s != segment] == [True] * 3
            assert {(i // BLOCK_TOKENS) % 4 for i in new[segment]} == {segment}
            own = [
                float(votes[n, i])
                for i in range(at.sink_end, at.window_start)
                if i // BLOCK_TOKENS % 4 == segment
            ]
            kept = [float(votes[n, i]) for i in new[segment]]
            assert sorted(kept, reverse=True) == sorted(own, reverse=True)[: len(kept)]
            assert len(kept) == 30
        assert decoding.state.next_segment.tolist() == [[(segment + 1) % 4] * 2]


@pytest.mark.parametrize("num_segments", [2, 16, 64])
def test_the_tail_is_part_of_the_newest_two_blocks(num_segments: int) -> None:
    decoding = Decoding([1090], room=150, num_segments=num_segments, pool_width=1, head_dim=32)
    case = make_case(decoding.k, decoding.v, int32(1240))
    sweep(case_of_length(case, 1090), decoding.query(), blocks_of(1090), decoding.state, keep=1)
    for length in range(1091, 1240):
        segment = int(decoding.state.next_segment[0, 0])
        got = sweep(
            case_of_length(case, length),
            decoding.query(),
            blocks_of(length),
            decoding.state,
            keep=1,
        )
        newest = (length - 20 - 1) // BLOCK_TOKENS
        own = [
            block
            for block in range(newest + 1)
            if block % num_segments == segment or block >= newest - 1
        ]
        most = sum(
            min((block + 1) * BLOCK_TOKENS, length - 20) - max(block * BLOCK_TOKENS, 3)
            for block in own
        )
        assert int(got[3][0, 0, 0]) - 23 <= most


def blocks_of(length: int) -> QueryBlocks:
    return QueryBlocks(
        cache_seqlens=int32(length), seqlen_q=1, num_sink_tokens=3, num_recent_tokens=20
    )


def case_of_length(case: Case, length: int) -> Case:
    case.plain.cache_seqlens = int32(length)
    return case


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it forces a name, once
)
@given(
    moves=st.lists(st.tuples(st.integers(0, 180), st.booleans()), min_size=1, max_size=12),
    num_segments=st.sampled_from([2, 3, 5, 64]),
    start=st.integers(0, 40),
)
@ONE_IMPLEMENTATION
def test_nothing_is_lost(
    cpu_implementation: str, moves: list[tuple[int, bool]], num_segments: int, start: int
) -> None:
    """Whatever the window lets go between two sweeps, hits included: pools that have room for
    everything make every sweep see everything."""
    total = 500 + sum(moved for moved, _ in moves)
    _, k, v = make_qkv(1, 1, total, 2, 1, 32)
    starts = int32(start)
    state = SweepState.empty(1, 1, num_segments, total)
    length, case = 500, make_case(k, v, int32(total), starts=starts)
    indices, topk_length = torch.zeros(1, 1, total, dtype=torch.int32), int32(0).view(1, 1)
    q = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(total))
    for moved, is_hit in [(0, False), *moves]:
        length += moved
        blocks = QueryBlocks(
            cache_seqlens=int32(length),
            seqlen_q=1,
            starts=starts,
            num_sink_tokens=3,
            num_recent_tokens=20,
        )
        if is_hit and moved == 0:
            continue
        got = sweep(
            case_of_length(case, length),
            q,
            blocks,
            state,
            keep=total,
            indices=indices,
            topk_length=topk_length,
            hit=int32(int(is_hit)).view(1, 1),
        )
        if not is_hit:
            assert int(got[3].sum()) == length - start
            assert listed_at(got, 0, 0) == list(range(start, length))


def test_a_needle_stays_in_its_pool_and_is_found_when_it_matters() -> None:
    decoding = Decoding([1500], room=9, num_lists=1, pool_width=8, group_size=1)
    q = decoding.query()
    decoding.k[0, 700] = 3.0 * q[0]  # heavy for this query, and light for its opposite
    decoding.step(q=q)
    for _ in range(6):
        assert 700 not in listed_at(decoding.step(keep=5, q=-q), 0, 0)
    # Its segment was scanned with queries that it does not matter to, and forgot it ...
    assert all(700 not in pool for pool in pools(decoding.state, 0, 0))
    decoding.state.scanned_to.zero_()
    decoding.step(q=q)
    assert 700 in pools(decoding.state, 0, 0)[700 // BLOCK_TOKENS % 4]
    assert int(decoding.state.next_segment[0, 0]) != 700 // BLOCK_TOKENS % 4
    assert 700 in listed_at(decoding.step(keep=5, q=q), 0, 0)  # ... until it is found again


# ---- ties


@pytest.mark.parametrize("num_lists", [1, 2])
def test_ties_go_to_the_lowest_positions(num_lists: int) -> None:
    decoding = Decoding([1500], room=3, num_lists=num_lists, pool_width=40, num_segments=3)
    decoding.k.copy_(decoding.k[:, :1].expand_as(decoding.k))
    decoding.step(keep=100)
    for segment in range(3):
        first = max(segment * BLOCK_TOKENS, 3)
        for n in range(num_lists):
            assert pools(decoding.state, 0, n)[segment] == list(range(first, first + 40))
    # Pools hold 40 tokens each; segment 0 is scanned: 3..127, then its block 3.
    listed = listed_at(decoding.step(keep=100), 0, 0)
    assert listed[:103] == list(range(103))
    listed = listed_at(decoding.step(keep=100), 0, 0)  # segment 1: its own, and 40 from segment 0
    assert listed[3:103] == [*range(3, 43), *range(128, 188)]


@ONE_IMPLEMENTATION
def test_many_ties_at_the_border_lose_nothing() -> None:
    length = 40_000
    k = torch.zeros(1, length, 1, 32)
    state = SweepState.empty(1, 1, 2, 17_000)
    case = make_case(k, k, int32(length))
    q, blocks = torch.ones(1, 1, 32), blocks_of(length)
    sweep(case, q, blocks, state, keep=16_385, width=17_000)
    got = sweep(case, q, blocks, state, keep=16_385, width=17_000)
    assert int(got[1][0, 0]) == 16_385 + 23
    positions = [i for i in range(3, length - 20) if i // BLOCK_TOKENS % 2 == 0]
    positions = sorted([*positions, *pools(state, 0, 0)[1]])[:16_385]
    assert listed_at(got, 0, 0)[3:-20] == positions


@pytest.mark.parametrize("keep", [1, 100, 800])
def test_votes_of_every_size(keep: int) -> None:
    """Spikes, underflow to zero, and neighbouring floats."""
    for sharpness in (0.0, 1e-7, 1.0, 30.0, 300.0):
        decoding = Decoding([900], room=3)
        decoding.q *= sharpness
        for _ in range(3):
            decoding.step(keep)


# ---- hits


@pytest.mark.parametrize("num_lists", [1, 2])
def test_hits_append_the_newest_token_and_leave_the_state(num_lists: int) -> None:
    decoding = Decoding([600, 500], room=4, num_lists=num_lists)
    first = decoding.step()
    flags = torch.tensor([[1, 0], [0, 7]], dtype=torch.int32)[:, :num_lists].contiguous()
    indices, lengths = first.indices.clone(), first.topk_length.clone()
    before = clone(decoding.state)
    expected = decoding.expected(
        clone(before),
        decoding.case(),
        25,
        hit=flags,
        previous=BlockLists(indices[:, None].clone(), lengths[:, None].clone(), torch.zeros(0)),
    )
    got = sweep(
        decoding.case(),
        decoding.query(),
        decoding.blocks(),
        decoding.state,
        keep=25,
        hit=flags,
        indices=indices,
        topk_length=lengths,
    )
    assert torch.equal(got[1], expected.topk_length) and torch.equal(got[3], expected.num_seen)
    for row in range(2):
        for n in range(num_lists):
            state = [tensor[row, n] for tensor in decoding.state]
            old = [tensor[row, n] for tensor in before]
            if flags[row, n]:
                newest = decoding.now()[row] - 1
                assert listed_at(got, row, n) == [*listed_at(first, row, n), newest]
                assert got[2][row, n].isnan() and got[3][row, n].tolist() == [0, 0]
                assert_same(tuple(state), tuple(old))
            else:
                assert got[2][row, n] > 0 and int(state[3]) != int(old[3])
    assert int(got[4].sum()) == 0


# ---- what is not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sketch", [None, "int4"])
@pytest.mark.parametrize("num_lists", [1, 2])
def test_defective_keys_are_never_listed_nor_pooled(
    value: float, sketch: str | None, num_lists: int
) -> None:
    bad = [1, 60, 300, 301, 695, 701]  # a sink, candidates, the window
    decoding = Decoding([700], room=6, sketch=sketch, num_lists=num_lists, recent=130)
    decoding.k[0, bad, 0, 5] = value
    for _ in range(6):
        got = decoding.step()
        pooled = {i for pool in pools(decoding.state, 0, 0) for i in pool}
        assert not pooled & set(bad) and not set(listed_at(got, 0, 0)) & set(bad)
    assert got.num_nonfinite[0].tolist() == [
        sum(int(got.votes[0, 0, i].isnan()) for i in bad),
        0,
    ]


@pytest.mark.parametrize("normalise_candidates_only", [False, True])
def test_pool_members_that_become_defective_are_dropped(normalise_candidates_only: bool) -> None:
    decoding = Decoding([900], room=3)
    decoding.step()
    member = pools(decoding.state, 0, 0)[2][4]  # segment 0 is scanned next
    decoding.k[0, member, 0] = torch.nan
    got = decoding.step(normalise_candidates_only=normalise_candidates_only)
    assert member not in listed_at(got, 0, 0)
    assert got.num_nonfinite.tolist() == [[1, 0]]


def test_queries_that_are_not_finite_have_no_vote() -> None:
    decoding = Decoding([600, 500], room=4, group_size=3)
    decoding.step()
    for head, value in ((0, torch.nan), (4, torch.inf)):
        q = decoding.query()
        q[0, head, 3] = value
        got = decoding.step(q=q)
        assert got.num_nonfinite.tolist()[0][head // 3] == 1


@pytest.mark.parametrize("num_lists", [1, 2])
def test_no_finite_query_leaves_the_pools_alone(num_lists: int) -> None:
    decoding = Decoding([600], room=4, num_lists=num_lists)
    q = decoding.query()
    q[:] = torch.nan
    decoding.step(q=q)
    assert not decoding.state.scanned_to.any()  # still void
    decoding.step()
    before = clone(decoding.state)
    decoding.step(q=q)
    assert_same(decoding.state, before)
    q = decoding.query()
    q[:, :2] = torch.nan  # the first KV head's
    decoding.step(q=q)
    changed = decoding.state.next_segment != before.next_segment
    assert changed.tolist() == ([[True]] if num_lists == 1 else [[False, True]])


# ---- same bits


@pytest.mark.parametrize("sketch", [None, "int4"])
@pytest.mark.parametrize("num_lists", [1, 2])
def test_bits_do_not_depend_on_threads_batch_or_layout(sketch: str | None, num_lists: int) -> None:
    def run(layout: str = "head_major", num_threads: int = 1) -> list[tuple[Tensor, ...]]:
        decoding = Decoding(
            [500, 300, 130, 420],
            room=3,
            num_lists=num_lists,
            sketch=sketch,
            starts=int32(0, 29, 0, 200),
            layout=layout,
            recent=130,
            dtype=torch.bfloat16,
        )
        results = []
        with threads(num_threads):
            for _ in range(3):
                results.append(one(decoding, decoding.case(), decoding.query()))
                decoding.added += 1
        return results

    def one(decoding: Decoding, case: Case, q: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"sketch": sketch is not None, "keep": 40}
        got = sweep(case, q, decoding.blocks(), decoding.state, **options)
        valid = torch.arange(30) < decoding.state.pool_length[..., None]
        state = clone(decoding.state)
        return *got, *state._replace(pool=state.pool.where(valid, -1))

    first = run()
    others = [run(num_threads=count) for count in (1, 2, 3, 7)]
    others += [run(layout=layout) for layout in LAYOUTS[1:]]
    for other in others:
        for got, want in zip(other, first, strict=True):
            assert_same(got, want)

    for row in range(4):
        whole = Decoding([500, 300, 130, 420], room=3, dtype=torch.bfloat16)
        length, start = whole.lengths[row], [0, 29, 0, 200][row]
        alone = Decoding(
            [length],
            room=3,
            num_lists=num_lists,
            sketch=sketch,
            starts=int32(start),
            recent=130,
            dtype=torch.bfloat16,
        )
        alone.q, alone.k, alone.v = (x[row : row + 1] for x in (whole.q, whole.k, whole.v))
        for step in range(3):
            got = one(alone, alone.case(), alone.query())
            alone.added += 1
            assert_same(got, tuple(x[row : row + 1] for x in first[step]))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@ONE_IMPLEMENTATION
def test_an_empty_batch() -> None:
    decoding = Decoding([300])
    case = make_case(decoding.k[:0], decoding.v[:0], int32())
    blocks = QueryBlocks(cache_seqlens=int32(), seqlen_q=1)
    got = sweep(case, decoding.query()[:0], blocks, SweepState.empty(0, 2, 4, 8), keep=3)
    assert [x.shape[0] for x in got] == [0] * 5


# ---- one test per message


LISTS = torch.zeros(2, 2, dtype=torch.int32)


def bad_call(**change: Any) -> None:
    decoding = Decoding([300, 200], sketch="int4", pool_width=5)
    case, state = decoding.case(), decoding.state
    for name in SweepState._fields:
        if name in change:
            state = state._replace(**{name: change.pop(name)})
    options = {"keep": 10, "sketch": True} | change
    sweep(case, options.pop("q", decoding.query()), decoding.blocks(), state, **options)


def ascending(last: int) -> dict[str, Tensor]:
    """A pool of two tokens in segment 1 of the first list."""
    pool, length = torch.zeros(2, 2, 4, 5, dtype=torch.int32), torch.zeros(2, 2, 4).int()
    pool[0, 0, 1, :2], length[0, 0, 1] = int32(7, last), 2
    return {"pool": pool, "pool_length": length, "scanned_to": torch.full_like(length, 250)}


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"num_sink_tokens": -1}, "num_sink_tokens: got -1, allowed: an int >= 0"),
    ({"num_recent_tokens": -2}, "num_recent_tokens: got -2, allowed: an int >= 0"),
    ({"keep": -1}, "keep: got -1, allowed: an int >= 0"),
    ({"q": torch.zeros(2, 4, 32).double()}, "q: got float64, allowed: float32"),
    ({"q": torch.zeros(2, 1, 4, 32)}, r"q: got shape \[2, 1, 4, 32\], allowed: \[batch, num_q_he"),
    ({"q": torch.zeros(2, 4, 64)}, r"q: got shape .*head_dim=32"),
    ({"q": torch.zeros(2, 3, 32)}, "num_q_heads: got 3, allowed: a multiple of num_kv_heads = 2"),
    ({"q": torch.zeros(2, 4, 33)[..., :32]}, "q: got strides .*a contiguous tensor"),
    ({"q_local": torch.zeros(2, 2, 32)}, r"q_local: got shape \[2, 2, 32\]"),
    ({"q_local": torch.zeros(2, 4, 32).half()}, "q_local: got float16, allowed: float32"),
    ({"k_cache": torch.zeros(3, 303, 2, 32)}, "k_cache: got 3 rows, allowed: batch = 2"),
    ({"cache_seqlens": int32(300, -1)}, "cache_seqlens: got -1 in row 1, allowed: an int >= 0"),
    ({"cache_seqlens": int32(304, 1)}, "cache_seqlens: got 304 tokens in row 0, allowed: at most"),
    ({"starts": int32(0)}, r"starts: got shape \[1\], allowed: \[batch=2\]"),
    ({"block_table": int32(0, 2).view(2, 1)}, r"block_table: got page 2 at \[1, 0\]"),
    ({"sketch_format": "int2"}, "sketch_format: got 'int2', allowed: int4, int8, none"),
    ({"cos": torch.zeros(300, 16)}, "sin: got None, allowed: a tensor, like cos"),
    (
        {"cos": torch.zeros(32, 16), "sin": torch.zeros(32, 16)},
        "cos: got 32 positions, allowed: at least 33",
    ),
    ({"pool": torch.zeros(2, 2, 4, 5)}, "pool: got float32, allowed: int32"),
    ({"pool": torch.zeros(2, 2, 4).int()}, r"pool: got shape \[2, 2, 4\], allowed: \[batch=2, num"),
    ({"pool": torch.zeros(2, 2, 4, 9).int()[..., :5]}, "pool: got strides .*a contiguous tensor"),
    ({"pool": torch.zeros(2, 3, 4, 5).int()}, "num_lists: got 3, allowed: num_kv_heads = 2, or 1"),
    ({"pool": torch.zeros(2, 2, 1, 5).int()}, r"num_segments: got 1, allowed: 2\.\.64"),
    ({"pool": torch.zeros(2, 2, 65, 5).int()}, r"num_segments: got 65, allowed: 2\.\.64"),
    ({"pool_length": torch.zeros(2, 2, 3).int()}, r"pool_length: got shape \[2, 2, 3\]"),
    ({"pool_length": torch.full((2, 2, 4), 6).int()}, r"pool_length: got 6, allowed: 0\.\.5"),
    ({"pool_length": torch.full((2, 2, 4), -1).int()}, r"pool_length: got -1, allowed: 0\.\.5"),
    ({"scanned_to": torch.zeros(2, 2, 4).long()}, "scanned_to: got int64, allowed: int32"),
    ({"next_segment": torch.zeros(2, 1).int()}, r"next_segment: got shape \[2, 1\], .*num_lists=2"),
    ({"next_segment": LISTS + 4}, r"next_segment: got 4, allowed: 0\.\.3"),
    ({"next_segment": LISTS - 1}, r"next_segment: got -1, allowed: 0\.\.3"),
    (ascending(7), r"pool: got positions 7\.\.7 that do not ascend in segment 1 of row 0"),
    (
        ascending(250),
        r"pool: got positions 7\.\.250 in segment 1 of row 0, .*positions in 0\.\.249",
    ),
    (ascending(-1), r"pool: got positions 7\.\.-1 that do not ascend"),
    (
        {"hit": torch.zeros(2, 3).int()},
        r"hit: got shape \[2, 3\], allowed: \[batch=2, num_lists=2\]",
    ),
    ({"hit": LISTS.long()}, "hit: got int64, allowed: int32"),
    ({"hit": LISTS + 1}, r"topk_length: got 777 at \[0, 0\] where hit is set, allowed: 0\.\.447"),
    (
        {"hit": LISTS + 1, "topk_length": LISTS + 3},
        r"indices: got 12345 as the last entry at \[0, 0\] where hit is set, allowed: below",
    ),
    ({"scan_all": torch.zeros(2, 1).int()}, r"scan_all: got shape \[2, 1\]"),
    ({"indices": torch.zeros(2, 2, 32).int()}, "indices: got width 32, allowed: at least 33"),
    ({"indices": torch.zeros(2, 2, 64)}, "indices: got float32, allowed: int32"),
    ({"topk_length": torch.zeros(2).int()}, r"topk_length: got shape \[2\], .*num_lists=2"),
    ({"kept_score": torch.zeros(2, 2).double()}, "kept_score: got float64, allowed: float32"),
]


@ONE_IMPLEMENTATION
@pytest.mark.parametrize("change, message", ERRORS, ids=[e[1][:44] for e in ERRORS])
def test_error_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_call(**change)


@ONE_IMPLEMENTATION
def test_the_call_that_the_messages_are_about_is_fine() -> None:
    bad_call()
    bad_call(**ascending(249))
