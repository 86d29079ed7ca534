"""Cosine scores of blocks, and how many of the best ones a pool of the pass lets a layer take."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.block_lists import QueryWindows
from kvselect.block_scores import block_logits
from kvselect.policies.entropy_pool import normalised_entropy, pool_counts
from kvselect.policies.stack_state import StackState
from kvselect.queries import Queries

__all__ = ["candidate_blocks", "cosine_scores", "only_best", "pooled"]


def cosine_scores(q: Tensor, table: Tensor, scope: str) -> Tensor:
    """``scores[g, B] = mean over h of group g of cos(q[h], table[g, B])``.

    Parameters
    ----------
    q : Tensor, [batch, n, num_q_heads, head_dim]
    table : Tensor, [batch, num_kv_heads, num_blocks, head_dim]
    scope : "kv_head" or "layer"
        "layer": the mean over all heads, of [..., 1, num_blocks]. A cosine of the heads laid end
        to end, as upstream has it, would follow the loudest head.

    Returns
    -------
    Tensor, [batch, n, num_lists, num_blocks], float32; NaN where the table is
    """
    normal = torch.nn.functional.normalize
    cosines = block_logits(normal(q.float(), dim=-1), normal(table.float(), dim=-1), 1.0)
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
    usable = candidate[:, :, None] & votes.isfinite()
    ranked = votes.where(usable, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(votes.shape[-1], device=votes.device)
    needed = (place < counts[..., None, None]).expand_as(order)
    best = torch.zeros_like(usable).scatter(-1, order, needed)
    return votes.where(best & usable, torch.nan)


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
    usable = candidate & votes.isfinite().all(2)
    logits = votes.mean(2).where(usable, -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp().where(usable, 0.0)
    num_units = usable.sum(-1)
    entropy = normalised_entropy(weights, num_units)
    counts = pool_counts(stack, layer, queries, entropy, num_units, topk=topk, granule=granule)
    return only_best(votes, candidate, counts)
