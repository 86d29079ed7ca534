"""KVCache: one layer's keys and values, contiguous or paged, and the sketch of the keys."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.checks import (
    HEAD_DIMS,
    STORAGE_DTYPES,
    require,
    require_choice,
    require_int,
    require_tensor,
    require_type,
)
from kvselect.sketch import BLOCK_TOKENS, SKETCH_FORMATS, block_bytes, encode, op_format
from kvselect.storage import (
    ForeignPages,
    HeadMajorRows,
    OwnPages,
    Storage,
    grown,
    zeros_in_huge_pages,
)

__all__ = ["CacheChange", "KVCache"]


_SERIALS = count()
_CHANGES_KEPT = 16


class CacheChange(NamedTuple):
    """A change after which what was remembered of the tokens is still true of some of them.

    Attributes
    ----------
    version : int
        The cache's, from then on.
    rows : Tensor, [new_batch], int64, or None
        Rows became ``rows[...]``; None: they stayed.
    num_real_tokens : tuple of int
        Of each row afterwards, without its left padding: its first ones are as they were.
    """

    version: int
    rows: Tensor | None
    num_real_tokens: tuple[int, ...]


class KVCache:
    """Keys and values of one layer for a batch of rows, each row with a length of its own.

    Contiguous storage is head-major, ``[batch, num_kv_heads, capacity, head_dim]``, so that
    transformers reads it in place; it grows geometrically and never truncates. Paged storage is a
    pool of pages and a block table. The kernels see both as ``[num_blocks, page_block_size,
    num_kv_heads, head_dim]`` (`k_pages`, `v_pages`).

    Row lengths are known twice, on the device (`cache_seqlens`) and to the host, so that no step
    reads them back.

    Parameters
    ----------
    batch, num_kv_heads, head_dim : int
        ``head_dim`` is one of `kvselect.checks.HEAD_DIMS`: 32, 64, 80, 96, 128, 160, 192, 256, 512.
    dtype : float32, float16 or bfloat16
    device : device
    capacity : int
        Tokens per row to make room for at once; more is made when needed.
    sketch : "int4", "int8" or None
        Low-bit copy of the keys in blocks of 128 tokens; None: scores read the keys themselves.
    page_block_size : int or None
        Tokens per page of a pool of its own; None: contiguous.

    Raises
    ------
    ValueError, TypeError
        If a size, dtype or format is not one of these.
    """

    keep: ClassVar[Literal["cpu"] | None] = None  # where tokens are kept; None: on the device

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = 0,
        sketch: str | None = "int4",
        page_block_size: int | None = None,
    ) -> None:
        require_int(batch, "batch", 0)
        require_int(num_kv_heads, "num_kv_heads", 1)
        require_int(head_dim, "head_dim", 1)
        require(head_dim in HEAD_DIMS, "head_dim", head_dim, " or ".join(map(str, HEAD_DIMS)))
        require_type(dtype, torch.dtype, "dtype")
        require(dtype in STORAGE_DTYPES, "dtype", dtype, " or ".join(map(str, STORAGE_DTYPES)))
        require_int(capacity, "capacity", 0)
        require_choice(sketch, "sketch", (*SKETCH_FORMATS, None))
        if page_block_size is not None:
            require_int(page_block_size, "page_block_size", 1)
        # As tensors report it ("cuda" is "cuda:0" there), so that comparing is enough.
        device = torch.empty(0, device=device).device
        sizes = batch, num_kv_heads, head_dim, dtype, device
        self._set_up(self._new_storage(*sizes, page_block_size), batch, page_block_size, sketch)
        self._make_room([capacity] * batch, exactly=True)

    def _new_storage(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_block_size: int | None,
    ) -> Storage:
        if page_block_size is None:
            return HeadMajorRows(batch, num_kv_heads, head_dim, dtype, device)
        return OwnPages(batch, num_kv_heads, head_dim, dtype, device, page_block_size)

    def _set_up(
        self, storage: Storage, batch: int, page_block_size: int | None, sketch: str | None
    ) -> None:
        pages = storage.k_pages
        self._storage = storage
        self._page_block_size = page_block_size
        self._num_kv_heads, self._head_dim = pages.shape[2], pages.shape[3]
        self._dtype, self._device = pages.dtype, pages.device
        self._set_lengths([0] * batch, [0] * batch)
        self._cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=self._device)
        self._starts: Tensor | None = None
        # The tensor that set_starts got and its version then: the same again need not be read.
        self._given_starts: tuple[Tensor, int] | None = None
        self._version = self._num_appended = 0
        self._changes: deque[CacheChange] = deque(maxlen=_CHANGES_KEPT)
        self._serial = next(_SERIALS)
        shape: tuple[int, ...] = (batch, self._num_kv_heads)
        self._num_nonfinite = torch.zeros(shape, dtype=torch.int64, device=self._device)
        self._sketch_format = sketch
        self._sketch_data: Tensor | None = None
        if sketch is not None:
            shape = (*shape, 0, block_bytes(sketch, self._head_dim))
            self._sketch_data = torch.zeros(shape, dtype=torch.uint8, device=self._device)

    @classmethod
    def from_pages(
        cls,
        k_pages: Tensor,
        v_pages: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        sketch: str | None = "int4",
    ) -> KVCache:
        """A cache over a foreign pool, read and appended to in place; its sketch is built here.

        Parameters
        ----------
        k_pages, v_pages : Tensor, [num_blocks, page_block_size, num_kv_heads, head_dim]
            Any strides with a contiguous last dim.
        block_table : Tensor, [batch, max_num_blocks], int32
            Page of each block of each row. Borrowed: pages that the engine adds later are seen.
        cache_seqlens : Tensor, [batch], int32
            Tokens stored; copied, and read by the host once.
        sketch : "int4", "int8" or None

        Raises
        ------
        ValueError, TypeError
            If shapes or dtypes do not agree, or a row is longer than its pages. An append beyond
            them raises too: a foreign pool does not grow.
        """
        require_tensor(k_pages, "k_pages", (None, None, None, None), STORAGE_DTYPES)
        device, head_dim = k_pages.device, k_pages.shape[3]
        require(head_dim in HEAD_DIMS, "head_dim", head_dim, " or ".join(map(str, HEAD_DIMS)))
        require_tensor(v_pages, "v_pages", tuple(k_pages.shape), (k_pages.dtype,), device)
        require_tensor(block_table, "block_table", (None, None), (torch.int32,), device)
        batch = block_table.shape[0]
        require_tensor(cache_seqlens, "cache_seqlens", (batch,), (torch.int32,), device)
        require_choice(sketch, "sketch", (*SKETCH_FORMATS, None))
        require_int(k_pages.shape[1], "page_block_size", 1)
        pages = ForeignPages(k_pages, v_pages, block_table)
        lengths: list[int] = cache_seqlens.tolist()
        for row, length in enumerate(lengths):
            allowed = f"0..{pages.capacity} (what block_table has room for)"
            require(0 <= length <= pages.capacity, f"cache_seqlens[{row}]", length, allowed)
            used = block_table[row, : pages.num_pages(length)]
            bad = used[(used < 0) | (used >= k_pages.shape[0])].tolist()
            allowed = f"pages 0..{k_pages.shape[0] - 1}"
            require(not bad, f"block_table[{row}]", bad, allowed)

        cache = cls.__new__(cls)
        cache._set_up(pages, batch, k_pages.shape[1], sketch)
        cache._make_room(lengths)
        cache._set_lengths(lengths)
        cache._cache_seqlens = cache_seqlens.clone()
        for row, length in enumerate(lengths):
            k = pages.row_keys(row, 0, length)
            v = pages.row_values(row, 0, length)
            finite = k.isfinite().all(-1) & v.isfinite().all(-1)
            cache._num_nonfinite[row] = (~finite).sum(0)
        cache._sketch_data = cache._sketched(cache._host_starts)
        return cache

    # --- what is stored ---------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return len(self._lengths)

    @property
    def num_kv_heads(self) -> int:
        return self._num_kv_heads

    @property
    def head_dim(self) -> int:
        return self._head_dim

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def capacity(self) -> int:
        """Tokens per row that fit before more room is made."""
        return self._storage.capacity

    @property
    def page_block_size(self) -> int | None:
        """Tokens per page; None: contiguous."""
        return self._page_block_size

    @property
    def k(self) -> Tensor:
        """Keys, [batch, max_seqlen, num_kv_heads, head_dim]: a view (paged: a gathered copy)."""
        return self._storage.tokens(self._lengths)[0]

    @property
    def v(self) -> Tensor:
        """Values, [batch, max_seqlen, num_kv_heads, head_dim]: a view (paged: a gathered copy)."""
        return self._storage.tokens(self._lengths)[1]

    @property
    def k_pages(self) -> Tensor:
        """Keys as the ops take them, [num_blocks, page_block_size, num_kv_heads, head_dim]."""
        return self._storage.k_pages

    @property
    def v_pages(self) -> Tensor:
        """Values as the ops take them, [num_blocks, page_block_size, num_kv_heads, head_dim]."""
        return self._storage.v_pages

    @property
    def scored_k_pages(self) -> Tensor:
        """`k_pages` for scores from the sketch: keys of sinks, recent tokens, blocks without codes.

        Other pages of a `TieredKVCache` may be anything here.
        """
        return self._storage.k_pages

    @property
    def block_table(self) -> Tensor | None:
        """int32 [batch, max_num_blocks]; None: contiguous."""
        return self._storage.block_table

    @property
    def cache_seqlens(self) -> Tensor:
        """Tokens of each row, int32 [batch]; appends update it in place."""
        return self._cache_seqlens

    @property
    def lengths(self) -> tuple[int, ...]:
        """`cache_seqlens` as the host knows it: no device is asked."""
        return tuple(self._lengths)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest row, known to the host."""
        return self._max_seqlen

    @property
    def starts(self) -> Tensor | None:
        """First real token of each row, int32 [batch]; None: no padding."""
        return self._starts

    @property
    def num_real_tokens(self) -> tuple[int, ...]:
        """Tokens of each row without its left padding, known to the host."""
        return self._num_real_tokens

    @property
    def lengths_are_bounds(self) -> bool:
        """Whether `lengths`, `max_seqlen` and `num_real_tokens` only bound what the device knows.

        False but for a `FixedKVCache`.
        """
        return False

    @property
    def version(self) -> int:
        """Grows by one with every change of stored tokens other than an append.

        What was remembered about an older version is void.
        """
        return self._version

    def changes_since(self, version: int) -> list[CacheChange] | None:
        """What led from an older version to this one; None: nothing older is worth keeping."""
        found = [change for change in self._changes if change.version > version]
        return found if len(found) == self._version - version else None

    @property
    def serial(self) -> int:
        """Which cache of this process it is; a copy has the number of its original."""
        return self._serial

    @property
    def num_appended(self) -> int:
        """Tokens of the last append, the most of any row; 0 after any other change."""
        return self._num_appended

    @property
    def num_nonfinite(self) -> Tensor:
        """Tokens ever appended whose key or value held NaN or inf, int64 [batch, num_kv_heads]."""
        return self._num_nonfinite

    @property
    def sketch_format(self) -> str | None:
        return self._sketch_format

    @property
    def sketch_data(self) -> Tensor | None:
        """Sketch records, uint8 [batch, num_kv_heads, max_blocks, block_bytes].

        Records of blocks that are not whole hold nothing of meaning.
        """
        return self._sketch_data

    @property
    def sketch_in_pages(self) -> bool:
        """Whether records lie with the pages of the keys: only an `EngineKVCache`'s do.

        `sketch_data` is then [num_blocks, num_kv_heads, page_block_size / 128, block_bytes].
        """
        return False

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, sketch, with room not yet used."""
        stores = (self._storage.k_pages, self._storage.v_pages, self._sketch_data)
        return sum(s.numel() * s.element_size() for s in stores if s is not None)

    def __repr__(self) -> str:
        size = self._page_block_size
        layout = "contiguous" if size is None else f"pages of {size}"
        return (
            f"KVCache(batch={self.batch}, num_kv_heads={self._num_kv_heads}, "
            f"head_dim={self._head_dim}, dtype={self._dtype}, device='{self._device}', {layout}, "
            f"sketch={self._sketch_format!r}, max_seqlen={self.max_seqlen})"
        )

    def require_window(self, num_sink_tokens: int, num_recent_tokens: int) -> None:
        """Raise ValueError unless scores may read so many first and last keys: they may, but for a
        `TieredKVCache`."""

    def whole_rows(self) -> AbstractContextManager[None]:
        """For what reads every token: they are all on the device as long as this lasts."""
        return nullcontext()

    # --- what changes it --------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, seqlens: Sequence[int] | Tensor | None = None) -> None:
        """Store new tokens behind each row's last one; sketch every block that they complete.

        Parameters
        ----------
        k, v : Tensor, [batch, n, num_kv_heads, head_dim]
            Any strides with a contiguous last dim; the cache's dtype and device. ``n`` may be 0.
        seqlens : sequence of int or integer Tensor, [batch], or None
            How many of the ``n`` tokens count in each row: the first ones. None: all. The host
            reads a tensor's values.

        Raises
        ------
        ValueError, TypeError
            If anything does not fit, or the CUDA stream is being captured (a replay would not
            count the tokens); nothing is stored then.
        """
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            allowed = "eager calls (kvselect.fixed_cache.FixedKVCache can be captured)"
            require(False, "KVCache", "a stream under capture", allowed)
        heads, dim = self._num_kv_heads, self._head_dim
        require_tensor(k, "k", (self.batch, None, heads, dim), (self._dtype,), self._device)
        num_new = k.shape[1]
        require_tensor(v, "v", (self.batch, num_new, heads, dim), (self._dtype,), self._device)
        num_valid: Tensor | None = None
        counts = [num_new] * self.batch
        if seqlens is not None:
            counts = _read_ints(seqlens, "seqlens", self.batch)
            for row, count in enumerate(counts):
                allowed = f"0..{num_new} (new tokens)"
                require(0 <= count <= num_new, f"seqlens[{row}]", count, allowed)
            num_valid = torch.tensor(counts, dtype=torch.int32, device=self._device)
        longest = max(counts, default=0)
        if longest:
            lengths = [n + count for n, count in zip(self._lengths, counts)]
            self._make_room(lengths)
            torch.ops.kvselect.kv_append.default(
                k,
                v,
                num_valid,
                self._storage.k_pages,
                self._storage.v_pages,
                self._storage.block_table,
                self._cache_seqlens,
                self._sketch_data,
                op_format(self._sketch_format),
                self._num_nonfinite,
                self._starts,
            )
            self._set_lengths(lengths)
        self._num_appended = longest

    def crop(self, num_tokens: int) -> None:
        """Drop the last ``num_tokens`` tokens of every row; `num_nonfinite` keeps its counts.

        Raises
        ------
        ValueError, TypeError
            If a row holds fewer; nothing is dropped then.
        """
        require_int(num_tokens, "num_tokens", 0)
        shortest = min(self._lengths, default=num_tokens)
        allowed = f"0..{shortest} (tokens of the shortest row)"
        require(num_tokens <= shortest, "num_tokens", num_tokens, allowed)
        self._set_lengths([n - num_tokens for n in self._lengths])
        self._cache_seqlens = self._cache_seqlens - num_tokens
        self._storage.release(self._lengths)
        self._changed()
        self._changes.append(CacheChange(self._version, None, self._num_real_tokens))

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Make the rows ``rows[index]``: beams, dropped or repeated requests; batch may change.

        Parameters
        ----------
        index : sequence of int or integer Tensor, [new_batch]
            Each in ``[0, batch)``. The host reads a tensor's values.

        Raises
        ------
        ValueError, TypeError
            If an entry is no row, or a row of a foreign pool appears twice; nothing changes then.
        """
        rows = _read_ints(index, "index", None)
        allowed = f"rows 0..{self.batch - 1}"
        require(all(0 <= row < self.batch for row in rows), "index", rows, allowed)
        lengths = [self._lengths[row] for row in rows]
        picked = torch.tensor(rows, dtype=torch.int64, device=self._device)
        sketch_data = None if self._sketch_data is None else self._sketch_data[picked]
        cache_seqlens, num_nonfinite = self._cache_seqlens[picked], self._num_nonfinite[picked]
        starts = None if self._starts is None else self._starts[picked]
        self._storage.take_rows(rows, lengths)
        # Nothing from here on can fail: an error before it has changed nothing.
        self._sketch_data, self._starts, self._given_starts = sketch_data, starts, None
        self._cache_seqlens, self._num_nonfinite = cache_seqlens, num_nonfinite
        self._set_lengths(lengths, [self._host_starts[row] for row in rows])
        self._changed()
        self._changes.append(CacheChange(self._version, picked, self._num_real_tokens))

    def reset(self) -> None:
        """Forget every token; the room stays."""
        self._set_lengths([0] * self.batch, [0] * self.batch)
        self._cache_seqlens = torch.zeros_like(self._cache_seqlens)
        self._num_nonfinite = torch.zeros_like(self._num_nonfinite)
        self._starts = self._given_starts = None
        self._storage.release(self._lengths)
        self._changed()

    def set_starts(self, starts: Sequence[int] | Tensor | None) -> None:
        """Say where each row's first real token sits; nothing sees the padding before it.

        Parameters
        ----------
        starts : sequence of int or integer Tensor, [batch], or None
            Each >= 0; may lie beyond the row's end. The host reads the values, unless the tensor is
            the one that was set last: pass the same one at every step. Values that differ from the
            last ones bump `version`.

        Raises
        ------
        ValueError, TypeError
            If it is no list of such numbers; nothing changes then.
        """
        if self._are_starts(starts):
            return
        values = [0] * self.batch if starts is None else _read_ints(starts, "starts", self.batch)
        require(all(start >= 0 for start in values), "starts", values, "ints >= 0")
        moved = values != self._host_starts
        on_device = None if starts is None else self._starts
        if starts is not None and (moved or on_device is None):
            on_device = torch.tensor(values, dtype=torch.int32, device=self._device)
        sketch_data = self._sketched(values) if moved else self._sketch_data
        # Nothing from here on can fail: an error before it has changed nothing.
        self._starts, self._sketch_data, self._given_starts = on_device, sketch_data, None
        if isinstance(starts, Tensor) and not starts.is_inference():
            self._given_starts = (starts, starts._version)
        if moved:
            self._set_lengths(self._lengths, values)
            self._changed()

    def _are_starts(self, starts: Sequence[int] | Tensor | None) -> bool:
        """Whether these are the very starts that are set, unchanged since: nobody reads them."""
        if starts is None or not isinstance(starts, Tensor):
            return starts is None and self._starts is None
        if starts is self._starts:
            return True
        given = self._given_starts
        return given is not None and starts is given[0] and starts._version == given[1]

    def _sketched(self, starts: list[int]) -> Tensor | None:
        """`sketch_data` of all whole blocks, anew; they count from each row's first real token."""
        if self._sketch_data is None or self._sketch_format is None:
            return None
        num_whole = [max(n - start, 0) // BLOCK_TOKENS for start, n in zip(starts, self._lengths)]
        if not any(num_whole):
            return self._sketch_data
        # Not in place: tensors made under inference_mode refuse that outside of it.
        fresh = zeros_in_huge_pages(self._sketch_data, tuple(self._sketch_data.shape))
        for row, (start, whole) in enumerate(zip(starts, num_whole)):
            if whole:
                keys = self._storage.row_keys(row, start, start + whole * BLOCK_TOKENS)
                blocks = keys.reshape(whole, BLOCK_TOKENS, *keys.shape[1:])
                records = encode(blocks.permute(2, 0, 1, 3), self._sketch_format)
                fresh[row, :, :whole] = records
        return fresh

    def _set_lengths(self, lengths: list[int], starts: list[int] | None = None) -> None:
        """What the host knows of the rows, and what follows from it for every call until a change.

        ``starts``: None keeps them.
        """
        if starts is not None:
            self._host_starts = starts
        self._lengths = lengths
        self._max_seqlen = max(lengths, default=0)
        real = [max(n - start, 0) for n, start in zip(lengths, self._host_starts)]
        self._num_real_tokens = tuple(real)

    def _changed(self) -> None:
        self._version += 1
        self._num_appended = 0

    def _make_room(self, lengths: list[int], exactly: bool = False) -> None:
        self._storage.make_room(lengths, exactly)
        if self._sketch_data is None:
            return
        needed = max(lengths, default=0) // BLOCK_TOKENS
        if needed > self._sketch_data.shape[2]:  # pages may have a table far longer than any row
            num_blocks = needed if exactly else needed + max(needed // 8, 1)
            num_blocks = min(num_blocks, max(self._storage.capacity // BLOCK_TOKENS, needed))
            self._sketch_data = grown(self._sketch_data, 2, num_blocks)


def _read_ints(values: Sequence[int] | Tensor, name: str, size: int | None) -> list[int]:
    """Integers of a list or tensor for the host; ``size``: how many there must be."""
    if isinstance(values, Tensor):
        integers = (torch.int32, torch.int64)
        require_tensor(values, name, (size,), integers, contiguous_last_dim=False)
        read: list[int] = values.tolist()
        return read
    require_type(values, (list, tuple), name, "a list of ints or an integer tensor")
    for value in values:
        require_type(value, int, name, "ints")
    allowed = f"{size} entries, one per row"
    require(size is None or len(values) == size, name, list(values), allowed)
    return list(values)
