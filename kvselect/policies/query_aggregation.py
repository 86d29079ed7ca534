"""Query aggregation: the vectors that score on behalf of each query block, for either positions."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.policies.probe_query import QueryMoments, probe_query
from kvselect.policies.scoring_vectors import (
    Average,
    BlockVectors,
    compact_decode_vectors,
    compact_vectors,
    equal_blocks,
    group_means,
    original_vectors,
)
from kvselect.policies.token_lists import token_range
from kvselect.policies.token_settings import VoteSettings
from kvselect.queries import Queries
from kvselect.query_blocks import BlockRange, block_range

__all__ = ["ProbeSettings", "probe_vectors", "probes", "scoring_vectors"]


class ProbeSettings(Protocol):
    """What `probe_vectors` reads of a policy."""

    @property
    def num_recent_tokens(self) -> int: ...
    @property
    def scope(self) -> Literal["kv_head", "layer"]: ...
    @property
    def positions(self) -> Literal["original", "compact"]: ...


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


def probe_vectors(
    settings: ProbeSettings, queries: Queries, cache: KVCache, moments: QueryMoments | None = None
) -> Tensor:
    """One probe for every query block, as keys are cached; the mean of the question behind it.

    Parameters
    ----------
    moments : QueryMoments or None
        As `probes` takes it.

    Returns
    -------
    Tensor, [batch, num_blocks, 1 or 2, num_q_heads, head_dim]
        With ``queries.question``, 2.
    """
    rope = queries.rope if settings.positions == "compact" else None
    if queries.phase == "decode":
        q = queries.q.unsqueeze(2)
        return q if rope is None else rope.rotate(q.float(), settings.num_recent_tokens)
    at = block_range(
        queries.cache_seqlens,
        cache.starts,
        queries.q_block_offsets,
        queries.seqlen_q,
        "block_start",
        0,
        settings.num_recent_tokens,
    )
    probe = probes(queries, at, 1 if settings.scope == "layer" else cache.num_kv_heads, moments)
    asked = None if queries.question is None else queries.question.float().mean(1)

    def average(blocks: Tensor, first: int, last: int) -> Tensor:
        vectors = probe(blocks, first, last)
        if asked is None:
            return vectors
        return torch.cat([vectors, asked[:, None, None].expand_as(vectors)], dim=2)

    if settings.positions == "original":
        (part,) = original_vectors(queries, at, average, True)
        return part.q
    assert rope is not None
    parts = [average(b, first, last) for first, last, b in equal_blocks(queries.q, queries.offsets)]
    return rope.rotate(torch.cat(parts, dim=1), settings.num_recent_tokens)


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
