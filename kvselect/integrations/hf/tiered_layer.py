"""keep="cpu": cache layers whose keys and values lie in host memory, the sketch on the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvselect.checks import require, require_choice, require_int
from kvselect.integrations.hf.cache_layer import KVSelectLayer
from kvselect.integrations.hf.plan import StackPlan, Tier
from kvselect.lru_slots import Replacement
from kvselect.policies.base import Policy, require_listed_reads
from kvselect.tiered_cache import TieredKVCache

RESIDENT_LISTS = 2
"""Default ``resident_tokens``, in longest lists: what more saves is in docs/tier.md."""


class KVSelectTieredLayer(KVSelectLayer):
    """One layer's keys and values in a `TieredKVCache`; ``keys`` and ``values`` are host memory."""

    def __init__(self, sketch: str | None, tier: Tier) -> None:
        super().__init__(sketch)
        self.tier = tier
        self.cache: TieredKVCache | None = None

    def __repr__(self) -> str:
        return f"KVSelectTieredLayer(sketch={self.sketch!r}, tokens={self.get_seq_length()})"

    def _new_cache(self, batch: int, num_kv_heads: int, head_dim: int) -> TieredKVCache:
        return TieredKVCache(
            batch,
            num_kv_heads,
            head_dim,
            num_sink_tokens=self.tier.num_sink_tokens,
            num_recent_tokens=self.tier.num_recent_tokens,
            resident_tokens=self.tier.resident_tokens,
            dtype=self.dtype,
            device=self.device,
            sketch=self.sketch,
            residency=self.tier.residency,
            replacement=self.tier.replacement,
            block_tokens=self.tier.block_tokens,
        )

    def _show(self) -> tuple[Tensor, Tensor]:
        assert self.cache is not None
        k_head_dim, v_head_dim = self._head_dims
        self.keys = self.cache.k.transpose(1, 2)[..., :k_head_dim]
        self.values = self.cache.v.transpose(1, 2)[..., :v_head_dim]
        return self.keys, self.values


def require_keep(
    keep: str | None, resident_tokens: int | None, replacement: str | None, policy: Policy
) -> int | None:
    """``resident_tokens`` to use; None: everything stays on the device.

    Raises
    ------
    ValueError
        If the policy's steps read more than they list, or a list would not fit; if a setting of
        the tier is given without ``keep="cpu"``.
    """
    require_choice(keep, "keep", (None, "cpu"))
    require_choice(replacement, "replacement", (None, "lru", "lru_s"))
    if keep is None:
        allowed = "None without keep='cpu'"
        require(resident_tokens is None, "resident_tokens", resident_tokens, allowed)
        require(replacement is None, "replacement", replacement, allowed)
        return None
    require_listed_reads(policy)
    longest = _longest_list(policy)
    if resident_tokens is None:
        return RESIDENT_LISTS * longest
    allowed = f"None or an int >= {longest} (the longest list of the policy)"
    require_int(resident_tokens, "resident_tokens", longest, allowed)
    return resident_tokens


def make_tiers(
    plan: StackPlan, policy: Policy, resident_tokens: int, replacement: Replacement = "lru"
) -> dict[int, Tier]:
    """A tier for each cache layer whose readers all select."""
    readers: dict[int, list[bool]] = {}
    for layer in plan.layers:
        if layer.source is not None:
            readers.setdefault(layer.source, []).append(layer.selects)
    settings: Any = policy
    sizes = (
        settings.num_sink_tokens,
        settings.num_recent_tokens + policy.num_margin_tokens,
        max(resident_tokens, _longest_list(policy)),
    )
    block_tokens = getattr(policy, "block_size", 1)  # what lists name together
    order: dict[str, Any] = {"replacement": replacement, "block_tokens": block_tokens}
    return {source: Tier(*sizes, **order) for source, select in readers.items() if all(select)}


def _longest_list(policy: Policy) -> int:
    return max(policy.capacity, policy.dense_below_tokens or 0) + policy.num_margin_tokens
