"""Coverage: keep tokens that stand for queries and for all other tokens (MMTok, 2508.18264)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvselect.checks import require, require_float
from kvselect.policies.base import register_policy
from kvselect.policies.budgets import share_out
from kvselect.policies.eviction import EvictionPolicy, Span

__all__ = ["Coverage"]


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage(EvictionPolicy):
    """Evict what is covered: greedily maximise ``sum over rows of max_{j in S} [P; alpha * Q]``.

    ``P``: attention weights of the window's ``m`` queries over the span, over ``m``; ``Q[i, j] =
    softmax_j(cos(k_i, k_j) / temperature) / num_tokens`` of the keys before RoPE. The greedy set
    has at least ``1 - 1/e`` of the best set's coverage.

    Parameters
    ----------
    alpha : float >= 0
        Weight of covering tokens against covering queries.
    temperature : float > 0
    topk, ratio, span, num_sink_tokens, num_recent_tokens, num_window_queries
        See `EvictionPolicy`.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Dong et al., arXiv:2508.18264; weights of the model's own attention stand for the
    paper's similarity of text and image. Without a rotation (`Rope`) keys are compared as they are
    stored. Lazy greedy: a gain is computed anew only when it might be the largest. Memory:
    ``num_tokens ** 2`` floats, one KV head at a time: for spans of some thousand tokens.
    """

    query_aware: ClassVar[bool] = True
    needs_keys_before_rope: ClassVar[bool] = True

    alpha: float = 0.5
    temperature: float = 0.2

    def __post_init__(self) -> None:
        EvictionPolicy.__post_init__(self)
        alpha = require_float(self.alpha, "alpha", "a float >= 0")
        require(alpha >= 0.0, "alpha", alpha, "a float >= 0")
        temperature = require_float(self.temperature, "temperature", "a float > 0")
        require(temperature > 0.0, "temperature", temperature, "a float > 0")

    @classmethod
    def at_budget(cls, budget: int) -> Coverage:
        sinks, recent, picked = share_out(budget)
        return cls(topk=picked, num_sink_tokens=sinks, num_recent_tokens=recent)

    def choose(self, span: Span, budget: int) -> Tensor:
        kept = torch.zeros(span.keys.shape[:2], dtype=torch.bool, device=span.keys.device)
        for head in range(kept.shape[0]):
            rows = self.rows(span.weights[head], span.unit_keys[head])
            kept[head, greedy_cover(rows, budget)] = True
        return kept

    def extra_bytes(self, num_tokens: int, **sizes: int) -> tuple[int, int]:
        remembered, momentary = super(Coverage, self).extra_bytes(num_tokens, **sizes)
        return remembered, momentary + 16 * num_tokens**2  # four tables of one head

    def rows(self, weights: Tensor, unit_keys: Tensor) -> Tensor:
        """``[P; alpha * Q]`` of one head, [num_rows, num_tokens]."""
        alike = (unit_keys @ unit_keys.T / self.temperature).softmax(1) / unit_keys.shape[0]
        return torch.cat((weights / weights.shape[0], self.alpha * alike))


def greedy_cover(rows: Tensor, budget: int) -> list[int]:
    """Columns in the order of picking; the earliest of equal gains."""
    columns = rows.T.contiguous()
    covered = rows.new_zeros(rows.shape[0])
    waiting = [(-gain, column) for column, gain in enumerate(columns.sum(1).tolist())]
    heapq.heapify(waiting)
    picked: list[int] = []
    while len(picked) < budget:
        _, column = heapq.heappop(waiting)
        gain = float((columns[column] - covered).relu().sum())
        if waiting and waiting[0] < (-gain, column):  # its gain shrank since: another may be best
            heapq.heappush(waiting, (-gain, column))
            continue
        picked.append(column)
        covered = torch.maximum(covered, columns[column])
    return picked
