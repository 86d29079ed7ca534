"""Cosine scores of blocks, and how many of the best ones a pool of the pass lets a layer take."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.block_lists import QueryWindows
from kvselect.block_scores import block_logits
from kvselect.policies.entropy_pool import entropy_of, pool_counts
from kvselect.policies.stack_state import StackState
from kvselect.queries import Queries

__all__ = ["candidate_blocks", "cosine_scores", "only_best", "pooled"]


def cosine_scores(q: Tensor, table: Tensor, scope: str) -> Tensor:
    """``scores[g, B] = mean over h of group g of q[h] . table[g, B] / |q[h]|``.

    Parameters
    ----------
    q : Tensor, [batch, n, num_q_heads, head_dim]
    table : Tensor, [batch, num_kv_heads, num_blocks, head_dim], float32, of length 1
    scope : "kv_head" or "layer"
        "layer": the mean over all heads, of [..., 1, num_blocks]. A cosine of the heads laid end
        to end, as upstream has it, would follow the loudest head.

    Returns
    -------
    Tensor, [batch, n, num_lists, num_blocks], float32; NaN where the table is
    """
    cosines = block_logits(torch.nn.functional.normalize(q.float(), dim=-1), table, 1.0)
    scores = cosines.mean(3).transpose(1, 2)
    return scores.mean(2, keepdim=True) if scope == "layer" else scores


def candidate_blocks(windows: QueryWindows, num_blocks: int, num_sink_blocks: int) -> Tensor:
    """Which blocks compete: behind the sinks, before the window; bool [batch, n, num_blocks]."""
    block = torch.arange(num_blocks, device=windows.first_block.device)
    return (block >= num_sink_blocks) & (block < windows.first_block[..., None])


def only_best(votes: Tensor, candidate: Tensor, counts: Tensor) -> Tensor:
    """Votes with NaN, which is never picked, in the place of all but the ``counts`` best.

    Parameters
    ----------
    votes : Tensor, [batch, n, num_lists, num_blocks], float32
    candidate : Tensor, [batch, n, num_blocks], bool
    counts : Tensor, [batch, n]
    """
    ranked = votes.where(candidate[:, :, None] & _finite(votes), torch.nan)
    order = ranked.nan_to_num(-torch.inf).sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(votes.shape[-1], device=votes.device)
    needed = (place < counts[..., None, None]).expand_as(order)
    best = torch.empty_like(needed, memory_format=torch.contiguous_format)
    return ranked.where(best.scatter_(-1, order, needed), torch.nan)


def pooled(
    votes: Tensor,
    candidate: Tensor,
    stack: StackState,
    layer: int,
    queries: Queries,
    *,
    topk: int,
    granule: int,
) -> Tensor:
    """`only_best` with counts from the pool of the pass, by the entropy of ``softmax(votes)``.

    ``votes`` of several lists count as their mean, so that all lists of a layer are as long.
    """
    finite, mean = _finite(votes), votes.mean(2) if votes.shape[2] > 1 else votes[:, :, 0]
    usable = candidate & (finite.all(2) if votes.shape[2] > 1 else finite[:, :, 0])
    num_units = usable.sum(-1)
    entropy = entropy_of(mean.where(usable, -torch.inf).softmax(-1), num_units)
    counts = pool_counts(stack, layer, queries, entropy, num_units, topk=topk, granule=granule)
    return only_best(votes, candidate, counts)


def _finite(votes: Tensor) -> Tensor:
    """As ``votes.isfinite()``, which is five kernels on a CPU."""
    return votes.abs() < torch.inf
