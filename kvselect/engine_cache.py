"""EngineKVCache: one layer's keys and values in the pages of a serving engine.

The engine owns pages and block tables, and brings other rows at every step: requests start, end,
share prefixes, are preempted and start again elsewhere. So nothing here is remembered by row. What
kvselect adds to a page, the sketch of its keys, lies with the page: who shares a page shares its
records, and who writes to it anew writes them anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.checks import (
    HEAD_DIMS,
    STORAGE_DTYPES,
    require,
    require_choice,
    require_tensor,
)
from kvselect.sketch import BLOCK_TOKENS, SKETCH_FORMATS, block_bytes, op_format
from kvselect.storage import ForeignPages, zeros_in_huge_pages

__all__ = ["EngineKVCache", "sketch_share"]


class EngineKVCache(KVCache):
    """A KVCache over foreign pages whose rows are set for each group of calls by `serve`.

    Parameters
    ----------
    k_pages, v_pages : Tensor, [num_blocks, page_block_size, num_kv_heads, head_dim]
        Any strides with a contiguous last dim; written by `append` only.
    sketch : "int4", "int8" or None
        With a sketch ``page_block_size`` is a multiple of 128, the tokens of a sketch block.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or the page size do not fit.

    Notes
    -----
    A record is written by the append that completes its block and read only where the row is at
    least so long, so records of pages that the engine gave to someone else are never read.
    """

    def __init__(self, k_pages: Tensor, v_pages: Tensor, *, sketch: str | None = "int4") -> None:
        require_tensor(k_pages, "k_pages", (None, None, None, None), STORAGE_DTYPES)
        num_blocks, page_block_size, num_kv_heads, head_dim = k_pages.shape
        require(head_dim in HEAD_DIMS, "head_dim", head_dim, " or ".join(map(str, HEAD_DIMS)))
        require_tensor(v_pages, "v_pages", tuple(k_pages.shape), (k_pages.dtype,), k_pages.device)
        require_choice(sketch, "sketch", (*SKETCH_FORMATS, None))
        require_page_block_size(page_block_size, sketch)
        no_rows = torch.zeros((0, 0), dtype=torch.int32, device=k_pages.device)
        self._pages = ForeignPages(k_pages, v_pages, no_rows)
        self._set_up(self._pages, 0, page_block_size, None)
        self._sketch_format = sketch
        if sketch is not None:
            like = torch.empty(0, dtype=torch.uint8, device=k_pages.device)
            per_page = page_block_size // BLOCK_TOKENS
            shape = (num_blocks, num_kv_heads, per_page, block_bytes(sketch, head_dim))
            self._sketch_data = zeros_in_huge_pages(like, shape)

    @property
    def sketch_in_pages(self) -> bool:
        return self._sketch_data is not None

    def serve(
        self,
        block_table: Tensor,
        cache_seqlens: Tensor,
        lengths: Sequence[int],
        num_nonfinite: Tensor | None = None,
    ) -> None:
        """Make these the rows of the calls that follow.

        Parameters
        ----------
        block_table : Tensor, [batch, max_num_blocks], int32
            Borrowed.
        cache_seqlens : Tensor, [batch], int32
            Tokens that each row holds; borrowed, appends update it in place.
        lengths : sequence of int
            The same for the host, which is trusted: nothing is read back.
        num_nonfinite : Tensor, [batch, num_kv_heads], int64, or None
            Defects that the rows count already; borrowed. None: none.

        Raises
        ------
        ValueError, TypeError
            If shapes or dtypes do not agree.
        """
        batch = len(lengths)
        require_tensor(block_table, "block_table", (batch, None), (torch.int32,), self._device)
        require_tensor(cache_seqlens, "cache_seqlens", (batch,), (torch.int32,), self._device)
        self._pages.point_to(block_table)
        self._cache_seqlens = cache_seqlens
        self._set_lengths(list(lengths), [0] * batch)
        shape = (batch, self._num_kv_heads)
        if num_nonfinite is None:
            num_nonfinite = torch.zeros(shape, dtype=torch.int64, device=self._device)
        require_tensor(num_nonfinite, "num_nonfinite", shape, (torch.int64,), self._device)
        self._num_nonfinite = num_nonfinite
        self._changed()

    def append(self, k: Tensor, v: Tensor, seqlens: Sequence[int] | Tensor | None = None) -> None:
        """As KVCache; every row takes all tokens (``seqlens`` is None)."""
        require(seqlens is None, "seqlens", seqlens, "None (an engine's rows append together)")
        heads, dim = self._num_kv_heads, self._head_dim
        require_tensor(k, "k", (self.batch, None, heads, dim), (self._dtype,), self._device)
        require_tensor(v, "v", tuple(k.shape), (self._dtype,), self._device)
        num_new = k.shape[1]
        lengths = [length + num_new for length in self._lengths]
        self._pages.make_room(lengths)
        torch.ops.kvselect.kv_append.default(
            k,
            v,
            None,
            self.k_pages,
            self.v_pages,
            self.block_table,
            self._cache_seqlens,
            self._sketch_data,
            op_format(self._sketch_format),
            self._num_nonfinite,
            None,
            self.sketch_in_pages,
        )
        self._set_lengths(lengths)
        self._num_appended = num_new

    def crop(self, num_tokens: int) -> None:
        """Refused, as `reorder`, `reset` and `set_starts`: the engine says what rows there are."""
        _refuse("crop")

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        _refuse("reorder")

    def reset(self) -> None:
        _refuse("reset")

    def set_starts(self, starts: Sequence[int] | Tensor | None) -> None:
        _refuse("set_starts")


def _refuse(call: str) -> None:
    require(False, "EngineKVCache", call, "serve, append (rows and lengths are the engine's)")


def require_page_block_size(page_block_size: int, sketch: str | None) -> None:
    """ValueError unless pages of so many tokens can keep a sketch."""
    if sketch is not None:
        allowed = f"a multiple of {BLOCK_TOKENS} with sketch={sketch!r}, any size with sketch=None"
        whole = page_block_size >= 1 and page_block_size % BLOCK_TOKENS == 0
        require(whole, "page_block_size", page_block_size, allowed)


def sketch_share(sketch: str | None, head_dim: int, itemsize: int) -> float:
    """Bytes of a sketch over those of the keys and values that it describes."""
    if sketch is None:
        return 0.0
    return block_bytes(sketch, head_dim) / (2 * BLOCK_TOKENS * head_dim * itemsize)
