"""MaxMin: keep tokens whose keys are far from one another (DivPrune, arXiv:2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvselect.policies.base import register_policy
from kvselect.policies.budgets import share_out
from kvselect.policies.eviction import EvictionPolicy, Span

__all__ = ["MaxMin"]

_ROWS_AT_ONCE = 512  # of the distances between all tokens; bounds their memory


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class MaxMin(EvictionPolicy):
    """Evict for diversity: no query is asked.

    The first pick is the token whose nearest neighbour is farthest by ``1 - cos`` of the keys
    before RoPE, each further one ``argmax_j min over picked i of dist(i, j)``; the earliest of
    equal ones. A token is picked once, also where keys are equal.

    Parameters
    ----------
    topk, ratio, span, num_sink_tokens, num_recent_tokens, num_window_queries
        See `EvictionPolicy`. Upstream's ratio is 0.098, of image tokens.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Alvar et al., arXiv:2503.02175, on keys instead of embeddings. Without a rotation
    (`Rope`) keys are compared as they are stored. Cost: ``num_tokens * (num_tokens + topk)``
    distances per KV head.
    """

    query_aware: ClassVar[bool] = False
    needs_keys_before_rope: ClassVar[bool] = True

    @classmethod
    def at_budget(cls, budget: int) -> MaxMin:
        sinks, recent, picked = share_out(budget)
        return cls(topk=picked, num_sink_tokens=sinks, num_recent_tokens=recent)

    def extra_bytes(self, num_tokens: int, **sizes: int) -> tuple[int, int]:
        remembered, momentary = super(MaxMin, self).extra_bytes(num_tokens, **sizes)
        distances = min(_ROWS_AT_ONCE, num_tokens) * num_tokens * sizes["num_kv_heads"]
        return remembered, momentary + 8 * distances

    def choose(self, span: Span, budget: int) -> Tensor:
        return far_apart(span.unit_keys, budget)[0]


def far_apart(unit_keys: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Picks of every head as a mask [num_kv_heads, num_tokens], and the distance of each pick to
    the earlier ones, [num_kv_heads, budget]: of the first one, to its nearest neighbour."""
    num_heads, num_tokens, _ = unit_keys.shape
    kept = torch.zeros(num_heads, num_tokens, dtype=torch.bool, device=unit_keys.device)
    distances = unit_keys.new_zeros(num_heads, budget)
    if budget == 0:
        return kept, distances
    nearest = _nearest_neighbour(unit_keys)
    heads = torch.arange(num_heads, device=unit_keys.device)
    for turn in range(budget):
        free = nearest.masked_fill(kept, -torch.inf)
        picked = free.argmax(1)  # the first of equal ones
        distances[:, turn] = free[heads, picked]
        kept[heads, picked] = True
        distance = 1.0 - (unit_keys @ unit_keys[heads, picked, :, None])[..., 0]
        nearest = distance if turn == 0 else torch.minimum(nearest, distance)
    return kept, distances


def _nearest_neighbour(unit_keys: Tensor) -> Tensor:
    """Distance of every token to the nearest other one, [num_kv_heads, num_tokens]."""
    parts = []
    for begin in range(0, unit_keys.shape[1], _ROWS_AT_ONCE):
        part = unit_keys[:, begin : begin + _ROWS_AT_ONCE]
        similarity = part @ unit_keys.transpose(1, 2)
        similarity.diagonal(begin, 1, 2).fill_(-torch.inf)
        parts.append(1.0 - similarity.amax(2))
    return torch.cat(parts, 1)
