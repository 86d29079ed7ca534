"""BlockStatistics: it says of each block what the block's finite keys say, after anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvselect import KVCache, TieredKVCache
from kvselect.block_statistics import KINDS, BlockStatistics
from kvselect.fixed_cache import FixedKVCache
from kvselect.reference import blocks_of_row

HEADS, DIM = 2, 32


def tokens(batch: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn((2, batch, n, HEADS, DIM), generator=generator)
    return k, v


def check(statistics: BlockStatistics, cache: KVCache) -> None:
    """Every block of every row against float64, computed from what the cache holds."""
    size = statistics.block_size
    for row in range(cache.batch):
        for number, block in enumerate(blocks_of_row(cache, row, size)):  # type: ignore[arg-type]
            for head in range(HEADS):
                keys = cache.k[row, list(block), head].double()
                finite = keys.isfinite().all(-1)
                listed = statistics.finite[row, head, number]
                assert listed[: len(block)].tolist() == finite.tolist()
                assert not listed[len(block) :].any()
                assert statistics.num_finite[row, head, number, 0] == finite.sum()
                values = cache.v[row, list(block), head].double()[finite]
                keys = keys[finite]
                tables = statistics.min_max, statistics.moments, statistics.unit_mean
                found = [x[row, head, number] for x in tables]
                if not len(keys):
                    assert all(x.isnan().all() for x in found)
                    continue
                bounds = torch.cat([keys.amax(0), keys.amin(0)])
                assert torch.equal(found[0].double(), bounds)
                moments = torch.cat([keys.mean(0), keys.var(0, correction=0)])
                assert torch.allclose(found[1].double(), moments, atol=2e-6)
                direction = torch.nn.functional.normalize(keys.mean(0), dim=0)
                assert torch.allclose(found[2].double(), direction, atol=2e-6)
                mean = statistics.mean_value[row, head, number].double()
                assert torch.allclose(mean, values.mean(0), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_block_size", [None, 16])
@pytest.mark.parametrize("size", [1, 16, 20])
def test_appends_in_any_pieces(dtype: Any, page_block_size: int | None, size: int) -> None:
    cache = KVCache(3, HEADS, DIM, dtype=dtype, sketch=None, page_block_size=page_block_size)
    statistics = BlockStatistics(size, KINDS)
    cache.set_starts([0, 5, 40])
    statistics.follow(cache)
    for seed, counts in enumerate([(50, 43, 20), (1, 1, 1), (1, 0, 1), (7, 30, 0), (1, 1, 1)]):
        k, v = (x.to(dtype) for x in tokens(3, max(counts), seed))
        cache.append(k, v, list(counts))
        statistics.follow(cache)
        check(statistics, cache)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 40)),
            st.tuples(st.just("crop"), st.integers(0, 30)),
            st.tuples(st.just("reorder"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
            st.tuples(st.just("reset"), st.just(0)),
            st.tuples(st.just("starts"), st.integers(0, 9)),
            st.tuples(st.just("look"), st.just(0)),
        ),
        max_size=12,
    )
)
def test_follows_whatever_happens_to_the_cache(steps: list[tuple[str, Any]]) -> None:
    cache, statistics = KVCache(2, HEADS, DIM, sketch=None), BlockStatistics(16, KINDS)
    for seed, (what, arg) in enumerate([("append", 37), ("look", 0), *steps, ("look", 0)]):
        if what == "append":
            cache.append(*tokens(cache.batch, arg, seed))
        elif what == "crop":
            cache.crop(min(arg, min(cache.lengths)))
        elif what == "reorder":
            cache.reorder([row % cache.batch for row in arg])
        elif what == "reset":
            cache.reset()
        elif what == "starts":
            cache.set_starts([arg, 0, 3][: cache.batch])
        else:
            statistics.follow(cache)
    check(statistics, cache)


def test_a_crop_and_a_new_order_read_only_what_they_open(monkeypatch: Any) -> None:
    cache, statistics = KVCache(2, HEADS, DIM, sketch=None), BlockStatistics(16, KINDS)
    cache.append(*tokens(2, 400))
    statistics.follow(cache)
    read = []
    compute = BlockStatistics._compute
    monkeypatch.setattr(
        BlockStatistics, "_compute", lambda s, c, n: (read.append(n), compute(s, c, n))[1]
    )
    cache.crop(3)  # 397 tokens: the last block is open again
    cache.append(*tokens(2, 1, 7))
    statistics.follow(cache)
    cache.reorder([1, 0, 1])
    cache.append(*tokens(3, 1, 8))
    statistics.follow(cache)
    statistics.follow(cache)
    assert read == [1, 1, 0]
    check(statistics, cache)


def test_received_follows_rows_and_forgets_what_is_cropped() -> None:
    cache, statistics = KVCache(2, HEADS, DIM, sketch=None), BlockStatistics(16, representatives=2)
    cache.append(*tokens(2, 40))
    statistics.follow(cache)
    assert not statistics.received.any()
    statistics.received[0] += 1.0
    statistics.received[1] += 2.0
    cache.reorder([1, 0])
    cache.crop(10)
    cache.append(*tokens(2, 10, 1))
    statistics.follow(cache)
    flat = statistics.received.flatten(2)
    assert (flat[0, :, :30] == 2.0).all() and (flat[1, :, :30] == 1.0).all()
    assert not flat[:, :, 30:].any()
    cache.set_starts([1, 0])  # blocks are others: nothing is known of them
    statistics.follow(cache)
    assert not statistics.received.any()


def test_another_cache_is_looked_at_anew() -> None:
    statistics = BlockStatistics(16, KINDS)
    for seed in (0, 1):
        cache = KVCache(1, HEADS, DIM, sketch=None)
        cache.append(*tokens(1, 33, seed))
        statistics.follow(cache)
        check(statistics, cache)


def test_keys_that_are_not_finite_do_not_count() -> None:
    cache, statistics = KVCache(1, HEADS, DIM, sketch=None), BlockStatistics(16, KINDS)
    k, v = tokens(1, 60)
    k[0, 3, 0, 5], k[0, 20, 1, 0] = torch.nan, torch.inf
    k[0, 32:48, 0, 1] = -torch.inf
    cache.append(k, v)
    statistics.follow(cache)
    check(statistics, cache)
    assert statistics.min_max[0, 0, 2].isnan().all()
    assert statistics.min_max[0, 1, 2].isfinite().all()


def test_a_fixed_cache_by_single_tokens() -> None:
    """The host never learns the lengths; changes are followed at once."""
    cache = FixedKVCache(2, HEADS, DIM, capacity=120, sketch=None)
    statistics = BlockStatistics(16, KINDS)
    cache.append(*tokens(2, 30), torch.tensor([30, 21], dtype=torch.int32))
    with cache.known_lengths():
        statistics.follow(cache)
    held = [table.data_ptr() for table in statistics.tensors()]
    for step in range(20):
        cache.append(*tokens(2, 1, step))
        statistics.follow(cache)
    with cache.known_lengths():
        check(statistics, cache)
    cache.crop(18)
    cache.reorder(torch.tensor([1, 0]))
    for step in range(3):
        cache.append(*tokens(2, 1, 50 + step))
        statistics.follow(cache)
    with cache.known_lengths():
        check(statistics, cache)
    for count in (17, 40):
        cache.append(*tokens(2, count, count))
        statistics.follow(cache)
    with cache.known_lengths():
        check(statistics, cache)
    assert [table.data_ptr() for table in statistics.tensors()] == held


def test_a_tiered_cache_shows_its_window() -> None:
    cache = TieredKVCache(
        1, HEADS, DIM, sketch=None, num_sink_tokens=0, num_recent_tokens=32, resident_tokens=64
    )
    statistics, twin = BlockStatistics(16, ("min_max",)), BlockStatistics(16, ("min_max",))
    plain = KVCache(1, HEADS, DIM, sketch=None)
    for seed, n in enumerate([200, *[1] * 40]):
        k, v = tokens(1, n, seed)
        for into in (cache, plain):
            into.append(k, v)
        statistics.follow(cache)
        twin.follow(plain)
        cache.drop_whole_rows()
    blocks = 240 // 16
    assert torch.equal(statistics.min_max[:, :, :blocks], twin.min_max[:, :, :blocks])
    again = BlockStatistics(16, ("min_max",))  # begins when most tokens are on the host
    again.follow(cache)
    assert torch.equal(again.min_max[:, :, :blocks], twin.min_max[:, :, :blocks])


@pytest.mark.parametrize(
    ("size", "kinds", "error", "message"),
    [
        (0, (), ValueError, "block_size: got 0, allowed: an int >= 1"),
        (1.5, (), TypeError, "block_size: got float 1.5"),
        (16, ("median",), ValueError, "kinds: got 'median', allowed: 'min_max' or 'moments' or"),
    ],
)
def test_settings_are_checked(size: Any, kinds: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        BlockStatistics(size, kinds)


def test_it_says_how_much_it_holds() -> None:
    cache, statistics = KVCache(1, HEADS, DIM, sketch=None), BlockStatistics(16, ("min_max",))
    cache.append(*tokens(1, 1600))
    statistics.follow(cache)
    rows = statistics.num_blocks
    assert 100 <= rows <= 114
    assert statistics.nbytes == HEADS * rows * (2 * DIM * 4 + 16 + 4)
