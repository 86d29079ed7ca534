"""What stands for a block of tokens, and how much a query may find there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvselect.reference.cache import CacheLike


def blocks_of_row(cache: CacheLike, row: int, block_size: int) -> list[range]:
    """Positions of each block, counted from the row's first real token; the last may be short."""
    start = 0 if cache.starts is None else int(cache.starts[row])
    end = int(cache.cache_seqlens[row])
    return [range(at, min(at + block_size, end)) for at in range(start, end, block_size)]


def finite_keys(cache: CacheLike, row: int, head: int, block: range) -> Tensor:
    """Keys of a block that hold numbers only, [n, head_dim] float64."""
    keys = cache.k[row, list(block), head].double()
    return keys[keys.isfinite().all(-1)]


def page_bound(q: Tensor, keys: Tensor, softmax_scale: float) -> float:
    """``softmax_scale * sum_d max(q_d * low_d, q_d * high_d)``; NaN without keys.

    Parameters
    ----------
    q : Tensor, [head_dim]
    keys : Tensor, [n, head_dim], float64
    """
    if not len(keys):
        return math.nan
    q = q.double()
    return float(torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum()) * softmax_scale


def block_lse(q: Tensor, keys: Tensor, softmax_scale: float) -> float:
    """``log sum_j exp(softmax_scale * q . k_j)``: what every block score estimates."""
    return float((softmax_scale * keys @ q.double()).logsumexp(0))


def moment_lse(q: Tensor, keys: Tensor, softmax_scale: float, order: int) -> float:
    """The estimate of `block_lse` from the mean key, and with order 2 the channels' variances.

    ``softmax_scale * q . mean + softmax_scale^2 / 2 * sum_d q_d^2 * variance_d + log n``
    """
    if not len(keys):
        return math.nan
    q = q.double() * softmax_scale
    estimate = float(q @ keys.mean(0)) + math.log(len(keys))
    if order == 2:
        estimate += 0.5 * float((q.square() * keys.var(0, correction=0)).sum())
    return estimate


def quest_pages(
    q: Tensor, cache: CacheLike, row: int, head: int, page_size: int, num_pages: int, scale: float
) -> list[int]:
    """Pages that Quest attends to for one KV head, ascending.

    Parameters
    ----------
    q : Tensor, [group_size, head_dim]
        Of the row's newest token.
    num_pages : int
        The last page included.
    """
    pages = blocks_of_row(cache, row, page_size)
    votes = [0.0] * (len(pages) - 1)
    for own in q:
        bounds = [
            page_bound(own, finite_keys(cache, row, head, page), scale) for page in pages[:-1]
        ]
        finite = torch.tensor([b for b in bounds if math.isfinite(b)], dtype=torch.float64)
        lse = float(finite.logsumexp(0)) if len(finite) else 0.0
        votes = [vote + math.exp(bound - lse) for vote, bound in zip(votes, bounds)]
    known = [page for page, vote in enumerate(votes) if math.isfinite(vote)]
    best = sorted(known, key=lambda page: (-votes[page], page))[: num_pages - 1]
    return [*sorted(best), len(pages) - 1]
