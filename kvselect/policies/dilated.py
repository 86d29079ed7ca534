"""Dilated: the lists of another method, and the tokens beside those that it lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kvselect.cache import KVCache
from kvselect.checks import require, require_int, require_type
from kvselect.crossovers import Crossover
from kvselect.fixed_cache import FixedKVCache
from kvselect.policies.base import Policy, PolicyState, policy_from_dict, register_policy
from kvselect.policies.token_select import TokenSelect
from kvselect.queries import Phase, Queries
from kvselect.rope import Rope
from kvselect.selection import Selection, list_width

__all__ = ["Dilated"]


@dataclass(slots=True, eq=False)
class DilatedState(PolicyState):
    """`PolicyState`, and the inner method's own."""

    inner: PolicyState | None = None

    def invalidate(self) -> None:
        assert self.inner is not None
        self.inner.invalidate()


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class Dilated(Policy):
    """Widen each list by ``radius`` tokens on either side of every token that it holds.

    Parameters
    ----------
    inner : Policy or dict
        A method that lists tokens anew and may take any back: `TokenSelect` with original
        positions and a budget of its own per layer, without reuse of lists (what is added would be
        remembered).
    radius : int >= 1

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds, or the inner method's lists cannot be widened.

    Notes
    -----
    Source: the neighbourhood of HiPrune, arXiv:2508.00553, around any method. Lists grow to at most
    ``2 * radius + 1`` times their tokens.
    """

    revocable: ClassVar[bool] = True
    query_aware: ClassVar[bool] = True
    persistent: ClassVar[bool] = False

    inner: Policy = field(default_factory=TokenSelect)
    radius: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.inner, Mapping):
            object.__setattr__(self, "inner", policy_from_dict(self.inner))
        require_type(self.inner, Policy, "inner", "a kvselect policy")
        require_int(self.radius, "radius", 1)
        inner: Any = self.inner
        name = type(inner).__name__
        # Others attend in ways of their own, or have a state that follows more than the lists.
        allowed = "a method that lists tokens by their scores (TokenSelect)"
        require(isinstance(inner, TokenSelect), "inner", name, allowed)
        allowed = "'fixed' (neighbours are outside of the pool)"
        require(inner.layer_budget == "fixed", "inner.layer_budget", inner.layer_budget, allowed)
        allowed = "'original' (ranks of compact positions are those of the inner list)"
        require(inner.positions == "original", "inner.positions", inner.positions, allowed)
        way = inner.prefill_attention
        allowed = "'sparse_attention' (neighbours lie behind a block, where dense kernels see them)"
        require(way == "sparse_attention", "inner.prefill_attention", way, allowed)
        for reuse in ("similarity_threshold", "num_segments"):
            allowed = "None (lists that are reused are changed in place)"
            value = getattr(inner, reuse, None)
            require(value is None, f"inner.{reuse}", value, allowed)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return self.inner.dense_layers

    @property
    def chunk_size(self) -> int:
        return self.inner.chunk_size

    @property
    def q_block_size(self) -> int:
        return self.inner.q_block_size

    @property
    def num_tail_tokens(self) -> int:
        return self.inner.num_tail_tokens

    @property
    def tail_q_block_size(self) -> int:
        return self.inner.tail_q_block_size

    @property
    def scope(self) -> str:
        """Who shares one list."""
        inner: Any = self.inner
        return str(inner.scope)

    @property
    def dense_prefill(self) -> bool:
        inner: Any = self.inner
        return bool(inner.dense_prefill)

    @property
    def average_queries(self) -> str:
        """Read by `attach`, which passes the queries before RoPE where the inner method asks."""
        inner: Any = self.inner
        return str(inner.average_queries)

    @property
    def required_sketch(self) -> str | None:
        return self.inner.required_sketch

    @property
    def capacity(self) -> int:
        return (2 * self.radius + 1) * self.inner.capacity

    def new_state(
        self, cache: KVCache, crossovers: Mapping[int, Crossover] | None = None
    ) -> DilatedState:
        allowed = "a cache that grows (widened lists are not captured)"
        require(not isinstance(cache, FixedKVCache), "cache", type(cache).__name__, allowed)
        inner = self.inner.new_state(cache, {})
        state = DilatedState(self, crossovers=crossovers, inner=inner)
        inner.prefill, inner.decode = state.prefill, state.decode
        return state

    def update(self, state: PolicyState, cache: KVCache) -> None:
        assert isinstance(state, DilatedState) and state.inner is not None
        self.inner.update(state.inner, cache)

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        return self.inner.is_dense(phase, begin, end, rope)

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        assert isinstance(state, DilatedState) and state.inner is not None
        state.inner.prefill, state.inner.decode = type(state.prefill)(), type(state.decode)()
        chosen = self.inner.select(state.inner, queries, cache)
        assert chosen is None or isinstance(chosen, Selection)
        statistics = state.statistics(queries.phase)
        inner = state.inner.statistics(queries.phase)
        if chosen is None:
            statistics.record_dense(inner.tokens_visible)
            return None
        wide = widened(chosen, self.radius, queries, cache)
        statistics.record_selection(wide, inner.tokens_visible, scored=True)
        return wide

    def to_dict(self) -> dict[str, Any]:
        return {"policy": "Dilated", "inner": self.inner.to_dict(), "radius": self.radius}


def widened(chosen: Selection, radius: int, queries: Queries, cache: KVCache) -> Selection:
    """The lists of ``chosen`` and the tokens beside; what a query does not see, attention skips."""
    indices, num_visible = chosen.indices, queries.cache_seqlens
    start = torch.zeros_like(num_visible) if cache.starts is None else cache.starts
    shape = (-1, *[1] * indices.dim())
    reach = torch.arange(-radius, radius + 1, dtype=torch.int32, device=indices.device)
    beside = indices[..., None] + reach
    valid = (
        (indices >= 0)[..., None]
        & (beside >= start.view(shape))
        & (beside < num_visible.view(shape))
    )
    nowhere = 2**31 - 1
    places = beside.where(valid, nowhere).flatten(-2).sort(-1).values
    again = torch.zeros_like(places, dtype=torch.bool)
    again[..., 1:] = places[..., 1:] == places[..., :-1]
    places = places.masked_fill(again, nowhere).sort(-1).values
    places = places[..., : list_width(queries.max_seqlen)]
    found = places < nowhere
    return Selection(
        places.where(found, -1).contiguous(),
        found.sum(-1, dtype=torch.int32),
        chosen.q_block_offsets,
    )
