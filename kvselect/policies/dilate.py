"""Dilate: keep the most attended tokens and their neighbours (HiPrune, arXiv:2508.00553)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvselect.checks import require, require_float, require_int
from kvselect.policies.base import register_policy
from kvselect.policies.budgets import share_out
from kvselect.policies.eviction import EvictionPolicy, Span, best

__all__ = ["Dilate"]


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class Dilate(EvictionPolicy):
    """Evict all but anchors, what lies beside them, and the best of the rest.

    Anchors are the ``round(alpha * budget / group)`` tokens of highest mean weight from the window
    (at least one), ``group = 2 * radius + 1``; their neighbours are the tokens within ``radius``,
    or on a grid of ``grid_columns`` the four around them (``group = 5``), never across the edge of
    a row. The rest is filled by what the prompt's very last query gave.

    Parameters
    ----------
    alpha : float in [0, 1]
        Share of the budget that goes to anchors and their neighbours.
    radius : int >= 0
    grid_columns : int or None
        The span is an image of rows of so many tokens; None: a line.
    topk, ratio, span, num_sink_tokens, num_recent_tokens, num_window_queries
        See `EvictionPolicy`.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Liu et al., arXiv:2508.00553, by the attention of the language model instead of the
    vision encoder's layers. `Dilated` widens the lists of a method that selects anew at every step.
    """

    query_aware: ClassVar[bool] = True

    alpha: float = 0.1
    radius: int = 1
    grid_columns: int | None = None

    def __post_init__(self) -> None:
        EvictionPolicy.__post_init__(self)
        alpha = require_float(self.alpha, "alpha", "a float in [0, 1]")
        require(0.0 <= alpha <= 1.0, "alpha", alpha, "a float in [0, 1]")
        require_int(self.radius, "radius", 0)
        if self.grid_columns is not None:
            require_int(self.grid_columns, "grid_columns", 1, "None or an int >= 1")

    @classmethod
    def at_budget(cls, budget: int) -> Dilate:
        sinks, recent, picked = share_out(budget)
        return cls(topk=picked, num_sink_tokens=sinks, num_recent_tokens=recent)

    def choose(self, span: Span, budget: int) -> Tensor:
        group = 2 * self.radius + 1 if self.grid_columns is None else 5
        num_anchors = min(max(round(self.alpha * budget / group), 1), budget)
        anchors = best(span.received, num_anchors)
        beside = self.dilated(anchors) & ~anchors
        last = span.weights[:, -(span.weights.shape[1] // span.num_queries) :].mean(1)
        # Anchors first, then neighbours by their weights, then the rest: weights are at most 1.
        rank = torch.where(beside, 1.0 + span.received, last)
        return best(rank.masked_fill(anchors, 3.0), budget)

    def dilated(self, kept: Tensor) -> Tensor:
        """``kept`` [..., num_tokens], bool, and the tokens beside."""
        num_tokens, wide = kept.shape[-1], kept.clone()
        if self.grid_columns is None:
            for reach in range(1, min(self.radius, num_tokens - 1) + 1):
                wide[..., reach:] |= kept[..., :-reach]
                wide[..., :-reach] |= kept[..., reach:]
            return wide
        columns = self.grid_columns
        wide[..., columns:] |= kept[..., :-columns]
        wide[..., :-columns] |= kept[..., columns:]
        place = torch.arange(num_tokens, device=kept.device) % columns
        wide[..., 1:] |= kept[..., :-1] & (place[1:] != 0)
        wide[..., :-1] |= kept[..., 1:] & (place[:-1] != columns - 1)
        return wide
