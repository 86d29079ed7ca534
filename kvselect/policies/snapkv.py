"""SnapKV: keep the prompt tokens that its last queries attended to (arXiv:2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import max_pool1d

from kvselect.checks import require_choice
from kvselect.policies.base import register_policy
from kvselect.policies.budgets import share_out
from kvselect.policies.eviction import EvictionPolicy, Span, best
from kvselect.selection import require_pool_width

__all__ = ["SnapKV"]


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(EvictionPolicy):
    """Evict by the attention of an observation window: the control of all other evictions.

    ``score[g, i] = max over |j - i| <= pool_width // 2 of the mean weight that the last
    num_window_queries queries, all heads of group g, gave to token j``.

    Parameters
    ----------
    pool_width : int, odd
        1: off.
    budgets : "kv_head" or "layer"
        "kv_head": every head keeps as many tokens. "layer": the heads of a layer share
        ``num_kv_heads`` times as many, so that their numbers differ.
    topk, ratio, span, num_sink_tokens, num_recent_tokens, num_window_queries
        See `EvictionPolicy`.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Li et al., arXiv:2404.14469; shared budgets: Ada-KV, arXiv:2407.11550, without its
    floor.
    """

    query_aware: ClassVar[bool] = True

    pool_width: int = 7
    budgets: Literal["kv_head", "layer"] = "kv_head"

    def __post_init__(self) -> None:
        EvictionPolicy.__post_init__(self)
        require_pool_width(self.pool_width)
        require_choice(self.budgets, "budgets", ("kv_head", "layer"))

    @classmethod
    def at_budget(cls, budget: int) -> SnapKV:
        sinks, recent, picked = share_out(budget)
        return cls(topk=picked, num_sink_tokens=sinks, num_recent_tokens=recent)

    @property
    def needs_all_heads(self) -> str | None:
        return "budgets='layer' ranks over all heads" if self.budgets == "layer" else None

    def choose(self, span: Span, budget: int) -> Tensor:
        scores = max_pool1d(span.received, self.pool_width, 1, self.pool_width // 2)
        if self.budgets == "kv_head":
            return best(scores, budget)
        return best(scores.flatten(), budget * scores.shape[0]).view(scores.shape)
