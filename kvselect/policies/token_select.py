"""TokenSelect: tokens picked one by one by a soft vote of the query heads (arXiv:2411.02886)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from kvselect.arguments import require_compact_rope
from kvselect.cache import KVCache
from kvselect.checks import require
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
from kvselect.policies.exact_audit import audit_lists
from kvselect.policies.list_memory import lists_of_call, prepare_memory, remember
from kvselect.policies.query_aggregation import scoring_vectors
from kvselect.policies.scoring_vectors import BlockVectors
from kvselect.policies.soft_vote import soft_vote
from kvselect.policies.token_settings import PUBLISHED, require_token_settings
from kvselect.queries import Phase, Queries
from kvselect.rope import Rope
from kvselect.selection import Selection, num_kept

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
    query_groups, aggregate : int, "sum_vote", "max_vote", "mean" or "probe"
        A block is split into at most ``query_groups`` runs of neighbouring queries; the mean query
        of each votes with a softmax of its own, and the votes are added or their maximum is taken.
        "mean": one mean query. "probe": one mean of all queries, unusual ones weighing more
        (`probe_query`).
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
    layer_budget : "fixed" or "entropy_pool"
        "entropy_pool": ``topk`` is the mean over the layers of a forward pass; layers whose scores
        are flatter take more, up to twice as many (`pool_counts`).
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
    prefill_attention : "sparse_attention" or "dense_kernel"
        What attends the lists of prefill blocks: kvselect's own kernel, which reads the cache where
        it lies, or a dense one over copies of what is listed (`sparse_attention`'s
        ``implementation``). Reports name the kernel that ran.

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
    aggregate: Literal["mean", "sum_vote", "max_vote", "probe"] = "sum_vote"
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
    layer_budget: Literal["fixed", "entropy_pool"] = "fixed"
    similarity_threshold: float | None = None
    max_age: int = 64
    similarity: Literal["min", "q10", "flat"] | None = None
    similarity_on: Literal["unrotated", "rotated"] = "unrotated"
    num_segments: int | None = None
    pool_factor: float = 2.0
    rolling_floor: float = 0.98
    rolling_audit_interval: int | None = 64
    prefill_attention: Literal["sparse_attention", "dense_kernel"] = "sparse_attention"

    def __post_init__(self) -> None:
        require_token_settings(self)

    @classmethod
    def paper_compat(cls, **settings: Any) -> TokenSelect:
        """The published form, for comparison only; ``settings`` replace single fields."""
        return cls(**(PUBLISHED | settings))

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
        """The most tokens that may be picked by score: `keep`, but for a floor or a pool."""
        most = 2 * self.topk if self.flows_between_layers else self.topk
        return num_kept(self.topk_max or most, self.overselect)

    @property
    def flows_between_layers(self) -> bool:
        return self.layer_budget == "entropy_pool"

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

    @property
    def needs_all_heads(self) -> str | None:
        if self.layer_budget == "entropy_pool" and self.scope == "kv_head":
            return "layer_budget='entropy_pool' draws by the mean over all heads; scope='layer' can"
        return None

    def new_state(
        self, cache: KVCache, crossovers: Mapping[int, Crossover] | None = None
    ) -> PolicyState:
        if cache.keep is not None:
            require_listed_reads(self)
            cache.require_window(self.num_sink_tokens, self.num_recent_tokens)
        settled = decode_policies(self, cache, crossovers)
        state = PolicyState(self, decode_policies=settled, crossovers=crossovers)
        remember(self, state, cache)
        return state

    def prepare_capture(
        self, state: PolicyState, cache: FixedKVCache, num_q_heads: int, rope: Rope | None
    ) -> list[Tensor]:
        stepping = state.decode_policy(num_q_heads)
        assert isinstance(stepping, TokenSelect)
        return prepare_memory(stepping, state, cache, num_q_heads, rope)

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        """Lists of every query block; None where everything is attended to.

        With a selection cache the indices of decode steps belong to the state: the next step
        changes them in place.
        """
        if self.sketch is not None:  # would be missed at the first long row only
            allowed = f"{self.sketch!r} (KVCache(..., sketch=...)), as the policy says"
            require(cache.sketch_format == self.sketch, "sketch", cache.sketch_format, allowed)
        if self.positions == "compact":
            require_compact_rope(queries.rope, 0)
        visible = visible_tokens(queries, cache)
        statistics = state.statistics(queries.phase)
        if self.is_dense(queries.phase, *longest_block(queries, cache), queries.rope):
            statistics.record_dense(visible)
            return None
        if self.positions == "compact":
            require_compact_rope(queries.rope, self.capacity)

        parts = self._scoring_vectors(queries, cache)
        made = lists_of_call(self, state, parts, queries, cache)
        selection = selection_of(made.lists, queries, cache.num_kv_heads, made.total, made.hit)
        statistics.record_selection(selection, visible, True, made.num_nonfinite, made.sweep)
        return selection

    def audit(
        self, state: PolicyState, queries: Queries, cache: KVCache, selection: Selection
    ) -> None:
        """As `Policy.audit`: ``topk`` candidates of the exact scores are the measure.

        With compact positions candidates are scored as ever, at their fixed distance, but from
        their keys.
        """
        with cache.whole_rows():
            parts = self._scoring_vectors(queries, cache)
            vote = soft_vote(self, parts, queries, cache, exact=True)
        audit_lists(self, vote, queries, cache, selection, state.decode)

    def _scoring_vectors(self, queries: Queries, cache: KVCache) -> list[BlockVectors]:
        return scoring_vectors(self, queries, cache)
