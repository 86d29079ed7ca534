"""Which vectors score on behalf of a query block: means of runs of neighbouring queries.

One mean over a whole block can be worse than not selecting at all (METHODS: 1.105 bits per byte
against 1.097 for the window alone, on a small trained model); a vote per run of queries, added up,
gains (1.079) and rides free on the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.checks import require
from kvselect.queries import Queries
from kvselect.query_blocks import BlockRange
from kvselect.rope import Rope

__all__ = [
    "Average",
    "BlockVectors",
    "compact_decode_vectors",
    "compact_vectors",
    "equal_blocks",
    "group_means",
    "original_vectors",
]


Average = Callable[[Tensor, int, int], Tensor]
"""Of the queries [batch, n, length, num_q_heads, head_dim] of blocks ``[first, last)``, float32:
their vectors, [batch, n, num_vectors, num_q_heads, head_dim]."""


class BlockVectors(NamedTuple):
    """Scoring vectors of blocks ``[first, last)`` of a call, the same number for each."""

    first: int
    last: int
    # [batch, last - first, num_vectors, num_q_heads, head_dim], contiguous
    q: Tensor  # meets candidates; float32, or a decode step's own queries as they are
    q_local: Tensor | None  # meets sinks and recent tokens, float32; None: q


def original_vectors(
    queries: Queries, at: BlockRange, average: Average, average_first: bool
) -> list[BlockVectors]:
    """Vectors that meet rotated keys: means of un-rotated queries, rotated to their block's middle.

    Averaging rotated queries over many positions would cancel the fast rotations. With neither
    ``rope`` nor ``q_unrotated`` the queries carry no rotation and are averaged as they are.

    Parameters
    ----------
    average_first : bool
        False: average the queries as attention uses them (the published form).

    Raises
    ------
    ValueError
        If one of ``rope`` and ``q_unrotated`` is given without the other.
    """
    rope, q = queries.rope, queries.q
    if average_first and (rope is not None or queries.q_unrotated is not None):
        allowed = "the model's Rope, to rotate the mean of q_unrotated"
        require(rope is not None, "rope", None, allowed)
        allowed = "the queries before RoPE (or average_queries='after_rope')"
        require(queries.q_unrotated is not None, "q_unrotated", None, allowed)
        assert queries.q_unrotated is not None
        q = queries.q_unrotated
    parts = []
    middle = ((at.begin + at.end - 1) // 2 - at.start).clamp(min=0)
    for first, last, blocks in equal_blocks(q, queries.offsets):
        mean = average(blocks, first, last)
        if average_first and rope is not None:
            mean = rope.rotate_at(mean, middle[:, first:last, None])
        parts.append(BlockVectors(first, last, mean, None))
    return _joined(parts)


def compact_vectors(
    queries: Queries,
    at: BlockRange,
    keep: int,
    num_recent_tokens: int,
    average: Average,
    average_first: bool,
) -> list[BlockVectors]:
    """Vectors that meet un-rotated keys.

    For candidates at the fixed distance ``num_recent_tokens``; for sinks and recent tokens at the
    rank that the block's middle token would have.

    Parameters
    ----------
    average_first : bool
        False: query row ``j`` of a block goes to ``num_recent_tokens + j`` (and to its own rank),
        then the rows are averaged (the published form).
    """
    rope = queries.rope
    assert rope is not None
    num_candidates = at.window_start - at.sink_end
    window_rank = at.sink_end - at.start + num_candidates.clamp(max=keep) - at.window_start
    parts = []
    for first, last, blocks in equal_blocks(queries.q, queries.offsets):
        if average_first:
            mean = average(blocks, first, last)
            middle = (at.begin + at.end - 1) // 2
            rank = (window_rank + middle).clamp(min=0)[:, first:last, None]
            q, q_local = rope.rotate(mean, num_recent_tokens), rope.rotate(mean, rank)
        else:
            row = torch.arange(blocks.shape[2], device=blocks.device)
            rank = (window_rank + at.begin).clamp(min=0)[:, first:last, None] + row
            q = average(rope.rotate(blocks, num_recent_tokens + row), first, last)
            q_local = average(rope.rotate(blocks, rank), first, last)
        parts.append(BlockVectors(first, last, q, q_local))
    return _joined(parts)


def compact_decode_vectors(
    q: Tensor, rope: Rope, num_recent_tokens: int, rank: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Both forms of single queries: at the fixed distance, and at their rank.

    Parameters
    ----------
    q : Tensor, [batch, num_blocks, 1, num_q_heads, head_dim], float32
    rank : int, or Tensor [batch, num_blocks]
        Of the query's own token.

    Returns
    -------
    Two tensors of the shape of ``q``, float32, contiguous
    """
    if isinstance(rank, int):  # both rotations in one multiplication: decode counts every small op
        own, other = rope.fixed_factors((num_recent_tokens, rank), q.shape[-1])
        both = rope.turn(q, own, other)
        return both[0], both[1]
    return rope.rotate(q, num_recent_tokens), rope.rotate(q, rank[..., None])


def equal_blocks(q: Tensor, offsets: tuple[int, ...]) -> list[tuple[int, int, Tensor]]:
    """Runs of blocks of equal length: first, last, their queries in float32.

    Queries are [batch, last - first, length, num_q_heads, head_dim].
    """
    lengths = [end - begin for begin, end in pairwise(offsets)]
    runs, first = [], 0
    for length, same in groupby(lengths):
        last = first + len(list(same))
        span = q[:, offsets[first] : offsets[last]].float()
        runs.append((first, last, torch.unflatten(span, 1, (last - first, length))))
        first = last
    return runs


def group_means(query_groups: int) -> Average:
    """Vectors that are means of at most ``query_groups`` runs of neighbouring queries, as even as
    can be."""

    def average(blocks: Tensor, first: int, last: int) -> Tensor:
        length = blocks.shape[2]
        groups = min(query_groups, length)
        if length % groups == 0:
            return torch.unflatten(blocks, 2, (groups, length // groups)).mean(3)
        bounds = [length * group // groups for group in range(groups + 1)]
        means = [blocks[:, :, begin:end].mean(2) for begin, end in pairwise(bounds)]
        return torch.stack(means, dim=2)

    return average


def _joined(parts: list[BlockVectors]) -> list[BlockVectors]:
    """Neighbouring runs with the same number of vectors as one: an op call takes one number.

    In practice one call is left: only a first block shorter than ``query_groups`` differs.
    """
    joined = []
    for _, same in groupby(parts, key=lambda part: part.q.shape[2]):
        run = list(same)
        q = torch.cat([part.q for part in run], dim=1).contiguous()
        local = [part.q_local for part in run if part.q_local is not None]
        q_local = torch.cat(local, dim=1).contiguous() if local else None
        joined.append(BlockVectors(run[0].first, run[-1].last, q, q_local))
    return joined
