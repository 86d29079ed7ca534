"""From scores to lists of tokens: the best candidates, a mass floor, rows that are dense."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.policies.mass_floor import trim_to_count, trim_to_mass
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.policies.soft_vote import Vote
from kvselect.policies.token_settings import ListSettings, VoteSettings, window_rule
from kvselect.queries import Queries
from kvselect.query_blocks import BlockRange, block_range
from kvselect.selection import Lists, list_width, select_blocks

__all__ = [
    "has_dense_rows",
    "longest_list",
    "pick_tokens",
    "room",
    "token_range",
    "with_dense_rows",
]


def pick_tokens(
    settings: ListSettings,
    vote: Vote,
    queries: Queries,
    cache: KVCache,
    width: int,
    hit: Tensor | None = None,
    reused: Lists | None = None,
    keep: int | None = None,
    statistics: PhaseStatistics | None = None,
    counts: Tensor | None = None,
) -> Lists:
    """Sinks, the best candidates and the window; everything, where a row is dense.

    Parameters
    ----------
    width : int
        Entries per list; room for the longest.
    hit, reused
        As `select_blocks` takes them.
    keep : int or None
        Candidates per list, without a mass floor; None: what the settings say.
    statistics : PhaseStatistics or None
        Counts what a mass floor took; needed by one.
    counts : Tensor, [batch, num_blocks], integer, or None
        Candidates of each (row, block), at most `keep_max`; None: as many for all.
    """
    lists = select_blocks(
        vote.scores,
        cache_seqlens=queries.cache_seqlens,
        starts=cache.starts,
        q_block_offsets=queries.q_block_offsets,
        seqlen_q=queries.seqlen_q,
        window_rule=window_rule(settings, queries.phase),
        num_sink_tokens=settings.num_sink_tokens,
        num_recent_tokens=settings.num_recent_tokens,
        keep=settings.keep_max if keep is None else keep,
        width=width,
        pool_width=settings.pool_width,
        hit=hit,
        reused=reused,
        ranking=vote.ranking,
    )
    if settings.mass_target is not None and keep is None:
        assert vote.total is not None and statistics is not None
        floored = trim_to_mass(
            lists,
            vote.scores,
            token_range(settings, queries, cache),
            keep=settings.keep,
            keep_max=settings.keep_max,
            wanted=settings.mass_target * _on_device(vote.total, vote.scores),
            hit=hit,
        )
        lists = floored.lists
        statistics.record_floor(floored.counts)
    if counts is not None:
        lists = trim_to_count(lists, vote.scores, token_range(settings, queries, cache), counts)
    return with_dense_rows(settings, lists, queries, cache)


def token_range(settings: VoteSettings, queries: Queries, cache: KVCache) -> BlockRange:
    """Sinks, candidates and window of every (row, block) of a call."""
    return block_range(
        queries.cache_seqlens,
        cache.starts,
        queries.q_block_offsets,
        queries.seqlen_q,
        window_rule(settings, queries.phase),
        settings.num_sink_tokens,
        settings.num_recent_tokens,
    )


def has_dense_rows(settings: ListSettings, queries: Queries, cache: KVCache) -> bool:
    """Whether a short row may have to be dense beside longer ones.

    Rows within the budget need no care: their lists hold every token anyway.
    """
    several = cache.batch > 1 or cache.lengths_are_bounds
    return several and settings.dense_limit(queries.rope) > settings.budget


def longest_list(settings: ListSettings, queries: Queries, cache: KVCache) -> int:
    """Entries that lists of a call may need."""
    if has_dense_rows(settings, queries, cache):
        return max(settings.capacity, settings.dense_limit(queries.rope))
    return settings.capacity


def room(settings: ListSettings, longest: int, max_seqlen: int) -> int:
    """Entries of lists that are kept: rows may grow."""
    return list_width(min(longest, max(settings.capacity, 2 * max_seqlen)))


def with_dense_rows(
    settings: ListSettings, lists: Lists, queries: Queries, cache: KVCache
) -> Lists:
    """The lists, where those of (row, block)s that are dense beside longer ones hold everything."""
    if not has_dense_rows(settings, queries, cache):
        return lists
    ends = queries.cache_seqlens[:, None]
    if queries.q_block_offsets is not None:
        ends = ends - queries.seqlen_q + queries.q_block_offsets[1:]
    starts = 0 if cache.starts is None else cache.starts[:, None]
    count = (ends - starts).clamp(min=0)[:, :, None]
    dense = count <= settings.dense_limit(queries.rope)
    place = torch.arange(lists.indices.shape[-1], dtype=torch.int32, device=cache.device)
    first = 0 if cache.starts is None else cache.starts[:, None, None, None]
    everything = torch.where(place < count[..., None], place + first, -1)
    return Lists(
        torch.where(dense[..., None], everything, lists.indices),
        torch.where(dense, count, lists.topk_length),
        lists.kept_score.masked_fill(dense, torch.nan),  # it was the shorter list's
    )


def _on_device(number: float | Tensor, like: Tensor) -> Tensor:
    """A number as a 0-d tensor beside ``like``, without a copy to the device."""
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float32, device=like.device)
