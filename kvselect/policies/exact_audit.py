"""The audit of a decode step: what its lists missed of the exact top-k of exact scores."""

from __future__ import annotations

from torch import Tensor

from kvselect.cache import KVCache
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.policies.soft_vote import Vote
from kvselect.policies.token_lists import pick_tokens, token_range
from kvselect.policies.token_settings import ListSettings
from kvselect.queries import Queries
from kvselect.selection import Selection, list_width

__all__ = ["audit_lists"]


def audit_lists(
    settings: ListSettings,
    vote: Vote,
    queries: Queries,
    cache: KVCache,
    selection: Selection,
    statistics: PhaseStatistics,
) -> None:
    """Record the share of the exact top-k that lists hold, and which attention mass either keeps.

    Parameters
    ----------
    vote : Vote
        Exact scores of the step.
    selection : Selection
        What the step attended to.
    """
    votes = vote.scores[:, 0]
    num_lists = votes.shape[1]
    at = token_range(settings, queries, cache)
    width = list_width(min(settings.budget, queries.max_seqlen))
    best = pick_tokens(settings, vote, queries, cache, width, keep=settings.topk)
    listed = selection.indices[:, :num_lists].long()
    listed = listed.where(listed >= 0, votes.shape[2])  # pads mark a place of their own
    marks = votes.new_zeros((*votes.shape[:2], votes.shape[2] + 1))
    marks = marks.scatter(2, listed, 1.0)
    wanted = best.indices[:, 0]
    candidate = (wanted >= at.sink_end[..., None]) & (wanted < at.window_start[..., None])
    found = marks.gather(2, wanted.clamp(min=0).long()).where(candidate, 0.0).sum(2)
    count = candidate.sum(2)
    overlap = (found / count.clamp(min=1)).where(count > 0, 1.0)
    total = votes.nansum(2).clamp(min=1e-30)
    mass: Tensor = (votes.nan_to_num(0.0) * marks[..., :-1]).sum(2) / total
    statistics.record_exact(overlap, mass, best.kept_score[:, 0] / total)
