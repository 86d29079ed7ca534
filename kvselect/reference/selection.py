"""Sinks + the best-scored candidates + recent tokens, as one ascending list."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.reference.query_blocks import QueryBlocks
from kvselect.selection import Selection


def num_kept(topk: int, overselect: float) -> int:
    """``ceil(overselect * topk)``, as of decimal numbers: 1.1 * 10 is 11."""
    return math.ceil(round(overselect * topk, 6))


class BlockLists(NamedTuple):
    """What select_query_blocks gives."""

    indices: Tensor  # [batch, num_blocks, num_lists, width] int32, ascending, -1 pads
    topk_length: Tensor  # [batch, num_blocks, num_lists] int32
    kept_score: Tensor  # [batch, num_blocks, num_lists] float64


def pick(scores: list[float], sink_end: int, window_start: int, keep: int, width: int) -> list[int]:
    """The ``keep`` best of the candidates [sink_end, window_start), ascending.

    Order: pooled score descending, own score descending, position ascending. The pooled score is
    the maximum over the candidates at most ``width // 2`` places away. NaN and inf never compete.
    """
    finite = [i for i in range(sink_end, window_start) if math.isfinite(scores[i])]
    reach = width // 2
    pooled = {i: scores[i] for i in finite}
    if reach:
        for i in finite:
            near = range(max(i - reach, sink_end), min(i + reach + 1, window_start))
            pooled[i] = max(scores[j] for j in near if math.isfinite(scores[j]))
    return sorted(sorted(finite, key=lambda i: (-pooled[i], -scores[i], i))[: max(keep, 0)])


def without_nonfinite(listed: list[int], scores: list[float]) -> list[int]:
    """The listed tokens without those whose score is NaN or inf."""
    return [i for i in listed if math.isfinite(scores[i])]


def select_query_blocks(
    scores: Tensor,
    blocks: QueryBlocks,
    *,
    keep: int,
    pool_width: int = 1,
    width: int | None = None,
    hit: Tensor | None = None,
    previous: BlockLists | None = None,
) -> BlockLists:
    """One list per block and head: sinks, the ``keep`` best candidates, and the recent window.

    Parameters
    ----------
    scores : Tensor, [batch, num_blocks, num_lists, max_seqlen]
    blocks : QueryBlocks
    keep : int
        Candidates to pick; all of them where there are fewer. [tokens]
    pool_width : int
        Odd; 1 is off. [tokens]
    width : int or None
        Entries per list; None: as many as the longest list has.
    hit : Tensor or None, [batch, num_lists]
        Where non-zero, the list of ``previous`` gets the newest token, position ``end - 1``,
        appended, and nothing else.
    previous : BlockLists or None

    Returns
    -------
    BlockLists
        A token whose score is NaN or inf is in no list, not even as a sink or recent token.
        ``kept_score`` is the sum of the scores of all listed tokens, NaN on a hit.
    """
    batch, num_blocks, num_lists, _ = scores.shape
    lists: list[list[int]] = []
    kept: list[float] = []
    for row in range(batch):
        for block in range(num_blocks):
            at = blocks.range(row, block)
            for n in range(num_lists):
                if hit is not None and previous is not None and int(hit[row, n]):
                    length = int(previous.topk_length[row, block, n])
                    old = previous.indices[row, block, n, :length].tolist()
                    lists.append([*old, at.end - 1])
                    kept.append(math.nan)
                    continue
                own = scores[row, block, n].double().tolist()
                listed = [
                    *range(at.start, at.sink_end),
                    *pick(own, at.sink_end, at.window_start, keep, pool_width),
                    *range(at.window_start, at.end),
                ]
                listed = without_nonfinite(listed, own)
                lists.append(listed)
                kept.append(math.fsum(own[i] for i in listed))
    width = max((len(x) for x in lists), default=0) if width is None else width
    indices = torch.full((len(lists), width), -1, dtype=torch.int32)
    for number, listed in enumerate(lists):
        indices[number, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
    shape = (batch, num_blocks, num_lists)
    lengths = torch.tensor([len(x) for x in lists], dtype=torch.int32)
    return BlockLists(
        indices.view(*shape, width),
        lengths.view(shape),
        torch.tensor(kept, dtype=torch.float64).view(shape),
    )


def select_tokens(
    scores: Tensor,
    cache_seqlens: Tensor,
    *,
    topk: int,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    overselect: float = 1.0,
    pool_width: int = 1,
    starts: Tensor | None = None,
) -> Selection:
    """The tokens that one decode query attends to.

    Parameters
    ----------
    scores : Tensor, [batch, num_kv_heads, max_seqlen]
        One list per head; equal rows give equal lists.
    cache_seqlens : Tensor, [batch], int32
    topk : int
        ``ceil(overselect * topk)`` candidates are picked. [tokens]
    num_sink_tokens, num_recent_tokens : int
        Always kept. [tokens]
    overselect : float
    pool_width : int
        Odd; 1 is off. [tokens]
    starts : Tensor or None, [batch], int32

    Returns
    -------
    Selection
        indices [batch, num_kv_heads, width] int32, kept_score float64
    """
    blocks = QueryBlocks(
        cache_seqlens=cache_seqlens,
        seqlen_q=1,
        starts=starts,
        num_sink_tokens=num_sink_tokens,
        num_recent_tokens=num_recent_tokens,
    )
    lists = select_query_blocks(
        scores[:, None], blocks, keep=num_kept(topk, overselect), pool_width=pool_width
    )
    return Selection(
        indices=lists.indices[:, 0],
        topk_length=lists.topk_length[:, 0],
        kept_score=lists.kept_score[:, 0],
    )
