"""What a list of an earlier decode step is still worth: by the cosine of the queries, by its age.

Selection from exact scores, so that the only error is that of reuse. Reuse as the selection cache
does it (METHODS 2.4): a list keeps its sinks and its picks, and its window reaches back to where it
began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvselect.checks import require, require_choice
from kvselect.eval.dump import LayerDump
from kvselect.eval.key_estimates import soft_capped

__all__ = ["Budget", "Replayed", "Reuse", "replay_cache", "reuse_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Tokens of one list, as `TokenSelect` has them; ``keep``: picked by score."""

    keep: int
    num_sink_tokens: int
    num_recent_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reuse:
    """One KV head: step ``t`` served by the list of step ``s <= t``; all [steps, steps], [t, s].

    Attributes
    ----------
    cosine : Tensor
        Of the two steps' queries before RoPE: the lowest of the heads that share the list.
    overlap : Tensor
        Share of the fresh picks that are among the old ones.
    fresh_share : Tensor
        What the old list holds of the candidates' mass, over what the fresh picks hold.
    fresh_mass : Tensor
        Attention mass of the fresh picks: what there is to lose; equal in a row.
    kept : Tensor
        Attention mass of the whole list, sinks and window included; the diagonal is a fresh list's.
    """

    cosine: Tensor
    overlap: Tensor
    fresh_share: Tensor
    fresh_mass: Tensor
    kept: Tensor


def reuse_of(layer: LayerDump, positions: str, budget: Budget) -> list[Reuse]:
    """Every KV head of a captured layer; entries with ``s > t`` are NaN.

    Parameters
    ----------
    positions : "original" or "compact"
        How the policy scores: rotated queries and keys; or candidates un-rotated and at one
        distance, sinks and window at their ranks.

    Raises
    ------
    ValueError
        If the first step has fewer candidates than are picked, or there are sink logits.
    """
    require_choice(positions, "positions", ("original", "compact"))
    first = layer.num_tokens - len(layer.q)
    candidates = first + 1 - budget.num_recent_tokens - budget.num_sink_tokens
    allowed = f"at most {candidates} (candidates of the first step)"
    require(budget.keep <= candidates, "keep", budget.keep, allowed)
    require(layer.sink_logits is None, "sink_logits", "a tensor", "None")
    group = layer.group_size
    found = []
    for head in range(layer.k.shape[1]):
        own = slice(head * group, (head + 1) * group)
        weights = [
            _weights(layer, positions, budget, step, own, head) for step in range(len(layer.q))
        ]
        queries = layer.q_unrotated[:, own].double()
        unit = torch.nn.functional.normalize(queries, dim=-1)
        cosine = torch.einsum("tjd,sjd->tsj", unit, unit).amin(-1)
        found.append(_reuse(weights, cosine, first, budget))
    return found


def _weights(
    layer: LayerDump, positions: str, budget: Budget, step: int, own: slice, head: int
) -> Tensor:
    """Attention of one step over all visible tokens, mean over the group's heads; float64 [n]."""
    num_tokens = layer.num_tokens - len(layer.q) + step + 1
    rope = layer.rope
    if positions == "original" or rope is None:
        logits = layer.q[step, own].double() @ layer.k[:num_tokens, head].double().T
    else:
        sinks, recent = budget.num_sink_tokens, budget.num_recent_tokens
        rank = min(num_tokens, sinks + budget.keep + recent) - 1
        q = layer.q_unrotated[step, own].float()
        k = layer.k_unrotated[:num_tokens, head].float()
        logits = rope.rotate_at(q, recent).double() @ k.double().T
        local = [*range(sinks), *range(num_tokens - recent, num_tokens)]
        ranks = [*range(sinks), *range(rank + 1 - recent, rank + 1)]
        at_ranks = rope.rotate_at(k[local][:, None], torch.tensor(ranks))[:, 0]
        logits[:, local] = rope.rotate_at(q, rank).double() @ at_ranks.double().T
    logits = soft_capped(layer.softmax_scale * logits, layer.softcap)
    return logits.softmax(-1).mean(0)


def _reuse(weights: Sequence[Tensor], cosine: Tensor, first: int, budget: Budget) -> Reuse:
    num_steps, sinks = len(weights), budget.num_sink_tokens
    picks, horizons = [], []
    for step, row in enumerate(weights):
        horizon = first + step + 1 - budget.num_recent_tokens
        picks.append(row[sinks:horizon].topk(budget.keep).indices + sinks)
        horizons.append(horizon)
    picked = torch.zeros(num_steps, first + num_steps, dtype=torch.float64)
    picked.scatter_(1, torch.stack(picks), 1.0)
    blank = torch.full((num_steps, num_steps), torch.nan, dtype=torch.float64)
    overlap, share, fresh, kept = (blank.clone() for _ in range(4))
    for step, row in enumerate(weights):
        old = slice(0, step + 1)
        up_to = torch.cat([row.new_zeros(1), row.cumsum(0)])  # mass before each place
        held = picked[old, : len(row)] @ row
        begins = torch.tensor(horizons[old])
        left_window = up_to[horizons[step]] - up_to[begins]  # candidates that old windows hold
        share[step, old] = (held + left_window) / held[step]
        fresh[step, old] = held[step]
        kept[step, old] = held + up_to[sinks] + up_to[-1] - up_to[begins]
        overlap[step, old] = picked[old] @ picked[step] / budget.keep
    return Reuse(
        cosine=cosine.where(kept.isfinite(), torch.nan),
        overlap=overlap,
        fresh_share=share,
        fresh_mass=fresh,
        kept=kept,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A selection cache over one head's steps.

    Attributes
    ----------
    hit_rate : float
        Of all steps but the first.
    kept, kept_fresh : float
        Mean mass with and without reuse.
    """

    hit_rate: float
    kept: float
    kept_fresh: float


def replay_cache(reuse: Reuse, threshold: float, max_age: int) -> Replayed:
    """Reuse the last list made while its query is similar and it served fewer than ``max_age``."""
    num_steps = len(reuse.kept)
    anchor, hits, kept = 0, 0, float(reuse.kept[0, 0])
    for step in range(1, num_steps):
        hit = float(reuse.cosine[step, anchor]) >= threshold and step - anchor <= max_age
        hits += hit
        anchor = anchor if hit else step
        kept += float(reuse.kept[step, anchor])
    return Replayed(
        hit_rate=hits / max(num_steps - 1, 1),
        kept=kept / num_steps,
        kept_fresh=float(reuse.kept.diagonal().mean()),
    )
