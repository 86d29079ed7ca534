"""Quest: whole pages, by an upper bound of their logits (arXiv:2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvselect.block_lists import choose_blocks, query_windows
from kvselect.block_scores import signed_parts, soft_votes
from kvselect.block_statistics import BlockStatistics
from kvselect.cache import KVCache
from kvselect.checks import require_int
from kvselect.policies.base import PolicyState, longest_block, register_policy, visible_tokens
from kvselect.policies.block_policy import BlockPolicy, BlockState
from kvselect.policies.budgets import share_out
from kvselect.policies.token_settings import require_layers
from kvselect.queries import Phase, Queries
from kvselect.rope import Rope
from kvselect.selection import Selection

__all__ = ["Quest"]

MIN_PAGES = 3


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(BlockPolicy):
    """The pages that may hold the largest logits, and the last one; decode only.

    ``bound[h, P] = softmax_scale * sum_d max(q[h, d] * low[P, d], q[h, d] * high[P, d])``, which no
    logit of the page exceeds; ``scores[g, P] = sum over h of group g of softmax_P(bound[h, :])``
    over the complete pages. With one query head per KV head that is the published ranking.

    Parameters
    ----------
    token_budget : int
        ``max(token_budget // page_size, 3)`` pages are attended to, the last one included.
    page_size : int
        [tokens]
    dense_layers : tuple of int
        Layers that never select; read by `attach`.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Tang et al., arXiv:2406.10774, which reports self-attention up to 7.03 times as fast, a
    step of the whole model 2.23 times. State: two vectors per page and KV head, 1 / page_size of
    the keys and values. One list per KV head; the published form has one per query head.
    """

    phases: ClassVar[frozenset[str]] = frozenset({"decode"})
    revocable: ClassVar[bool] = True
    query_aware: ClassVar[bool] = True
    persistent: ClassVar[bool] = True

    token_budget: int = 2048
    page_size: int = 16
    dense_layers: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        require_int(self.page_size, "page_size", 1)
        require_int(self.token_budget, "token_budget", 1)
        require_layers(self.dense_layers)

    @classmethod
    def at_budget(cls, budget: int) -> Quest:
        share_out(budget)  # for its bounds
        return cls(token_budget=budget, dense_layers=())  # every layer is compared

    @property
    def num_pages(self) -> int:
        """Pages that a step attends to."""
        return max(self.token_budget // self.page_size, MIN_PAGES)

    @property
    def capacity(self) -> int:
        return self.num_pages * self.page_size

    @property
    def reads_unlisted(self) -> str | None:
        return "its pages are brought up to date from keys that may lie outside of the window"

    def new_statistics(self) -> BlockStatistics:
        return BlockStatistics(self.page_size, ("min_max",))

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        return phase == "prefill" or end <= self.capacity

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        """The best pages and the last one; None where that is all."""
        assert isinstance(state, BlockState)
        visible, statistics = visible_tokens(queries, cache), state.statistics(queries.phase)
        if self.is_dense(queries.phase, *longest_block(queries, cache), queries.rope):
            statistics.record_dense(visible)
            return None
        windows = query_windows(queries, cache, self.page_size, 1)
        bounds, block_table = state.blocks.min_max_pages
        votes = soft_votes(
            signed_parts(queries.q),
            bounds,
            windows.first_block,
            -(-queries.max_seqlen // self.page_size),
            scale=queries.softmax_scale,
            block_table=block_table,
            softcap=queries.softcap,
            sink_logits=queries.sink_logits,
        )
        chosen = choose_blocks(
            votes, windows, state.blocks, queries, cache, topk_blocks=self.num_pages - 1
        )
        statistics.record_selection(chosen.selection, visible, scored=False)
        return chosen.selection
