"""local_v and bitplane: steps that read only the values, and low bits of keys, that matter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvselect.attention import attend_queries
from kvselect.cache import KVCache
from kvselect.policies.listed_weights import (
    Listed,
    gathered,
    listed_of_step,
    sketched,
    softmax_weights,
    step_logits,
)
from kvselect.queries import Queries
from kvselect.selection import Selection, list_width

__all__ = ["StepCounts", "WeightedSelection", "attend_weighted", "weigh_step"]


@dataclass(slots=True, eq=False)
class StepCounts:
    """What decode steps read, summed over rows and KV heads; on the device."""

    sums: Tensor | None = None  # float64 [4]: listed, values read, lists, lists refined

    def add(self, listed: Tensor, read: Tensor, refined: Tensor) -> None:
        new = torch.stack([x.sum(dtype=torch.float64) for x in (listed, read, refined)])
        new = torch.cat([new[:2], new.new_tensor([refined.numel()]), new[2:]])
        self.sums = new if self.sums is None else self.sums + new

    def _share(self, which: int, of: int) -> float | None:
        total = 0.0 if self.sums is None else float(self.sums[of])
        return float(self.sums[which]) / total if total and self.sums is not None else None

    @property
    def value_share(self) -> float | None:
        """Values read, of those listed; None: no step yet."""
        return self._share(1, 0)

    @property
    def refine_rate(self) -> float | None:
        """Lists whose low bits were fetched, of all; None: no step yet."""
        return self._share(3, 2)


@dataclass(slots=True, eq=False)
class WeightedSelection(Selection):
    """A Selection of a decode step whose weights are known.

    Parameters
    ----------
    weights : Tensor, [batch, num_kv_heads, group_size, width], float32
        Of all listed tokens, the heaviest first, which is an order of its own for each KV head.
    lse : Tensor, [batch, num_kv_heads, group_size], float32
    values, chosen : Tensor, [batch, num_kv_heads, width], int64 and bool
        Positions in the same order; whose values are read.
    renormalise : bool
        Whether the weights of these are made to add up to those of all.
    by_keys : bool
        Whether the weights are those of the keys themselves, so that the kernel finds them again.
    """

    weights: Tensor | None = None
    lse: Tensor | None = None
    values: Tensor | None = None
    chosen: Tensor | None = None
    renormalise: bool = True
    by_keys: bool = True

    def column_sums(self, num_tokens: int) -> Tensor:
        """As `listed_weights.column_sums`, [batch, 1, num_tokens]."""
        assert self.weights is not None and self.values is not None
        sums = self.weights.sum(2).flatten(1)
        room = sums.new_zeros((sums.shape[0], num_tokens))
        return room.scatter_add(1, self.values.flatten(1), sums)[:, None]


class WeightSettings(Protocol):
    """What `weigh_step` reads of a policy.

    Attributes
    ----------
    refine_below : float or None
        Logits are of the sketch's keys; lists whose heaviest token gets less than this share of the
        attention, the mean over the heads that share it, take the keys themselves. A peaked row
        tolerates coarse bits: an error ``d`` of its largest logit moves the weights by at most
        ``d / 2`` in total. None: the keys.
    value_fraction, value_mass : float, float or None
        Values are read of the heaviest tokens, by the sum over the heads that share them:
        ``ceil(value_fraction * listed)``, or as many as hold ``value_mass`` of the attention.
    """

    @property
    def refine_below(self) -> float | None: ...
    @property
    def value_fraction(self) -> float: ...
    @property
    def value_mass(self) -> float | None: ...
    @property
    def renormalise(self) -> bool: ...


def weigh_step(
    settings: WeightSettings,
    queries: Queries,
    cache: KVCache,
    selection: Selection | None,
    counts: StepCounts,
) -> WeightedSelection:
    """Weights of a decode step, and whose values it reads; ``counts`` grows by them."""
    listed = listed_of_step(queries, cache, selection)
    keys = gathered(cache.k, listed)
    if settings.refine_below is None:
        weights, lse = _weigh(queries, listed, step_logits(queries, keys))
        refined = torch.zeros(weights.shape[:2], dtype=torch.bool, device=keys.device)
    else:
        coarse = step_logits(queries, sketched(cache, listed))
        weights, lse = _weigh(queries, listed, coarse)
        refined = weights.mean(2).amax(2) < settings.refine_below
        logits = torch.where(refined[..., None, None], step_logits(queries, keys), coarse)
        weights, lse = _weigh(queries, listed, logits)
    by_head = weights.sum(2)
    number = listed.there.sum(1)[:, None].expand(by_head.shape[:2])
    ranked, order = by_head.where(listed.there[:, None], -1.0).sort(
        dim=2, descending=True, stable=True
    )
    place = torch.arange(order.shape[2], device=order.device)
    if settings.value_mass is None:
        wanted = (number.double() * settings.value_fraction - 1e-9).ceil().long()
        chosen = place < wanted[..., None]
    else:
        before = ranked.clamp(min=0.0).cumsum(2) - ranked.clamp(min=0.0)
        chosen = before < settings.value_mass * ranked.clamp(min=0.0).sum(2, keepdim=True)
        chosen = chosen & (place < number[..., None])
    counts.add(number, chosen.sum(2), refined)
    if selection is None:
        heads = cache.num_kv_heads
        indices = listed.positions.where(listed.there, -1).int()
        # Padding comes first in a row: lists begin with their first token.
        shift = (~listed.there).int().argsort(dim=1, stable=True)
        indices = indices.gather(1, shift)[:, None].expand(-1, heads, -1)
        lengths = listed.there.sum(1, dtype=torch.int32)[:, None].expand(-1, heads)
        selection = Selection(indices, lengths)
    return WeightedSelection(
        selection.indices,
        selection.topk_length,
        selection.q_block_offsets,
        weights=weights.gather(3, order[:, :, None].expand_as(weights)),
        lse=lse,
        values=listed.positions[:, None].expand(-1, order.shape[1], -1).gather(2, order),
        chosen=chosen,
        renormalise=settings.renormalise,
        by_keys=settings.refine_below is None,
    )


def attend_weighted(
    queries: Queries, cache: KVCache, step: WeightedSelection
) -> tuple[Tensor, Tensor]:
    """Attention with the weights that are known; values of other tokens are not read.

    Returns
    -------
    out, lse
        As `sparse_attention` gives them.
    """
    weights, lse, values, chosen = step.weights, step.lse, step.values, step.chosen
    assert weights is not None and lse is not None and values is not None and chosen is not None
    own = weights.where(chosen[:, :, None], 0.0)
    read = own.sum(3)
    total = weights.sum(3) if step.renormalise else read
    if step.by_keys:
        n = cache.max_seqlen
        positions = values.where(chosen, n).sort(2).values.int()
        room = list_width(positions.shape[2]) - positions.shape[2]
        indices = torch.nn.functional.pad(positions.where(positions < n, -1), (0, room), value=-1)
        part = Selection(indices, chosen.sum(2, dtype=torch.int32), queries.q_block_offsets)
        if queries.q_block_offsets is not None:
            part.indices, part.topk_length = part.with_blocks()
        # Sinks have their part in the total already.
        out, _ = attend_queries(replace(queries, sink_logits=None), cache, part, None)
        scale = total.flatten(1, 2)[:, None, :, None]
        return (out.float() * scale).to(out.dtype), lse.flatten(1, 2)[:, None]
    v = cache.v.transpose(1, 2)  # [batch, num_kv_heads, n, head_dim]
    index = values.where(chosen, 0)
    rows = v.gather(2, index[..., None].expand(-1, -1, -1, v.shape[3])).float()
    rows = rows.where(chosen[..., None], 0.0)  # of a place that is not read: it may hold anything
    out = torch.einsum("bghw,bgwd->bghd", own * (total / read.clamp(min=1e-30))[..., None], rows)
    return out.flatten(1, 2)[:, None].to(queries.q.dtype), lse.flatten(1, 2)[:, None]


def _weigh(queries: Queries, listed: Listed, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of logits [batch, num_kv_heads, group_size, width], and its lse."""
    visible, heads = listed.there[:, None], logits.shape[1:3]
    weights, lse = softmax_weights(logits.flatten(1, 2), visible, queries, queries.sink_logits)
    return torch.unflatten(weights, 1, heads), torch.unflatten(lse, 1, heads)
