"""Which KV blocks a block of queries keeps: those of most mass, with budgets by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvselect.checks import require, require_float, require_tensor

__all__ = [
    "BlockMask",
    "apportioned_blocks",
    "head_recall",
    "head_recall_split",
    "largest_blocks",
    "needed_shares",
]


@dataclass(slots=True, eq=False)
class BlockMask:
    """Kept blocks of every query head and q block, a bit each.

    Parameters
    ----------
    bits : Tensor, uint8, [batch, num_q_heads, num_q_blocks, ceil(num_kv_blocks / 8)]
        Bit ``i`` of byte ``j`` is KV block ``8 * j + i``.
    num_kv_blocks : int
    recall : Tensor, [batch, num_q_heads], float32
        Share of the searched mass that the kept blocks hold.
    """

    bits: Tensor
    num_kv_blocks: int
    recall: Tensor

    @classmethod
    def pack(cls, kept: Tensor, recall: Tensor) -> BlockMask:
        """Of ``kept`` [batch, num_q_heads, num_q_blocks, num_kv_blocks], bool."""
        num_kv_blocks = kept.shape[-1]
        whole = torch.nn.functional.pad(kept, (0, -num_kv_blocks % 8))
        whole = whole.view(*kept.shape[:-1], -1, 8)
        weights = 2 ** torch.arange(8, device=kept.device)
        return cls((whole * weights).sum(-1).to(torch.uint8), num_kv_blocks, recall)

    def unpack(self) -> Tensor:
        """Bool, [batch, num_q_heads, num_q_blocks, num_kv_blocks]."""
        places = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        bits = (self.bits[..., None] >> places) & 1
        return bits.flatten(-2)[..., : self.num_kv_blocks].bool()


def largest_blocks(
    mass: Tensor, sparsity: Tensor, num_visible: Tensor, mandatory: Tensor
) -> Tensor:
    """The blocks of largest mass of every q block, as many in all rows of a head.

    ``max(1, round((1 - sparsity) * num_visible))`` blocks, mandatory ones first; equal masses in
    the order of the blocks.

    Parameters
    ----------
    mass : Tensor, [batch, num_q_heads, num_q_blocks, num_kv_blocks]
        NaN counts as 0.
    sparsity : Tensor, [batch, num_q_heads]
        Share of the visible blocks to leave out.
    num_visible : Tensor, [batch, num_q_blocks], int
        Blocks that a q block sees: the first ones.
    mandatory : Tensor, [batch, num_q_blocks, num_kv_blocks], bool
        Kept even where they are more.

    Returns
    -------
    Tensor, bool, shape of ``mass``
    """
    require_tensor(mass, "mass", (None, None, None, None), (torch.float32,))
    share = (1.0 - sparsity)[:, :, None] * num_visible[:, None]
    count = share.round().clamp(min=1).minimum(num_visible[:, None])
    return _first_blocks(mass, count, mandatory)


def needed_shares(mass: Tensor, num_visible: Tensor, mandatory: Tensor, recall: float) -> Tensor:
    """The least share of the visible blocks by which a head recalls so much of its mass.

    The same share of every q block, mandatory blocks first, then those of largest mass; arguments
    as in `largest_blocks`, ``recall`` in (0, 1).

    Returns
    -------
    Tensor, [batch, num_q_heads], float32, in [0, 1]; as if one block did where there is no mass
    """
    ordered = _in_order(mass, mandatory)
    found = mass.nan_to_num(0.0).gather(3, ordered)
    place = torch.arange(mass.shape[3], device=mass.device)
    # round(share * num_visible) blocks hold the one of this place from this share on.
    share = (place + 0.5) / num_visible.clamp(min=1)[:, None, :, None]
    shares, order = share.expand_as(mass).flatten(2).sort(dim=2)
    added = found.flatten(2).gather(2, order).double().cumsum(2)
    first = (added < recall * added[..., -1:]).sum(2, keepdim=True)
    return shares.gather(2, first.clamp(max=added.shape[2] - 1))[..., 0].clamp(max=1.0)


def apportioned_blocks(
    mass: Tensor, need: Tensor, sparsity: float, num_visible: Tensor, mandatory: Tensor
) -> Tensor:
    """As `largest_blocks`, heads having blocks in proportion to ``need``.

    Every q block keeps as many blocks of all heads together as with ``sparsity`` for each of them:
    a head one at least and ``num_visible`` at most, the others go one by one to the head with the
    largest ``need / (blocks it has + 1/2)`` (Sainte-Laguë), the first of equal ones.

    Parameters
    ----------
    need : Tensor, [batch, num_q_heads], float32, >= 0

    Returns
    -------
    Tensor, bool, shape of ``mass``
    """
    _, num_heads, num_q_blocks, num_blocks = mass.shape
    each = ((1.0 - sparsity) * num_visible).round().clamp(min=1).minimum(num_visible)
    place = torch.arange(num_blocks, device=mass.device)
    claim = need.double()[:, None, :, None] / (place + 0.5)
    claim = claim.masked_fill(place == 0, torch.inf).expand(-1, num_q_blocks, -1, -1)
    claim = claim.masked_fill(place >= num_visible[:, :, None, None], -1.0).flatten(2)
    order = claim.sort(dim=2, descending=True, stable=True).indices
    turn = torch.arange(order.shape[2], device=mass.device)
    given = torch.zeros_like(claim, dtype=torch.bool)
    given.scatter_(2, order, turn < (num_heads * each)[..., None])
    count = torch.unflatten(given, 2, (num_heads, num_blocks)).sum(3).transpose(1, 2)
    return _first_blocks(mass, count, mandatory)


def _in_order(mass: Tensor, mandatory: Tensor) -> Tensor:
    """Blocks of every q block, mandatory ones first, then by mass; int64, shape of ``mass``."""
    required = mandatory[:, None].expand_as(mass)
    ranked = mass.nan_to_num(0.0).masked_fill(required, torch.inf)
    return ranked.sort(dim=-1, descending=True, stable=True).indices


def _first_blocks(mass: Tensor, count: Tensor, mandatory: Tensor) -> Tensor:
    """The first ``count`` [batch, num_q_heads, num_q_blocks] blocks, and all mandatory ones."""
    place = torch.arange(mass.shape[3], device=mass.device)
    kept = torch.zeros_like(mass, dtype=torch.bool)
    kept.scatter_(3, _in_order(mass, mandatory), place < count[..., None])
    return kept | mandatory[:, None]


def head_recall(mass: Tensor, kept: Tensor) -> Tensor:
    """Kept over all mass of every head, [batch, num_q_heads]; 1 where there is none."""
    total = mass.sum((2, 3))
    return torch.where(total > 0, (mass * kept).sum((2, 3)) / total, 1.0)


def head_recall_split(recall: Tensor, sparsity: float, threshold: float) -> Tensor:
    """A sparsity per head: those that recall enough give blocks to those that recall least.

    With ``m = min(#{h: recall[h] > threshold}, num_q_heads // 2)`` the ``m`` best heads get
    ``(1 + sparsity) / 2``, the ``m`` worst ``(3 * sparsity - 1) / 2``, the rest ``sparsity``: the
    mean stays. Equal recalls in the order of the heads.

    Parameters
    ----------
    recall : Tensor, [batch, num_q_heads]
        At ``sparsity`` for all.
    sparsity : float in [1/3, 1)
    threshold : float in [0, 1]

    Returns
    -------
    Tensor, [batch, num_q_heads], float32

    Notes
    -----
    Source: AdaSpa, arXiv:2502.21079, 4.3; the cap at half of the heads is ours: beyond it the two
    groups would overlap.
    """
    allowed = "a float in [1/3, 1) (the worst heads get (3 * sparsity - 1) / 2)"
    sparsity = require_float(sparsity, "sparsity", allowed)
    require(1 / 3 <= sparsity < 1.0, "sparsity", sparsity, allowed)
    num_heads = recall.shape[1]
    moved = (recall > threshold).sum(1, keepdim=True).clamp(max=num_heads // 2)
    rank = recall.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    split = torch.full_like(recall, sparsity, dtype=torch.float32)
    split = split.masked_fill(rank < moved, (1 + sparsity) / 2)
    return split.masked_fill(rank >= num_heads - moved, (3 * sparsity - 1) / 2)
