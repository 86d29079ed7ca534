"""Exact attention over a list of tokens per KV head, and what such a list keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.reference.cache import CacheLike
from kvselect.reference.query_blocks import QueryBlocks
from kvselect.reference.rotation import RopeTable, rotate
from kvselect.reference.soft_cap import soft_capped
from kvselect.selection import Selection


def _entries(selection: Selection, row: int, block: int, head: int) -> Tensor:
    """Valid positions of one list, ascending, int64."""
    indices, topk_length = selection.indices, selection.topk_length
    if indices.dim() == 3:
        indices, topk_length = indices[:, None], topk_length[:, None]
    return indices[row, block, head, : int(topk_length[row, block, head])].long()


def sparse_attention(
    q: Tensor,
    cache: CacheLike,
    selection: Selection | None = None,
    *,
    softmax_scale: float | None = None,
    rope: RopeTable | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last ``seqlen_q`` tokens over the tokens that a selection lists.

    ``out = sum_i exp(s[i] - lse) v[i]`` with ``s[i] = softmax_scale * q . k[i]`` and
    ``lse = logsumexp_i s[i]``, over the listed tokens at or before the query's own position.

    Parameters
    ----------
    q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
        Query j sits at position ``cache_seqlens - seqlen_q + j``.
    cache : CacheLike
    selection : Selection or None
        None: every token from ``starts`` up to the query's own.
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    rope : RopeTable or None
        Keys are stored, and q is given, before RoPE ("compact" positions): the key of rank r in its
        list rotates to r, the query to the rank of its own token (the one that it would have, where
        it is not listed).
    softcap : float or None
        Given, a logit ``x`` becomes ``softcap * tanh(x / softcap)``.
    sink_logits : Tensor, [num_q_heads], or None
        One more logit per head, of a value that is 0: it takes part in the denominator only.

    Returns
    -------
    out : Tensor, [batch, seqlen_q, num_q_heads, head_dim], float64; 0 where nothing is attended
    lse : Tensor, [batch, seqlen_q, num_q_heads], float64; -inf there
    """
    batch, seqlen_q, num_q_heads, head_dim = q.shape
    num_kv_heads = cache.k.shape[2]
    group_size = num_q_heads // num_kv_heads
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    blocks = QueryBlocks(
        cache_seqlens=cache.cache_seqlens,
        seqlen_q=seqlen_q,
        starts=cache.starts,
        offsets=None if selection is None else selection.q_block_offsets,
    )
    out = torch.zeros(batch, seqlen_q, num_q_heads, head_dim, dtype=torch.float64)
    lse = torch.full((batch, seqlen_q, num_q_heads), -torch.inf, dtype=torch.float64)
    for row in range(batch):
        start, seqlen = blocks.start(row), blocks.seqlen(row)
        for block in range(blocks.num_blocks):
            for g in range(num_kv_heads):
                entries = torch.arange(start, seqlen)
                if selection is not None:
                    entries = _entries(selection, row, block, g)
                keys = cache.k[row, entries, g].double()
                values = cache.v[row, entries, g].double()
                if rope is not None:
                    keys = rotate(keys, torch.arange(len(entries)), rope)
                for query in blocks.queries(block):
                    position = blocks.position(row, query)
                    num_seen = int((entries <= position).sum())
                    if num_seen == 0:
                        continue
                    heads = slice(g * group_size, (g + 1) * group_size)
                    vectors = q[row, query, heads].double()
                    if rope is not None:
                        vectors = rotate(vectors, (entries < position).sum(), rope)
                    logits = soft_capped(scale * vectors @ keys[:num_seen].T, softcap)
                    total = logits.logsumexp(-1)
                    if sink_logits is not None:
                        total = total.logaddexp(sink_logits[heads].double())
                    lse[row, query, heads] = total
                    out[row, query, heads] = (logits - total[:, None]).exp() @ values[:num_seen]
    return out, lse


def gather_tokens(
    cache: CacheLike, selection: Selection, seqlen_q: int, *, rope: RopeTable | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Listed keys and values side by side, list after list: for KV head, row, block in this order.

    Parameters
    ----------
    cache : CacheLike
    selection : Selection
    seqlen_q : int
        Queries of the call; each list must end with all tokens of its block.
    rope : RopeTable or None
        Given, the key of rank r in its list rotates to r.

    Returns
    -------
    k, v : Tensor, [num_tokens, head_dim], float64
    cu_seqlens : Tensor, [num_lists + 1], int32
        Where each list begins, and where the last one ends.

    Raises
    ------
    ValueError
        If a list does not end with the tokens of its block, or holds others where the block begins
        before its row.
    """
    blocks = QueryBlocks(
        cache_seqlens=cache.cache_seqlens,
        seqlen_q=seqlen_q,
        starts=cache.starts,
        offsets=selection.q_block_offsets,
    )
    keys, values, ends = [], [], [0]
    for g in range(cache.k.shape[2]):
        for row in range(blocks.batch):
            for block in range(blocks.num_blocks):
                entries = _entries(selection, row, block, g)
                own = blocks.range(row, block)
                tail = list(range(own.begin, own.end))
                if len(blocks.queries(block)):
                    whole = len(tail) == len(blocks.queries(block))
                    listed = entries.tolist()
                    if listed[len(listed) - len(tail) if whole else 0 :] != tail:
                        raise ValueError(f"list [{row}, {block}, {g}] does not end with its block")
                key = cache.k[row, entries, g].double()
                if rope is not None:
                    key = rotate(key, torch.arange(len(entries)), rope)
                keys.append(key)
                values.append(cache.v[row, entries, g].double())
                ends.append(ends[-1] + len(entries))
    empty = torch.zeros(0, cache.k.shape[-1], dtype=torch.float64)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    return torch.cat([empty, *keys]), torch.cat([empty, *values]), cu_seqlens


def merge_splits(partial_out: Tensor, partial_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention computed over disjoint parts of the context.

    ``lse = logsumexp_s partial_lse[s]``, ``out = sum_s exp(partial_lse[s] - lse) * partial_out[s]``

    Parameters
    ----------
    partial_out : Tensor, [num_splits, ..., head_dim]
    partial_lse : Tensor, [num_splits, ...]
        Natural log; -inf where a split saw no token: its ``partial_out`` does not matter then.

    Returns
    -------
    out : Tensor, [..., head_dim], float64; 0 where no split saw a token
    lse : Tensor, [...], float64; -inf there
    """
    partial_out, partial_lse = partial_out.double(), partial_lse.double()
    lse = partial_lse.logsumexp(0)
    weights = (partial_lse - lse).exp()
    seen = (partial_lse > -torch.inf)[..., None]
    return (weights[..., None] * partial_out).where(seen, 0.0).sum(0), lse


def recovered_mass(
    q: Tensor,
    cache: CacheLike,
    selection: Selection,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Share of each query head's dense attention mass that a selection holds.

    ``sum over listed i of p[i]``, where p is the softmax over every token that the query sees.

    Parameters
    ----------
    q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
    cache : CacheLike
    selection : Selection
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    softcap : float or None
        As in `sparse_attention`.

    Returns
    -------
    Tensor, [batch, seqlen_q, num_q_heads], float64, in [0, 1]; 1 where nothing is visible
    """
    batch, seqlen_q, num_q_heads, head_dim = q.shape
    group_size = num_q_heads // cache.k.shape[2]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    blocks = QueryBlocks(
        cache_seqlens=cache.cache_seqlens,
        seqlen_q=seqlen_q,
        starts=cache.starts,
        offsets=selection.q_block_offsets,
    )
    mass = torch.ones(batch, seqlen_q, num_q_heads, dtype=torch.float64)
    for row in range(batch):
        start = blocks.start(row)
        for block in range(blocks.num_blocks):
            for h in range(num_q_heads):
                entries = _entries(selection, row, block, h // group_size)
                for query in blocks.queries(block):
                    position = blocks.position(row, query)
                    if position < start:
                        continue
                    keys = cache.k[row, start : position + 1, h // group_size].double()
                    logits = scale * (keys @ q[row, query, h].double())
                    weights = soft_capped(logits, softcap).softmax(0)
                    seen = entries[(entries >= start) & (entries <= position)]
                    mass[row, query, h] = weights[seen - start].sum()
    return mass
