"""EvictableKVCache: drops tokens for good, others in every KV head, and frees their memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.checks import require, require_int, require_tensor
from kvselect.selection import Selection
from kvselect.storage import grown

__all__ = ["EvictableKVCache"]

_PAGE_TOKENS = 16  # of the rows that remain: heads that keep less must not pay for those with more


class EvictableKVCache(KVCache):
    """A KVCache until `evict`; from then on every KV head of a row holds tokens of its own.

    What remains lies in `rows`, a paged cache of one head whose row ``b * num_kv_heads + g`` is KV
    head ``g`` of row ``b``: the same kernels read it. Keys keep the rotation of their positions;
    `lengths`, `cache_seqlens` and `max_seqlen` go on counting every token there ever was.

    Parameters
    ----------
    batch, num_kv_heads, head_dim, dtype, device, capacity
        As for KVCache; it has no sketch and no pages before.

    Raises
    ------
    ValueError, TypeError
        As KVCache.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = 0,
    ) -> None:
        self._rows: KVCache | None = None
        self._positions: Tensor | None = None  # [batch * num_kv_heads, room] int32
        self._num_croppable = 0
        self.on_evict: Callable[[], object] | None = (
            None  # told when whoever shows keys must let go
        )
        super().__init__(
            batch,
            num_kv_heads,
            head_dim,
            dtype=dtype,
            device=device,
            capacity=capacity,
            sketch=None,
        )

    @property
    def rows(self) -> KVCache | None:
        """What remains of every (row, KV head), [batch * num_kv_heads] rows; None: everything."""
        return self._rows

    def listed(self) -> Selection:
        """Positions of the tokens that remain, as lists over the whole rows.

        Raises
        ------
        ValueError
            If none was dropped.
        """
        allowed = "a cache that dropped tokens (see evict)"
        require(self._rows is not None, "cache", "all tokens", allowed)
        assert self._rows is not None and self._positions is not None
        shape = (self.batch, self.num_kv_heads)
        width = self._rows.max_seqlen
        indices = self._positions[:, :width].reshape(*shape, width)
        return Selection(indices, self._rows.cache_seqlens.view(shape).clone())

    def evict(self, kept: Tensor, topk_length: Tensor, num_recent_tokens: int) -> None:
        """Keep the listed tokens of every KV head; the memory of all others is free afterwards.

        Parameters
        ----------
        kept : Tensor, [batch, num_kv_heads, width], int32
            Positions, ascending, -1 pads: each row's last ``num_recent_tokens`` among them.
        topk_length : Tensor, [batch, num_kv_heads], int32
            Valid entries; the host reads them.
        num_recent_tokens : int
            So many tokens at the end may be cropped later.

        Raises
        ------
        ValueError, TypeError
            If a shape does not fit, or tokens were dropped before.

        Notes
        -----
        For a moment there are both: the peak is what was stored and what remains.
        """
        require(self._rows is None, "cache", "tokens dropped before", "one that holds all of them")
        shape = (self.batch, self.num_kv_heads)
        require_tensor(kept, "kept", (*shape, None), (torch.int32,), self.device)
        require_tensor(topk_length, "topk_length", shape, (torch.int32,), self.device)
        require_int(num_recent_tokens, "num_recent_tokens", 0)
        num_rows, width = self.batch * self.num_kv_heads, kept.shape[2]
        rows = KVCache(
            num_rows,
            1,
            self.head_dim,
            dtype=self.dtype,
            device=self.device,
            sketch=None,
            page_block_size=_PAGE_TOKENS,
        )
        index = kept.clamp(min=0).long().transpose(1, 2)[..., None]
        index = index.expand(-1, -1, -1, self.head_dim)
        k, v = (
            x.gather(1, index).transpose(1, 2).reshape(num_rows, width, 1, self.head_dim)
            for x in (self.k, self.v)
        )
        rows.append(k, v, topk_length.flatten())
        # What is in them was counted when it came.
        self._num_nonfinite = self._num_nonfinite - rows.num_nonfinite.view(shape)
        sizes = (self.batch, self.num_kv_heads, self.head_dim, self.dtype, self.device)
        self._storage = self._new_storage(*sizes, None)
        self._rows, self._num_croppable = rows, num_recent_tokens
        self._positions = grown(kept.reshape(num_rows, width) + 1, 1, width + width // 8 + 1) - 1
        self._changed()
        if self.on_evict is not None:
            self.on_evict()

    @property
    def num_nonfinite(self) -> Tensor:
        if self._rows is None:
            return self._num_nonfinite
        return self._num_nonfinite + self._rows.num_nonfinite.view(self._num_nonfinite.shape)

    @property
    def k(self) -> Tensor:
        """As KVCache; after `evict` NaN, which takes no memory: nobody may read dropped tokens."""
        return super().k if self._rows is None else self._gone()

    @property
    def v(self) -> Tensor:
        """As `k`."""
        return super().v if self._rows is None else self._gone()

    @property
    def k_pages(self) -> Tensor:
        """As KVCache; ValueError after `evict`, when `rows` has what remains."""
        self._require_all()
        return super().k_pages

    @property
    def v_pages(self) -> Tensor:
        """As `k_pages`."""
        self._require_all()
        return super().v_pages

    @property
    def nbytes(self) -> int:
        """Bytes held, with room not yet used."""
        return super().nbytes if self._rows is None else self._rows.nbytes

    def append(self, k: Tensor, v: Tensor, seqlens: Sequence[int] | Tensor | None = None) -> None:
        """As KVCache: new tokens follow in every KV head."""
        if self._rows is None:
            super().append(k, v, seqlens)
            return
        shape = (self.batch, None, self.num_kv_heads, self.head_dim)
        require_tensor(k, "k", shape, (self.dtype,), self.device)
        require_tensor(v, "v", tuple(k.shape), (self.dtype,), self.device)
        counts = [k.shape[1]] * self.batch if seqlens is None else list(map(int, seqlens))
        require(len(counts) == self.batch, "seqlens", counts, f"{self.batch} entries, one per row")
        each = [count for count in counts for _ in range(self.num_kv_heads)]
        k, v = (x.transpose(1, 2).flatten(0, 1).unsqueeze(2) for x in (k, v))
        self._rows.append(k, v, each if seqlens is not None else None)
        self._num_croppable += min(counts, default=0)
        self._note_positions(k.shape[1], counts)
        self._cache_seqlens = self._cache_seqlens + torch.tensor(
            counts, dtype=torch.int32, device=self.device
        )
        self._set_lengths([n + count for n, count in zip(self._lengths, counts)])
        self._num_appended = max(counts, default=0)

    def crop(self, num_tokens: int) -> None:
        """As KVCache, as far back as no token was dropped."""
        if self._rows is None:
            super().crop(num_tokens)
            return
        require_int(num_tokens, "num_tokens", 0)
        allowed = f"0..{self._num_croppable} (tokens at the end that every head still has)"
        require(num_tokens <= self._num_croppable, "num_tokens", num_tokens, allowed)
        self._rows.crop(num_tokens)
        assert self._positions is not None
        place = torch.arange(self._positions.shape[1], device=self.device)
        gone = place >= self._rows.cache_seqlens[:, None]
        self._positions = self._positions.masked_fill(gone, -1)
        self._num_croppable -= num_tokens
        self._set_lengths([n - num_tokens for n in self._lengths])
        self._cache_seqlens = self._cache_seqlens - num_tokens
        self._changed()

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """As KVCache."""
        if self._rows is not None:
            heads = self.num_kv_heads
            picked = [int(row) for row in index]
            allowed = f"rows 0..{self.batch - 1}"
            require(all(0 <= row < self.batch for row in picked), "index", picked, allowed)
            folded = [row * heads + head for row in picked for head in range(heads)]
            self._rows.reorder(folded)
            assert self._positions is not None
            self._positions = self._positions[torch.tensor(folded, device=self.device)]
        super().reorder(index)

    def reset(self) -> None:
        """Forget every token, and that any was dropped."""
        self._rows, self._positions, self._num_croppable = None, None, 0
        super().reset()

    def set_starts(self, starts: Sequence[int] | Tensor | None) -> None:
        """As KVCache; other values than before are refused once tokens were dropped."""
        before = list(self._host_starts)
        if self._rows is not None and starts is not None and not self._are_starts(starts):
            values = [int(start) for start in starts]
            require(values == before, "starts", values, f"{before} (tokens were dropped)")
        super().set_starts(starts)

    def _note_positions(self, num_new: int, counts: list[int]) -> None:
        """Positions of the tokens that `rows` has just got; `lengths` do not count them yet."""
        assert self._rows is not None and self._positions is not None
        needed = max(self._rows.lengths, default=0) + num_new
        positions = self._positions.clone()  # lists that were given out stay as they were
        if needed > positions.shape[1]:
            positions = grown(positions + 1, 1, needed + needed // 8) - 1
        heads, new = self.num_kv_heads, torch.arange(num_new, device=self.device)
        valid = new < torch.tensor(counts, device=self.device).repeat_interleave(heads)[:, None]
        first = torch.tensor(self._lengths, device=self.device).repeat_interleave(heads)[:, None]
        before = self._rows.cache_seqlens[:, None] - valid.sum(1, keepdim=True)
        values = (first + new).where(valid, -1).int()
        self._positions = positions.scatter(1, before + new, values)

    def _gone(self) -> Tensor:
        nothing = torch.full((1, 1, 1, 1), torch.nan, dtype=self.dtype, device=self.device)
        return nothing.expand(self.batch, self.max_seqlen, self.num_kv_heads, self.head_dim)

    def _require_all(self) -> None:
        allowed = "a cache that holds every token (this one was evicted: see rows)"
        require(self._rows is None, "k_pages, v_pages", "dropped tokens", allowed)
