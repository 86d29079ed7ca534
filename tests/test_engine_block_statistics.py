"""Statistics that lie with pages are those of a row alone, whoever had the pages before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvselect import KVCache
from kvselect.block_statistics import KINDS, BlockStatistics
from kvselect.engine_block_statistics import EngineBlockStatistics
from kvselect.engine_cache import EngineKVCache

HEADS, DIM, PAGE, SIZE, NUM_PAGES = 2, 32, 12, 4, 16


class Rows:
    """Rows in an engine's pages, and each in a cache of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)
        shape = (NUM_PAGES, PAGE, HEADS, DIM)
        nan = torch.full(shape, float("nan"))  # of whoever had the pages before
        self.cache = EngineKVCache(nan, nan.clone(), sketch=None)
        self.statistics = EngineBlockStatistics(SIZE, KINDS, self.cache)
        self.alone: dict[int, tuple[KVCache, BlockStatistics]] = {}
        self.pages: dict[int, list[int]] = {}

    def serve(self, names: list[int]) -> None:
        table = torch.full((len(names), 5), -1, dtype=torch.int32)
        for row, name in enumerate(names):
            table[row, : len(self.pages[name])] = torch.tensor(self.pages[name])
        lengths = [self.alone[name][0].max_seqlen for name in names]
        self.cache.serve(table, torch.tensor(lengths, dtype=torch.int32), lengths)

    def append(self, names: list[int], count: int) -> None:
        shape = (len(names), count, HEADS, DIM)
        k, v = (torch.randn(shape, generator=self.generator) for _ in range(2))
        k[:, 0, 0, 3] = float("inf")  # such a key does not count
        for name in names:
            self.alone.setdefault(
                name, (KVCache(1, HEADS, DIM, sketch=None), BlockStatistics(SIZE, KINDS))
            )
        self.serve(names)
        self.cache.append(k, v)
        self.statistics.follow(self.cache)
        for row, name in enumerate(names):
            cache, statistics = self.alone[name]
            cache.append(k[row : row + 1], v[row : row + 1])
            statistics.follow(cache)

    def compare(self, names: list[int]) -> None:
        self.serve(names)
        self.statistics.follow(self.cache)  # nothing was appended since
        for row, name in enumerate(names):
            cache, statistics = self.alone[name]
            used = -(-cache.max_seqlen // SIZE)
            assert self.statistics.num_blocks >= used
            for table in (*KINDS, "finite", "num_finite"):
                got: Tensor = getattr(self.statistics, table)[row, :, :used]
                wanted: Tensor = getattr(statistics, table)[0, :, :used]
                torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_rows_of_pages_are_rows_alone() -> None:
    rows = Rows()
    rows.pages = {0: [7, 3, 9], 1: [0, 1, 2, 14], 2: [5], 3: [6, 4]}
    rows.append([0], 30)
    rows.append([1], 11)
    rows.append([2], 1)
    rows.append([3], 17)
    rows.compare([0, 1, 2, 3])
    for order in ([1, 0], [2, 1], [1], [2, 1, 3], [0, 3, 2, 1]):
        rows.append(order, 1)
        rows.compare(order)
    rows.append([1, 2], 5)  # one row is shorter than what is brought up to date
    rows.compare([3, 2, 1, 0])


def test_pages_are_shared_and_change_hands() -> None:
    rows = Rows()
    rows.pages = {0: [7, 3, 9]}
    rows.append([0], 26)
    full = {name: table[[7, 3]].clone() for name, table in rows.statistics._in_pages.items()}
    rows.pages[1] = [9, 7]  # of a request that is gone, and one that is not
    rows.append([1], 3)
    rows.compare([1])
    for name, table in rows.statistics._in_pages.items():
        assert torch.equal(table[[7, 3]].nan_to_num(), full[name].nan_to_num()), name


def test_nothing_is_written_behind_a_row() -> None:
    """A page's end is a row's end: the next page of the table is nobody's, or another's."""
    rows = Rows()
    rows.pages = {0: [7]}
    rows.append([0], PAGE)
    others = [page for page in range(NUM_PAGES) if page != 7]
    for name, table in rows.statistics._in_pages.items():
        assert (table[others] == 0).all(), name


def test_room_is_known() -> None:
    rows = Rows()
    each = 2 * DIM * 4 + 2 * DIM * 4 + 2 * DIM * 4 + SIZE + 4
    assert rows.statistics.nbytes == NUM_PAGES * HEADS * (PAGE // SIZE) * each
    assert rows.statistics.kinds == KINDS and rows.statistics.block_size == SIZE


def test_pages_hold_whole_blocks() -> None:
    rows = Rows()
    message = r"^page_block_size: got 12, allowed: a multiple of 5, the tokens of a block of the"
    with pytest.raises(ValueError, match=message):
        EngineBlockStatistics(5, ("min_max",), rows.cache)
