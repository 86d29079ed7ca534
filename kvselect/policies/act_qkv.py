"""ActQKV: blocks by the cosine of a probe query, as many as a layer's entropy asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvselect.arguments import require_compact_rope
from kvselect.block_lists import choose_blocks, query_windows
from kvselect.block_statistics import BlockStatistics
from kvselect.cache import KVCache
from kvselect.checks import require, require_choice, require_float
from kvselect.policies.base import (
    PolicyState,
    longest_block,
    register_policy,
    visible_tokens,
)
from kvselect.policies.block_policy import BlockState, WindowedBlocks
from kvselect.policies.budgets import share_out
from kvselect.policies.pooled_blocks import candidate_blocks, cosine_scores, pooled
from kvselect.policies.probe_query import QueryMoments
from kvselect.policies.query_aggregation import probe_vectors
from kvselect.queries import Queries
from kvselect.selection import Selection
from kvselect.tensor_parallel import num_ranks, sum_over_ranks

__all__ = ["ActQKV"]

GRANULE = 4  # blocks: what the counts of a pool are rounded to


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class ActQKV(WindowedBlocks):
    """The blocks most like a probe of the queries; flat layers take more of them than peaked ones.

    ``score[B] = mean_h cos(probe[h], mean key of B)``, ``probe = sum_t w[t] q[t]`` with weights in
    proportion to ``mean_c (q[t, c] - mu[c])^2 / (var[c] + mean(var) / 100)``: unusual queries of a
    block count for more. A decode step's probe is its query. Layer ``l`` takes ``share * pool``
    blocks, ``share = E[l] / sum over m >= l of E[m]``, ``E`` the mean entropy of the softmax of the
    scores over the last 100 blocks or steps (`pool_counts`).

    Parameters
    ----------
    topk_blocks, block_size : int
        Blocks kept by score, on the mean over layers; their size in tokens.
    num_sink_tokens, num_recent_tokens : int
        Kept at either end, in whole blocks.
    scope : "layer" or "kv_head"
        Heads that share weights, scores and list.
    probe_statistics : "window" or "running"
        ``mu`` and ``var`` of the block's own queries, or of all that selected in the row so far.
    layer_budget : "entropy_pool" or "fixed"
        "fixed": ``topk_blocks`` for every layer.
    question_weight : float >= 0
        Adds ``question_weight * mean_h cos(question[h], mean key of B)`` in prefill, the question
        being the mean of the last 32 queries of the call; upstream 4. Such a policy has seen the
        question before the context: reports say so.
    positions : "original" or "compact"
    chunk_size, q_block_size : int
        Prefill: tokens per run of blocks, queries that share one list.
    dense_layers : tuple of int
        Layers that never select, and have no part in the pool; read by `attach`.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Xiao et al., arXiv:2502.13542; its claim to beat InfLLM and TokenSelect at 2K tokens is
    of its abstract alone, and its own timings are 1.8 to 2.0 times those of InfLLM. Differences:
    a block's key is the mean of its keys, as stored, not of the four most attended; cosines per
    head, not of all heads laid end to end; statistics per row (docs/policies.md).
    """

    revocable: ClassVar[bool] = True
    query_aware: ClassVar[bool] = True
    persistent: ClassVar[bool] = True

    topk_blocks: int = 46
    block_size: int = 32
    num_sink_tokens: int = 64
    num_recent_tokens: int = 512
    scope: Literal["layer", "kv_head"] = "layer"
    probe_statistics: Literal["window", "running"] = "window"
    layer_budget: Literal["entropy_pool", "fixed"] = "entropy_pool"
    question_weight: float = 0.0
    positions: Literal["original", "compact"] = "original"
    chunk_size: int = 2048
    q_block_size: int = 256
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.require_counts()
        require_choice(self.scope, "scope", ("layer", "kv_head"))
        require_choice(self.probe_statistics, "probe_statistics", ("window", "running"))
        require_choice(self.layer_budget, "layer_budget", ("entropy_pool", "fixed"))
        require_choice(self.positions, "positions", ("original", "compact"))
        weight = require_float(self.question_weight, "question_weight", "a float >= 0")
        require(weight >= 0.0, "question_weight", self.question_weight, "a float >= 0")

    @classmethod
    def at_budget(cls, budget: int) -> ActQKV:
        size = 32 if budget >= 1024 else 16
        sinks = share_out(budget).num_sink_tokens // size * size
        recent = min(512, budget // 4)
        return cls(
            topk_blocks=(budget - sinks - recent - size) // size,  # a window has part of a block
            block_size=size,
            num_sink_tokens=sinks,
            num_recent_tokens=recent,
            q_block_size=64,
        )

    @property
    def flows_between_layers(self) -> bool:
        return self.layer_budget == "entropy_pool" or self.probe_statistics == "running"

    @property
    def average_queries(self) -> str:
        """Probes are of queries before RoPE."""
        return "before_rope"

    @property
    def num_question_tokens(self) -> int:
        return 32 if self.question_weight else 0

    @property
    def most_blocks(self) -> int:
        return self.topk_blocks * (2 if self.layer_budget == "entropy_pool" else 1)

    @property
    def reads_unlisted(self) -> str | None:
        return "mean keys of blocks are made of keys that may lie outside of the window"

    @property
    def needs_all_heads(self) -> str | None:
        if self.layer_budget == "entropy_pool" and self.scope == "kv_head":
            return "layer_budget='entropy_pool' draws by the mean over all heads; scope='layer' can"
        return None

    def new_statistics(self) -> BlockStatistics:
        return BlockStatistics(self.block_size, ("unit_mean",))

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        """The best blocks of every query block, with sinks and window; None where that is all."""
        assert isinstance(state, BlockState)
        if self.positions == "compact":
            require_compact_rope(queries.rope, self.capacity)
        visible, statistics = visible_tokens(queries, cache), state.statistics(queries.phase)
        if self.is_dense(queries.phase, *longest_block(queries, cache), queries.rope):
            statistics.record_dense(visible)
            return None
        windows = query_windows(queries, cache, self.block_size, self.num_recent_tokens)
        num_blocks = state.blocks.most_blocks(queries.max_seqlen)
        table = state.blocks.unit_mean[:, :, :num_blocks]
        vectors = probe_vectors(self, queries, cache, self._moments(state, queries, cache))
        votes = cosine_scores(vectors[:, :, 0], table, self.scope)
        if vectors.shape[2] > 1:
            asked = cosine_scores(vectors[:, :, 1], table, self.scope)
            votes = votes + self.question_weight * asked
        group = queries.process_group
        if self.scope == "layer" and group is not None:
            votes = sum_over_ranks(votes, group) / num_ranks(group)
        if self.layer_budget == "entropy_pool":
            candidate = candidate_blocks(windows, num_blocks, self.num_sink_blocks)
            stack, best = state.shared(cache), {"topk": self.topk_blocks, "granule": GRANULE}
            votes = pooled(votes, candidate, stack, state.layer, queries, **best)
        chosen = choose_blocks(
            votes,
            windows,
            state.blocks,
            queries,
            cache,
            topk_blocks=self.most_blocks,
            num_sink_tokens=self.num_sink_tokens,
        )
        statistics.record_selection(chosen.selection, visible, scored=False)
        return chosen.selection

    def _moments(self, state: PolicyState, queries: Queries, cache: KVCache) -> QueryMoments | None:
        """Running statistics of the row's queries, which all are at one angle: before RoPE."""
        if self.probe_statistics == "window" or queries.phase == "decode":
            return None
        shape = (cache.batch, queries.q.shape[2], cache.head_dim, cache.device)
        name = f"probe of layer {state.layer}"
        return state.shared(cache).rows(name, lambda: QueryMoments(*shape))
