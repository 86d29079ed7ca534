"""Attention over kept KV blocks, and the mass of each block."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.reference.soft_cap import soft_capped


def _kept_blocks(
    block_mask: Tensor | tuple[Tensor, Tensor], at: tuple[int, int, int], sizes: tuple[int, int]
) -> set[int]:
    """Of (row, query head, q block), in a grid of ``sizes`` = (num_q_heads, num_q_blocks)."""
    row, head, block = at
    if isinstance(block_mask, tuple | list):
        offsets, indices = block_mask
        number = (row * sizes[0] + head) * sizes[1] + block
        return set(indices[int(offsets[number]) : int(offsets[number + 1])].tolist())
    mask = block_mask[None] if block_mask.dim() == 3 else block_mask
    line = mask[min(row, mask.shape[0] - 1), min(head, mask.shape[1] - 1), block]
    if line.dtype == torch.bool:
        return set(line.nonzero()[:, 0].tolist())
    return set(line.tolist()) - {-1}


def _row_logits(
    q: Tensor,
    k: Tensor,
    row: int,
    head: int,
    *,
    causal: bool,
    softmax_scale: float | None,
    softcap: float | None,
    seqlens_q: Tensor | None,
    cache_seqlens: Tensor | None,
) -> Tensor:
    """[queries of the row, keys of the row], float64, -inf where a query does not see a key."""
    seqlen_q = q.shape[1] if seqlens_q is None else int(seqlens_q[row])
    seqlen_k = k.shape[1] if cache_seqlens is None else int(cache_seqlens[row])
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    kv_head = head // (q.shape[2] // k.shape[2])
    logits = q[row, :seqlen_q, head].double() @ k[row, :seqlen_k, kv_head].double().T
    logits = soft_capped(scale * logits, softcap)
    if causal:
        position = seqlen_k - seqlen_q + torch.arange(seqlen_q)
        logits = logits.masked_fill(torch.arange(seqlen_k) > position[:, None], -torch.inf)
    return logits


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | tuple[Tensor, Tensor],
    *,
    q_block_size: int = 128,
    kv_block_size: int = 128,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    seqlens_q: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each q block over the KV blocks kept for it.

    Parameters
    ----------
    As `kvselect.block_sparse_attention`.

    Returns
    -------
    out : Tensor, [batch, seqlen_q, num_q_heads, head_dim], float64; 0 where a query sees nothing
    lse : Tensor, [batch, seqlen_q, num_q_heads], float64; -inf there
    """
    batch, seqlen_q, num_q_heads, head_dim = q.shape
    num_q_blocks = -(-seqlen_q // q_block_size)
    out = torch.zeros(batch, seqlen_q, num_q_heads, head_dim, dtype=torch.float64)
    lse = torch.full((batch, seqlen_q, num_q_heads), -torch.inf, dtype=torch.float64)
    for row in range(batch):
        for head in range(num_q_heads):
            logits = _row_logits(
                q,
                k,
                row,
                head,
                causal=causal,
                softmax_scale=softmax_scale,
                softcap=softcap,
                seqlens_q=seqlens_q,
                cache_seqlens=cache_seqlens,
            )
            kv_head = head // (num_q_heads // k.shape[2])
            values = v[row, : logits.shape[1], kv_head].double()
            blocks_of = torch.arange(logits.shape[1]) // kv_block_size
            for block in range(num_q_blocks):
                kept = _kept_blocks(block_mask, (row, head, block), (num_q_heads, num_q_blocks))
                listed = torch.isin(blocks_of, torch.tensor(sorted(kept), dtype=torch.int64))
                first = block * q_block_size
                for query in range(first, min(first + q_block_size, logits.shape[0])):
                    seen = listed & (logits[query] != -torch.inf)
                    if not seen.any():
                        continue
                    lse[row, query, head] = logits[query, seen].logsumexp(0)
                    out[row, query, head] = logits[query, seen].softmax(0) @ values[seen]
    return out, lse


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    q_block_size: int = 128,
    kv_block_size: int = 128,
    causal: bool = True,
    row_stride: int = 1,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    seqlens_q: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """Sum over counted queries and a block's keys of ``exp(logit - lse)``.

    Parameters
    ----------
    As `kvselect.block_mass`.

    Returns
    -------
    Tensor, [batch, num_q_heads, num_q_blocks, num_kv_blocks], float64
    """
    batch, seqlen_q, num_q_heads, _ = q.shape
    num_q_blocks, num_kv_blocks = -(-seqlen_q // q_block_size), -(-k.shape[1] // kv_block_size)
    mass = torch.zeros(batch, num_q_heads, num_q_blocks, num_kv_blocks, dtype=torch.float64)
    for row in range(batch):
        for head in range(num_q_heads):
            logits = _row_logits(
                q,
                k,
                row,
                head,
                causal=causal,
                softmax_scale=softmax_scale,
                softcap=softcap,
                seqlens_q=seqlens_q,
                cache_seqlens=cache_seqlens,
            )
            blocks_of = torch.arange(logits.shape[1]) // kv_block_size
            for query in range(logits.shape[0]):
                block = query // q_block_size
                last = min((block + 1) * q_block_size, logits.shape[0]) - 1
                if (last - query) % row_stride or not (logits[query] > -torch.inf).any():
                    continue
                norm = logits[query].logsumexp(0) if lse is None else lse[row, query, head].double()
                if norm == -torch.inf:
                    continue
                weights = (logits[query] - norm).exp()
                mass[row, head, block].index_add_(0, blocks_of, weights)
    return mass
