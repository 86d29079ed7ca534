"""What evictions keep, one KV head at a time: loops over tokens, float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def window_weights(q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
    """Attention weights of the last queries of a prompt, [num_queries * group_size, num_tokens].

    ``q`` [num_queries, group_size, head_dim] of one KV head, ``k`` [num_tokens, head_dim]; query
    ``j`` sees the tokens up to ``num_tokens - num_queries + j``.
    """
    num_queries, group_size, _ = q.shape
    weights = torch.zeros(num_queries, group_size, k.shape[0], dtype=torch.float64)
    for query, head in itertools.product(range(num_queries), range(group_size)):
        seen = k.shape[0] - num_queries + query + 1
        logits = softmax_scale * k[:seen].double() @ q[query, head].double()
        weights[query, head, :seen] = logits.softmax(0)
    return weights.flatten(0, 1)


def pooled(scores: list[float], pool_width: int) -> list[float]:
    """The largest score within ``pool_width // 2`` tokens of each."""
    reach = pool_width // 2
    return [max(scores[max(i - reach, 0) : i + reach + 1]) for i in range(len(scores))]


def best(scores: list[float], budget: int) -> list[int]:
    """The ``budget`` best, ascending; the earliest of equal ones."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:budget])


def far_apart(keys: Tensor, budget: int) -> list[int]:
    """Max-min picks in their order, of ``keys`` [num_tokens, head_dim]."""
    unit = torch.nn.functional.normalize(keys.double(), dim=1)
    distance = (1 - unit @ unit.T).tolist()
    tokens = range(len(distance))
    picked: list[int] = []
    while len(picked) < budget:
        free = [i for i in tokens if i not in picked]

        def nearest(i: int) -> float:
            others = picked or [j for j in tokens if j != i]
            return float(min(distance[i][j] for j in others))

        picked.append(max(free, key=lambda i: (nearest(i), -i)))
    return picked


def coverage_rows(weights: Tensor, keys: Tensor, alpha: float, temperature: float) -> Tensor:
    """``[P; alpha * Q]`` of one KV head, [num_rows, num_tokens]."""
    unit = torch.nn.functional.normalize(keys.double(), dim=1)
    alike = (unit @ unit.T / temperature).softmax(1) / len(keys)
    return torch.cat((weights.double() / len(weights), alpha * alike))


def covered(rows: Tensor, picked: tuple[int, ...] | list[int]) -> float:
    """What a set covers: the sum over rows of the largest picked entry."""
    return float(rows[:, list(picked)].amax(1).sum()) if len(picked) else 0.0


def greedy_cover(rows: Tensor, budget: int) -> list[int]:
    """Picks in their order, by what they add to the coverage."""
    picked: list[int] = []
    while len(picked) < budget:
        free = [i for i in range(rows.shape[1]) if i not in picked]
        picked.append(max(free, key=lambda i: (covered(rows, [*picked, i]), -i)))
    return picked


def best_cover(rows: Tensor, budget: int) -> float:
    """The most that ``budget`` columns can cover: all sets are tried."""
    return max(covered(rows, s) for s in itertools.combinations(range(rows.shape[1]), budget))


def visits(
    q: Tensor,
    k: Tensor,
    softmax_scale: float,
    *,
    num_steps: int,
    damping: float,
    temperature: float,
) -> Tensor:
    """Where a walk along attention is after some steps, [num_tokens], of one KV head.

    ``q`` [num_tokens, group_size, head_dim], ``k`` [num_tokens, head_dim]; token by token, and the
    root mean square over the query heads.
    """
    num_tokens, group_size, _ = q.shape
    squares = torch.zeros(num_tokens, dtype=torch.float64)
    for head in range(group_size):
        rows = window_weights(q[:, head : head + 1], k, softmax_scale / temperature)
        x = torch.full((num_tokens,), 1 / num_tokens, dtype=torch.float64)
        for _ in range(num_steps):
            led = sum((x[i] * rows[i] for i in range(num_tokens)), torch.zeros_like(x))
            x = (1 - damping) * led + damping / num_tokens
        squares += x**2
    return (squares / group_size).sqrt()
