"""FixedKVCache: room for so many tokens, row lengths that only the device knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.checks import require, require_int, require_tensor
from kvselect.sketch import op_format

__all__ = ["FixedKVCache"]


class Follower(Protocol):
    """What remembers something of a cache's tokens."""

    def clear(self) -> None:
        """Forget it, in place: captured steps go on writing to the same tensors."""


class FixedKVCache(KVCache):
    """A contiguous KVCache whose appends and reads never touch the host.

    Every step has the same shapes and the same tensors, so a graph that was captured for one step
    (``torch.compile``, CUDA graphs) serves all others. To the host every row is as long as its room
    (`max_seqlen`, `num_real_tokens`), which bounds whatever it decides; `known_lengths` reads the
    true lengths for a while.

    Parameters
    ----------
    batch, num_kv_heads, head_dim, dtype, device, sketch
        As for KVCache.
    capacity : int >= 1
        Tokens per row, once and for all.

    Attributes
    ----------
    followers : WeakSet of Follower
        Told of every change but appends: captured steps look at no version.

    Raises
    ------
    ValueError, TypeError
        As KVCache; an append beyond the room raises in the op on the CPU. On CUDA, where no host
        knows the lengths, rows stay full and drop what does not fit.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        sketch: str | None = "int4",
    ) -> None:
        require_int(capacity, "capacity", 1)
        self.followers: WeakSet[Follower] = WeakSet()
        super().__init__(
            batch,
            num_kv_heads,
            head_dim,
            dtype=dtype,
            device=device,
            capacity=capacity,
            sketch=sketch,
        )
        self._room = capacity
        self._starts = torch.zeros(batch, dtype=torch.int32, device=self._device)
        self._forget_lengths()

    @property
    def capacity(self) -> int:
        return self._room

    @property
    def lengths_are_bounds(self) -> bool:
        return self._bounds

    def tensors(self) -> list[Tensor]:
        """Everything that steps read and write in place: for ``mark_static_address``."""
        found = [self.k_pages, self.v_pages, self._cache_seqlens, self._num_nonfinite, self._starts]
        return [tensor for tensor in (*found, self._sketch_data) if tensor is not None]

    @contextmanager
    def known_lengths(self) -> Iterator[None]:
        """Let the host know the true lengths: reads them from the device once."""
        assert self._starts is not None
        self._set_lengths(self._cache_seqlens.tolist(), self._starts.tolist())
        self._bounds = False
        try:
            yield
        finally:
            self._forget_lengths()

    def append(self, k: Tensor, v: Tensor, seqlens: Sequence[int] | Tensor | None = None) -> None:
        """As KVCache, without a look at the host's lengths; ``seqlens``: int32 Tensor or None."""
        heads, dim = self._num_kv_heads, self._head_dim
        require_tensor(k, "k", (self.batch, None, heads, dim), (self._dtype,), self._device)
        require_tensor(v, "v", tuple(k.shape), (self._dtype,), self._device)
        if seqlens is not None:
            require_tensor(seqlens, "seqlens", (self.batch,), (torch.int32,), self._device)
        torch.ops.kvselect.kv_append.default(
            k,
            v,
            seqlens,
            self.k_pages,
            self.v_pages,
            None,
            self._cache_seqlens,
            self._sketch_data,
            op_format(self._sketch_format),
            self._num_nonfinite,
            self._starts,
        )
        self._num_appended = k.shape[1]

    def crop(self, num_tokens: int) -> None:
        """Drop the last ``num_tokens`` tokens of every row, or what it has."""
        require_int(num_tokens, "num_tokens", 0)
        self._cache_seqlens.sub_(num_tokens).clamp_(min=0)
        self._changed()

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Rows become ``rows[index]``, as many as before, in place."""
        rows = torch.as_tensor(index, dtype=torch.int64, device=self._device)
        allowed = f"{self.batch} rows (a cache of fixed room keeps their number)"
        require(rows.shape == (self.batch,), "index", tuple(rows.shape), allowed)
        for tensor in self.tensors():
            tensor.copy_(tensor.index_select(0, rows))
        self._given_starts = None
        self._changed()

    def reset(self) -> None:
        """Forget every token, in place."""
        assert self._starts is not None
        for tensor in (self._cache_seqlens, self._num_nonfinite, self._starts):
            tensor.zero_()
        self._given_starts = None
        self._changed()

    def set_starts(self, starts: Sequence[int] | Tensor | None) -> None:
        """As KVCache, in place; compares on the host, so not for captured steps."""
        assert self._starts is not None
        with self.known_lengths():
            kept, sketch_data = self._starts, self._sketch_data
            super().set_starts([0] * self.batch if starts is None else starts)
            # KVCache makes these anew; captured steps know the old ones.
            if self._starts is not kept:
                kept.copy_(self._starts)
                self._starts = kept
            if sketch_data is not None and self._sketch_data is not sketch_data:
                assert self._sketch_data is not None
                sketch_data.copy_(self._sketch_data)
                self._sketch_data = sketch_data

    def __getstate__(self) -> dict[str, Any]:
        """Without followers, which are not this cache's to copy; their copies come back."""
        return {name: value for name, value in self.__dict__.items() if name != "followers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.followers = WeakSet()

    def _changed(self) -> None:
        super()._changed()
        for follower in self.followers:
            follower.clear()

    def _forget_lengths(self) -> None:
        self._set_lengths([self._room] * len(self._lengths), [0] * len(self._lengths))
        self._bounds = True
