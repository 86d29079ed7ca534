"""Query aggregation: the vectors that score on behalf of each query block, for either positions."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.policies.probe_query import QueryMoments, probe_query
from kvselect.policies.scoring_vectors import (
    Average,
    BlockVectors,
    compact_decode_vectors,
    compact_vectors,
    group_means,
    original_vectors,
)
from kvselect.policies.token_lists import token_range
from kvselect.policies.token_settings import VoteSettings
from kvselect.queries import Queries
from kvselect.query_blocks import BlockRange

__all__ = ["probes", "scoring_vectors"]


def scoring_vectors(settings: VoteSettings, queries: Queries, cache: KVCache) -> list[BlockVectors]:
    """The vectors of every query block; of a decode step its own queries."""
    rope = queries.rope
    if queries.phase == "decode":
        q = queries.q.unsqueeze(2).contiguous()
        q_local: Tensor | None = None
        if settings.positions == "compact":
            assert rope is not None
            rank = _decode_rank(settings, queries, cache)
            q, q_local = compact_decode_vectors(q.float(), rope, settings.num_recent_tokens, rank)
        return [BlockVectors(0, queries.num_blocks, q, q_local)]
    at = token_range(settings, queries, cache)
    if settings.aggregate == "probe":
        average = probes(queries, at, 1 if settings.scope == "layer" else cache.num_kv_heads)
    else:
        average = group_means(1 if settings.aggregate == "mean" else settings.query_groups)
    first = settings.average_queries == "before_rope"
    if settings.positions == "original":
        return original_vectors(queries, at, average, first)
    return compact_vectors(queries, at, settings.keep, settings.num_recent_tokens, average, first)


def probes(
    queries: Queries, at: BlockRange, num_probes: int, moments: QueryMoments | None = None
) -> Average:
    """`probe_query` of every block.

    Parameters
    ----------
    num_probes : int
        As `probe_query` takes it.
    moments : QueryMoments or None
        Takes in the blocks, which must come in their order; None: statistics of each block alone.
    """

    def average(blocks: Tensor, first: int, last: int) -> Tensor:
        length = blocks.shape[2]
        place = torch.arange(-length, 0, device=blocks.device)
        real = place >= -(at.end - at.begin)[:, first:last, None]  # padding comes first
        statistics = None if moments is None else moments.add(blocks, real)
        return probe_query(blocks, real, num_probes, statistics)

    return average


def _decode_rank(settings: VoteSettings, queries: Queries, cache: KVCache) -> Tensor | int:
    """Rank of each query's own token in its list; one number where all lists are full."""
    full = settings.num_sink_tokens + settings.keep + settings.num_recent_tokens
    shortest = min(cache.num_real_tokens) - queries.num_later_tokens - queries.seqlen_q + 1
    if shortest >= full and not cache.lengths_are_bounds:
        return full - 1
    real = queries.cache_seqlens  # up to the last query, without padding; may be negative
    if cache.starts is not None:
        real = real - cache.starts
    place = torch.arange(1 - queries.seqlen_q, 1, device=real.device)
    return (real[:, None] + place).clamp(1, full) - 1
