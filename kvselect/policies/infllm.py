"""InfLLM: far blocks by the keys that once received most attention (arXiv:2402.04617)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvselect.arguments import require_compact_rope
from kvselect.block_lists import choose_blocks, query_windows
from kvselect.block_masks import BlockMask
from kvselect.block_scores import block_logits
from kvselect.block_statistics import BlockStatistics
from kvselect.cache import KVCache
from kvselect.checks import require_choice, require_int
from kvselect.local_mass import add_local_mass, mean_query, represent_blocks
from kvselect.policies.base import PolicyState, longest_block, register_policy, visible_tokens
from kvselect.policies.block_policy import BlockState, WindowedBlocks, share_out_blocks
from kvselect.policies.clamped_attention import attend_clamped
from kvselect.queries import Phase, Queries
from kvselect.rope import Rope
from kvselect.selection import Selection
from kvselect.tensor_parallel import sum_over_ranks

__all__ = ["InfLLM"]


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class InfLLM(WindowedBlocks):
    """Blocks of context memory, found by a few representative keys each.

    While a token lies in the window it sums up the attention that it receives there. A block that
    leaves the window is represented by the mean of the ``num_representatives`` keys with the
    largest sums: ``score_B = sum over h of qbar[h] . rep_B[h // group_size]``, ``qbar`` the mean
    query of a query block.

    Parameters
    ----------
    topk_blocks, block_size, num_sink_tokens, num_recent_tokens, num_representatives : int
        Blocks picked, tokens of one, tokens kept at either end (up to whole blocks), keys.
    scope : "layer" or "kv_head", who shares one list
    positions : "clamp", "compact" or "original"
        "clamp": true distances inside the window, ``num_recent_tokens - 1`` to all before it, at
        which blocks are scored with "compact" too (ranks in the list).
    chunk_size, q_block_size, dense_layers : as `TokenSelect` has them

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds; when used, if rope has too few positions.

    Notes
    -----
    Source: Xiao et al., arXiv:2402.04617: average of infinity-Bench 57.7 with Mistral-7B (25.2
    without), LongBench 46.95 with Llama-3-8B (44.73). Representatives by received attention, as its
    code has it. State: one vector per block and KV head, one number per token and KV head.
    """

    revocable: ClassVar[bool] = True
    query_aware: ClassVar[bool] = True
    persistent: ClassVar[bool] = True

    topk_blocks: int = 16
    block_size: int = 128
    num_sink_tokens: int = 128
    num_recent_tokens: int = 4096
    num_representatives: int = 4
    scope: Literal["layer", "kv_head"] = "layer"
    positions: Literal["clamp", "compact", "original"] = "clamp"
    chunk_size: int = 2048
    q_block_size: int = 512
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.require_counts()
        require_int(self.num_representatives, "num_representatives", 1)
        require_choice(self.scope, "scope", ("layer", "kv_head"))
        require_choice(self.positions, "positions", ("clamp", "compact", "original"))

    @classmethod
    def at_budget(cls, budget: int) -> InfLLM:
        return cls(**share_out_blocks(budget, 128))

    @property
    def average_queries(self) -> str:
        """Read by `attach`, which passes the queries before RoPE then."""
        return "before_rope"

    @property
    def num_positions(self) -> int:
        blocks = self.num_sink_blocks + self.topk_blocks if self.positions == "clamp" else 0
        return self.capacity - blocks * self.block_size

    @property
    def num_margin_tokens(self) -> int:
        return 2 * self.block_size  # of a block that has just left the window

    def new_statistics(self) -> BlockStatistics:
        return BlockStatistics(self.block_size, representatives=self.num_representatives)

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        if self.positions == "clamp":  # what lies before the window is not at its true distance
            anchor = end if phase == "decode" else begin
            return anchor - self.num_recent_tokens < self.block_size
        bound = end if rope is None or not self.caches_unrotated else rope.num_positions
        return super(InfLLM, self).is_dense(phase, begin, end, rope) and end <= bound

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        """Sinks, the best blocks and the window of every query block; None where that is all."""
        assert isinstance(state, BlockState)
        if self.caches_unrotated:
            require_compact_rope(queries.rope, self.num_positions)
        visible, statistics = visible_tokens(queries, cache), state.statistics(queries.phase)
        blocks = state.blocks
        dense = self.is_dense(queries.phase, *longest_block(queries, cache), queries.rope)
        windows = query_windows(queries, cache, self.block_size, self.num_recent_tokens)
        num_blocks, votes = -(-queries.max_seqlen // self.block_size), []
        distance = self.num_recent_tokens - 1 if self.caches_unrotated else None
        for part in range(queries.num_blocks):
            represent_blocks(blocks, queries, cache, windows, part, self.num_recent_tokens)
            if not dense:
                q = mean_query(queries, windows, part, distance)
                found = block_logits(q, blocks.representatives[:, :, :num_blocks], 1.0)
                vote = found.sum((2, 3))
                if self.scope == "layer":
                    vote = sum_over_ranks(vote.sum(1, keepdim=True), queries.process_group)
                votes.append(vote)
            add_local_mass(blocks, queries, cache, windows, part, self.caches_unrotated)
        if queries.phase == "prefill":  # ahead of the next step, while all keys are at hand
            last = queries.num_blocks
            represent_blocks(blocks, queries, cache, windows, last, self.num_recent_tokens)
        if dense:
            statistics.record_dense(visible)
            return None
        sizes = {"topk_blocks": self.topk_blocks, "num_sink_tokens": self.num_sink_tokens}
        chosen = choose_blocks(torch.stack(votes, 1), windows, blocks, queries, cache, **sizes)
        statistics.record_selection(chosen.selection, visible, scored=False)
        return chosen.selection

    def attend(
        self, queries: Queries, cache: KVCache, selection: Selection | BlockMask | None
    ) -> tuple[Tensor, Tensor]:
        """Attention over the lists; "clamp": over window and the rest apart, then merged."""
        if self.positions != "clamp" or not isinstance(selection, Selection):
            return super(InfLLM, self).attend(queries, cache, selection)
        windows = query_windows(queries, cache, self.block_size, self.num_recent_tokens)
        sizes = {"block_size": self.block_size, "distance": self.num_recent_tokens - 1}
        return attend_clamped(queries, cache, selection, windows, **sizes)
