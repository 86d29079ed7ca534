"""Where a KVCache keeps its tokens: head-major rows, pages of its own, or the pages of an engine.

All three show keys and values as ``[num_blocks, page_block_size, num_kv_heads, head_dim]`` with a
block table (None for rows), which is what the kernels take. What a row holds is the cache's affair:
storage is told how many tokens each row must have room for.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.checks import require

__all__ = ["ForeignPages", "HeadMajorRows", "OwnPages", "Storage"]

_ROW_ALIGNMENT = 128  # tokens; rows are whole sketch blocks


class Storage(Protocol):
    """What a `KVCache` asks of its storage."""

    @property
    def capacity(self) -> int:
        """Tokens per row that fit before more room is made."""
        ...

    @property
    def k_pages(self) -> Tensor: ...
    @property
    def v_pages(self) -> Tensor: ...
    @property
    def block_table(self) -> Tensor | None: ...

    def make_room(self, lengths: list[int], exactly: bool = False) -> None:
        """Room for ``lengths`` tokens in each row; ValueError if there is none.

        What must grow for it grows by an eighth more, unless ``exactly``.
        """
        ...

    def release(self, lengths: list[int]) -> None:
        """Rows need no more than ``lengths`` tokens."""
        ...

    def take_rows(self, rows: list[int], lengths: list[int]) -> None:
        """Rows become ``rows``, which hold ``lengths`` tokens; one may appear more than once."""
        ...

    def tokens(self, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values as [batch, max(lengths), num_kv_heads, head_dim]."""
        ...

    def row_keys(self, row: int, begin: int, end: int) -> Tensor:
        """Keys of positions [begin, end) of one row, [end - begin, num_kv_heads, head_dim]."""
        ...


def grown_capacity(needed: int, exactly: bool) -> int:
    """An eighth more than is needed now, so that appending costs constant time per token.

    No more than that: this is most of a long context's memory, and a prompt that just filled its
    rows must not double it with the first token that follows.
    """
    slack = 0 if exactly else max(needed // 8, 1)
    return -(-(needed + slack) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


def zeros_in_huge_pages(like: Tensor, shape: tuple[int, ...], pinned: bool = False) -> Tensor:
    """Zeros of the dtype and device of ``like``, in huge pages where the system has them.

    ``pinned``: page-locked host memory, which an accelerator copies from and to by itself.
    """
    out = like.new_empty(shape, pin_memory=pinned)
    # Subclasses, FakeTensor among them, may have no memory that advice could be about.
    has_memory = type(out) is Tensor and out.device.type == "cpu"
    if has_memory and not torch.compiler.is_compiling():
        # Advice counts for pages that are not there yet: before the zeros are written.
        torch.ops.kvselect.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out.zero_()


def grown(store: Tensor, dim: int, size: int, pinned: bool = False) -> Tensor:
    """A copy of ``store`` with ``size`` entries along ``dim``, the new ones zero."""
    # Zero, not empty: someone else's masked attention over a row's unused end must find numbers.
    shape = (*store.shape[:dim], size, *store.shape[dim + 1 :])
    larger = zeros_in_huge_pages(store, shape, pinned)
    larger.narrow(dim, 0, store.shape[dim]).copy_(store)
    return larger


class HeadMajorRows:
    """[batch, num_kv_heads, capacity, head_dim], as transformers has it: read by it in place."""

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        pinned: bool = False,
    ) -> None:
        self._pinned = pinned
        k = torch.zeros((batch, num_kv_heads, 0, head_dim), dtype=dtype, device=device)
        self._set_stores(k, torch.zeros_like(k))

    def _set_stores(self, k: Tensor, v: Tensor) -> None:
        self._k, self._v = k, v
        # Views that every op of every step takes: made once.
        self.k_pages, self.v_pages = k.transpose(1, 2), v.transpose(1, 2)

    @property
    def capacity(self) -> int:
        return self._k.shape[2]

    @property
    def block_table(self) -> None:
        return None

    def make_room(self, lengths: list[int], exactly: bool = False) -> None:
        longest = max(lengths, default=0)
        if longest > self.capacity:
            capacity = grown_capacity(longest, exactly)
            # One after the other: the old keys are gone before the old values are held twice.
            fitted = self.capacity
            self._set_stores(grown(self._k, 2, capacity, self._pinned), self._v)
            try:
                self._set_stores(self._k, grown(self._v, 2, capacity, self._pinned))
            except BaseException:  # out of memory: as long as they were, both of them
                self._set_stores(self._k[:, :, :fitted], self._v)
                raise

    def release(self, lengths: list[int]) -> None:
        """Rows keep their room."""

    def take_rows(self, rows: list[int], lengths: list[int]) -> None:
        picked = torch.tensor(rows, dtype=torch.int64, device=self._k.device)
        used = max(lengths, default=0)
        stores = []
        for store in (self._k, self._v):
            fresh = zeros_in_huge_pages(store, (len(rows), *store.shape[1:]), self._pinned)
            fresh[:, :, :used] = store[:, :, :used].index_select(0, picked)  # only what is stored
            stores.append(fresh)
        self._set_stores(*stores)

    def tokens(self, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Views."""
        used = max(lengths, default=0)
        return self.k_pages[:, :used], self.v_pages[:, :used]

    def row_keys(self, row: int, begin: int, end: int) -> Tensor:
        """A view."""
        return self._k[row, :, begin:end].transpose(0, 1)


class ForeignPages:
    """Pages that belong to an engine: read and written in place, never grown, never copied.

    The block table is borrowed, so that pages which the engine adds to it later are seen.
    """

    def __init__(self, k_pages: Tensor, v_pages: Tensor, block_table: Tensor) -> None:
        self._k, self._v, self._table = k_pages, v_pages, block_table

    @property
    def capacity(self) -> int:
        """Tokens that the block table has columns for."""
        return self._table.shape[1] * self._k.shape[1]

    @property
    def k_pages(self) -> Tensor:
        return self._k

    @property
    def v_pages(self) -> Tensor:
        return self._v

    @property
    def block_table(self) -> Tensor:
        return self._table

    def point_to(self, block_table: Tensor) -> None:
        """Other rows of the same pages."""
        self._table = block_table

    def make_room(self, lengths: list[int], exactly: bool = False) -> None:
        longest = max(lengths, default=0)
        allowed = f"at most {self.capacity} tokens per row (foreign pages do not grow)"
        require(longest <= self.capacity, "capacity", longest, allowed)

    def release(self, lengths: list[int]) -> None:
        """The engine knows what it gives back."""

    def take_rows(self, rows: list[int], lengths: list[int]) -> None:
        allowed = "each row once: two rows would append to the same foreign pages"
        require(len(set(rows)) == len(rows), "index", rows, allowed)
        self._table = self._table[torch.tensor(rows, dtype=torch.int64, device=self._table.device)]

    def tokens(self, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Gathered copies; zeros behind shorter rows."""
        return self._gathered(self._k, lengths), self._gathered(self._v, lengths)

    def row_keys(self, row: int, begin: int, end: int) -> Tensor:
        """A gathered copy."""
        return self._gathered_row(self._k, row, begin, end)

    def row_values(self, row: int, begin: int, end: int) -> Tensor:
        """A gathered copy of the values, as `row_keys`."""
        return self._gathered_row(self._v, row, begin, end)

    def _gathered_row(self, store: Tensor, row: int, begin: int, end: int) -> Tensor:
        first = begin // store.shape[1]
        pages = self._table[row, first : self.num_pages(end)].long()
        skipped = first * store.shape[1]
        return store[pages].flatten(0, 1)[begin - skipped : end - skipped]

    def num_pages(self, length: int) -> int:
        """Pages that ``length`` tokens fill."""
        return -(-length // self._k.shape[1])

    def _gathered(self, store: Tensor, lengths: list[int]) -> Tensor:
        tokens = store.new_zeros((len(lengths), max(lengths, default=0), *store.shape[2:]))
        for row, length in enumerate(lengths):
            tokens[row, :length] = self._gathered_row(store, row, 0, length)
        return tokens


class OwnPages(ForeignPages):
    """A pool of pages of our own: grows geometrically; what rows give up is used again."""

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_block_size: int,
    ) -> None:
        shape = (0, page_block_size, num_kv_heads, head_dim)
        pages = torch.zeros(shape, dtype=dtype, device=device)
        table = torch.zeros((batch, 0), dtype=torch.int32, device=device)
        super().__init__(pages, torch.zeros_like(pages), table)
        self._owned: list[list[int]] = [[] for _ in range(batch)]  # the block table, for the host
        self._free: list[int] = []
        self._capacity = 0

    @property
    def capacity(self) -> int:
        return self._capacity

    def make_room(self, lengths: list[int], exactly: bool = False) -> None:
        longest = max(lengths, default=0)
        if longest > self._capacity:
            self._capacity = grown_capacity(longest, exactly)
            self._table = grown(self._table, 1, self.num_pages(self._capacity))
        missing = [self.num_pages(n) - len(pages) for n, pages in zip(lengths, self._owned)]
        needed = sum(max(count, 0) for count in missing)
        if needed > len(self._free):
            before = self._k.shape[0]
            after = max(before + needed - len(self._free), before + before // 8)
            self._k, self._v = grown(self._k, 0, after), grown(self._v, 0, after)
            self._free[:0] = range(after - 1, before - 1, -1)  # the lowest is taken first
        if needed:
            # Not in place: a table made under inference_mode refuses that outside of it.
            self._table = self._table.clone()
        for row, count in enumerate(missing):
            if count <= 0:
                continue
            taken = [self._free.pop() for _ in range(count)]
            have = len(self._owned[row])
            self._table[row, have : have + count] = torch.tensor(taken, dtype=torch.int32)
            self._owned[row] += taken

    def release(self, lengths: list[int]) -> None:
        for pages, length in zip(self._owned, lengths):
            self._free += pages[self.num_pages(length) :]
            del pages[self.num_pages(length) :]

    def take_rows(self, rows: list[int], lengths: list[int]) -> None:
        """A fresh pool in which every row owns its pages, also where two come from one."""
        old = [page for row in rows for page in self._owned[row]]
        picked = torch.tensor(old, dtype=torch.int64, device=self._k.device)
        count = max(self._k.shape[0], len(old))
        stores = []
        for store in (self._k, self._v):
            fresh = zeros_in_huge_pages(store, (count, *store.shape[1:]))
            fresh[: len(old)] = store[picked]
            stores.append(fresh)
        table = self._table.new_zeros((len(rows), self._table.shape[1]))
        owned: list[list[int]] = []
        first = 0
        for row, source in enumerate(rows):
            last = first + len(self._owned[source])
            owned.append(list(range(first, last)))
            table[row, : last - first] = torch.arange(first, last, dtype=torch.int32)
            first = last
        (self._k, self._v), self._table, self._owned = stores, table, owned
        self._free = list(range(count - 1, first - 1, -1))
