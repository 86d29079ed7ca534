"""Lists of a call, made anew or with what was remembered: a selection cache, rolling pools."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.engine_cache import EngineKVCache
from kvselect.engine_selection_cache import EngineSelectionCache
from kvselect.fixed_cache import FixedKVCache
from kvselect.policies.base import PolicyState
from kvselect.policies.entropy_pool import normalised_entropy, pool_counts
from kvselect.policies.rolling_steps import audit_rolling, sweep_step
from kvselect.policies.scoring_vectors import BlockVectors
from kvselect.policies.soft_vote import Vote, num_lists, scores_are_mass, soft_vote
from kvselect.policies.token_lists import (
    longest_list,
    pick_tokens,
    room,
    token_range,
    with_dense_rows,
)
from kvselect.policies.token_settings import TokenSettings
from kvselect.queries import Queries
from kvselect.rolling_pools import RollingPools, SweepCounts
from kvselect.rope import Rope
from kvselect.selection import Lists, list_width, num_kept
from kvselect.selection_cache import CapturedSelectionCache, ReuseStep, SelectionCache
from kvselect.tensor_parallel import num_ranks

__all__ = ["StepLists", "lists_of_call", "prepare_memory", "remember"]


class StepLists(NamedTuple):
    """Lists of a call and what is known of them."""

    lists: Lists
    total: float | Tensor | None  # as `Vote` has it
    num_nonfinite: Tensor | None
    hit: Tensor | None = None
    sweep: SweepCounts | None = None


def remember(settings: TokenSettings, state: PolicyState, cache: KVCache) -> None:
    """Give a new state what the settings ask for."""
    if settings.similarity_threshold is not None:
        similarity = settings.similarity or ("min" if settings.scope == "kv_head" else "q10")
        kind: type[SelectionCache] = SelectionCache
        if isinstance(cache, FixedKVCache):
            kind = CapturedSelectionCache
        elif isinstance(cache, EngineKVCache):
            kind = EngineSelectionCache
        state.selection_cache = kind(settings.similarity_threshold, settings.max_age, similarity)
    if settings.num_segments is not None:
        state.rolling_pools = RollingPools(
            settings.num_segments,
            num_kept(settings.topk, settings.pool_factor),
            settings.rolling_floor,
            settings.rolling_audit_interval,
        )


def prepare_memory(
    settings: TokenSettings,
    state: PolicyState,
    cache: FixedKVCache,
    num_q_heads: int,
    rope: Rope | None,
) -> list[Tensor]:
    """`Policy.prepare_capture`: the selection cache's tensors, where they are missing."""
    reuse = state.selection_cache
    if not isinstance(reuse, CapturedSelectionCache) or reuse.tensors():
        return []
    longest = max(settings.capacity, settings.dense_limit(rope))
    most = room(settings, longest, cache.capacity)
    reuse.prepare(cache, num_q_heads, num_lists(settings, cache), most)
    return reuse.tensors()


def lists_of_call(
    settings: TokenSettings,
    state: PolicyState,
    parts: list[BlockVectors],
    queries: Queries,
    cache: KVCache,
) -> StepLists:
    """Lists of every query block by the votes of ``parts``.

    Only decode steps reuse what is remembered, whatever selects by their rule: prefill calls cut
    blocks, and later tokens may follow them in the cache.
    """
    remembers = state.selection_cache is not None or state.rolling_pools is not None
    if remembers and queries.phase == "decode" and queries.q_block_offsets is None:
        return _lists_with_memory(settings, state, parts, queries, cache)
    state.invalidate()
    vote = soft_vote(settings, parts, queries, cache, rank=_picks_best(settings))
    width = list_width(min(longest_list(settings, queries, cache), queries.max_seqlen))
    statistics = state.statistics(queries.phase)
    counts = None
    if settings.layer_budget == "entropy_pool":
        counts = _pooled_counts(settings, state, vote, queries, cache)
    lists = pick_tokens(settings, vote, queries, cache, width, statistics=statistics, counts=counts)
    return StepLists(lists, vote.total, vote.num_nonfinite)


def _picks_best(settings: TokenSettings) -> bool:
    """Whether lists begin with the ``keep`` best of the scores as they are."""
    return settings.pool_width == 1 and settings.keep_max == settings.keep


def _pooled_counts(
    settings: TokenSettings, state: PolicyState, vote: Vote, queries: Queries, cache: KVCache
) -> Tensor:
    """What the pool of the pass leaves to this layer: candidates of each (row, block)."""
    at = token_range(settings, queries, cache)
    num_candidates = (at.window_start - at.sink_end).clamp(min=0)
    place = torch.arange(vote.scores.shape[3], device=vote.scores.device)
    candidate = (place >= at.sink_end[..., None]) & (place < at.window_start[..., None])
    votes = vote.scores.nan_to_num(0.0, 0.0, 0.0).sum(2).where(candidate, 0.0)
    dense = at.end - at.start <= settings.dense_limit(queries.rope)
    # Such a row alone would not get here: it takes no part in the pool.
    num_candidates = num_candidates.where(~dense, num_candidates.clamp(max=settings.topk))
    entropy = normalised_entropy(votes, num_candidates)
    counts = pool_counts(
        state.shared(cache), state.layer, queries, entropy, num_candidates, topk=settings.topk
    )
    return (counts * settings.overselect).ceil().long()


def _lists_with_memory(
    settings: TokenSettings,
    state: PolicyState,
    parts: list[BlockVectors],
    queries: Queries,
    cache: KVCache,
) -> StepLists:
    if settings.scope == "layer":
        ranks = num_ranks(queries.process_group)
        allowed = "1 with scope='layer' and remembered lists (ranks would have to agree on them)"
        require(ranks == 1, "ranks of process_group", ranks, allowed)
    reuse, rolling = state.selection_cache, state.rolling_pools
    statistics = state.statistics(queries.phase)
    longest = longest_list(settings, queries, cache)
    decided: Tensor | None = None
    hit: Tensor | None = None
    asked: ReuseStep | None = None
    reused: Lists | None = None
    width = list_width(min(longest, queries.max_seqlen))
    if rolling is not None:
        rolling.follow(cache, num_lists(settings, cache))
    sweeps = rolling is not None and not rolling.all_stopped
    if reuse is not None:
        most = room(settings, longest, queries.max_seqlen)
        asked = reuse.lookup(
            _similarity_queries(settings, queries),
            cache,
            num_lists=num_lists(settings, cache),
            width=width,
            room=most,
            dense_limit=settings.dense_limit(queries.rope),
            reuse_counts=statistics.reuse_counts(cache.device),
        )
        # A scan decides on its way.
        decided = asked.decide(cache) if sweeps else torch.empty_like(asked.age)
        if asked.is_filled:
            hit, reused = decided, reuse.lists
        width = most
    if sweeps:
        assert rolling is not None
        swept = sweep_step(settings, rolling, parts[0], queries, cache, width, hit, reused)
        lists, rolled = swept.lists, swept.counts.rolled
        audit_rolling(settings, rolling, parts, lists, rolled, queries, cache, statistics)
        heads = queries.q.shape[2] // num_lists(settings, cache)
        total = float(heads) if scores_are_mass(settings) else None
        if queries.sink_logits is not None:
            total = None  # what the sinks left to the tokens is not known
        lists = with_dense_rows(settings, lists, queries, cache)
        made = StepLists(lists, total, swept.num_nonfinite, hit, swept.counts)
    else:
        rank = _picks_best(settings)
        vote = soft_vote(settings, parts, queries, cache, decided, rank=rank, reuse=asked)
        lists = pick_tokens(
            settings, vote, queries, cache, width, hit, reused, statistics=statistics
        )
        made = StepLists(lists, vote.total, vote.num_nonfinite, hit)
    if reuse is not None:
        reuse.store(lists, cache)
    return made


def _similarity_queries(settings: TokenSettings, queries: Queries) -> Tensor:
    """What the selection cache compares, [batch, 1, num_q_heads, head_dim]."""
    q = queries.q
    if settings.similarity_on == "unrotated" and settings.positions == "original":
        if queries.q_unrotated is not None:
            q = queries.q_unrotated
        else:
            allowed = "the queries before RoPE (or similarity_on='rotated')"
            require(queries.rope is None, "q_unrotated", None, allowed)
    return q
