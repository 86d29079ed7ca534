"""Decode steps of a rolling sweep: one segment scanned, pools scored anew, audits that are due."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.policies.scoring_vectors import BlockVectors
from kvselect.policies.soft_vote import soft_vote, vote_scale
from kvselect.policies.token_lists import pick_tokens
from kvselect.policies.token_settings import ListSettings
from kvselect.queries import Queries
from kvselect.rolling_pools import RollingPools, Swept
from kvselect.selection import Lists

__all__ = ["audit_rolling", "sweep_step"]


def sweep_step(
    settings: ListSettings,
    rolling: RollingPools,
    vectors: BlockVectors,
    queries: Queries,
    cache: KVCache,
    width: int,
    hit: Tensor | None,
    reused: Lists | None,
) -> Swept:
    """Lists of a rolling sweep, and what it looked at."""
    return rolling.sweep(
        vectors.q[:, 0, 0].float(),
        None if vectors.q_local is None else vectors.q_local[:, 0, 0],
        cache,
        num_sink_tokens=settings.num_sink_tokens,
        num_recent_tokens=settings.num_recent_tokens,
        keep=settings.keep,
        scale=vote_scale(settings, queries),
        sketch=settings.sketch,
        normalise_candidates_only=settings.normalise_over == "candidates",
        rope=queries.rope if settings.positions == "compact" else None,
        width=width,
        hit=hit,
        reused=reused,
        softcap=queries.softcap,
        sink_logits=queries.sink_logits,
    )


def audit_rolling(
    settings: ListSettings,
    rolling: RollingPools,
    parts: list[BlockVectors],
    lists: Lists,
    rolled: Tensor,
    queries: Queries,
    cache: KVCache,
    statistics: PhaseStatistics,
) -> None:
    """Compare the lists that rolled, in rows that are due, with a fresh exact top-k.

    By the mass that either keeps, sinks and recent tokens included.
    """
    limit = settings.dense_limit(queries.rope)
    due = rolling.due()
    if any(due):
        counted = rolled & torch.tensor(due, device=cache.device)[:, None]
        with cache.whole_rows():
            vote = soft_vote(settings, parts, queries, cache, (~counted).int(), exact=True)
        width = lists.indices.shape[-1]
        fresh = pick_tokens(settings, vote, queries, cache, width, keep=settings.topk)
        held = vote.scores.gather(3, lists.indices.clamp(min=0).long())
        kept = held.where(lists.indices >= 0, 0.0).nan_to_num(0.0, 0.0, 0.0).sum(3)[:, 0]
        audited = rolling.add_audit(kept, fresh.kept_score[:, 0], counted)
        real = torch.tensor(cache.num_real_tokens, device=cache.device)[:, None]
        tokens = (counted * real).sum() * (cache.num_kv_heads // counted.shape[1])
        statistics.record_audit(*audited, tokens)
    rolling.void([tokens <= limit for tokens in cache.num_real_tokens])
