"""Cache layers of policies that drop tokens of the prompt for good."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from kvselect.evictable_cache import EvictableKVCache
from kvselect.integrations.hf.cache_layer import KVSelectLayer
from kvselect.integrations.hf.plan import StackPlan


class KVSelectEvictingLayer(KVSelectLayer):
    """One layer's keys and values in an `EvictableKVCache`.

    Once tokens are gone ``keys`` and ``values`` have their shape still, are NaN and take no memory.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.cache: EvictableKVCache | None = None

    def __repr__(self) -> str:
        return f"KVSelectEvictingLayer(tokens={self.get_seq_length()})"

    @property
    def has_dropped(self) -> bool:
        """Whether tokens are gone."""
        return self.cache is not None and self.cache.rows is not None

    def _new_cache(self, batch: int, num_kv_heads: int, head_dim: int) -> EvictableKVCache:
        cache = EvictableKVCache(
            batch, num_kv_heads, head_dim, dtype=self.dtype, device=self.device
        )
        cache.on_evict = self._show
        return cache

    def _show(self) -> tuple[Tensor, Tensor]:
        assert self.cache is not None
        self._stores = None
        k_head_dim, v_head_dim = self._head_dims
        self.keys = self.cache.k.transpose(1, 2)[..., :k_head_dim]
        self.values = self.cache.v.transpose(1, 2)[..., :v_head_dim]
        return self.keys, self.values


def settle_evictions(plan: StackPlan) -> frozenset[int]:
    """The cache layers that may be evicted: those with one reader; the others' readers run dense.

    A token that one reader drops would be gone for all of them.
    """
    readers = Counter(layer.source for layer in plan.layers)
    for layer in plan.layers:
        if not layer.selects:
            continue
        if layer.source is None:
            layer.reason = "its cache holds latents (MLA): nothing of one KV head can be dropped"
        elif readers[layer.source] > 1:
            layer.reason = "shares its keys with other layers, which would miss what it drops"
    sources = [layer.source for layer in plan.layers if layer.selects]
    return frozenset(source for source in sources if source is not None)
