"""SpAtten: fewer tokens layer by layer, by the attention that they got above (arXiv:2012.09852)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from kvselect.block_masks import BlockMask
from kvselect.cache import KVCache
from kvselect.checks import require, require_bool, require_choice, require_float, require_int
from kvselect.crossovers import Crossover
from kvselect.policies.base import (
    Policy,
    PolicyState,
    register_policy,
    require_listed_reads,
    selection_of,
    visible_tokens,
)
from kvselect.policies.cascade import cascade_lists, cascade_record
from kvselect.policies.listed_weights import column_sums
from kvselect.policies.local_v import StepCounts, WeightedSelection, attend_weighted, weigh_step
from kvselect.policies.token_settings import require_layers
from kvselect.queries import Phase, Queries
from kvselect.rope import Rope
from kvselect.selection import Selection
from kvselect.tensor_parallel import sum_over_ranks

__all__ = ["SpAtten"]


@dataclass(slots=True, eq=False)
class SpAttenState(PolicyState):
    """`PolicyState` and what decode steps read of values and low bits."""

    counts: StepCounts = field(default_factory=StepCounts)


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class SpAtten(Policy):
    """A cascade over the layers: what one layer leaves out, no layer below it attends to.

    ``keep[l + 1] <= keep[l]``, ``|keep[l]| = max(1, floor((1 - r_l) * L))`` of ``L`` visible
    tokens, ranked by ``c[j]``, the attention that token ``j`` got in the layers above, summed over
    heads and queries; ``r_l`` as in `kept_share`. The layers of a stack share their states
    (`Policy.new_states`); one layer alone attends to everything.

    Parameters
    ----------
    cascade : "soft" or "hard"
        "soft": ``c`` is of this pass and query block alone, and what is left out may come back for
        the next. "hard": ``c`` adds up over all queries and steps, divided by the queries that
        could see the token, and what is dropped stays dropped: no question finds it again.
    mean_pruned, first_pruned, free_layers : float
        Share of the tokens left out, on the mean over the layers of the cascade and in its first;
        share of the layers before it.
    decay : float in [0, 1]
        "hard": what older passes count for, once per pass.
    num_sink_tokens, num_recent_tokens : int
        Never left out; part of what is kept.
    value_fraction, value_mass : float in (0, 1], float in (0, 1) or None
        Decode steps read the values of the tokens that weigh most for their query only: so large a
        part of them, or as many as hold so much of the attention. Published: 0.3.
    renormalise : bool
        Make the weights of these add up to one.
    refine_below : float in (0, 1), or None
        Decode steps weigh tokens by the int4 sketch, and by the keys themselves where the heaviest
        gets less than this of the attention; published: 0.05 to 0.1. None: by the keys.
    chunk_size, q_block_size : int
        Prefill: tokens per run of blocks, queries that share one list.
    dense_layers : tuple of int
        Layers that are no part of the cascade; read by `attach`.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Wang et al., arXiv:2012.09852, which reports 10 times less DRAM traffic on simulated
    hardware, with accuracy after fine-tuning for each task. Pruning of heads is left out: it needs
    that fine-tuning. Weights are computed in plain torch beside the attention kernel: this shows
    what the method keeps and reads, not how fast it could be (docs/policies.md).
    """

    query_aware: ClassVar[bool] = True
    persistent: ClassVar[bool] = True

    cascade: Literal["soft", "hard"] = "soft"
    mean_pruned: float = 0.5
    first_pruned: float = 0.1
    free_layers: float = 0.15
    decay: float = 1.0
    num_sink_tokens: int = 4
    num_recent_tokens: int = 64
    value_fraction: float = 1.0
    value_mass: float | None = None
    renormalise: bool = True
    refine_below: float | None = None
    chunk_size: int = 2048
    q_block_size: int = 128
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_choice(self.cascade, "cascade", ("soft", "hard"))
        for name in ("mean_pruned", "first_pruned", "free_layers"):
            value = require_float(getattr(self, name), name, "a float in [0, 1)")
            require(0.0 <= value < 1.0, name, value, "a float in [0, 1)")
        last = 2.0 * self.mean_pruned - self.first_pruned
        allowed = "between 2 * mean_pruned - 1 and 2 * mean_pruned (the last layer loses the rest)"
        fits = self.mean_pruned == 0.0 or 0.0 <= last < 1.0
        require(fits, "first_pruned", self.first_pruned, allowed)
        decay = require_float(self.decay, "decay", "a float in [0, 1]")
        require(0.0 <= decay <= 1.0, "decay", decay, "a float in [0, 1]")
        allowed = "1 with cascade='soft', which remembers nothing"
        require(self.cascade == "hard" or decay == 1.0, "decay", decay, allowed)
        require_int(self.num_sink_tokens, "num_sink_tokens", 0)
        for name in ("num_recent_tokens", "chunk_size", "q_block_size"):
            require_int(getattr(self, name), name, 1)
        part = require_float(self.value_fraction, "value_fraction", "a float in (0, 1]")
        require(0.0 < part <= 1.0, "value_fraction", part, "a float in (0, 1]")
        for name in ("value_mass", "refine_below"):
            if getattr(self, name) is not None:
                value = require_float(getattr(self, name), name, "None or a float in (0, 1)")
                require(0.0 < value < 1.0, name, value, "None or a float in (0, 1)")
        both = self.value_mass is not None and part < 1.0
        require(not both, "value_fraction", part, "1 with value_mass (each says whose are read)")
        require_bool(self.renormalise, "renormalise")
        require_layers(self.dense_layers)

    @property
    def revocable(self) -> bool:  # type: ignore[override]
        """What a hard cascade drops stays dropped."""
        return self.cascade == "soft"

    @property
    def tail_q_block_size(self) -> int:
        """Drafts go the way of prefill where steps change what is remembered, or weigh."""
        return 16 if self.cascade == "soft" and not self.weighs_steps else 1

    @property
    def required_sketch(self) -> str | None:
        return None if self.refine_below is None else "int4"

    @property
    def reads_unlisted(self) -> str | None:
        return "the layers before the cascade attend to everything"

    @property
    def joins_heads(self) -> bool:
        return True

    @property
    def flows_between_layers(self) -> bool:
        return True

    @property
    def weighs_steps(self) -> bool:
        """Whether decode steps attend by weights of their own."""
        pruned = self.value_fraction < 1.0 or self.value_mass is not None
        return pruned or self.refine_below is not None

    def new_state(
        self, cache: KVCache, crossovers: Mapping[int, Crossover] | None = None
    ) -> SpAttenState:
        if cache.keep is not None:
            require_listed_reads(self)
        return SpAttenState(self, crossovers=crossovers)

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        return self.mean_pruned == 0.0 and not self.weighs_steps

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        """What is left for this layer; None: everything."""
        assert isinstance(state, SpAttenState)
        if self.refine_below is not None:
            require(cache.sketch_format == "int4", "sketch", cache.sketch_format, "'int4'")
        visible, statistics = visible_tokens(queries, cache), state.statistics(queries.phase)
        shared = state.shared(cache), state.layer, queries, cache
        lists = cascade_lists(self, *shared)
        found = None if lists is None else selection_of(lists, queries, cache.num_kv_heads)
        if self.weighs_steps and queries.phase == "decode":
            weighed = weigh_step(self, queries, cache, found, state.counts)
            found, sums = weighed, weighed.column_sums(queries.max_seqlen)
        else:
            sums = column_sums(queries, cache, found)
        sums = sum_over_ranks(sums, queries.process_group)
        cascade_record(self, *shared, found, sums)
        if found is None:
            statistics.record_dense(visible)
        else:
            statistics.record_selection(found, visible, scored=False)
        return found

    def attend(
        self, queries: Queries, cache: KVCache, selection: Selection | BlockMask | None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(selection, WeightedSelection):
            return attend_weighted(queries, cache, selection)
        return super(SpAtten, self).attend(queries, cache, selection)
