"""Attention weights themselves: logits over listed tokens, their column sums, values by weight.

What policies need that rank tokens by the attention they get, or read values only where they count:
`sparse_attention` gives no weights away. Plain torch in float32; a query block and a KV head at a
time, so that nothing of the size of queries times tokens outlives its use.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.queries import Queries
from kvselect.selection import Selection
from kvselect.sketch import BLOCK_TOKENS, decode

__all__ = ["Listed", "column_sums", "listed_of_step", "sketched", "softmax_weights", "step_logits"]


class Listed(NamedTuple):
    """Tokens that one query per row attends to, as one list for all heads."""

    positions: Tensor  # [batch, width] int64; anything valid where there is none
    there: Tensor  # [batch, width] bool


def column_sums(queries: Queries, cache: KVCache, selection: Selection | None) -> Tensor:
    """Attention that each token gets from all queries of a block, summed over heads.

    ``sums[P, j] = sum over t in P and h of softmax_j(logits[h, t, :])[j]`` over the listed tokens
    at or before ``t``.

    Parameters
    ----------
    selection : Selection or None
        One list for all heads; None: every visible token.

    Returns
    -------
    Tensor, [batch, num_blocks, max_seqlen], float32; 0 where nothing is listed
    """
    batch, num_blocks, n = cache.batch, queries.num_blocks, queries.max_seqlen
    device = cache.device
    sums = torch.zeros((batch, num_blocks, n), device=device)
    k = cache.k[:, :n]
    everything = torch.arange(n, device=device).expand(batch, -1)
    starts = 0 if cache.starts is None else cache.starts[:, None]
    for block in range(num_blocks):
        begin, end = queries.offsets[block], queries.offsets[block + 1]
        position = queries.cache_seqlens[:, None] - queries.seqlen_q
        position = position + torch.arange(begin, end, device=device)
        if selection is None:
            there, index = everything >= starts, everything
        else:
            lists = selection.with_blocks()[0][:, block, 0].long()
            there, index = lists >= 0, lists.clamp(min=0)
        visible = there[:, None] & (index[:, None] <= position[..., None])
        for head in range(cache.num_kv_heads):
            group = queries.q.shape[2] // cache.num_kv_heads
            heads = slice(head * group, (head + 1) * group)
            keys = k[:, :, head].gather(1, index[..., None].expand(-1, -1, k.shape[3])).float()
            q = queries.q[:, begin:end, heads].float()
            logits = torch.einsum("bqhd,bwd->bhqw", q, keys)
            sinks = None if queries.sink_logits is None else queries.sink_logits[heads]
            weights, _ = softmax_weights(logits, visible[:, None], queries, sinks)
            sums[:, block].scatter_add_(1, index, weights.sum((1, 2)).where(there, 0.0))
    return sums


def softmax_weights(
    logits: Tensor, visible: Tensor, queries: Queries, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax of ``softmax_scale * logits`` over what is visible and finite in the last dim; lse.

    Parameters
    ----------
    logits : Tensor, [batch, heads, ..., width], float32
    visible : Tensor, bool, that broadcasts to it
    sink_logits : Tensor, [heads], or None
    """
    logits = queries.softmax_scale * logits
    if queries.softcap:
        logits = queries.softcap * (logits / queries.softcap).tanh()
    logits = logits.where(visible & logits.isfinite(), -torch.inf)
    lse = logits.logsumexp(-1)
    if sink_logits is not None:
        shape = (1, -1, *(1,) * (lse.dim() - 2))
        lse = lse.logaddexp(sink_logits.view(shape))
    return (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp(), lse


def listed_of_step(queries: Queries, cache: KVCache, selection: Selection | None) -> Listed:
    """The tokens of a decode step."""
    if selection is not None:
        lists = selection.with_blocks()[0][:, 0, 0].long()
        return Listed(lists.clamp(min=0), lists >= 0)
    place = torch.arange(queries.max_seqlen, device=cache.device).expand(cache.batch, -1)
    starts = 0 if cache.starts is None else cache.starts[:, None]
    return Listed(place, (place >= starts) & (place < queries.cache_seqlens[:, None]))


def step_logits(queries: Queries, keys: Tensor) -> Tensor:
    """``q . k`` of a decode step, [batch, num_kv_heads, group_size, width] float32.

    ``keys``: [batch, width, num_kv_heads, head_dim].
    """
    q = torch.unflatten(queries.q[:, 0].float(), 1, (keys.shape[2], -1))
    return torch.einsum("bghd,bwgd->bghw", q, keys.float())


def sketched(cache: KVCache, listed: Listed) -> Tensor:
    """Keys of listed tokens by the sketch alone, [batch, width, num_kv_heads, head_dim] float32.

    The keys themselves where a block has no codes: it is not whole, or its range leaves float16.
    """
    exact = gathered(cache.k, listed).float()
    assert cache.sketch_format is not None and cache.sketch_data is not None
    starts = 0 if cache.starts is None else cache.starts[:, None]
    place = (listed.positions - starts).clamp(min=0)
    real = (cache.cache_seqlens if cache.starts is None else cache.cache_seqlens - cache.starts)[
        :, None
    ]
    whole = place // BLOCK_TOKENS < real // BLOCK_TOKENS
    num_blocks = cache.max_seqlen // BLOCK_TOKENS
    if num_blocks == 0:
        return exact
    keys = decode(cache.sketch_data[:, :, :num_blocks], cache.sketch_format, cache.head_dim)
    keys = keys.flatten(2, 3).transpose(1, 2)
    place = place.clamp(max=keys.shape[1] - 1)[..., None, None].expand(-1, -1, *keys.shape[2:])
    coded = keys.gather(1, place)
    return torch.where(whole[..., None, None] & ~coded.isnan(), coded, exact)


def gathered(stored: Tensor, listed: Listed) -> Tensor:
    """Rows of keys or values [batch, n, num_kv_heads, head_dim] at the listed positions."""
    index = listed.positions[..., None, None].expand(-1, -1, *stored.shape[2:])
    return stored.gather(1, index)
