"""Landmark's stingy positions: blocks before the window are seen at a few slots in front of it.

Slots of one block each, 0 to ``num_slots``, lie before the window, which begins at ``(num_slots +
1) * block_size``. The latest ``num_slots`` blocks are scored at slots 1 and on, where they truly
are; all older ones at slot 0. The j-th picked block is attended to at slot j, plus one if it is
among the latest: order is kept, and between old and recent ones a slot is empty. No position is
ever larger than the slots, the window and the queries take.

A row with no more than ``num_slots`` blocks before its window picks them all, and sees them where
they truly are: such rows are dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvselect.attention import attend_queries, merge_splits
from kvselect.block_lists import BlockChoice, QueryWindows, split_lists
from kvselect.block_scores import moment_logits
from kvselect.block_statistics import BlockStatistics
from kvselect.cache import KVCache
from kvselect.queries import Queries
from kvselect.rope import Rope
from kvselect.selection import Selection

__all__ = ["StingySelection", "attend_stingy", "stingy_logits", "with_slots"]


@dataclass(slots=True, eq=False)
class StingySelection(Selection):
    """A Selection, and the slot of every token before its window.

    Parameters
    ----------
    far, near : Selection
        What lies before the window, and in it.
    positions : Tensor, int64, [batch, num_query_blocks, num_kv_heads, width of ``far``]
        Of its tokens; 0 where there is none.
    query_positions : Tensor, int64, [batch, seqlen_q]
    """

    far: Selection | None = None
    near: Selection | None = None
    positions: Tensor | None = None
    query_positions: Tensor | None = None


def query_positions(
    queries: Queries, cache: KVCache, windows: QueryWindows, part: int, num_slots: int, size: int
) -> Tensor:
    """Positions of one query block's queries, int64 [batch, n]; 0 for those in padding."""
    begin, end = queries.offsets[part], queries.offsets[part + 1]
    place = queries.cache_seqlens[:, None] - queries.seqlen_q
    place = place + torch.arange(begin, end, device=cache.device)
    if cache.starts is not None:
        place = place - cache.starts[:, None]
    moved = (num_slots + 1 - windows.first_block[:, part, None]) * size
    return (place + moved).where(place >= 0, 0).long()


def stingy_logits(
    queries: Queries,
    cache: KVCache,
    blocks: BlockStatistics,
    windows: QueryWindows,
    part: int,
    num_blocks: int,
    *,
    num_slots: int,
    order: int,
) -> Tensor:
    """`moment_logits` of one query block with every block at the slot that it is scored at.

    Moments are of un-rotated keys, all of them seen at the middle of the slot.

    Returns
    -------
    Tensor, [batch, num_kv_heads, n, group_size, num_blocks], float32; NaN where nothing counts
    """
    size, rope = blocks.block_size, queries.rope
    assert rope is not None
    q = queries.q[:, slice(*queries.offsets[part : part + 2])]
    own = query_positions(queries, cache, windows, part, num_slots, size)
    moments, count = blocks.moments[:, :, :num_blocks], blocks.num_finite[:, :, :num_blocks]

    def seen_from(slot: int, means: Tensor, counts: Tensor) -> Tensor:
        distance = (own - slot * size - (size - 1) // 2).clamp(min=0)
        # At position 0 a key is multiplied by the attention scaling, and nothing else.
        turned = rope.rotate(rope.rotate(q, distance), 0)
        return moment_logits(turned, means, counts, order, queries.softmax_scale, queries.softcap)

    logits = seen_from(0, moments, count)
    first = windows.first_block[:, part].long()
    for slot in range(1, num_slots + 1):
        block = first - num_slots - 1 + slot
        there = (block >= 0) & (block < num_blocks)
        index = block.clamp(0, num_blocks - 1)
        shape = (-1, moments.shape[1], 1)
        gathered = (
            table.gather(2, index[:, None, None, None].expand(*shape, table.shape[3]))
            for table in (moments, count)
        )
        at_slot = seen_from(slot, *gathered)
        place = index[:, None, None, None, None].expand(*at_slot.shape)
        kept = torch.where(there[:, None, None, None, None], at_slot, logits.gather(4, place))
        logits = logits.scatter(4, place, kept)
    return logits


def with_slots(
    chosen: BlockChoice,
    queries: Queries,
    cache: KVCache,
    windows: QueryWindows,
    *,
    num_slots: int,
    block_size: int,
) -> StingySelection:
    """What was chosen, with the positions of its tokens and of the queries."""
    told = chosen.selection
    far, near = split_lists(told, windows, cache, block_size)
    tokens = far.with_blocks()[0].long()
    start = 0 if cache.starts is None else cache.starts[:, None, None, None].long()
    place = (tokens - start).clamp(min=0)
    block = place // block_size
    picked = chosen.picked.long().expand(-1, -1, tokens.shape[2], -1)
    before = (picked[..., None, :] >= 0) & (picked[..., None, :] < block[..., None])
    first = windows.first_block.long()[:, :, None, None]
    by_order = before.sum(-1) + (block >= first - num_slots)
    slot = torch.where(first <= num_slots, block + 1 + num_slots - first, by_order)
    positions = (slot * block_size + place % block_size).where(tokens >= 0, 0)
    parts = range(queries.num_blocks)
    own = [query_positions(queries, cache, windows, i, num_slots, block_size) for i in parts]
    return StingySelection(
        told.indices,
        told.topk_length,
        told.q_block_offsets,
        far=far,
        near=near,
        positions=positions,
        query_positions=torch.cat(own, 1),
    )


def attend_stingy(
    queries: Queries, cache: KVCache, selection: StingySelection
) -> tuple[Tensor, Tensor]:
    """Attention over what lies before the window, at its slots, and over the window, merged.

    The window's tokens lie next to each other, so that ranks keep their distances. What lies before
    it is rotated anew for every query block, in torch: one product of the block's queries and its
    picked keys.

    Returns
    -------
    out, lse : Tensor
        As `sparse_attention` gives them.
    """
    far, near = selection.far, selection.near
    positions, own = selection.positions, selection.query_positions
    rope = queries.rope
    assert far is not None and near is not None and rope is not None
    assert positions is not None and own is not None
    tokens = far.with_blocks()[0].long()
    q = rope.rotate(queries.q, own)
    parts = [
        _attend_far(
            q[:, slice(*queries.offsets[part : part + 2])],
            cache,
            tokens[:, part],
            positions[:, part],
            rope,
            queries,
        )
        for part in range(queries.num_blocks)
    ]
    far_out, far_lse = (torch.cat(both, 1) for both in zip(*parts))
    near_out, near_lse = attend_queries(queries, cache, near, rope)
    padding = own == 0  # real queries come after the slots
    far_lse = far_lse.masked_fill(padding[..., None], -torch.inf)
    out, lse = merge_splits(
        torch.stack([far_out, near_out.float()]), torch.stack([far_lse, near_lse])
    )
    return out.to(queries.q.dtype), lse


def _attend_far(
    q: Tensor, cache: KVCache, tokens: Tensor, positions: Tensor, rope: Rope, queries: Queries
) -> tuple[Tensor, Tensor]:
    """``q`` [batch, n, num_q_heads, head_dim], rotated, over listed tokens [batch, num_kv_heads,
    width] at ``positions``; -1 pads."""
    listed = tokens >= 0
    row = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None]
    head = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
    place = tokens.clamp(min=0)
    keys, values = (store[row, place, head] for store in (cache.k, cache.v))
    keys = rope.rotate(keys.unsqueeze(3), positions).squeeze(3)
    values = values.float().where(listed[..., None], 0.0)
    grouped = torch.unflatten(q, 2, (tokens.shape[1], -1))  # [batch, n, kv_head, group, channel]
    logits = queries.softmax_scale * torch.einsum("bnhgd,bhwd->bhngw", grouped, keys)
    if queries.softcap:
        logits = queries.softcap * (logits / queries.softcap).tanh()
    logits = logits.where(listed[:, :, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    out = torch.einsum("bhngw,bhwd->bnhgd", weights, values)
    return out.flatten(2, 3), lse.transpose(1, 2).flatten(2)
