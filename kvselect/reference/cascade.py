"""Cascade pruning: what each token got, what a layer keeps of it, whose values are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor


def token_sums(
    q: Tensor, k: Tensor, listed: Sequence[int], positions: Sequence[int], scale: float
) -> dict[int, float]:
    """Attention that each listed token gets from queries at ``positions``, summed over heads.

    Parameters
    ----------
    q : Tensor, [num_queries, num_q_heads, head_dim]
    k : Tensor, [n, num_kv_heads, head_dim]
    """
    group = q.shape[1] // k.shape[1]
    sums = dict.fromkeys(listed, 0.0)
    for query, position in zip(q.double(), positions):
        seen = [token for token in listed if token <= position]
        for head, own in enumerate(query):
            weights = (scale * k[seen, head // group].double() @ own).softmax(0)
            for token, weight in zip(seen, weights.tolist()):
                sums[token] += weight
    return sums


def cascade_keep(
    scores: Mapping[int, float],
    kept: Sequence[int],
    visible: range,
    share: float,
    num_sink_tokens: int,
    num_recent_tokens: int,
) -> list[int]:
    """What a layer keeps of what the layer above kept: sinks, the best candidates, the window.

    Parameters
    ----------
    visible : range
        The row's tokens up to the query.
    num_recent_tokens : int
        Length of the window, the query's own token included.
    """
    window = max(visible.stop - num_recent_tokens, visible.start)
    sinks = min(visible.start + num_sink_tokens, window)
    always = [*range(visible.start, sinks), *range(window, visible.stop)]
    total = max(math.floor(share * len(visible) + 1e-9), 1)
    candidates = [token for token in kept if sinks <= token < window]
    ranked = sorted(candidates, key=lambda token: (-scores[token], token))
    return sorted([*always, *ranked[: max(total - len(always), 0)]])


def heaviest(weights: Tensor, fraction: float, mass: float | None) -> list[int]:
    """Places whose values are read: so large a part of them, or as many as hold ``mass``.

    Parameters
    ----------
    weights : Tensor, [width]
        Summed over the heads that share the values.
    """
    order = sorted(range(len(weights)), key=lambda place: (-float(weights[place]), place))
    if mass is None:
        return order[: math.ceil(fraction * len(weights) - 1e-9)]
    total, held, taken = float(weights.double().sum()), 0.0, []
    for place in order:
        if held >= mass * total:
            break
        taken.append(place)
        held += float(weights[place])
    return taken
