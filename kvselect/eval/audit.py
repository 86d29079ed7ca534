"""Recovered mass, measured from outside a policy: the attention mass that the listed tokens hold.

A policy's own figure comes from the scores it made, so from a sketch where it has one, and
StreamingLLM makes none. The audit asks the exact keys, for every policy in the same way.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvselect.block_masks import BlockMask
from kvselect.cache import KVCache
from kvselect.evictable_cache import EvictableKVCache
from kvselect.policies.base import Policy, PolicyState
from kvselect.policies.scoring_vectors import compact_decode_vectors
from kvselect.queries import Queries
from kvselect.score import score_blocks
from kvselect.selection import Selection


@dataclass(slots=True)
class Audit:
    """Collects the recovered mass of decode queries, by layer and KV head.

    Attributes
    ----------
    enabled : bool
        Off while decode steps are timed: an audit reads every key.
    """

    enabled: bool = True
    _layers: list[PolicyState] = field(default_factory=list)
    _sums: dict[int, list[float]] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)

    def layer_of(self, state: PolicyState) -> int:
        """Which of the selecting layers a state belongs to: they are met in order."""
        for layer, known in enumerate(self._layers):
            if known is state:
                return layer
        self._layers.append(state)
        return len(self._layers) - 1

    def forget_layers(self) -> None:
        """The next states are those of another cache."""
        self._layers.clear()

    def add(self, layer: int, mass: list[float]) -> None:
        """One call: the mean over its queries, one number per KV head."""
        sums = self._sums.setdefault(layer, [0.0] * len(mass))
        self._sums[layer] = [one + other for one, other in zip(sums, mass)]
        self._counts[layer] = self._counts.get(layer, 0) + 1

    def take(self) -> list[list[float]]:
        """Mean mass since the last `take`, [layers][KV heads]; empty: no decode query was seen."""
        means = [
            [value / self._counts[layer] for value in self._sums[layer]]
            for layer in sorted(self._sums)
        ]
        self._sums.clear()
        self._counts.clear()
        return means

    @property
    def recovered_mass(self) -> float | None:
        """Mean over layers, heads and decode queries since the last `take`; None before the
        first."""
        calls = sum(self._counts.values())
        if not calls:
            return None
        return sum(sum(sums) / len(sums) for sums in self._sums.values()) / calls


def audited(policy: Policy, audit: Audit) -> Policy:
    """The same policy, whose decode selections `audit` sees. Selections are unchanged."""
    base: Any = type(policy)

    class Audited(base):
        __slots__ = ()

        def select(
            self, state: PolicyState, queries: Queries, cache: KVCache
        ) -> Selection | BlockMask | None:
            selection: Selection | BlockMask | None = base.select(self, state, queries, cache)
            layer = audit.layer_of(state)
            gone = isinstance(cache, EvictableKVCache) and cache.rows is not None
            # What was dropped has no mass that could be asked for.
            if audit.enabled and queries.phase == "decode" and not gone:
                mass = [1.0] * cache.num_kv_heads
                if isinstance(selection, Selection):
                    with cache.whole_rows():
                        mass = _mass(self, queries, cache, selection).tolist()
                audit.add(layer, mass)
            return selection

    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    made: Policy = Audited(**settings)
    return made


def _mass(policy: Any, queries: Queries, cache: KVCache, selection: Selection) -> Tensor:
    """Mean recovered mass of the queries, each of which is a block of its own; [num_kv_heads].

    With compact positions a candidate that is not listed has no position; as the policies' scores
    do, the audit meets candidates at the fixed distance ``num_recent_tokens``, and sinks and recent
    tokens at their ranks.
    """
    indices, topk_length = selection.with_blocks()
    if policy.positions == "original":
        mass: Tensor = torch.ops.kvselect.recovered_mass.default(
            queries.q,
            cache.k_pages,
            cache.block_table,
            queries.cache_seqlens,
            cache.starts,
            indices,
            topk_length,
            selection.q_block_offsets,
            queries.softmax_scale,
            queries.max_seqlen,
            queries.softcap,
        )
        return mass.unflatten(2, (cache.num_kv_heads, -1)).mean((0, 1, 3))  # type: ignore[no-untyped-call]
    assert queries.rope is not None
    # Of each query's own token: the last of its list, as `score_blocks` lays out the window. Longer
    # lists (reused, or of a mass floor) shift window and query alike; distances stay.
    keep = getattr(policy, "keep", 0)
    fresh = policy.num_sink_tokens + keep + policy.num_recent_tokens
    rank = topk_length.amax(dim=2).clamp(max=fresh) - 1
    q, q_local = compact_decode_vectors(
        queries.q.float().unsqueeze(2), queries.rope, policy.num_recent_tokens, rank
    )
    scores, _ = score_blocks(
        q.contiguous(),
        cache,
        cache_seqlens=queries.cache_seqlens,
        max_seqlen=queries.max_seqlen,
        q_block_offsets=queries.q_block_offsets,
        seqlen_q=queries.seqlen_q,
        window_rule="decode",
        num_sink_tokens=policy.num_sink_tokens,
        num_recent_tokens=policy.num_recent_tokens,
        keep=keep,
        scale=queries.softmax_scale,
        sketch=None,
        q_local=q_local.contiguous(),
        rope=queries.rope,
        softcap=queries.softcap,
    )
    listed = scores.gather(3, indices.clamp(min=0).long()) * (indices >= 0)
    return listed.sum(3).mean((0, 1)) / (queries.q.shape[2] // cache.num_kv_heads)
