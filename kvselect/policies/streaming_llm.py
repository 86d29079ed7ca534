"""StreamingLLM: the first tokens and the latest ones, nothing between (arXiv:2309.17453)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvselect.arguments import require_compact_rope
from kvselect.cache import KVCache
from kvselect.checks import require_choice, require_int
from kvselect.crossovers import Crossover
from kvselect.policies.base import (
    Policy,
    PolicyState,
    longest_block,
    register_policy,
    selection_of,
    visible_tokens,
)
from kvselect.policies.budgets import share_out
from kvselect.queries import Phase, Queries
from kvselect.rope import Rope
from kvselect.selection import Selection, list_width, select_blocks

__all__ = ["StreamingLLM"]


@dataclass(slots=True, eq=False)
class StreamingState(PolicyState):
    """`PolicyState` and the scores of a method that has none."""

    zeros: Tensor | None = None  # [at least seqlen_k] float32


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingLLM(Policy):
    """Attention sinks and a sliding window: the floor that every selecting method must clear.

    ``indices = [0, num_sink_tokens) + [n - num_recent_tokens, n)``; in prefill the window of a
    query block starts ``num_recent_tokens`` before its first query, so that every query sees at
    least that many predecessors.

    Parameters
    ----------
    num_sink_tokens, num_recent_tokens : int
        Tokens kept at either end.
    positions : "compact" or "original"
        "compact" renumbers the kept tokens 0.. at every step, which is what makes endless text
        work.
    chunk_size, q_block_size : int
        Prefill: tokens per run of blocks, queries that share one list.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Xiao et al., arXiv:2309.17453. The middle stays in the cache but is never read again by
    this policy.
    """

    revocable: ClassVar[bool] = False
    query_aware: ClassVar[bool] = False
    persistent: ClassVar[bool] = False

    num_sink_tokens: int = 4
    num_recent_tokens: int = 512
    positions: Literal["compact", "original"] = "compact"
    chunk_size: int = 2048
    q_block_size: int = 128

    def __post_init__(self) -> None:
        require_int(self.num_sink_tokens, "num_sink_tokens", 0)
        require_int(self.num_recent_tokens, "num_recent_tokens", 1)
        require_choice(self.positions, "positions", ("compact", "original"))
        require_int(self.chunk_size, "chunk_size", 1)
        require_int(self.q_block_size, "q_block_size", 1)

    @classmethod
    def at_budget(cls, budget: int) -> StreamingLLM:
        sinks = share_out(budget).num_sink_tokens
        return cls(num_sink_tokens=sinks, num_recent_tokens=budget - sinks, q_block_size=64)

    @property
    def reads_unlisted(self) -> None:
        return None

    @property
    def capacity(self) -> int:
        """Sinks, window, and the queries of one block."""
        return self.num_sink_tokens + self.num_recent_tokens + self.q_block_size

    def new_state(
        self, cache: KVCache, crossovers: Mapping[int, Crossover] | None = None
    ) -> StreamingState:
        return StreamingState(self, crossovers=crossovers)

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        window_start = (end if phase == "decode" else begin) - self.num_recent_tokens
        return window_start <= self.num_sink_tokens

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        """Sinks and window of every query block, one list for all heads; None where that is all."""
        if self.positions == "compact":
            require_compact_rope(queries.rope, self.capacity)
        visible = visible_tokens(queries, cache)
        statistics = state.statistics(queries.phase)
        if self.is_dense(queries.phase, *longest_block(queries, cache), queries.rope):
            statistics.record_dense(visible)
            return None
        lists = select_blocks(
            self._equal_scores(state, queries, cache),
            cache_seqlens=queries.cache_seqlens,
            starts=cache.starts,
            q_block_offsets=queries.q_block_offsets,
            seqlen_q=queries.seqlen_q,
            window_rule="decode" if queries.phase == "decode" else "block_start",
            num_sink_tokens=self.num_sink_tokens,
            num_recent_tokens=self.num_recent_tokens,
            keep=0,
            width=list_width(min(self.capacity, queries.max_seqlen)),
        )
        selection = selection_of(lists, queries, cache.num_kv_heads)
        statistics.record_selection(selection, visible, scored=False)
        return selection

    @staticmethod
    def _equal_scores(state: PolicyState, queries: Queries, cache: KVCache) -> Tensor:
        """Zeros [batch, num_blocks, 1, seqlen_k], one row in memory: nothing is picked by them."""
        assert isinstance(state, StreamingState)
        if state.zeros is None or state.zeros.shape[0] < queries.max_seqlen:
            state.zeros = torch.zeros(2 * queries.max_seqlen, device=cache.device)
        return state.zeros[: queries.max_seqlen].expand(cache.batch, queries.num_blocks, 1, -1)
