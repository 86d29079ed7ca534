"""Landmark: blocks by an estimate of their log-sum-exp from moments (arXiv:2305.16300)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvselect.arguments import require_compact_rope
from kvselect.block_lists import choose_blocks, query_windows
from kvselect.block_masks import BlockMask
from kvselect.block_scores import moment_logits
from kvselect.block_statistics import BlockStatistics
from kvselect.cache import KVCache
from kvselect.checks import require, require_choice
from kvselect.policies.base import PolicyState, longest_block, register_policy, visible_tokens
from kvselect.policies.block_policy import BlockState, WindowedBlocks, share_out_blocks
from kvselect.policies.residual_blocks import SelectionWithRest, merge_rest, with_rest
from kvselect.policies.stingy_positions import (
    StingySelection,
    attend_stingy,
    stingy_logits,
    with_slots,
)
from kvselect.queries import Queries
from kvselect.selection import Selection
from kvselect.tensor_parallel import num_ranks

__all__ = ["Landmark"]


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class Landmark(WindowedBlocks):
    """Virtual landmarks: the blocks whose moments promise most attention; nothing is trained.

    ``lse_B ~ softmax_scale * q . mean_B + log |B|``, with order 2 ``+ softmax_scale^2 / 2 * sum_d
    q_d^2 * variance_B[d]``; ``weight_B = softmax`` of that over the blocks between sinks and
    window, per query and head. Queries and heads that share a list vote with their maximum.

    Parameters
    ----------
    topk_blocks, block_size, num_sink_tokens, num_recent_tokens : int
        Blocks picked, tokens of one, tokens kept at either end (up to whole blocks).
    order : 1 or 2, moments used
    scope : "kv_head" or "layer", who shares one list
    attention : "joint" or "residual"
        "residual": a block that is not picked still takes part by one pseudo-token, its mean value
        at the estimate of ``lse_B`` (Vcc, arXiv:2305.04241; with order 1, its mean key with the
        bias ``log |B|``).
    positions : "original" or "stingy"
        "original": moments are of rotated keys. "stingy": blocks before the window are seen at
        ``topk_blocks`` + sink blocks + 1 slots in front of it (`stingy_positions`), so that
        contexts may be longer than the model was trained for; with "joint" attention only.
    chunk_size, q_block_size, dense_layers : as `TokenSelect` has them.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Mohtashami & Jaggi, arXiv:2305.16300, whose landmarks are trained: perplexity 15.14 on
    PG-19 at 2048 tokens and k = 2 (Transformer-XL 14.72), passkeys to 32K with LLaMA-7B.
    """

    revocable: ClassVar[bool] = True
    query_aware: ClassVar[bool] = True
    persistent: ClassVar[bool] = True

    topk_blocks: int = 4
    block_size: int = 64
    order: int = 2
    num_sink_tokens: int = 0
    num_recent_tokens: int = 512
    scope: Literal["kv_head", "layer"] = "kv_head"
    attention: Literal["joint", "residual"] = "joint"
    positions: Literal["original", "stingy"] = "original"
    chunk_size: int = 2048
    q_block_size: int = 128
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.require_counts()
        require(self.order in (1, 2) and self.order is not True, "order", self.order, "1 or 2")
        require_choice(self.scope, "scope", ("kv_head", "layer"))
        require_choice(self.attention, "attention", ("joint", "residual"))
        require_choice(self.positions, "positions", ("original", "stingy"))
        joint = self.attention == "joint" or self.positions == "original"
        allowed = "'original' with attention='residual' (blocks that are left out have no slot)"
        require(joint, "positions", self.positions, allowed)

    @classmethod
    def at_budget(cls, budget: int) -> Landmark:
        return cls(**share_out_blocks(budget, 64))

    @property
    def num_slots(self) -> int:
        """Most blocks that a list holds before its window."""
        return self.num_sink_blocks + self.topk_blocks

    @property
    def num_positions(self) -> int:
        return self.capacity + self.block_size

    @property
    def reads_unlisted(self) -> str | None:
        if self.positions == "stingy":
            return "positions='stingy' rotates picked keys itself, on the device"
        if self.attention == "residual":
            return "attention='residual' averages values of the host"
        return super(Landmark, self).reads_unlisted

    @property
    def needs_all_heads(self) -> str | None:
        return "scope='layer' takes maxima over all heads" if self.scope == "layer" else None

    def new_statistics(self) -> BlockStatistics:
        kinds = ("moments", "mean_value") if self.attention == "residual" else ("moments",)
        return BlockStatistics(self.block_size, kinds)

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        """Sinks, the best blocks and the window of every query block; None where that is all."""
        assert isinstance(state, BlockState)
        stingy = self.positions == "stingy"
        if stingy:
            require_compact_rope(queries.rope, self.num_positions)
        visible, statistics = visible_tokens(queries, cache), state.statistics(queries.phase)
        if self.is_dense(queries.phase, *longest_block(queries, cache), queries.rope):
            statistics.record_dense(visible)
            return None
        ranks = 1 if self.scope == "kv_head" else num_ranks(queries.process_group)
        require(ranks == 1, "scope", "layer", "'kv_head' where heads are spread over processes")
        blocks = state.blocks
        windows = query_windows(queries, cache, self.block_size, self.num_recent_tokens)
        num_blocks = blocks.most_blocks(queries.max_seqlen)
        number = torch.arange(num_blocks, device=cache.device)
        candidate = (number >= self.num_sink_blocks) & (number < windows.first_block[..., None])
        votes = []
        for part in range(queries.num_blocks):
            if stingy:
                slots = {"num_slots": self.num_slots, "order": self.order}
                logits = stingy_logits(queries, cache, blocks, windows, part, num_blocks, **slots)
            else:
                logits = self._logits(queries, blocks, part, num_blocks)
            known = candidate[:, part, None, None, None] & ~logits.isnan()
            # Logarithms of the weights: those far apart stay apart.
            weights = logits.where(known, -torch.inf).log_softmax(-1).where(known, torch.nan)
            vote = weights.flatten(2, 3).amax(2)
            votes.append(vote.amax(1, keepdim=True) if self.scope == "layer" else vote)
        chosen = choose_blocks(
            torch.stack(votes, 1),
            windows,
            blocks,
            queries,
            cache,
            topk_blocks=self.topk_blocks,
            num_sink_tokens=self.num_sink_tokens,
        )
        statistics.record_selection(chosen.selection, visible, scored=False)
        if stingy:
            sizes = {"num_slots": self.num_slots, "block_size": self.block_size}
            return with_slots(chosen, queries, cache, windows, **sizes)
        if self.attention == "joint":
            return chosen.selection
        return with_rest(chosen, candidate, blocks)

    def attend(
        self, queries: Queries, cache: KVCache, selection: Selection | BlockMask | None
    ) -> tuple[Tensor, Tensor]:
        """Attention over the lists; "residual": merged with that over the blocks left out."""
        if isinstance(selection, StingySelection):
            return attend_stingy(queries, cache, selection)
        out, lse = super(Landmark, self).attend(queries, cache, selection)
        if isinstance(selection, SelectionWithRest) and selection.blocks is not None:
            logits_of = partial(self._logits, queries, selection.blocks)
            out, lse = merge_rest(out, lse, selection, queries.num_blocks, logits_of)
        return out, lse

    def _logits(
        self, queries: Queries, blocks: BlockStatistics, part: int, num_blocks: int
    ) -> Tensor:
        """Estimated lse of each block for the queries of one query block."""
        return moment_logits(
            queries.q[:, slice(*queries.offsets[part : part + 2])],
            blocks.moments[:, :, :num_blocks],
            blocks.num_finite[:, :, :num_blocks],
            self.order,
            queries.softmax_scale,
            queries.softcap,
        )
