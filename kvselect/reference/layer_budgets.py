"""Probe queries, entropies of scores, and the pool of blocks that the layers of a pass share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NUM_SAMPLES = 100


def probe_query(queries: Tensor, statistics_of: Tensor | None = None) -> Tensor:
    """The mean of queries in which unusual ones weigh more, [channels] float64.

    Parameters
    ----------
    queries : Tensor, [num_queries, channels]
        The heads that share a probe laid end to end.
    statistics_of : Tensor, [n, channels], or None
        Queries that say what is usual; None: these.
    """
    h = queries.double()
    usual = h if statistics_of is None else statistics_of.double()
    mu, var = usual.mean(0), usual.var(0, correction=0)
    floor = var + var.mean() / 100
    if not floor.any():
        return h.mean(0)
    beta = ((h - mu).square() / floor).mean(1)
    if not beta.any():
        return h.mean(0)
    return (beta / beta.sum()) @ h


def normalised_entropy(weights: Sequence[float]) -> float:
    """Entropy of what the weights are in proportion to, over that of equal ones."""
    if len(weights) < 2:
        return 0.0
    total = math.fsum(weights)
    parts = [weight / total for weight in weights]
    return -math.fsum(p * math.log(p) for p in parts if p > 0) / math.log(len(weights))


def cosine_score(q: Tensor, keys: Sequence[Tensor]) -> float:
    """Mean over heads of the cosine of ``q`` [heads, head_dim] and the mean of each head's keys."""
    found = [
        torch.nn.functional.cosine_similarity(head.double(), own.double().mean(0), dim=0)
        for head, own in zip(q, keys)
    ]
    return float(torch.stack(found).mean())


def pool_count(
    samples: Sequence[Sequence[float]],
    layer: int,
    pool: int,
    num_units: int,
    topk: int,
    granule: int,
    floor_share: float,
) -> int:
    """Units that a layer takes of what the layers above left in the pool.

    Parameters
    ----------
    samples : one sequence per layer
        Entropies of its past, and of the layer itself up to this block.
    pool : int
        What is left.
    num_units : int
        Units that compete.
    """
    num_layers = len(samples)
    if num_units <= topk:
        return num_units
    means = [
        sum(own[-NUM_SAMPLES:]) / min(len(own), NUM_SAMPLES) if own else 0.0 for own in samples
    ]
    share = 1.0 / (num_layers - layer)
    if all(len(own) >= NUM_SAMPLES for own in samples) and sum(means[layer:]) > 0:
        share = means[layer] / sum(means[layer:])
    least = min(granule * math.ceil(floor_share * topk / granule), topk)
    most = min(max(pool - least * (num_layers - 1 - layer), least), 2 * topk)
    wanted = granule * round(share * pool / granule)
    return min(max(wanted, least), most, num_units)
