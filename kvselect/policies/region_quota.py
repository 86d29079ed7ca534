"""RegionQuota: an overview says how many tokens each region keeps (HiRED, arXiv:2408.10945)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvselect.checks import require, require_float, require_int
from kvselect.policies.base import register_policy
from kvselect.policies.budgets import share_out
from kvselect.policies.eviction import EvictionPolicy, Span, best

__all__ = ["RegionQuota", "quotas"]


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class RegionQuota(EvictionPolicy):
    """Evict region by region, by quotas that the overview's attention gives.

    The span is an overview of ``overview_tokens`` tokens, then regions of ``region_tokens`` each
    that show in detail, in its order, what the overview shows as a whole (a thumbnail and its
    tiles). ``alpha`` of the budget goes to the overview, the rest to the regions in proportion to
    how many of the overview's top ``1 - alpha`` tokens fall into the stretch that each one shows.
    Inside a region the tokens of highest mean weight from the window are kept.

    Parameters
    ----------
    overview_tokens, region_tokens : int
        A span no longer than the overview is one region.
    alpha : float in [0, 1]
    topk, ratio, span, num_sink_tokens, num_recent_tokens, num_window_queries
        See `EvictionPolicy`; upstream's rate is ``ratio=0.2``.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Arif et al., arXiv:2408.10945. Quotas by largest remainder; what a full region cannot
    take goes to the others.
    """

    query_aware: ClassVar[bool] = True

    overview_tokens: int = 576
    region_tokens: int = 576
    alpha: float = 0.5

    def __post_init__(self) -> None:
        EvictionPolicy.__post_init__(self)
        require_int(self.overview_tokens, "overview_tokens", 1)
        require_int(self.region_tokens, "region_tokens", 1)
        alpha = require_float(self.alpha, "alpha", "a float in [0, 1]")
        require(0.0 <= alpha <= 1.0, "alpha", alpha, "a float in [0, 1]")

    @classmethod
    def at_budget(cls, budget: int) -> RegionQuota:
        sinks, recent, picked = share_out(budget)
        return cls(topk=picked, num_sink_tokens=sinks, num_recent_tokens=recent)

    def choose(self, span: Span, budget: int) -> Tensor:
        received = span.received
        num_heads, num_tokens = received.shape
        overview = min(self.overview_tokens, num_tokens)
        begins = list(range(overview, num_tokens, self.region_tokens))
        ends = [min(begin + self.region_tokens, num_tokens) for begin in begins]
        room = [overview, *(end - begin for begin, end in zip(begins, ends))]
        kept = torch.zeros_like(received, dtype=torch.bool)
        for head in range(num_heads):
            top = best(received[head, :overview], round((1 - self.alpha) * overview))
            # The stretch of the overview that a token belongs to, by its share of the way.
            shown = torch.arange(overview, device=top.device) * max(len(begins), 1) // overview
            votes = torch.bincount(shown[top], minlength=len(begins)).tolist() if begins else []
            own = self.alpha * budget if begins else float(budget)
            total = max(sum(votes), 1)
            shares = [own, *((budget - own) * vote / total for vote in votes)]
            for quota, begin, end in zip(
                quotas(shares, budget, room), [0, *begins], [overview, *ends]
            ):
                kept[head, begin:end] = best(received[head, begin:end], quota)
        return kept


def quotas(shares: list[float], total: int, room: list[int]) -> list[int]:
    """``total`` in whole parts in proportion to ``shares``, none above its ``room``.

    Largest remainder, the first of equal ones; what a full part cannot take goes to the others in
    proportion to their shares, or evenly where these have none.
    """
    parts = [0] * len(shares)
    left = min(total, sum(room))
    while left > 0:
        open_ = [i for i in range(len(shares)) if parts[i] < room[i]]
        weight = sum(shares[i] for i in open_)
        exact = {i: left * (shares[i] / weight if weight > 0 else 1 / len(open_)) for i in open_}
        given = {i: min(int(exact[i]), room[i] - parts[i]) for i in open_}
        for i, count in given.items():
            parts[i] += count
        left -= sum(given.values())
        if any(given[i] < int(exact[i]) for i in open_):
            continue  # somebody was full: share out anew among the others
        for i in sorted(open_, key=lambda i: (int(exact[i]) - exact[i], i)):
            if left > 0 and parts[i] < room[i]:
                parts[i] += 1
                left -= 1
    return parts
