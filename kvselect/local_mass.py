"""What the queries of one block say together: their mean, and what their window's tokens get."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.block_lists import QueryWindows, first_blocks
from kvselect.block_statistics import BlockStatistics, stored
from kvselect.cache import KVCache
from kvselect.queries import Queries
from kvselect.rope import Rope
from kvselect.sketch import op_format

__all__ = ["add_local_mass", "mean_query", "represent_blocks"]

_LOGITS_AT_ONCE = 1 << 24  # of one product: bounds the memory of a prefill block


def mean_query(queries: Queries, windows: QueryWindows, part: int, distance: int | None) -> Tensor:
    """Mean of the queries of one query block, [batch, 1, num_q_heads, head_dim] float32.

    Parameters
    ----------
    distance : int or None
        Queries are un-rotated, and their mean is turned by so much. None: the mean of the queries
        before RoPE, where ``queries`` has them, turned to the middle of the block; else as they
        are.
    """
    rope, rows = queries.rope, slice(*queries.offsets[part : part + 2])
    averaged = queries.q if distance is not None else queries.q_unrotated
    if rope is None or averaged is None:
        return queries.q[:, rows].float().mean(1, keepdim=True)
    mean = averaged[:, rows].float().mean(1, keepdim=True)
    if distance is not None:
        return rope.rotate_at(mean, distance)
    middle = (windows.begin[:, part] + windows.end[:, part] - 1) // 2
    return rope.rotate_at(mean, middle.clamp(min=0)[:, None])


def represent_blocks(
    blocks: BlockStatistics,
    queries: Queries,
    cache: KVCache,
    windows: QueryWindows,
    part: int,
    num_recent_tokens: int,
) -> None:
    """Find representatives of all blocks before a query block's window.

    ``part`` may be the number of query blocks: before the window of the queries that come next.
    """
    size = blocks.block_size
    if part < queries.num_blocks:
        end = windows.first_block[:, part]
    else:
        end = (windows.end[:, -1] - num_recent_tokens).clamp(min=0) // size
    ends = first_blocks(queries, cache, part, size, num_recent_tokens)
    # Where no host counts: as many as the queries before may have moved the window by.
    blocks.represent(cache, end, ends, 2 if queries.phase == "decode" else windows.most_blocks)


def add_local_mass(
    blocks: BlockStatistics,
    queries: Queries,
    cache: KVCache,
    windows: QueryWindows,
    part: int,
    rotates: bool,
) -> None:
    """Add to ``blocks.received`` what the queries of one query block pay to their window's tokens.

    ``received[g, i] += sum over queries and heads h of group g of softmax_i(softmax_scale * q[h] .
    k[g, i])``, each softmax over the query's window up to itself.

    Parameters
    ----------
    part : int
        Which query block. Its window begins at ``windows.first_block``.
    rotates : bool
        Queries and keys are un-rotated: ``queries.rope`` turns them to their place in the window.

    Notes
    -----
    Cost: as much as attention to the window without its values; a single query goes through the
    scan of `score_tokens`.
    """
    size, rope = blocks.block_size, queries.rope if rotates else None
    start = 0 if cache.starts is None else cache.starts
    first = windows.first_block[:, part] * size
    place = first[:, None] + torch.arange(windows.most_blocks * size, device=cache.device)
    begin, end = queries.offsets[part], queries.offsets[part + 1]
    q = queries.q[:, begin:end]
    there = place < windows.end[:, part, None]
    there &= place < blocks.num_blocks * size
    at = place.where(there, 0).long()
    position = at if cache.starts is None else at + cache.starts[:, None]
    if end - begin == 1:
        seqlens = (windows.end[:, part] + start).int().contiguous()
        mass = _step_mass(q, queries, cache, seqlens, (first + start).int().contiguous(), rope)
        position = position.clamp(max=mass.shape[2] - 1)
        mass = mass.gather(2, position[:, None].expand(-1, mass.shape[1], -1))
    else:
        k = stored(cache.k_pages, cache.block_table, position[:, None], there[:, None])[:, :, 0]
        mass = _block_mass(q, k, queries, windows.end[:, part], place, there, rope)
    mass = mass.nan_to_num(0.0, 0.0, 0.0).masked_fill(~there[:, None], 0.0)
    flat = blocks.received.flatten(2)
    flat.scatter_add_(2, at[:, None].expand(-1, flat.shape[1], -1), mass)


def _step_mass(
    q: Tensor, queries: Queries, cache: KVCache, seqlens: Tensor, starts: Tensor, rope: Rope | None
) -> Tensor:
    """Of one query per row, over tokens [starts, seqlens), [batch, num_kv_heads, max_seqlen]."""
    cos, sin, rope_start, interleaved = None, None, 0, False
    vectors, local = q.unsqueeze(2).contiguous(), None
    if rope is not None:
        cos, sin, rope_start, interleaved = rope.cos, rope.sin, rope.start, rope.interleaved
        rank = (seqlens - starts - 1).clamp(min=0).long()
        local = rope.rotate(vectors, rank[:, None, None]).contiguous()
        vectors = local
    mass, _, _ = torch.ops.kvselect.score_tokens.default(
        vectors,
        local,
        cache.scored_k_pages,
        cache.block_table,
        seqlens,
        starts,
        None,
        op_format(None),
        None,
        1,
        "decode",
        0,
        queries.max_seqlen,  # all of them are recent: rotated to their own rank
        0,
        queries.softmax_scale,
        False,
        False,
        cos,
        sin,
        rope_start,
        interleaved,
        None,
        queries.max_seqlen,
        queries.softcap,
        queries.sink_logits,
    )
    found: Tensor = mass[:, 0]
    return found


def _block_mass(
    q: Tensor,
    k: Tensor,
    queries: Queries,
    end: Tensor,
    place: Tensor,
    there: Tensor,
    rope: Rope | None,
) -> Tensor:
    """Of the last queries before ``end``, over window keys [batch, num_kv_heads, n, head_dim]."""
    batch, length, heads, _ = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    query_place = (end - length)[:, None] + torch.arange(length, device=q.device)
    if rope is not None:
        rank = torch.arange(num_keys, device=q.device).clamp(max=rope.num_positions - 1)
        k = rope.rotate(k.transpose(1, 2), rank).transpose(1, 2)
        own = (query_place - place[:, :1]).clamp(min=0, max=rope.num_positions - 1)
        q = rope.rotate(q, own.long())
    keys, finite = k.float(), k.isfinite().all(-1)
    keys = keys.masked_fill(~finite[..., None], 0.0)
    total = keys.new_zeros((batch, num_kv_heads, num_keys))
    at_once = max(_LOGITS_AT_ONCE // max(batch * heads * num_keys, 1), 1)
    for begin in range(0, length, at_once):
        part = slice(begin, begin + at_once)
        rows = torch.unflatten(q[:, part].float(), 2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        logits = (rows.flatten(2, 3) @ keys.mT) * queries.softmax_scale
        logits = torch.unflatten(logits, 2, rows.shape[2:4])  # [batch, kv heads, group, n, keys]
        if queries.softcap:
            logits = queries.softcap * (logits / queries.softcap).tanh()
        seen = there[:, None] & (place[:, None] <= query_place[:, part, None])
        seen = seen[:, None, None] & finite[:, :, None, None]
        logits = logits.masked_fill(~seen, -torch.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        if queries.sink_logits is not None:
            lse = lse.logaddexp(queries.sink_logits.view(1, num_kv_heads, -1, 1, 1))
        # A query that is not finite, or sees nothing, says nothing.
        total += (logits - lse).exp().nan_to_num(0.0, 0.0, 0.0).sum((2, 3))
    return total
