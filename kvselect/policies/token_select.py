"""TokenSelect: tokens picked one by one by a soft vote of the query heads (arXiv:2411.02886)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvselect.arguments import require_compact_rope
from kvselect.cache import KVCache
from kvselect.checks import (
    require,
    require_bool,
    require_choice,
    require_float,
    require_int,
    require_scale,
    require_type,
)
from kvselect.crossovers import Crossover
from kvselect.fixed_cache import FixedKVCache
from kvselect.policies.base import (
    Policy,
    PolicyState,
    decode_policies,
    longest_block,
    register_policy,
    require_listed_reads,
    selection_of,
    visible_tokens,
)
from kvselect.policies.budgets import share_out
from kvselect.policies.mass_floor import trim_to_mass
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.policies.scoring_vectors import (
    BlockVectors,
    compact_decode_vectors,
    compact_vectors,
    original_vectors,
)
from kvselect.queries import Phase, Queries
from kvselect.query_blocks import BlockRange, block_range
from kvselect.rolling_pools import MAX_SEGMENTS, RollingPools, SweepCounts, Swept
from kvselect.rope import Rope
from kvselect.score import score_blocks
from kvselect.selection import (
    Lists,
    Selection,
    list_width,
    num_kept,
    require_pool_width,
    select_blocks,
)
from kvselect.selection_cache import CapturedSelectionCache, SelectionCache
from kvselect.sketch import BLOCK_TOKENS, SKETCH_FORMATS
from kvselect.tensor_parallel import num_ranks, sum_over_ranks

__all__ = ["TokenSelect"]


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSelect(Policy):
    """Sinks, the tokens that most attention mass falls on, and recent tokens; anew for each query.

    Parameters
    ----------
    topk, num_sink_tokens, num_recent_tokens : int
        Tokens kept by score, at the start, at the end. With a sketch, ``num_recent_tokens >= 128``.
    scope : "kv_head" or "layer"
        Who shares one list.
    score_scale : float or None
        Of the logits of the vote only; None: the attention's own ``softmax_scale``.
    normalise_over : "visible" or "candidates"
        "candidates" gives every head a total weight of 1 whatever its mass there (published form).
    chunk_size : int
        Prefill: tokens whose blocks are scored in one scan; bounds memory, changes no result.
    q_block_size : int
        Prefill: queries that share one selection.
    num_tail_tokens, tail_q_block_size : int
        Prefill: the last ``num_tail_tokens`` of every call go into blocks of ``tail_q_block_size``.
    window_anchor : "block_start" or "block_end"
        Where a block's recent window is counted from. "block_end" leaves its first query fewer
        predecessors and needs ``num_recent_tokens >= q_block_size``.
    query_groups, aggregate : int, "sum_vote", "max_vote" or "mean"
        A block is split into at most ``query_groups`` runs of neighbouring queries; the mean query
        of each votes with a softmax of its own, and the votes are added or their maximum is taken.
        "mean": one mean query.
    average_queries : "before_rope" or "after_rope"
        Average un-rotated queries, then rotate the mean once; or the other way round (published
        form).
    pool_width : int, odd
        A candidate ranks by the largest score within ``pool_width // 2`` of it; 1: off.
    positions : "original" or "compact"
        "compact": keys are cached un-rotated, and a selected token's position is its rank in the
        list.
    sketch : "int4", "int8" or None
        Format of the scoring keys; None: exact keys.
    overselect : float >= 1
        ``ceil(overselect * topk)`` tokens are picked: covers the ranking noise of a sketch.
    dense_layers : tuple of int
        Layers that never select; read by `attach`.
    dense_prefill : bool
        Select in decode only.
    dense_below_tokens : int or None
        Rows of at most so many tokens are dense, in prefill and decode, and so are all rows of at
        most ``num_sink_tokens + topk + num_recent_tokens``. None: in decode, the length up to which
        dense attention is the faster one on this machine, where that was measured
        (`kvselect.break_even`); near it results then depend on the machine. Compact positions end
        the dense path at the trained length.
    mass_target : float in (0, 1), or None
        Each list takes more candidates, up to ``topk_max`` (times ``overselect``), until the
        estimated attention mass that it keeps, averaged over its heads, reaches this. Never fewer
        than without. None: as many for every query.
    topk_max : int >= topk, or None
        Given exactly where ``mass_target`` is. Lists that fall short of the target with so many are
        counted (`PhaseStatistics.num_short_of_mass`).
    similarity_threshold : float in (0, 1], or None
        Reuse a list while queries are at least so similar; None: select at every step.
    max_age : int
        Most steps in a row that a list is reused.
    similarity : "min", "q10", "flat" or None
        How the cosines of the heads that share a list combine; None: "min" for scope "kv_head",
        "q10" for "layer".
    similarity_on : "unrotated" or "rotated"
        Which queries are compared: rotated ones drift by position alone.
    num_segments : int in [2, 64], or None
        Rolling sweep: a decode step scans one of so many interleaved segments of the row, and
        scores anew what mattered when the others were scanned (their pools). None: every step scans
        everything. A list that the selection cache reuses does not even scan its segment.
    pool_factor : float > 0
        Rolling sweep: ``ceil(pool_factor * topk)`` tokens per segment and list are remembered.
    rolling_floor : float > 0
        Rolling sweep: a list whose audits find less than this share of the attention mass that a
        fresh exact top-k keeps scans everything until its pools are void (the next prefill, crop,
        reorder).
    rolling_audit_interval : int or None
        Rolling sweep: steps from one audit to the next, each of which scores all keys; the first is
        due ``num_segments`` steps after the pools are filled. None: no audits.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds; also when used, if the cache has another sketch or rope has
        too few positions.

    Notes
    -----
    Source: Wu et al., arXiv:2411.02886; `paper_compat` gives the published form. Differences and
    their reasons: docs/decisions.md.
    """

    revocable: ClassVar[bool] = True
    query_aware: ClassVar[bool] = True
    persistent: ClassVar[bool] = True

    topk: int = 2048
    num_sink_tokens: int = 128
    num_recent_tokens: int = 512
    scope: Literal["kv_head", "layer"] = "kv_head"
    score_scale: float | None = None
    normalise_over: Literal["visible", "candidates"] = "visible"
    chunk_size: int = 2048
    q_block_size: int = 128
    num_tail_tokens: int = 128
    tail_q_block_size: int = 16
    window_anchor: Literal["block_start", "block_end"] = "block_start"
    query_groups: int = 8
    aggregate: Literal["mean", "sum_vote", "max_vote"] = "sum_vote"
    average_queries: Literal["before_rope", "after_rope"] = "before_rope"
    pool_width: int = 1
    positions: Literal["original", "compact"] = "original"
    sketch: Literal["int4", "int8"] | None = "int4"
    overselect: float = 1.5
    dense_layers: tuple[int, ...] = ()
    dense_prefill: bool = False
    dense_below_tokens: int | None = None
    mass_target: float | None = None
    topk_max: int | None = None
    similarity_threshold: float | None = None
    max_age: int = 64
    similarity: Literal["min", "q10", "flat"] | None = None
    similarity_on: Literal["unrotated", "rotated"] = "unrotated"
    num_segments: int | None = None
    pool_factor: float = 2.0
    rolling_floor: float = 0.98
    rolling_audit_interval: int | None = 64

    def __post_init__(self) -> None:
        for name in ("topk", "num_recent_tokens", "chunk_size", "q_block_size"):
            require_int(getattr(self, name), name, 1)
        for name in ("tail_q_block_size", "query_groups", "max_age"):
            require_int(getattr(self, name), name, 1)
        for name in ("num_sink_tokens", "num_tail_tokens"):
            require_int(getattr(self, name), name, 0)
        require_choice(self.scope, "scope", ("kv_head", "layer"))
        require_choice(self.normalise_over, "normalise_over", ("visible", "candidates"))
        require_choice(self.window_anchor, "window_anchor", ("block_start", "block_end"))
        require_choice(self.aggregate, "aggregate", ("mean", "sum_vote", "max_vote"))
        require_choice(self.average_queries, "average_queries", ("before_rope", "after_rope"))
        require_choice(self.positions, "positions", ("original", "compact"))
        require_choice(self.sketch, "sketch", (*SKETCH_FORMATS, None))
        require_choice(self.similarity, "similarity", ("min", "q10", "flat", None))
        require_choice(self.similarity_on, "similarity_on", ("unrotated", "rotated"))
        require_pool_width(self.pool_width)
        require_bool(self.dense_prefill, "dense_prefill")
        overselect = require_float(self.overselect, "overselect", "a float >= 1")
        require(overselect >= 1.0, "overselect", self.overselect, "a float >= 1")
        if self.score_scale is not None:
            require_scale(self.score_scale, "score_scale")
        if self.dense_below_tokens is not None:
            allowed = "None or an int >= 0"
            require_int(self.dense_below_tokens, "dense_below_tokens", 0, allowed)
        self._require_floor()
        if self.similarity_threshold is not None:
            allowed = "None or a float in (0, 1]"
            threshold = require_float(self.similarity_threshold, "similarity_threshold", allowed)
            require(0.0 < threshold <= 1.0, "similarity_threshold", threshold, allowed)
        if self.num_segments is not None:
            allowed = f"None or an int in 2..{MAX_SEGMENTS}"
            require_int(self.num_segments, "num_segments", 2, allowed)
            enough = self.num_segments <= MAX_SEGMENTS
            require(enough, "num_segments", self.num_segments, allowed)
            allowed = "1 with num_segments (a pool member's neighbours are not scored)"
            require(self.pool_width == 1, "pool_width", self.pool_width, allowed)
        for name in ("pool_factor", "rolling_floor"):
            value = require_float(getattr(self, name), name, "a float > 0")
            require(value > 0.0, name, value, "a float > 0")
        if self.rolling_audit_interval is not None:
            allowed = "None or an int >= 1"
            require_int(self.rolling_audit_interval, "rolling_audit_interval", 1, allowed)
        require_type(self.dense_layers, tuple, "dense_layers", "a tuple of layer indices")
        for layer in self.dense_layers:
            require_int(layer, "dense_layers", 0, "layer indices >= 0")

        if self.sketch is not None:
            allowed = (
                f"an int >= {BLOCK_TOKENS} with a sketch (its blocks; sketch=None has no bound)"
            )
            enough = self.num_recent_tokens >= BLOCK_TOKENS
            require(enough, "num_recent_tokens", self.num_recent_tokens, allowed)
        if self.window_anchor == "block_end":
            largest = self.q_block_size
            if self.num_tail_tokens:
                largest = max(largest, self.tail_q_block_size)
            allowed = f"an int >= {largest} (q_block_size) with window_anchor='block_end'"
            enough = self.num_recent_tokens >= largest
            require(enough, "num_recent_tokens", self.num_recent_tokens, allowed)
        if self.positions == "compact":
            allowed = "'unrotated' with positions='compact'"
            require(self.similarity_on == "unrotated", "similarity_on", self.similarity_on, allowed)

    def _require_floor(self) -> None:
        """A mass floor needs scores that are shares of attention mass, of all that is visible."""
        if self.mass_target is None:
            allowed = "None without mass_target"
            require(self.topk_max is None, "topk_max", self.topk_max, allowed)
            return
        allowed = "None or a float in (0, 1)"
        target = require_float(self.mass_target, "mass_target", allowed)
        require(0.0 < target < 1.0, "mass_target", target, allowed)
        allowed = f"an int >= {self.topk} (topk) with mass_target"
        require_int(self.topk_max, "topk_max", self.topk, allowed)
        allowed = "None with mass_target"
        require(self.score_scale is None, "score_scale", self.score_scale, allowed)
        require(self.num_segments is None, "num_segments", self.num_segments, allowed)
        allowed = "'visible' with mass_target"
        require(self.normalise_over == "visible", "normalise_over", self.normalise_over, allowed)
        allowed = "'sum_vote' or 'mean' with mass_target"
        require(self.aggregate != "max_vote", "aggregate", self.aggregate, allowed)
        require(self.pool_width == 1, "pool_width", self.pool_width, "1 with mass_target")

    @classmethod
    def paper_compat(cls, **settings: Any) -> TokenSelect:
        """The published form, for comparison only; ``settings`` replace single fields."""
        published: dict[str, Any] = {
            "scope": "layer",
            "score_scale": 1.0,
            "normalise_over": "candidates",
            "chunk_size": 512,
            "q_block_size": 512,
            "num_tail_tokens": 0,
            "window_anchor": "block_end",
            "query_groups": 1,
            "aggregate": "mean",
            "average_queries": "after_rope",
            "positions": "compact",
            "sketch": None,
            "overselect": 1.0,
            "similarity_threshold": 0.9,
            "similarity": "flat",
        }
        return cls(**(published | settings))

    @classmethod
    def at_budget(cls, budget: int) -> TokenSelect:
        sinks, recent, picked = share_out(budget)
        return cls(
            topk=int(picked / 1.5),
            num_sink_tokens=sinks,
            num_recent_tokens=recent,
            q_block_size=64,
            dense_below_tokens=0,
        )

    @property
    def required_sketch(self) -> str | None:
        return self.sketch

    @property
    def reads_unlisted(self) -> str | None:
        if self.sketch is None:
            return "sketch=None scores every key"
        if self.num_segments is not None:
            return "num_segments: pools are scored from their keys"
        return None

    @property
    def keep(self) -> int:
        """Tokens picked by score."""
        return num_kept(self.topk, self.overselect)

    @property
    def keep_max(self) -> int:
        """The most tokens that may be picked by score: `keep`, but for a mass floor."""
        return self.keep if self.topk_max is None else num_kept(self.topk_max, self.overselect)

    @property
    def budget(self) -> int:
        """Tokens that may be attended to before anything is left out: rows up to here are dense."""
        return self.num_sink_tokens + self.topk + self.num_recent_tokens

    @property
    def capacity(self) -> int:
        """Most tokens in one list: sinks, picked, window, what reuse or a query block adds."""
        tail = self.tail_q_block_size if self.num_tail_tokens else 0
        window = self.num_recent_tokens + max(self.max_age, self.q_block_size, tail)
        return self.num_sink_tokens + self.keep_max + window

    def dense_limit(self, rope: Rope | None) -> int:
        """Rows of at most so many tokens are dense."""
        limit = max(self.budget, self.dense_below_tokens or 0)
        return min(limit, self._last_position(rope, limit))

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        if end <= self.dense_limit(rope):
            return True
        if phase == "decode":
            return False
        anchor = begin if self.window_anchor == "block_start" else end
        everything_listed = anchor <= self.budget and end <= self._last_position(rope, end)
        return self.dense_prefill or everything_listed

    def _last_position(self, rope: Rope | None, unbounded: int) -> int:
        """Where dense attention ends: at the trained length, if it rotates by rank."""
        return unbounded if rope is None or self.positions == "original" else rope.num_positions

    def new_state(
        self, cache: KVCache, crossovers: Mapping[int, Crossover] | None = None
    ) -> PolicyState:
        if cache.keep is not None:
            require_listed_reads(self)
            cache.require_window(self.num_sink_tokens, self.num_recent_tokens)
        settled = decode_policies(self, cache, crossovers)
        state = PolicyState(self, decode_policies=settled, crossovers=crossovers)
        if self.similarity_threshold is not None:
            similarity = self.similarity or ("min" if self.scope == "kv_head" else "q10")
            kind = CapturedSelectionCache if isinstance(cache, FixedKVCache) else SelectionCache
            state.selection_cache = kind(self.similarity_threshold, self.max_age, similarity)
        if self.num_segments is not None:
            state.rolling_pools = RollingPools(
                self.num_segments,
                num_kept(self.topk, self.pool_factor),
                self.rolling_floor,
                self.rolling_audit_interval,
            )
        return state

    def prepare_capture(
        self, state: PolicyState, cache: FixedKVCache, num_q_heads: int, rope: Rope | None
    ) -> list[Tensor]:
        reuse = state.selection_cache
        if not isinstance(reuse, CapturedSelectionCache) or reuse.tensors():
            return []
        stepping = state.decode_policy(num_q_heads)
        assert isinstance(stepping, TokenSelect)
        longest = max(stepping.capacity, stepping.dense_limit(rope))
        room = self._room(longest, cache.capacity)
        reuse.prepare(cache, num_q_heads, self._num_lists(cache), room)
        return reuse.tensors()

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        """Lists of every query block; None where everything is attended to.

        With a selection cache the indices of decode steps belong to the state: the next step
        changes them in place.
        """
        self._require_usable(queries, cache)
        visible = visible_tokens(queries, cache)
        statistics = state.statistics(queries.phase)
        if self.is_dense(queries.phase, *longest_block(queries, cache), queries.rope):
            statistics.record_dense(visible)
            return None
        if self.positions == "compact":
            require_compact_rope(queries.rope, self.capacity)

        reuse, rolling = state.selection_cache, state.rolling_pools
        remembers = reuse is not None or rolling is not None
        # Prefill calls cut blocks, of decode's rule too; later tokens may follow them in the cache.
        is_step = queries.phase == "decode" and queries.q_block_offsets is None
        if not remembers or not is_step:
            state.invalidate()
            votes, total, num_nonfinite = self._vote(queries, cache)
            width = list_width(min(self._longest_list(queries, cache), queries.max_seqlen))
            lists = self._pick(votes, queries, cache, width, total=total, statistics=statistics)
            selection = selection_of(lists, queries, cache.num_kv_heads, total)
            statistics.record_selection(selection, visible, True, num_nonfinite)
            return selection

        longest = self._longest_list(queries, cache)
        hit: Tensor | None = None
        reused: Lists | None = None
        width = list_width(min(longest, queries.max_seqlen))
        if reuse is not None:
            room = self._room(longest, queries.max_seqlen)
            hit = reuse.lookup(
                self._similarity_queries(queries),
                cache,
                num_lists=self._num_lists(cache),
                width=width,
                room=room,
                dense_limit=self.dense_limit(queries.rope),
                reuse_counts=statistics.reuse_counts(cache.device),
            )
            reused = None if hit is None else reuse.lists
            width = room
        sweep: SweepCounts | None = None
        if rolling is not None:
            rolling.follow(cache, self._num_lists(cache))
        if rolling is not None and not rolling.all_stopped:
            swept = self._sweep(rolling, queries, cache, width, hit, reused)
            lists, num_nonfinite, sweep = swept.lists, swept.num_nonfinite, swept.counts
            self._audit(state, lists, sweep.rolled, queries, cache)
            heads = queries.q.shape[2] // self._num_lists(cache)
            total = float(heads) if self._scores_are_mass() else None
            if queries.sink_logits is not None:
                total = None  # what the sinks left to the tokens is not known
            if self._has_dense_rows(queries, cache):
                lists = _with_dense_rows(lists, queries, cache, self.dense_limit(queries.rope))
        else:
            votes, total, num_nonfinite = self._vote(queries, cache, hit)
            lists = self._pick(
                votes, queries, cache, width, hit, reused, total=total, statistics=statistics
            )
        if reuse is not None:
            reuse.store(lists, cache)
        selection = selection_of(lists, queries, cache.num_kv_heads, total, hit)
        statistics.record_selection(selection, visible, True, num_nonfinite, sweep)
        return selection

    def _sweep(
        self,
        rolling: RollingPools,
        queries: Queries,
        cache: KVCache,
        width: int,
        hit: Tensor | None,
        reused: Lists | None,
    ) -> Swept:
        """Lists of a rolling sweep, and what it looked at."""
        vectors = self._scoring_vectors(queries, cache)[0]
        return rolling.sweep(
            vectors.q[:, 0, 0].float(),
            None if vectors.q_local is None else vectors.q_local[:, 0, 0],
            cache,
            num_sink_tokens=self.num_sink_tokens,
            num_recent_tokens=self.num_recent_tokens,
            keep=self.keep,
            scale=queries.softmax_scale if self.score_scale is None else self.score_scale,
            sketch=self.sketch,
            normalise_candidates_only=self.normalise_over == "candidates",
            rope=queries.rope if self.positions == "compact" else None,
            width=width,
            hit=hit,
            reused=reused,
            softcap=queries.softcap,
            sink_logits=queries.sink_logits,
        )

    def _audit(
        self, state: PolicyState, lists: Lists, rolled: Tensor, queries: Queries, cache: KVCache
    ) -> None:
        """Compare the lists that rolled, in rows that are due, with a fresh exact top-k.

        By the mass that either keeps, sinks and recent tokens included.
        """
        rolling = state.rolling_pools
        assert rolling is not None
        limit = self.dense_limit(queries.rope)
        due = rolling.due()
        if any(due):
            counted = rolled & torch.tensor(due, device=cache.device)[:, None]
            with cache.whole_rows():
                votes, _, _ = self._vote(queries, cache, (~counted).int(), exact=True)
            fresh = self._pick(votes, queries, cache, lists.indices.shape[-1], keep=self.topk)
            held = votes.gather(3, lists.indices.clamp(min=0).long())
            kept = held.where(lists.indices >= 0, 0.0).nan_to_num(0.0, 0.0, 0.0).sum(3)[:, 0]
            audited = rolling.add_audit(kept, fresh.kept_score[:, 0], counted)
            real = torch.tensor(cache.num_real_tokens, device=cache.device)[:, None]
            tokens = (counted * real).sum() * (cache.num_kv_heads // counted.shape[1])
            state.statistics(queries.phase).record_audit(*audited, tokens)
        rolling.void([tokens <= limit for tokens in cache.num_real_tokens])

    def audit(
        self, state: PolicyState, queries: Queries, cache: KVCache, selection: Selection
    ) -> None:
        """Compare a step's lists with the exact top-k of exact scores, ``topk`` candidates of it.

        How many of these the lists hold, and which attention mass either keeps. With compact
        positions candidates are scored as ever, at their fixed distance, but from their keys.
        """
        num_lists = self._num_lists(cache)
        with cache.whole_rows():
            votes = self._vote(queries, cache, exact=True)[0][:, 0]
        at = self._block_range(queries, cache)
        width = list_width(min(self.budget, queries.max_seqlen))
        best = self._pick(votes[:, None], queries, cache, width, keep=self.topk)
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
        mass = (votes.nan_to_num(0.0) * marks[..., :-1]).sum(2) / total
        state.decode.record_exact(overlap, mass, best.kept_score[:, 0] / total)

    def _require_usable(self, queries: Queries, cache: KVCache) -> None:
        """What is missing would be missed at the first long row only; say so at the first step."""
        if self.sketch is not None:
            allowed = f"{self.sketch!r} (KVCache(..., sketch=...)), as the policy says"
            require(cache.sketch_format == self.sketch, "sketch", cache.sketch_format, allowed)
        if self.positions == "compact":
            require_compact_rope(queries.rope, 0)

    def _vote(
        self,
        queries: Queries,
        cache: KVCache,
        hit: Tensor | None = None,
        exact: bool = False,
    ) -> tuple[Tensor, float | Tensor | None, Tensor]:
        """Scores, what all tokens of a list score together, and counts of what was not finite.

        Scores are [batch, num_blocks, num_lists, max_seqlen]; the total is None where they are no
        shares of attention mass. ``exact``: from the keys, whatever the sketch.
        """
        scale = queries.softmax_scale if self.score_scale is None else self.score_scale
        num_kv_heads, shared = cache.num_kv_heads, self.scope == "layer"
        if hit is not None and shared:
            hit = hit.expand(-1, num_kv_heads).contiguous()
        parts = self._scoring_vectors(queries, cache)
        scores, counts = [], []
        for part in parts:
            offsets = queries.q_block_offsets
            if offsets is not None and len(parts) > 1:
                offsets = offsets[part.first : part.last + 1]
            part_scores, num_nonfinite = score_blocks(
                part.q,
                cache,
                cache_seqlens=queries.cache_seqlens,
                max_seqlen=queries.max_seqlen,
                q_block_offsets=offsets,
                seqlen_q=queries.seqlen_q,
                window_rule=self._window_rule(queries),
                num_sink_tokens=self.num_sink_tokens,
                num_recent_tokens=self.num_recent_tokens,
                keep=self.keep,
                scale=scale,
                sketch=None if exact else self.sketch,
                max_vote=self.aggregate == "max_vote",
                normalise_candidates_only=self.normalise_over == "candidates",
                q_local=part.q_local,
                rope=queries.rope if self.positions == "compact" else None,
                hit=hit,
                softcap=queries.softcap,
                sink_logits=queries.sink_logits,
            )
            scores.append(part_scores)
            counts.append(num_nonfinite)

        votes, num_nonfinite = scores[0], counts[0]
        if len(parts) > 1:
            votes, num_nonfinite = torch.cat(scores, dim=1), torch.cat(counts, dim=1)
        heads = queries.q.shape[2] // (1 if shared else num_kv_heads)
        if shared:
            votes = sum_over_ranks(votes.sum(2, keepdim=True), queries.process_group)
            heads *= num_ranks(queries.process_group)
        total = self._total_score(parts, heads)
        if total is not None and queries.sink_logits is not None:
            total = votes.nansum(3)  # the sinks took the rest
        return votes, total, num_nonfinite

    def _total_score(self, parts: list[BlockVectors], heads: int) -> float | Tensor | None:
        """What all visible tokens of a list score together; a Tensor where blocks differ."""
        if not self._scores_are_mass():
            return None
        if len(parts) == 1:
            return float(heads * parts[0].q.shape[2])
        totals = [float(heads * p.q.shape[2]) for p in parts for _ in range(p.first, p.last)]
        return torch.tensor(totals, device=parts[0].q.device)[:, None]

    def _scores_are_mass(self) -> bool:
        """Whether scores are shares of attention mass."""
        by_attention = self.score_scale is None and self.normalise_over == "visible"
        return by_attention and self.aggregate != "max_vote"

    def _pick(
        self,
        votes: Tensor,
        queries: Queries,
        cache: KVCache,
        width: int,
        hit: Tensor | None = None,
        reused: Lists | None = None,
        keep: int | None = None,
        total: float | Tensor | None = None,
        statistics: PhaseStatistics | None = None,
    ) -> Lists:
        """Sinks, the best candidates and the window; everything, where a row is dense.

        ``total``, what all tokens score together, and ``statistics`` are for a mass floor.
        """
        lists = select_blocks(
            votes,
            cache_seqlens=queries.cache_seqlens,
            starts=cache.starts,
            q_block_offsets=queries.q_block_offsets,
            seqlen_q=queries.seqlen_q,
            window_rule=self._window_rule(queries),
            num_sink_tokens=self.num_sink_tokens,
            num_recent_tokens=self.num_recent_tokens,
            keep=self.keep_max if keep is None else keep,
            width=width,
            pool_width=self.pool_width,
            hit=hit,
            reused=reused,
        )
        if self.mass_target is not None and keep is None:
            assert total is not None and statistics is not None
            floored = trim_to_mass(
                lists,
                votes,
                self._block_range(queries, cache),
                keep=self.keep,
                keep_max=self.keep_max,
                wanted=self.mass_target * _on_device(total, votes),
                hit=hit,
            )
            lists = floored.lists
            statistics.record_floor(floored.counts)
        if self._has_dense_rows(queries, cache):
            lists = _with_dense_rows(lists, queries, cache, self.dense_limit(queries.rope))
        return lists

    def _block_range(self, queries: Queries, cache: KVCache) -> BlockRange:
        return block_range(
            queries.cache_seqlens,
            cache.starts,
            queries.q_block_offsets,
            queries.seqlen_q,
            self._window_rule(queries),
            self.num_sink_tokens,
            self.num_recent_tokens,
        )

    def _window_rule(self, queries: Queries) -> str:
        return "decode" if queries.phase == "decode" else self.window_anchor

    def _has_dense_rows(self, queries: Queries, cache: KVCache) -> bool:
        """Whether a short row may have to be dense beside longer ones.

        Rows within the budget need no care: their lists hold every token anyway.
        """
        several = cache.batch > 1 or cache.lengths_are_bounds
        return several and self.dense_limit(queries.rope) > self.budget

    def _room(self, longest: int, max_seqlen: int) -> int:
        """Entries of lists that are kept: rows may grow."""
        return list_width(min(longest, max(self.capacity, 2 * max_seqlen)))

    def _longest_list(self, queries: Queries, cache: KVCache) -> int:
        if self._has_dense_rows(queries, cache):
            return max(self.capacity, self.dense_limit(queries.rope))
        return self.capacity

    def _similarity_queries(self, queries: Queries) -> Tensor:
        """What the selection cache compares, [batch, 1, num_q_heads, head_dim]."""
        q = queries.q
        if self.similarity_on == "unrotated" and self.positions == "original":
            if queries.q_unrotated is not None:
                q = queries.q_unrotated
            else:
                allowed = "the queries before RoPE (or similarity_on='rotated')"
                require(queries.rope is None, "q_unrotated", None, allowed)
        return q

    def _num_lists(self, cache: KVCache) -> int:
        return 1 if self.scope == "layer" else cache.num_kv_heads

    def _scoring_vectors(self, queries: Queries, cache: KVCache) -> list[BlockVectors]:
        rope = queries.rope
        if queries.phase == "decode":
            q = queries.q.unsqueeze(2).contiguous()
            q_local: Tensor | None = None
            if self.positions == "compact":
                assert rope is not None
                rank = self._decode_rank(queries, cache)
                q, q_local = compact_decode_vectors(q.float(), rope, self.num_recent_tokens, rank)
            return [BlockVectors(0, queries.num_blocks, q, q_local)]
        at = self._block_range(queries, cache)
        groups = 1 if self.aggregate == "mean" else self.query_groups
        first = self.average_queries == "before_rope"
        if self.positions == "original":
            return original_vectors(queries, at, groups, first)
        return compact_vectors(queries, at, self.keep, self.num_recent_tokens, groups, first)

    def _decode_rank(self, queries: Queries, cache: KVCache) -> Tensor | int:
        """Rank of each query's own token in its list; one number where all lists are full."""
        full = self.num_sink_tokens + self.keep + self.num_recent_tokens
        shortest = min(cache.num_real_tokens) - queries.num_later_tokens - queries.seqlen_q + 1
        if shortest >= full and not cache.lengths_are_bounds:
            return full - 1
        real = _real_tokens(queries, cache)
        place = torch.arange(1 - queries.seqlen_q, 1, device=real.device)
        return (real[:, None] + place).clamp(1, full) - 1


def _on_device(number: float | Tensor, like: Tensor) -> Tensor:
    """A number as a 0-d tensor beside ``like``, without a copy to the device."""
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float32, device=like.device)


def _real_tokens(queries: Queries, cache: KVCache) -> Tensor:
    """Tokens of each row up to the last query, padding excluded, int32 [batch]; may be negative."""
    if cache.starts is None:
        return queries.cache_seqlens
    return queries.cache_seqlens - cache.starts


def _with_dense_rows(lists: Lists, queries: Queries, cache: KVCache, limit: int) -> Lists:
    """The lists, where those of (row, block)s of at most ``limit`` visible tokens hold them all."""
    ends = queries.cache_seqlens[:, None]
    if queries.q_block_offsets is not None:
        ends = ends - queries.seqlen_q + queries.q_block_offsets[1:]
    starts = 0 if cache.starts is None else cache.starts[:, None]
    count = (ends - starts).clamp(min=0)[:, :, None]
    dense = count <= limit
    place = torch.arange(lists.indices.shape[-1], dtype=torch.int32, device=cache.device)
    first = 0 if cache.starts is None else cache.starts[:, None, None, None]
    everything = torch.where(place < count[..., None], place + first, -1)
    return Lists(
        torch.where(dense[..., None], everything, lists.indices),
        torch.where(dense, count, lists.topk_length),
        lists.kept_score.masked_fill(dense, torch.nan),  # it was the shorter list's
    )
