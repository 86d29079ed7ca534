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


def list_blocks(
    picked: Tensor,
    first_block: Tensor,
    end: Tensor,
    starts: Tensor | None,
    finite: Tensor,
    num_window_blocks: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Tokens of chosen blocks and of a window of blocks, ascending; what is not finite is left out.

    Parameters
    ----------
    picked : Tensor, [num_rows, num_lists, num_picked], int32
        Blocks before the window, ascending, -1 pads. A row is a query block of a row of the batch;
        one list is for all heads.
    first_block, end : Tensor, [num_rows], int32
        The window's first block; the first token that is not listed. Like blocks, counted from the
        batch row's first real token.
    starts : Tensor, [batch], int32, or None
    finite : Tensor, [batch, num_kv_heads, num_blocks, block_size], bool
        Of a list for all heads every head's flag counts.
    num_window_blocks, width : int
        Blocks of a window at most; entries of a list.

    Returns
    -------
    indices : Tensor, [num_rows, num_lists, width], int32
        Positions in the batch row, -1 behind the last.
    count : Tensor, [num_rows, num_lists], int32
    """
    num_rows, num_lists, _ = picked.shape
    batch, _, num_blocks, size = finite.shape
    indices = torch.full((num_rows, num_lists, width), -1, dtype=torch.int32)
    count = torch.zeros(num_rows, num_lists, dtype=torch.int32)
    for row in range(num_rows):
        batch_row = row // (num_rows // batch)
        begin = int(first_block[row])
        window = range(begin, min(begin + num_window_blocks, num_blocks))
        start = 0 if starts is None else int(starts[batch_row])
        for part in range(num_lists):
            flags = finite[batch_row]
            flags = flags.all(0) if num_lists == 1 else flags[part]
            blocks = {int(block) for block in picked[row, part] if block >= 0} | set(window)
            tokens = [b * size + i for b in sorted(blocks) for i in range(size) if flags[b, i]]
            tokens = [token + start for token in tokens if token < int(end[row])][:width]
            indices[row, part, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
            count[row, part] = len(tokens)
    return indices, count


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


def local_mass(
    logits: Tensor, first_query: int, first_key: int, finite: Tensor | None = None
) -> Tensor:
    """Attention that each key gets from queries which see it and those before it in a window.

    Parameters
    ----------
    logits : Tensor, [num_heads, num_queries, num_keys]
        Of queries at positions ``first_query ..`` and keys at ``first_key ..``.
    finite : Tensor, [num_keys], bool, or None
        Keys that count; None: all.

    Returns
    -------
    Tensor, [num_keys], float64
    """
    heads, num_queries, num_keys = logits.shape
    total = torch.zeros(num_keys, dtype=torch.float64)
    for head in range(heads):
        for query in range(num_queries):
            seen = [
                key
                for key in range(num_keys)
                if first_key + key <= first_query + query and (finite is None or finite[key])
            ]
            if seen:
                total[seen] += logits[head, query, seen].double().softmax(0)
    return total


def representative(keys: Tensor, received: Tensor, count: int) -> Tensor:
    """Mean of the ``count`` keys that received most, the first of equals; of all, if none did.

    Parameters
    ----------
    keys : Tensor, [n, head_dim]
    received : Tensor, [n]
    """
    if not received.any():
        return keys.double().mean(0)
    order = sorted(range(len(keys)), key=lambda key: (-float(received[key]), key))
    return keys[order[:count]].double().mean(0)
