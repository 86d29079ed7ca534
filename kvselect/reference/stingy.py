"""Stingy positions (Landmark): where blocks before a window are seen, and attention there."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.reference.block_scores import moment_lse
from kvselect.reference.cache import CacheLike
from kvselect.reference.rotation import RopeTable, rotate


def scoring_slot(block: int, first_block: int, num_slots: int) -> int:
    """Where a block is scored: the latest ``num_slots`` where they truly are, older ones at 0."""
    return max(block - first_block + num_slots + 1, 0)


def stingy_slots(picked: list[int], first_block: int, num_slots: int) -> list[int]:
    """Where picked blocks, ascending, are attended to.

    The j-th at slot j, plus one if it is among the latest ``num_slots`` before the window's
    ``first_block``; where there are no more than these, every one at its true distance.
    """
    if first_block <= num_slots:
        return [scoring_slot(block, first_block, num_slots) for block in picked]
    return [j + (block >= first_block - num_slots) for j, block in enumerate(picked)]


def stingy_estimate(
    q: Tensor,
    keys: Tensor,
    slot: int,
    position: int,
    block_size: int,
    rope: RopeTable,
    softmax_scale: float,
    order: int,
) -> float:
    """`moment_lse` of a block's un-rotated keys [n, head_dim], all seen at the middle of a slot.

    ``q`` [head_dim], un-rotated, of a query at ``position``.
    """
    distance = torch.tensor(position - slot * block_size - (block_size - 1) // 2)
    turned = rotate(rotate(q, distance, rope), torch.tensor(0), rope)
    return moment_lse(turned, keys, softmax_scale, order)


def stingy_attention(
    q: Tensor,
    cache: CacheLike,
    row: int,
    head: int,
    token: int,
    listed: list[int],
    picked: list[int],
    first_block: int,
    block_size: int,
    num_slots: int,
    rope: RopeTable,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, list[int]]:
    """Attention of one query head's vector over listed tokens at their positions.

    Parameters
    ----------
    q : Tensor, [head_dim]
        Un-rotated, of ``token``.
    listed : list of int
        Places in the cache; those after ``token`` are not seen.
    picked : list of int
        Blocks before the window, from the row's first real token on.

    Returns
    -------
    out : Tensor, [head_dim], float64
    lse : Tensor, 0-d, float64
    positions : list of int
        Of the listed tokens that are seen, then that of the query.
    """
    start = 0 if cache.starts is None else int(cache.starts[row])
    slots = dict(zip(picked, stingy_slots(picked, first_block, num_slots)))
    seen = [place for place in listed if place <= token]
    positions = []
    for place in [*seen, token]:
        block, offset = divmod(place - start, block_size)
        slot = slots[block] if block < first_block else block - first_block + num_slots + 1
        positions.append(slot * block_size + offset)
    at = torch.tensor(positions)
    keys = rotate(cache.k[row, seen, head].double(), at[:-1], rope)
    logits = softmax_scale * (keys @ rotate(q.double(), at[-1], rope))
    out = logits.softmax(0) @ cache.v[row, seen, head].double()
    return out, logits.logsumexp(0), positions
