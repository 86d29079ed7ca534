"""EngineBlockStatistics: block statistics that lie with a serving engine's pages.

As the sketch does: who shares a page shares what stands for its keys, who writes to it writes that
anew, and nothing is known of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.block_statistics import BlockStatistics, rows_of_pages
from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.engine_cache import EngineKVCache
from kvselect.storage import zeros_in_huge_pages

__all__ = ["EngineBlockStatistics", "require_whole_blocks"]


class EngineBlockStatistics(BlockStatistics):
    """BlockStatistics of an `EngineKVCache`.

    `follow` after every append; what is read then is of the rows that the cache serves.

    Parameters
    ----------
    block_size : int
        [tokens] A page holds a whole number of blocks.
    kinds : tuple of str
        As BlockStatistics; there are no representatives, which are chosen by what a row attends to.
    cache : EngineKVCache
        Room is made for all of its pages.

    Raises
    ------
    ValueError, TypeError
        If a size or kind is not one of these.

    Notes
    -----
    A step reads bounds where they lie, and gathers once what it needs of the other tables of its
    rows: which tokens count, a byte each, and moments and means where a policy has them.
    """

    def __init__(self, block_size: int, kinds: tuple[str, ...], cache: EngineKVCache) -> None:
        super().__init__(block_size, kinds)
        pages = cache.k_pages
        require_whole_blocks(pages.shape[1], block_size)
        self._cache_of_pages = cache
        self._per_page = pages.shape[1] // block_size
        shape = (pages.shape[0], cache.num_kv_heads, self._per_page)
        self._in_pages: dict[str, Tensor] = {}
        for name, (width, dtype) in self._columns(cache.head_dim).items():
            like = torch.empty(0, dtype=dtype or cache.dtype, device=cache.device)
            self._in_pages[name] = zeros_in_huge_pages(like, (*shape, width))
        self._rows_seen: int | None = None
        self._some_are_shorter = False  # than the blocks that are written

    @property
    def nbytes(self) -> int:
        """Bytes held, of all pages."""
        return sum(table.nbytes for table in self._in_pages.values())

    @property
    def num_blocks(self) -> int:
        """Blocks of the longest row that is served."""
        return -(-self._cache_of_pages.max_seqlen // self._block_size)

    def follow(self, cache: KVCache) -> None:
        """Bring the blocks up to date with what the last append brought, if that was the last
        change."""
        assert cache is self._cache_of_pages
        num_new = cache.num_appended
        if num_new:
            changed = (num_new + self._block_size - 2) // self._block_size + 1
            changed = min(changed, self.num_blocks)
            fewest = -(-min(cache.num_real_tokens) // self._block_size)
            self._some_are_shorter = fewest < changed
            self._compute(cache, changed)

    def _write(self, name: str, block: Tensor, values: Tensor) -> None:
        """Values [batch, num_kv_heads, n, width] of blocks [batch, n]."""
        cache = self._cache_of_pages
        table = cache.block_table
        assert table is not None
        column = (block // self._per_page).clamp(max=table.shape[1] - 1)
        page, slot = table.gather(1, column).long(), block % self._per_page
        values = values.transpose(1, 2).to(self._in_pages[name].dtype)
        if self._some_are_shorter:  # never in a server's steps: a mask waits for the device
            # They have fewer blocks than were asked for: behind them is somebody else's page.
            there = block * self._block_size < cache.cache_seqlens[:, None]
            page, slot, values = page[there], slot[there], values[there]
        self._in_pages[name][page, :, slot] = values

    @property
    def min_max_pages(self) -> tuple[Tensor, Tensor | None]:
        """Read where they lie: bounds are most of what a step would gather."""
        return self._in_pages["min_max"], self._pages_of_rows()

    def _table(self, name: str) -> Tensor:
        """Of the rows that are served; gathered once."""
        cache = self._cache_of_pages
        if self._rows_seen != cache.version:
            self._rows_seen, self._tables = cache.version, {}
        if name not in self._tables:
            self._tables[name] = rows_of_pages(self._in_pages[name], self._pages_of_rows())
        return self._tables[name]

    def _pages_of_rows(self) -> Tensor:
        cache = self._cache_of_pages
        assert cache.block_table is not None
        num_pages = -(-cache.max_seqlen // (self._per_page * self._block_size))
        return cache.block_table[:, :num_pages]


def require_whole_blocks(page_block_size: int, block_size: int) -> None:
    """ValueError unless pages of so many tokens hold whole blocks."""
    allowed = f"a multiple of {block_size}, the tokens of a block of the policy"
    whole = page_block_size >= 1 and page_block_size % block_size == 0
    require(whole, "page_block_size", page_block_size, allowed)
