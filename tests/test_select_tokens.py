"""select_tokens on the same score bits as the reference: the same lists, exactly, always."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import ONE_IMPLEMENTATION, int32, select
from torch import Tensor

from kvselect.reference import BlockLists, QueryBlocks, select_query_blocks
from kvselect.testing import rel_err

pytestmark = pytest.mark.usefixtures("implementation")


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equals_reference(
    scores: Tensor, blocks: QueryBlocks, *, keep: int, pool_width: int = 1, width: int | None = None
) -> BlockLists:
    expected = select_query_blocks(scores, blocks, keep=keep, pool_width=pool_width)
    needed = needed_width(blocks, keep)
    width = max(needed + 5, 1) if width is None else width
    indices, topk_length, kept_score = select(
        scores, blocks, keep=keep, pool_width=pool_width, width=width
    )
    assert torch.equal(topk_length, expected.topk_length)
    longest = expected.indices.shape[-1]
    assert torch.equal(indices[..., :longest], expected.indices)
    assert (indices[..., longest:] == -1).all()
    assert rel_err(kept_score, expected.kept_score) <= 2e-6
    return BlockLists(indices, topk_length, kept_score)


def needed_width(blocks: QueryBlocks, keep: int) -> int:
    ranges = [
        blocks.range(row, block)
        for row in range(blocks.batch)
        for block in range(blocks.num_blocks)
    ]
    widths = [
        at.sink_end - at.start + min(keep, at.num_candidates) + at.end - at.window_start
        for at in ranges
    ]
    return max(widths, default=0)


@pytest.mark.parametrize("keep", [0, 1, 2, 15, 16, 17, 63, 200])
@pytest.mark.parametrize("sinks, recent", [(0, 0), (4, 0), (0, 9), (5, 16), (300, 3), (3, 300)])
def test_counts_and_borders(keep: int, sinks: int, recent: int) -> None:
    seqlens, starts = int32(120, 0, 1, 40, 77), int32(0, 0, 0, 17, 77)
    blocks = QueryBlocks(
        cache_seqlens=seqlens,
        seqlen_q=1,
        starts=starts,
        num_sink_tokens=sinks,
        num_recent_tokens=recent,
    )
    scores = random_scores(5, 1, 3, 130, seed=keep)
    for row, (length, start) in enumerate(zip(seqlens, starts, strict=True)):
        scores[row, ..., int(length) :] = 9.0  # must not be looked at
        scores[row, ..., : int(start)] = 9.0
    assert_equals_reference(scores, blocks, keep=keep)


@pytest.mark.parametrize("num_lists", [1, 2, 5])
@pytest.mark.parametrize("window_rule", ["decode", "block_start", "block_end"])
def test_blocks_and_lists(num_lists: int, window_rule: str) -> None:
    seqlens, starts = int32(90, 41, 13), int32(0, 7, 0)
    blocks = QueryBlocks(
        cache_seqlens=seqlens,
        seqlen_q=40,
        starts=starts,
        offsets=int32(0, 9, 9, 24, 25, 40),
        window_rule=window_rule,
        num_sink_tokens=3,
        num_recent_tokens=12,
    )
    assert_equals_reference(random_scores(3, 5, num_lists, 90, seed=1), blocks, keep=10)


def test_strides_of_the_scores() -> None:
    """Only the last dimension must be contiguous; a shared list may have a head stride of 0."""
    wide = random_scores(2, 3, 1, 4, 70, seed=2)
    blocks = QueryBlocks(cache_seqlens=int32(60, 33), seqlen_q=1, num_recent_tokens=4)
    assert_equals_reference(wide[:, 1:2, 0, ::2, 5:67], blocks, keep=9)
    assert_equals_reference(wide[:, :1, 0, :1, :64].expand(2, 1, 3, 64), blocks, keep=9)


def distribution(name: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    uniform = torch.rand(size, generator=generator)
    normal = torch.randn(size, generator=generator)
    match name:
        case "uniform":
            return uniform
        case "all_equal":
            return torch.full((size,), 0.37)
        case "all_zero":
            return torch.zeros(size)
        case "two_values":
            return torch.where(uniform < 0.5, 1e-7, 1.0000001e-7)
        case "one_bin":  # neighbouring floats: every bit of the key matters
            steps = (uniform * 50).int()
            return (torch.tensor(0.125).view(torch.int32) + steps).view(torch.float32)
        case "half_precision":
            return normal.half().float()
        case "log_uniform":
            return torch.exp(-80.0 * uniform)
        case "denormals":
            return (uniform * 1e-38).where(uniform < 0.9, 1e-45)
        case "softmax":
            return (8.0 * normal).softmax(0)
        case "negative":
            return normal - 5.0
        case "mixed_sign":
            return normal
        case "signed_zeros":
            return torch.where(uniform < 0.5, -0.0, 0.0)
        case "ascending":
            return torch.arange(size, dtype=torch.float32)
        case "descending":
            return torch.arange(size, 0, -1, dtype=torch.float32)
        case "one_spike":
            return torch.zeros(size).index_fill(0, torch.tensor([size // 3]), 1.0)
        case "huge":
            return normal * 1e34
    raise AssertionError(name)


DISTRIBUTIONS = [
    "uniform",
    "all_equal",
    "all_zero",
    "two_values",
    "one_bin",
    "half_precision",
    "log_uniform",
    "denormals",
    "softmax",
    "negative",
    "mixed_sign",
    "signed_zeros",
    "ascending",
    "descending",
    "one_spike",
    "huge",
]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("size, keep", [(1500, 1), (1500, 40), (1499, 700), (1499, 1498)])
def test_distributions(name: str, size: int, keep: int) -> None:
    """The k-th value and its ties are exact; the first of them by position are kept."""
    scores = distribution(name, size).view(1, 1, 1, -1)
    blocks = QueryBlocks(cache_seqlens=int32(size), seqlen_q=1)
    lists = assert_equals_reference(scores, blocks, keep=keep)
    assert lists.topk_length.item() == keep


@pytest.mark.parametrize("name", ["uniform", "all_equal", "two_values", "one_bin", "softmax"])
@pytest.mark.parametrize("pool_width", [3, 7, 4001])
def test_pooled_distributions(name: str, pool_width: int) -> None:
    scores = distribution(name, 301).view(1, 1, 1, -1)
    blocks = QueryBlocks(
        cache_seqlens=int32(301), seqlen_q=1, num_sink_tokens=3, num_recent_tokens=20
    )
    for keep in (1, 5, 60, 277, 278, 279):
        assert_equals_reference(scores, blocks, keep=keep, pool_width=pool_width)


@pytest.mark.parametrize("num_ties", [16_383, 16_384, 16_385, 40_000])
def test_many_ties_lose_nothing(num_ties: int) -> None:
    """Buffers for boundary candidates end at 16,384 entries elsewhere; here there is none."""
    size = num_ties + 5000
    scores = torch.full((size,), 1e-9)
    above = torch.randperm(size, generator=torch.Generator().manual_seed(1))[:1000]
    below = torch.randperm(size, generator=torch.Generator().manual_seed(2))[:4000]
    scores[below] = 1e-12
    scores[above] = 0.5
    blocks = QueryBlocks(cache_seqlens=int32(size), seqlen_q=1)
    keep = 2048
    indices, topk_length, _ = select(scores.view(1, 1, 1, -1), blocks, keep=keep, width=keep)
    order = torch.sort(scores, descending=True, stable=True).indices[:keep]
    assert topk_length.item() == keep
    assert torch.equal(indices.flatten().long(), order.sort().values)


def test_pooled_plateau_breaks_by_own_score_then_position() -> None:
    scores = torch.tensor([0.0, 0.2, 0.9, 0.3, 0.2, 0.0, 0.9, 0.1]).view(1, 1, 1, -1)
    blocks = QueryBlocks(cache_seqlens=int32(8), seqlen_q=1)

    def picked(keep: int) -> list[int]:
        indices, length, _ = select(scores, blocks, keep=keep, pool_width=3)
        return indices.flatten()[: int(length)].tolist()

    assert picked(2) == [2, 6]
    assert picked(3) == [2, 3, 6]
    assert picked(4) == [1, 2, 3, 6]
    assert picked(5) == [1, 2, 3, 6, 7]
    assert picked(6) == [1, 2, 3, 5, 6, 7]
    assert picked(7) == [1, 2, 3, 4, 5, 6, 7]


def test_pooling_does_not_look_outside_the_candidates() -> None:
    scores = torch.tensor([9.0, 0.1, 0.2, 0.3, 0.1, 9.0]).view(1, 1, 1, -1)
    blocks = QueryBlocks(cache_seqlens=int32(6), seqlen_q=1, num_sink_tokens=1, num_recent_tokens=1)
    indices, _, _ = select(scores, blocks, keep=1, pool_width=3, width=3)
    assert indices.flatten().tolist() == [0, 3, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pool_width", [1, 5])
def test_scores_that_are_not_finite_are_never_listed(bad: float, pool_width: int) -> None:
    """Not as a sink, not as a candidate (however few there are), not as a recent token."""
    scores = random_scores(2, 1, 2, 90, seed=3)
    scores[0, 0, 0, ::3] = bad
    scores[0, 0, 1, 5:] = bad
    scores[1, 0, 0] = bad
    blocks = QueryBlocks(
        cache_seqlens=int32(90, 81), seqlen_q=1, num_sink_tokens=4, num_recent_tokens=10
    )
    for keep in (0, 3, 40, 75, 76, 77, 200):
        lists = assert_equals_reference(scores, blocks, keep=keep, pool_width=pool_width)
        assert lists.topk_length[1, 0, 0] == 0
        assert lists.kept_score[1, 0, 0] == 0
        chosen = lists.indices[0, 0, 0][lists.indices[0, 0, 0] >= 0]
        assert (chosen % 3 != 0).all()


@pytest.mark.parametrize("seqlen", [600, 3000])
def test_scattered_nan_among_large_rows(seqlen: int) -> None:
    scores = (6.0 * torch.randn(seqlen, generator=torch.Generator().manual_seed(4))).softmax(0)
    scores[torch.arange(0, seqlen, 7)] = torch.nan
    scores[torch.arange(3, seqlen, 11)] = torch.inf
    blocks = QueryBlocks(cache_seqlens=int32(seqlen), seqlen_q=1)
    for keep in (1, 20, seqlen // 2, seqlen - 1):
        assert_equals_reference(scores.view(1, 1, 1, -1), blocks, keep=keep)


def test_width_may_fit_exactly() -> None:
    blocks = QueryBlocks(
        cache_seqlens=int32(50), seqlen_q=1, num_sink_tokens=2, num_recent_tokens=3
    )
    assert_equals_reference(random_scores(1, 1, 1, 50), blocks, keep=7, width=12)


def test_hit_appends_the_newest_token() -> None:
    scores = random_scores(2, 1, 2, 64, seed=5)
    before = QueryBlocks(
        cache_seqlens=int32(50, 40), seqlen_q=1, num_sink_tokens=2, num_recent_tokens=6
    )
    indices, topk_length, _ = select(scores, before, keep=8, width=20)
    old, old_length = indices.clone(), topk_length.clone()
    after = QueryBlocks(
        cache_seqlens=int32(51, 41), seqlen_q=1, num_sink_tokens=2, num_recent_tokens=6
    )
    hit = torch.tensor([[1, 0], [0, -3]], dtype=torch.int32)
    scores[hit[:, None] != 0] = torch.nan  # the scores of a reused list are rubbish
    expected = select_query_blocks(
        scores,
        after,
        keep=8,
        width=20,
        hit=hit,
        previous=BlockLists(old, old_length, torch.zeros(2, 1, 2)),
    )
    _, _, kept_score = select(
        scores, after, keep=8, hit=hit, indices=indices, topk_length=topk_length
    )
    assert torch.equal(indices, expected.indices)
    assert torch.equal(topk_length, expected.topk_length)
    assert torch.equal(kept_score[:, 0].isnan(), hit != 0)
    assert indices[0, 0, 0, 16] == 50 and indices[1, 0, 1, 16] == 40


def test_repeated_hits_keep_everything_since_the_refresh() -> None:
    """Never blind: the window keeps starting where it started when the list was made."""
    scores = random_scores(1, 1, 1, 100, seed=6)
    blocks = QueryBlocks(cache_seqlens=int32(60), seqlen_q=1, num_recent_tokens=5)
    indices, topk_length, _ = select(scores, blocks, keep=10, width=40)
    for seqlen in range(61, 80):
        blocks = QueryBlocks(cache_seqlens=int32(seqlen), seqlen_q=1, num_recent_tokens=5)
        select(
            scores,
            blocks,
            keep=10,
            hit=torch.ones(1, 1, dtype=torch.int32),
            indices=indices,
            topk_length=topk_length,
        )
    listed = indices.flatten()[: int(topk_length)]
    assert topk_length.item() == 15 + 19
    assert listed[-24:].tolist() == list(range(55, 79))


# ---- one test per message


def bad_call(**change: Any) -> None:
    blocks = QueryBlocks(
        cache_seqlens=int32(50, 20),
        seqlen_q=8,
        offsets=int32(0, 4, 8),
        num_sink_tokens=2,
        num_recent_tokens=6,
    )
    arguments = {"scores": random_scores(2, 2, 3, 50), "keep": 8} | change
    select(arguments.pop("scores"), blocks, **arguments)


LISTS = torch.zeros(2, 2, 3, 64, dtype=torch.int32)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"num_sink_tokens": -1}, "num_sink_tokens: got -1, allowed: an int >= 0"),
    ({"num_recent_tokens": -1}, "num_recent_tokens: got -1, allowed: an int >= 0"),
    ({"keep": -1}, "keep: got -1, allowed: an int >= 0"),
    ({"pool_width": 4}, "pool_width: got 4, allowed: an odd int >= 1"),
    ({"pool_width": -1}, "pool_width: got -1, allowed: an odd int >= 1"),
    ({"window_rule": "x"}, "window_rule: got 'x', allowed: decode, block_start, block_end"),
    ({"cache_seqlens": int32(50, -1)}, "cache_seqlens: got -1 in row 1, allowed: an int >= 0"),
    ({"cache_seqlens": int32(51, 1)}, r"seqlen_k: got 50, allowed: at least cache_seqlens\[0\]"),
    ({"starts": int32(1)}, r"starts: got shape \[1\], allowed: \[batch=2\]"),
    ({"q_block_offsets": int32(0, 8)}, r"scores: got shape \[2, 2, 3, 50\], .*num_blocks=1"),
    ({"indices": LISTS.long()}, "indices: got int64, allowed: int32"),
    ({"indices": LISTS[:, :, :2]}, r"indices: got shape .*num_lists=3"),
    ({"indices": LISTS[..., ::2]}, "indices: got strides .*a contiguous tensor"),
    ({"indices": LISTS[..., :15].contiguous()}, "indices: got width 15, allowed: at least 16"),
    ({"topk_length": torch.zeros(2, 2, 3)}, "topk_length: got float32, allowed: int32"),
    ({"topk_length": LISTS[:, :1, :, 0]}, r"topk_length: got shape \[2, 1, 3\]"),
    ({"kept_score": torch.zeros(2, 2)}, r"kept_score: got shape \[2, 2\]"),
    ({"kept_score": torch.zeros(2, 2, 3).double()}, "kept_score: got float64, allowed: float32"),
    ({"scores": random_scores(2, 2, 50)}, r"scores: got shape \[2, 2, 50\], allowed: \[batch, nu"),
    ({"scores": random_scores(2, 2, 3, 50).half()}, "scores: got float16, allowed: float32"),
    ({"scores": random_scores(2, 2, 3, 100)[..., ::2]}, "scores: got strides .*1 in the last dim"),
    ({"hit": torch.zeros(2, 3, dtype=torch.int32)}, "hit: got 2 query blocks, allowed: 1"),
]


@ONE_IMPLEMENTATION
@pytest.mark.parametrize("change, message", ERRORS, ids=[e[1][:44] for e in ERRORS])
def test_error_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_call(**change)


@ONE_IMPLEMENTATION
def test_errors_of_hit() -> None:
    blocks = QueryBlocks(cache_seqlens=int32(50), seqlen_q=1, num_recent_tokens=6)
    scores = random_scores(1, 1, 2, 50)

    def call(hit: Tensor, length: int = 30, last: int = 48) -> None:
        indices = torch.zeros(1, 1, 2, 40, dtype=torch.int32)
        indices[..., 29] = last
        lengths = torch.full((1, 1, 2), length, dtype=torch.int32)
        select(scores, blocks, keep=3, hit=hit, indices=indices, topk_length=lengths)

    second = int32(0, 1).view(1, 2)
    call(second)
    call(second, length=0)
    with pytest.raises(ValueError, match=r"hit: got shape \[1, 1\], allowed: \[batch=1, num_lis"):
        call(int32(1).view(1, 1))
    with pytest.raises(ValueError, match="hit: got int64, allowed: int32"):
        call(second.long())
    for length in (-1, 40):
        message = rf"topk_length: got {length} at \[0, 1\] where hit is set, allowed: 0\.\.39"
        with pytest.raises(ValueError, match=message):
            call(second, length=length)
    for last in (49, 12345):
        message = rf"indices: got {last} as the last entry at \[0, 1\] where hit is set"
        with pytest.raises(ValueError, match=message):
            call(second, last=last)


@ONE_IMPLEMENTATION
def test_nothing_is_written_when_a_check_fails() -> None:
    blocks = QueryBlocks(cache_seqlens=int32(50, 50), seqlen_q=1)
    indices = torch.full((2, 1, 1, 20), 5, dtype=torch.int32)
    lengths = torch.full((2, 1, 1), 20, dtype=torch.int32)
    with pytest.raises(ValueError, match="topk_length: got 20"):
        select(
            random_scores(2, 1, 1, 50),
            blocks,
            keep=10,
            hit=int32(0, 1).view(2, 1),
            indices=indices,
            topk_length=lengths,
        )
    assert (indices == 5).all() and (lengths == 20).all()
