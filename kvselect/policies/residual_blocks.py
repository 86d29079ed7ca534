"""Residual attention: blocks that a list leaves out take part by one pseudo-token each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvselect.attention import merge_splits
from kvselect.block_lists import BlockChoice
from kvselect.block_scores import attend_blocks
from kvselect.block_statistics import BlockStatistics
from kvselect.selection import Selection

__all__ = ["SelectionWithRest", "merge_rest", "with_rest"]


@dataclass(slots=True, eq=False)
class SelectionWithRest(Selection):
    """A Selection, and the blocks that it leaves out.

    Parameters
    ----------
    dropped : Tensor, bool, [batch, num_query_blocks, num_lists, num_blocks]
    blocks : BlockStatistics
        Has the mean value of each.
    """

    dropped: Tensor | None = None
    blocks: BlockStatistics | None = None


def with_rest(chosen: BlockChoice, candidate: Tensor, blocks: BlockStatistics) -> SelectionWithRest:
    """What was chosen; ``candidate`` [batch, num_query_blocks, num_blocks]: all it chose from."""
    num_blocks = candidate.shape[-1]
    # Pads go to a last entry, which is cut off.
    place = chosen.picked.long().where(chosen.picked >= 0, num_blocks)
    room = torch.cat([candidate, candidate[..., :1]], -1)[:, :, None]
    dropped = room.repeat(1, 1, place.shape[2], 1).scatter_(3, place, False)[..., :-1]
    told = chosen.selection
    return SelectionWithRest(
        told.indices, told.topk_length, told.q_block_offsets, dropped=dropped, blocks=blocks
    )


def merge_rest(
    out: Tensor,
    lse: Tensor,
    selection: SelectionWithRest,
    num_query_blocks: int,
    logits_of: Callable[[int, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Attention over the lists, merged with that over the blocks they leave out.

    Parameters
    ----------
    out, lse : Tensor
        As `sparse_attention` gives them.
    logits_of : callable
        Of (query block, number of blocks): estimates of each block's log-sum-exp, [batch,
        num_kv_heads, queries, group_size, num_blocks].
    """
    assert selection.dropped is not None and selection.blocks is not None
    num_blocks = selection.dropped.shape[-1]
    values = selection.blocks.mean_value[:, :, :num_blocks]
    rest = [
        attend_blocks(
            logits_of(part, num_blocks), values, selection.dropped[:, part, :, None, None]
        )
        for part in range(num_query_blocks)
    ]
    outs, lses = (torch.cat(parts, 1) for parts in zip(*rest))
    merged, total = merge_splits(torch.stack([out.float(), outs]), torch.stack([lse, lses]))
    return merged.to(out.dtype), total
