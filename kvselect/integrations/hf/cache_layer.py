"""A transformers cache layer over `kvselect.KVCache`: appends in place and shows zero-copy views.

``DynamicLayer.update`` concatenates the whole cache at every step; this layer writes only the new
tokens. Everything that a selection policy remembers about a layer lives here too, so that it
follows the rows of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.integrations.hf.attached_layer import AttachedLayer, RopeState
from kvselect.integrations.hf.head_dims import filled_up, require_head_dim


class KVSelectLayer(AttachedLayer, DynamicLayer):
    """One layer's keys and values in a `KVCache`, shown as ``[batch, heads, seqlen, head_dim]``.

    Parameters
    ----------
    sketch : {"int4", "int8", None}
        Format of the scoring keys that the cache keeps; None where the layer does not select by
        sketch.

    Attributes
    ----------
    cache : KVCache or None
        None until the first `update`.
    version : int
        Moves with everything except an append: what a policy remembered at another version is
        stale.
    """

    def __init__(self, sketch: str | None = None) -> None:
        super().__init__()
        self.sketch = sketch
        self._head_dims = 0, 0  # of the keys and values that came
        self._starts: Tensor | None = None
        self._stores: tuple[Tensor, Tensor] | None = (
            None  # all room, [batch, heads, capacity, head_dim]
        )
        self._past_versions = 0

    def __repr__(self) -> str:
        return f"KVSelectLayer(sketch={self.sketch!r}, tokens={self.get_seq_length()})"

    @property
    def version(self) -> int:
        return self._past_versions + (0 if self.cache is None else self.cache.version)

    def announce(self, rope_state: RopeState, sketch: str | None, starts: Tensor | None) -> None:
        """As `AttachedLayer`; the sketch of a filled layer is rebuilt if it has another format."""
        super().announce(rope_state, sketch, starts)
        self._starts = starts
        if sketch != self.sketch:
            self._change_sketch(sketch)

    def withdraw(self) -> None:
        """Take back what was announced: the forward pass that it was for failed."""
        super().withdraw()
        self._starts = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate as the first keys are, ``[batch, heads, n, head_dim]``."""
        head_dim = require_head_dim(key_states, value_states)
        batch, num_kv_heads = key_states.shape[:2]
        self._head_dims = key_states.shape[-1], value_states.shape[-1]
        self.dtype, self.device = key_states.dtype, key_states.device
        self._replace_cache(self._new_cache(batch, num_kv_heads, head_dim))
        self.is_initialized = True
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[batch, heads, n, head_dim]``; return views of everything stored, so laid out.

        See `AttachedLayer` for what is refused.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._take_announced()
        assert self.cache is not None
        if (
            self._starts is not None
        ):  # before the append, which it must not look like an interruption of
            self.cache.set_starts(self._starts)
            self._starts = None
        if key_states.requires_grad or value_states.requires_grad:  # our ops have no gradient
            key_states, value_states = key_states.detach(), value_states.detach()
        k, v = (filled_up(x, self.cache.head_dim) for x in (key_states, value_states))
        if self.cache.max_seqlen + k.shape[2] > self.cache.capacity:
            self.keys = self.values = self._stores = None  # would keep what the cache grows out of
        try:
            self.cache.append(k.transpose(1, 2), v.transpose(1, 2))
        finally:
            shown = self._show()
        return shown

    def get_seq_length(self) -> int:
        """Tokens stored (padding included)."""
        return 0 if self.cache is None else self.cache.max_seqlen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next `update` will show, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens of every row.

        Raises
        ------
        ValueError
            For a positive number, which once meant the final length.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding may count in a 0-d tensor
        require(tokens_to_remove <= 0, "tokens_to_remove", tokens_to_remove, "0 or a negative int")
        dropped = min(-tokens_to_remove, self.get_seq_length())
        if dropped == 0 or self.cache is None:
            return
        self.cache.crop(dropped)
        if self.validity is not None:
            self.validity = self.validity[:, : self.get_seq_length()]
        self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become ``rows[beam_idx]``."""
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times in a row."""
        if self.cache is not None:
            rows = torch.arange(self.cache.batch, device=self.device)
            self._take_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows: indices, or a boolean mask."""
        self._take_rows(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Forget all tokens and what was remembered of them; the next `update` allocates."""
        self._past_versions = self.version + 1
        self.cache = self.keys = self.values = None
        self._forget()
        self._states.clear()
        self._starts = self._stores = None
        self.is_initialized = False

    def offload(self) -> None:
        """Not supported: the sketch and the selection would have to move with the keys."""
        raise ValueError("offloading: got True, allowed: False for the cache of an attached model")

    prefetch = offload

    def _take_rows(self, index: Tensor) -> None:
        if self.cache is None or self.cache.max_seqlen == 0:  # as DynamicLayer: nothing to take
            return
        index = index.to(self.device)
        batch = self.cache.batch
        self.cache.reorder(index)
        if self.validity is not None:
            self.validity = self.validity.index_select(0, index)
        if self.cache.batch != batch:  # the state is allocated per row
            self.renew_states()
        self._stores = None
        self._show()

    def _change_sketch(self, sketch: str | None) -> None:
        """Rebuild a cache that was filled under a policy with another sketch format."""
        self.sketch = sketch
        old = self.cache
        if old is None:
            return
        cache = self._new_cache(old.batch, old.num_kv_heads, old.head_dim)
        cache.append(old.k.to(self.device), old.v.to(self.device))
        self._replace_cache(cache)
        self._show()

    def _new_cache(self, batch: int, num_kv_heads: int, head_dim: int) -> KVCache:
        return KVCache(
            batch, num_kv_heads, head_dim, dtype=self.dtype, device=self.device, sketch=self.sketch
        )

    def _replace_cache(self, cache: KVCache) -> None:
        if self.cache is not None:
            self._past_versions = self.version + 1
        self.cache = cache
        self._states.clear()
        self._stores = None

    def _show(self) -> tuple[Tensor, Tensor]:
        """Point ``keys`` and ``values`` at what is stored, and return them."""
        cache = self.cache
        assert cache is not None
        if self._stores is None or self._stores[0].shape[2] != cache.capacity:
            pages = zip((cache.k_pages, cache.v_pages), self._head_dims)
            k, v = (page.transpose(1, 2)[..., :head_dim] for page, head_dim in pages)
            self._stores = k, v
        tokens = cache.max_seqlen
        keys, values = (store.narrow(2, 0, tokens) for store in self._stores)
        self.keys, self.values = keys, values
        return keys, values
