"""Lists cut to a number of their own: what a floor under their mass takes, or a given count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.query_blocks import BlockRange
from kvselect.selection import Lists

__all__ = ["FLOOR_BINS", "Floored", "trim_to_count", "trim_to_mass"]

FLOOR_BINS = 8
"""Equal steps from the fewest candidates that may be picked to the most, for reports."""


class Floored(NamedTuple):
    """Lists cut to the mass that was asked for, and what that took."""

    lists: Lists
    counts: Tensor  # [FLOOR_BINS + 1] float64: lists by candidates picked; lists that fell short


def trim_to_mass(
    lists: Lists,
    votes: Tensor,
    at: BlockRange,
    *,
    keep: int,
    keep_max: int,
    wanted: Tensor,
    hit: Tensor | None = None,
) -> Floored:
    """Of lists with the ``keep_max`` best candidates, as many as reach the wanted score.

    At least ``keep``, in the order (score descending, position ascending); sinks and recent tokens
    always stay, and count.

    Parameters
    ----------
    votes : Tensor, [batch, num_blocks, num_lists, seqlen_k], float32
        What the lists were picked by.
    at : BlockRange
        Of the same blocks: says which entries are candidates.
    wanted : Tensor that broadcasts to [batch, num_blocks, num_lists]
        Score that a list must reach.
    hit : Tensor, [batch, num_lists], int32, or None
        Non-zero: a reused list, which stays as it is.

    Returns
    -------
    Floored

    Notes
    -----
    A sort of ``keep_max`` numbers per list; nothing is read back from the device.
    """
    indices = lists.indices
    valid, candidate = _candidates(lists, at)
    entry = torch.arange(indices.shape[3], device=indices.device)
    score = votes.gather(3, indices.clamp(min=0).long()).nan_to_num(0.0, 0.0, 0.0)
    always = score.where(valid & ~candidate, 0.0).sum(3)

    # Entries ascend, so a stable sort breaks ties by position.
    ranked, order = score.where(candidate, -1.0).sort(dim=3, descending=True, stable=True)
    before = ranked.clamp(min=0.0).cumsum(3) - ranked.clamp(min=0.0)
    needed = (entry < keep) | (always[..., None] + before < wanted[..., None])
    chosen = torch.zeros_like(valid).scatter(3, order, needed) & candidate
    kept = chosen | (valid & ~candidate)
    if hit is not None:
        reused = (hit != 0)[:, None, :]
        kept = kept | (valid & reused[..., None])

    trimmed = _packed(indices, kept)
    kept_score = score.where(kept, 0.0).sum(3)
    picked = chosen.sum(3)
    fell_short = (kept_score < wanted) & (picked >= keep_max)
    bin_of = (picked - keep).clamp(min=0) * FLOOR_BINS // max(keep_max - keep + 1, 1)
    counted = torch.ones_like(fell_short)
    if hit is not None:
        kept_score = kept_score.masked_fill(reused, torch.nan)
        counted = counted & ~reused
    one_hot = torch.nn.functional.one_hot(bin_of.clamp(max=FLOOR_BINS - 1), FLOOR_BINS)
    by_bin = (one_hot * counted[..., None]).sum((0, 1, 2)).double()
    counts = torch.cat((by_bin, (fell_short & counted).sum().double()[None]))
    return Floored(
        Lists(trimmed, kept.sum(3, dtype=torch.int32), kept_score.to(lists.kept_score.dtype)),
        counts,
    )


def trim_to_count(lists: Lists, votes: Tensor, at: BlockRange, counts: Tensor) -> Lists:
    """Of lists with their best candidates, the ``counts`` best; sinks and recent tokens stay.

    Parameters
    ----------
    votes, at
        As `trim_to_mass` takes them.
    counts : Tensor, [batch, num_blocks], integer
        Candidates of every list of a (row, block).
    """
    valid, candidate = _candidates(lists, at)
    score = votes.gather(3, lists.indices.clamp(min=0).long()).nan_to_num(0.0, 0.0, 0.0)
    _, order = score.where(candidate, -1.0).sort(dim=3, descending=True, stable=True)
    entry = torch.arange(order.shape[3], device=order.device)
    needed = (entry < counts[:, :, None, None]).expand_as(order)
    chosen = torch.zeros_like(valid).scatter(3, order, needed) & candidate
    kept = chosen | (valid & ~candidate)
    kept_score = score.where(kept, 0.0).sum(3).to(lists.kept_score.dtype)
    return Lists(_packed(lists.indices, kept), kept.sum(3, dtype=torch.int32), kept_score)


def _candidates(lists: Lists, at: BlockRange) -> tuple[Tensor, Tensor]:
    """Which entries are valid, and which of them are candidates."""
    indices = lists.indices
    valid = torch.arange(indices.shape[3], device=indices.device) < lists.topk_length[..., None]
    candidate = valid & (indices >= at.sink_end[..., None, None])
    return valid, candidate & (indices < at.window_start[..., None, None])


def _packed(indices: Tensor, kept: Tensor) -> Tensor:
    """The kept entries, in their order; -1 behind them."""
    trimmed = torch.full_like(indices, -1)
    # What is dropped goes to a last entry of its own, which is cut off.
    room = torch.cat((trimmed, trimmed[..., :1]), dim=3)
    target = (kept.cumsum(3) - 1).where(kept, indices.shape[3])
    return room.scatter(3, target, indices)[..., :-1].contiguous()
