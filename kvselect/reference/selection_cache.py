"""Which lists of a decode step may be reused, list by list, and what is remembered of the step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors, float64; -inf where one of them is zero or not finite.

    Exactly 1 for a vector and itself: ``sqrt(x * x)`` is ``x``.
    """
    a, b = a.double(), b.double()
    norm = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / norm if 0.0 < norm < math.inf else -math.inf


def similarity_of(q: Tensor, anchor: Tensor, how: str) -> float:
    """Of the cosines of [heads, head_dim]: the smallest ("min"), the lower 10 % quantile ("q10").

    "flat": the cosine of all heads laid end to end.
    """
    if how == "flat":
        return cosine(q.flatten(), anchor.flatten())
    cosines = sorted(cosine(a, b) for a, b in zip(q, anchor, strict=True))
    return cosines[0 if how == "min" else (len(cosines) - 1) // 10]


class CacheStep(NamedTuple):
    """What `selection_cache_step` gives: the hits, and what is remembered from now on."""

    hit: Tensor  # [batch, num_lists] int32
    anchor_query: Tensor  # [batch, num_q_heads, head_dim]
    age: Tensor  # [batch, num_lists] int32
    expected_seqlens: Tensor  # [batch] int32
    known_nonfinite: Tensor  # [batch, num_lists] int64
    reuse_counts: Tensor  # [2] int64


def selection_cache_step(
    q: Tensor,
    cache_seqlens: Tensor,
    starts: Tensor | None,
    num_nonfinite: Tensor,
    similarity: str,
    similarity_threshold: float,
    max_age: int,
    dense_limit: int,
    anchor_query: Tensor,
    age: Tensor,
    expected_seqlens: Tensor,
    known_nonfinite: Tensor,
    reuse_counts: Tensor,
) -> CacheStep:
    """Decide for every list whether it may be reused, and remember what made it.

    Parameters
    ----------
    q : Tensor, [batch, 1, num_q_heads, head_dim]
    cache_seqlens, starts : Tensor, [batch], int32
        Tokens of each row with the query's own; first real token (None: 0).
    num_nonfinite : Tensor, [batch, num_kv_heads], int64
        Defects ever appended; a new one makes the lists of its head miss.
    similarity : "min", "q10" or "flat"
    similarity_threshold : float in (0, 1]
    max_age : int
        Most steps in a row that a list is reused. [steps]
    dense_limit : int
        Lists of rows of at most so many real tokens are not reused at the next step.
    anchor_query, age, expected_seqlens, known_nonfinite, reuse_counts : Tensor
        What the last step gave; not changed.

    Returns
    -------
    CacheStep
        ``reuse_counts`` grows by the lists reused and by the visible tokens of their KV heads.
    """
    batch, num_lists = age.shape
    new = CacheStep(
        torch.zeros_like(age),
        anchor_query.clone(),
        torch.zeros_like(age),
        expected_seqlens.clone(),
        num_nonfinite.view(batch, num_lists, -1).sum(-1),
        reuse_counts.clone(),
    )
    heads = torch.unflatten(q[:, 0], 1, (num_lists, -1))
    anchors = torch.unflatten(anchor_query, 1, (num_lists, -1))
    new_anchors = torch.unflatten(new.anchor_query, 1, (num_lists, -1))
    for row in range(batch):
        seqlen = int(cache_seqlens[row])
        real = seqlen - (0 if starts is None else int(starts[row]))
        for n in range(num_lists):
            if (
                int(expected_seqlens[row]) == seqlen
                and int(age[row, n]) < max_age
                and int(known_nonfinite[row, n]) == int(new.known_nonfinite[row, n])
                and similarity_of(heads[row, n], anchors[row, n], similarity)
                >= similarity_threshold
            ):
                new.hit[row, n] = 1
                new.age[row, n] = age[row, n] + 1
                new.reuse_counts[0] += 1
                new.reuse_counts[1] += max(real, 0) * (num_nonfinite.shape[1] // num_lists)
            else:
                new_anchors[row, n] = heads[row, n]
        new.expected_seqlens[row] = seqlen + 1 if real > dense_limit else -1
    return new
