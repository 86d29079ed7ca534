"""Scores of blocks from what stands for their keys: logits, and soft votes of the query heads."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.block_statistics import rows_of_pages
from kvselect.checks import HEAD_DIMS
from kvselect.sketch import op_format

__all__ = ["attend_blocks", "block_logits", "moment_logits", "signed_parts", "soft_votes"]


def signed_parts(q: Tensor) -> Tensor:
    """``[max(q, 0), min(q, 0)]`` along the last dim: its product with `BlockStatistics.min_max` is
    ``sum_d max(q_d * low_d, q_d * high_d)``, at least the product of ``q`` and any key."""
    return torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)


def block_logits(q: Tensor, table: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """``scale * q . table`` of every query head and block, in float32.

    Parameters
    ----------
    q : Tensor, [batch, n, num_q_heads, width]
    table : Tensor, [batch, num_kv_heads, num_blocks, width]
    softcap : float
        A logit ``x`` becomes ``softcap * tanh(x / softcap)``; 0: it stays as it is.

    Returns
    -------
    Tensor, [batch, num_kv_heads, n, group_size, num_blocks], float32
    """
    grouped = torch.unflatten(q, 2, (table.shape[1], -1)).transpose(1, 2)
    rows = grouped.flatten(2, 3).float() @ table.float().mT
    logits = torch.unflatten(rows * scale, 2, grouped.shape[2:4])
    return softcap * (logits / softcap).tanh() if softcap else logits


def moment_logits(
    q: Tensor, moments: Tensor, count: Tensor, order: int, scale: float, softcap: float = 0.0
) -> Tensor:
    """Estimates of ``log sum_j exp(scale * q . k_j)`` over each block, from moments of its keys.

    ``scale * q . mean + log count``, with order 2 ``+ scale^2 / 2 * sum_d q_d^2 * variance_d``: the
    first terms of the cumulants of the logits, had they independent channels.

    Parameters
    ----------
    q : Tensor, [batch, n, num_q_heads, head_dim]
    moments, count : Tensor, [batch, num_kv_heads, num_blocks, 2 * head_dim or 1], float32
        As `BlockStatistics` has them.

    Returns
    -------
    Tensor, [batch, num_kv_heads, n, group_size, num_blocks], float32; NaN where nothing counts
    """
    q = q.float()
    if order == 1:
        moments = moments[..., : q.shape[3]]
    else:
        q = torch.cat([q, 0.5 * scale * q.square()], -1)
    return block_logits(q, moments, scale, softcap) + count.squeeze(-1).log()[:, :, None, None]


def attend_blocks(logits: Tensor, values: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to one pseudo-token per block.

    Parameters
    ----------
    logits : Tensor, [batch, num_kv_heads, n, group_size, num_blocks], float32
    values : Tensor, [batch, num_kv_heads, num_blocks, head_dim], float32
    attended : Tensor, bool, that broadcasts to ``logits``

    Returns
    -------
    out : Tensor, [batch, n, num_q_heads, head_dim], float32; 0 where nothing is attended to
    lse : Tensor, [batch, n, num_q_heads], float32; -inf there
    """
    attended = attended & ~logits.isnan()
    logits = logits.masked_fill(~attended, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    out = weights.flatten(2, 3) @ values.nan_to_num(0.0)
    out = torch.unflatten(out, 2, weights.shape[2:4]).transpose(1, 2).flatten(2, 3)
    return out, lse.transpose(1, 2).flatten(2)


def soft_votes(
    q: Tensor,
    table: Tensor,
    num_visible: Tensor,
    num_blocks: int,
    *,
    scale: float,
    block_table: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """``votes[g, B] = sum over h of group g of softmax_B(scale * q[h] . table[g, B])``.

    Parameters
    ----------
    q : Tensor, [batch, n, num_q_heads, width], dtype of ``table``
    table : Tensor, [batch, num_kv_heads, at least num_blocks, width], contiguous
        With a ``block_table``, pages of it: [num_pages, num_kv_heads, blocks of a page, width].
    num_visible : Tensor, [batch, n], int32
        Blocks that the softmax goes over, the first ones.
    num_blocks : int
        At least the largest of them.
    block_table : Tensor, [batch, max_num_pages], int32, or None
        Pages of each row.
    scale, softcap, sink_logits
        As `Queries` has them.

    Returns
    -------
    Tensor, [batch, n, num_kv_heads, num_blocks], float32
        0 beyond ``num_visible``; NaN where the logit is not finite.

    Notes
    -----
    The scan of `score_tokens`, which takes the table for keys, where it has kernels of this width;
    torch in float32 elsewhere. Cost: reads the table once; memory-bound.
    """
    batch, n, _, width = q.shape
    if width not in HEAD_DIMS:
        if block_table is not None:
            table = rows_of_pages(table, block_table)
        logits = block_logits(q, table[:, :, :num_blocks], scale, softcap)
        beyond = torch.arange(num_blocks, device=q.device) >= num_visible[:, None, :, None, None]
        finite = logits.isfinite() & ~beyond
        kept = logits.where(finite, -torch.inf)
        lse = kept.logsumexp(-1, keepdim=True)
        if sink_logits is not None:
            lse = lse.logaddexp(sink_logits.view(1, table.shape[1], 1, -1, 1))
        weights = (kept - lse.nan_to_num(neginf=0.0)).exp().where(finite, torch.nan)
        return weights.masked_fill(beyond, 0.0).sum(3).transpose(1, 2)
    if block_table is None:
        block_table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    scores, _, _ = torch.ops.kvselect.score_tokens.default(
        q.flatten(0, 1)[:, None, None].contiguous(),
        None,
        table.transpose(1, 2),
        block_table.repeat_interleave(n, 0) if n > 1 else block_table,
        num_visible.flatten().contiguous(),
        None,
        None,
        op_format(None),
        None,
        1,
        "decode",
        0,
        0,
        num_blocks,
        scale,
        False,
        False,
        None,
        None,
        0,
        False,
        None,
        num_blocks,
        softcap,
        sink_logits,
    )
    return torch.unflatten(scores[:, 0], 0, (batch, n))
