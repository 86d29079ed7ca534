"""From scores of blocks to lists of tokens: whole blocks, sinks and a window, ascending."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.block_statistics import BlockStatistics
from kvselect.cache import KVCache
from kvselect.queries import Queries
from kvselect.query_blocks import block_range
from kvselect.selection import Selection, list_width, select_blocks

__all__ = [
    "BlockChoice",
    "QueryWindows",
    "choose_blocks",
    "first_blocks",
    "query_windows",
    "split_lists",
]


class QueryWindows(NamedTuple):
    """Of each (row, query block), counted from the row's first real token; int32 [batch, n].

    The window is every block with a token in it; candidates are the blocks before it, all of whose
    tokens lie before the queries.
    """

    first_block: Tensor  # of the window
    begin: Tensor  # the queries are [begin, end)
    end: Tensor
    most_blocks: int  # that a window has


class BlockChoice(NamedTuple):
    """What was chosen, as tokens and as blocks."""

    selection: Selection
    picked: Tensor  # [batch, n, num_lists, width] int32: sinks and candidates, ascending, -1 pads


def query_windows(
    queries: Queries, cache: KVCache, block_size: int, num_recent_tokens: int
) -> QueryWindows:
    """Windows of the last ``num_recent_tokens`` before each query block, in whole blocks.

    A decode step's own token is one of them; a prefill block's queries come on top.
    """
    step = queries.phase == "decode"
    at = block_range(
        queries.cache_seqlens,
        cache.starts,
        queries.q_block_offsets,
        queries.seqlen_q,
        "decode" if step else "block_start",
        0,
        num_recent_tokens,
    )
    longest = num_recent_tokens
    if not step:
        longest += max(b - a for a, b in zip(queries.offsets, queries.offsets[1:]))
    most = (longest + block_size - 2) // block_size + 1
    first_block = (at.window_start - at.start) // block_size
    return QueryWindows(first_block, at.begin - at.start, at.end - at.start, most)


def first_blocks(
    queries: Queries, cache: KVCache, part: int, block_size: int, num_recent_tokens: int
) -> tuple[int, ...] | None:
    """`QueryWindows.first_block` of one query block for every row; None: the host does not know.

    ``part`` may be the number of blocks: of the queries that come next.
    """
    if cache.lengths_are_bounds:
        return None
    step = queries.phase == "decode"
    ahead = queries.seqlen_q - queries.offsets[part + 1 if step else part]
    anchors = (real - queries.num_later_tokens - ahead for real in cache.num_real_tokens)
    return tuple(max(anchor - num_recent_tokens, 0) // block_size for anchor in anchors)


def choose_blocks(
    votes: Tensor,
    windows: QueryWindows,
    statistics: BlockStatistics,
    queries: Queries,
    cache: KVCache,
    *,
    topk_blocks: int,
    num_sink_tokens: int = 0,
) -> BlockChoice:
    """Sinks, the best blocks and the window of every query block, as lists of tokens.

    Parameters
    ----------
    votes : Tensor, [batch, num_query_blocks, num_lists, num_blocks], float32
        ``num_lists`` 1: all heads share a list. A block whose vote is not finite is not picked;
        votes of sinks and of the window do not matter.
    topk_blocks : int
        Picked by (vote descending, position ascending).
    num_sink_tokens : int
        Blocks with one of them are always kept.

    Returns
    -------
    BlockChoice
        Tokens whose key is not finite are not listed (with one list for all heads: the key of any
        head).
    """
    size = statistics.block_size
    batch, num_query_blocks, num_lists, num_blocks = votes.shape
    num_sinks = -(-num_sink_tokens // size)
    votes = votes.flatten(0, 1).unsqueeze(1)
    if num_sinks:
        votes = votes.clone()
        votes[..., :num_sinks] = 0.0
    first = windows.first_block.flatten().contiguous()
    most = min(num_sinks + topk_blocks, num_blocks)
    picked = select_blocks(
        votes.contiguous(),
        cache_seqlens=first,
        starts=None,
        q_block_offsets=None,
        seqlen_q=1,
        window_rule="decode",
        num_sink_tokens=num_sinks,
        num_recent_tokens=0,
        keep=topk_blocks,
        width=list_width(most),
    ).indices[:, 0, :, :most]

    width = list_width(min((most + windows.most_blocks) * size, queries.max_seqlen))
    indices, count = torch.ops.kvselect.list_blocks.default(
        picked,
        first,
        windows.end.flatten().contiguous(),
        cache.starts,
        statistics.finite,
        windows.most_blocks,
        width,
    )
    heads = cache.num_kv_heads
    shape = (batch, num_query_blocks, heads)
    indices = indices.expand(-1, heads, -1).view(*shape, -1)
    count = count.expand(-1, heads).view(shape)
    if queries.q_block_offsets is None:
        indices, count = indices.squeeze(1), count.squeeze(1)
    selection = Selection(indices, count, queries.q_block_offsets)
    return BlockChoice(selection, picked.view(batch, num_query_blocks, num_lists, -1))


def split_lists(
    selection: Selection, windows: QueryWindows, cache: KVCache, block_size: int
) -> tuple[Selection, Selection]:
    """The tokens of each list that lie before its window, and those in it."""
    indices, count = selection.with_blocks()
    begin = windows.first_block * block_size
    if cache.starts is not None:
        begin = begin + cache.starts[:, None]
    far = ((indices >= 0) & (indices < begin[..., None, None])).sum(3, dtype=torch.int32)
    place = torch.arange(indices.shape[3], dtype=torch.int32, device=indices.device)
    before = indices.masked_fill(place >= far[..., None], -1)
    width = list_width(min(indices.shape[3], windows.most_blocks * block_size))
    near = count - far
    place = place[:width].expand(*indices.shape[:3], -1)
    behind = indices.gather(3, (place + far[..., None]).clamp(max=indices.shape[3] - 1).long())
    behind = behind.masked_fill(place >= near[..., None], -1)
    parts = []
    for entries, length in ((before, far), (behind, near)):
        if selection.q_block_offsets is None:
            entries, length = entries.squeeze(1), length.squeeze(1)
        parts.append(Selection(entries.contiguous(), length, selection.q_block_offsets))
    return parts[0], parts[1]
