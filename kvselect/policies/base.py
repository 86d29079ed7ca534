"""Policy: one selection method. PolicyState: what it remembers of one layer. POLICIES: by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from kvselect.attention import attend_queries
from kvselect.block_masks import BlockMask
from kvselect.cache import KVCache
from kvselect.checks import require, require_type
from kvselect.crossovers import Crossover, Workload, break_even_mode, find_by_q_heads
from kvselect.fixed_cache import FixedKVCache
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.policies.stack_state import StackState
from kvselect.queries import Phase, Queries
from kvselect.rolling_pools import RollingPools
from kvselect.rope import Rope
from kvselect.selection import Lists, Selection
from kvselect.selection_cache import SelectionCache

_KEPT = frozenset({"prefill", "decode", "crossovers", "stack", "layer"})
"""Of a state that goes on under other settings."""

__all__ = ["POLICIES", "Policy", "PolicyState", "policy_from_dict", "register_policy"]


@dataclass(slots=True, eq=False)
class PolicyState:
    """What a policy remembers of one layer; row = request.

    Nothing of it is shared between layers but `stack`.

    Parameters
    ----------
    policy : Policy
        Whose state it is. Other settings of the same method make the next step select anew.
    prefill, decode : PhaseStatistics
        Counts for reports.
    selection_cache : SelectionCache or None
        Of policies that reuse lists.
    rolling_pools : RollingPools or None
        Of policies that scan a part of the row per step.
    decode_policies : dict
        By number of query heads: the policy of decode steps where a crossover was measured. The
        state settles it when it is made, so that no step looks anything up.
    crossovers : mapping or None
        What `Policy.new_state` was given: settles other settings of the method too.
    stack : StackState or None
        What the layers share, where the policy has something flow between them; None: not yet, or
        the layer is a stack of its own.
    layer : int
        Place among the layers that share it, 0 first.
    """

    policy: Policy
    prefill: PhaseStatistics = field(default_factory=PhaseStatistics)
    decode: PhaseStatistics = field(default_factory=PhaseStatistics)
    selection_cache: SelectionCache | None = None
    rolling_pools: RollingPools | None = None
    decode_policies: dict[int, Policy] = field(default_factory=dict)
    crossovers: Mapping[int, Crossover] | None = None
    stack: StackState | None = None
    layer: int = 0
    _offsets: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def scored_nbytes(self) -> int:
        """Bytes of its own that a step reads to score by: not those of keys or a sketch."""
        return 0

    def offsets_on(self, device: torch.device, offsets: tuple[int, ...]) -> Tensor:
        """Offsets as kernels read them, int32; those of the last call are kept.

        A copy from the host at every chunk would make it wait for the device, and a CUDA graph
        cannot capture one.
        """
        last = self._offsets
        if last is None or last[0] != offsets or last[1].device != device:
            with torch.inference_mode(False):  # it must serve calls of any grad mode
                last = (offsets, torch.tensor(offsets, dtype=torch.int32, device=device))
            self._offsets = last
        return last[1]

    def decode_policy(self, num_q_heads: int) -> Policy:
        """The policy of decode steps: with its ``dense_below_tokens`` settled."""
        return self.decode_policies.get(num_q_heads, self.policy)

    def statistics(self, phase: Phase) -> PhaseStatistics:
        return self.prefill if phase == "prefill" else self.decode

    @property
    def nbytes(self) -> int:
        """Memory of what is remembered in tensors, statistics and counts aside."""
        parts = (getattr(self, name.name) for name in dataclasses.fields(self))
        return sum(part.nbytes for part in parts if hasattr(part, "nbytes"))

    def shared(self, cache: KVCache) -> StackState:
        """What flows between layers, brought up to date with ``cache``.

        Raises
        ------
        ValueError
            If the host does not know how long the rows of ``cache`` are.
        """
        allowed = "a cache whose lengths the host knows: what flows between layers is not captured"
        require(not cache.lengths_are_bounds, "cache", type(cache).__name__, allowed)
        if self.stack is None:
            self.stack = StackState(1, self.policy)
        self.stack.follow(self.layer, cache)
        return self.stack

    def follow(self, policy: Policy, cache: KVCache) -> None:
        """Serve ``policy`` from now on: what was remembered under other settings is void.

        Raises
        ------
        ValueError
            If it is another method.
        """
        if self.policy is policy or self.policy == policy:
            return
        got, wanted = type(self.policy).__name__, type(policy).__name__
        require(got == wanted, "state", f"a state of {got}", f"a state of {wanted}")
        fresh = policy.new_state(cache, self.crossovers)
        for part in dataclasses.fields(self):  # what a method adds is of its settings as well
            if part.name not in _KEPT:
                setattr(self, part.name, getattr(fresh, part.name))
        if self.stack is not None:
            self.stack.serve(policy)

    def take_over(self, before: PolicyState) -> None:
        """Go on with what ``before``, the state of fewer or more rows, remembered, as far as that
        follows the rows of the cache by itself."""

    def invalidate(self) -> None:
        """Make the next step select anew; counts stay."""
        if self.selection_cache is not None:
            self.selection_cache.clear()
        if self.rolling_pools is not None:
            self.rolling_pools.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Base of all selection methods: frozen settings, no tensors, no counters.

    A method sets the four class constants, `select`, and whichever of the other members differ for
    it. The order of a step is `update`, `select`, `attend`; `decode_step` and `prefill` drive it.
    """

    phases: ClassVar[frozenset[str]] = frozenset({"prefill", "decode"})
    revocable: ClassVar[bool]  # may a token that is not kept now come back later?
    query_aware: ClassVar[bool]  # does what is kept depend on the query?
    persistent: ClassVar[bool]  # does the state outlive a step?

    # A method that has one of these settings declares a field of its name.
    @property
    def positions(self) -> Literal["original", "compact", "clamp", "stingy"]:
        return "original"

    def __deepcopy__(self, memo: dict[int, Any]) -> Policy:
        return self  # nothing in it changes: a copy of a cache goes on with what is remembered

    @property
    def caches_unrotated(self) -> bool:
        """Whether keys are cached before RoPE, and rotated where they are read."""
        return self.positions != "original"

    @property
    def num_positions(self) -> int:
        """Most positions that a call uses where keys are cached before RoPE."""
        return self.capacity

    @property
    def num_margin_tokens(self) -> int:
        """Tokens before the window whose keys decode steps read as well."""
        return 0

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers that `attach` leaves dense."""
        return ()

    @property
    def dense_below_tokens(self) -> int | None:
        """Rows of at most so many tokens are dense; None: the measured crossover decides."""
        return 0

    @property
    def chunk_size(self) -> int:
        """Prefill: queries that are scored in one call, in tokens; bounds the memory of scores."""
        return 2048

    @property
    def q_block_size(self) -> int:
        """Prefill: queries that share one selection."""
        return 128

    @property
    def num_tail_tokens(self) -> int:
        """Prefill: queries at the end of a call that go into blocks of ``tail_q_block_size``."""
        return 0

    @property
    def tail_q_block_size(self) -> int:
        """Prefill: see `num_tail_tokens`. Calls of at most so many queries on a filled cache select
        for each query by itself, as decode steps do."""
        return 16

    @property
    def num_question_tokens(self) -> int:
        """Prefill: queries at the end of a call that select for all of it, before they are reached;
        0: none do. Reports call such a policy question-aware."""
        return 0

    @property
    def prefill_attention(self) -> Literal["sparse_attention", "dense_kernel"]:
        """What attends the lists of prefill blocks: `sparse_attention`'s ``implementation``."""
        return "sparse_attention"

    @property
    def required_sketch(self) -> str | None:
        """Sketch format that the cache must have; None: any, or none."""
        return None

    @property
    def reads_unlisted(self) -> str | None:
        """Why decode steps read keys other than those of sinks, window and lists.

        None: they do not, so that a `TieredKVCache` may keep the rest in host memory.
        """
        return "nobody has said that its steps read only what they list"

    @property
    def joins_heads(self) -> bool:
        """Whether all heads of a layer decide together: processes with a share of them each add up
        what they found (`sum_over_ranks`)."""
        return getattr(self, "scope", "kv_head") == "layer"

    @property
    def needs_all_heads(self) -> str | None:
        """Why a process with a share of a layer's heads cannot run it; None: it can."""
        return None

    @property
    def capacity(self) -> int:
        """Most tokens in one list, and so most positions that "compact" uses; 0: no lists."""
        return 0

    def for_layer(self, index: int) -> Policy:
        """What the layer of this index runs, where layers differ; `attach` asks for it once."""
        return self

    @classmethod
    def at_budget(cls, budget: int) -> Policy:
        """Settings whose decode steps attend to ``budget`` tokens, sinks and recent ones included.

        What `kvselect eval --budget` and the curves of benches compare methods by; rounded down
        where a method counts in blocks. A method that can be compared so overrides it.

        Raises
        ------
        ValueError
            If the method has no budget, or not so small a one.
        """
        require(False, "budget", budget, f"None: {cls.__name__} has none")
        raise AssertionError

    def new_state(
        self, cache: KVCache, crossovers: Mapping[int, Crossover] | None = None
    ) -> PolicyState:
        """State for one layer whose keys and values ``cache`` holds.

        ``crossovers``: by number of query heads, for methods with ``dense_below_tokens=None``.
        None: those stored for this machine (`kvselect.break_even`).
        """
        return PolicyState(self, crossovers=crossovers)

    @property
    def flows_between_layers(self) -> bool:
        """Whether the layers of a forward pass share something: `new_states` makes their states."""
        return False

    def new_states(
        self, caches: Sequence[KVCache], crossovers: Mapping[int, Crossover] | None = None
    ) -> list[PolicyState]:
        """States of the layers of one stack, in the order in which they run.

        They share what flows between layers, if anything does. Crop and reorder the caches of all
        layers alike, between forward passes.
        """
        states = [self.new_state(cache, crossovers) for cache in caches]
        if self.flows_between_layers:
            stack = StackState(len(states), self)
            for layer, state in enumerate(states):
                state.stack, state.layer = stack, layer
        return states

    def new_cache(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = 0,
    ) -> KVCache:
        """An empty contiguous cache of the kind that the method needs, sketch included."""
        return KVCache(
            batch,
            num_kv_heads,
            head_dim,
            dtype=dtype,
            device=device,
            capacity=capacity,
            sketch=self.required_sketch,
        )

    def extra_bytes(
        self, num_tokens: int, *, num_q_heads: int, num_kv_heads: int, head_dim: int, itemsize: int
    ) -> tuple[int, int]:
        """What a row of ``num_tokens`` takes beside keys, values and sketch, in bytes, at most.

        First what a layer remembers, then what one layer at a time takes for a moment; workspaces
        of a step's own size are not counted.
        """
        return 0, 0

    def prepare_capture(
        self, state: PolicyState, cache: FixedKVCache, num_q_heads: int, rope: Rope | None
    ) -> list[Tensor]:
        """Before decode steps are captured: make the tensors that they write to, where they are
        missing; returns those that are new."""
        return []

    def update(self, state: PolicyState, cache: KVCache) -> None:
        """After an append, before `select`: block statistics and the like, not the sketch."""

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        """Whether queries ``[begin, end)`` of the batch's longest row attend to everything.

        Positions count real tokens, padding excluded. Once False, False for all later blocks.
        """
        return False

    def select(
        self, state: PolicyState, queries: Queries, cache: KVCache
    ) -> Selection | BlockMask | None:
        """The lists that ``queries`` attend to, or in prefill blocks; None: every visible token.

        A method that gives a `BlockMask` overrides `attend`.
        """
        raise NotImplementedError

    def attend(
        self, queries: Queries, cache: KVCache, selection: Selection | BlockMask | None
    ) -> tuple[Tensor, Tensor]:
        """Attention over what was selected: ``(out, lse)`` as `sparse_attention` gives them."""
        assert not isinstance(selection, BlockMask)
        rope = queries.rope if self.caches_unrotated else None
        return attend_queries(queries, cache, selection, rope, self.prefill_attention)

    def audit(
        self, state: PolicyState, queries: Queries, cache: KVCache, selection: Selection
    ) -> None:
        """Score a decode step from the exact keys, and record what its lists missed.

        Raises
        ------
        ValueError
            If the method has no scores to compare with.
        """
        allowed = "a policy that scores tokens (TokenSelect)"
        require(False, "audit", f"a policy {type(self).__name__}", allowed)

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON takes them, the method's name under "policy"; see `policy_from_dict`."""
        settings: dict[str, Any] = {"policy": type(self).__name__}
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            settings[setting.name] = list(value) if isinstance(value, tuple) else value
        return settings


POLICIES: dict[str, type[Policy]] = {}
_PolicyType = TypeVar("_PolicyType", bound=type[Policy])


def register_policy(policy: _PolicyType) -> _PolicyType:
    """Class decorator: make a method known by name. Above ``@dataclass``, which makes it anew."""
    POLICIES[policy.__name__] = policy
    return policy


def policy_from_dict(settings: Mapping[str, Any]) -> Policy:
    """The policy that ``to_dict`` described.

    Parameters
    ----------
    settings : mapping
        "policy": the method's class name; the rest: its settings. What is left out has its default.

    Raises
    ------
    ValueError
        If the method or a setting is unknown, or a value is out of bounds.
    TypeError
        If ``settings`` is not a mapping or a value has another type.
    """
    require_type(settings, Mapping, "settings", "a dict made by Policy.to_dict()")
    rest = dict(settings)
    name = rest.pop("policy", None)
    allowed = " or ".join(repr(known) for known in sorted(POLICIES))
    require(isinstance(name, str) and name in POLICIES, "policy", name, allowed)
    policy = POLICIES[name]
    known = [setting.name for setting in dataclasses.fields(policy)]
    unknown = sorted(set(rest) - set(known))
    require(not unknown, f"settings of {name}", unknown, ", ".join(known))
    return policy(**{k: tuple(v) if isinstance(v, list) else v for k, v in rest.items()})


def decode_policies(
    policy: Policy, cache: KVCache, crossovers: Mapping[int, Crossover] | None
) -> dict[int, Policy]:
    """`PolicyState.decode_policies`; what the user set stands, whatever was measured."""
    if policy.dense_below_tokens is not None or cache.keep is not None:
        return {}  # what was measured knows nothing of rows that a dense step would have to move
    if crossovers is None:
        if break_even_mode() == "off":
            return {}
        sizes = (0, cache.num_kv_heads, cache.head_dim, cache.dtype, cache.page_block_size)
        crossovers = find_by_q_heads(Workload.of(policy.to_dict(), *sizes), cache.device)
    return {heads: settled(policy, found) for heads, found in crossovers.items()}


def require_listed_reads(policy: Policy) -> None:
    """ValueError unless decode steps can do without the keys that they do not list."""
    reason = policy.reads_unlisted
    allowed = (
        f"None with this {type(policy).__name__} ({reason}); 'cpu' goes with StreamingLLM, and "
        "with TokenSelect that has a sketch and no num_segments, InfLLM, joint Landmark"
    )
    require(reason is None, "keep", "cpu", allowed)


def settled(policy: Policy, crossover: Crossover) -> Policy:
    """The policy, dense below a measured crossover."""
    changes: dict[str, Any] = {"dense_below_tokens": crossover.dense_below_tokens}
    return dataclasses.replace(policy, **changes)


def selection_of(
    lists: Lists,
    queries: Queries,
    num_kv_heads: int,
    total_score: float | Tensor | None = None,
    hit: Tensor | None = None,
) -> Selection:
    """The Selection that ``lists`` are: one list shown to all heads, one block without its axis."""
    indices, topk_length, kept_score = lists
    if indices.shape[2] != num_kv_heads:
        indices = indices.expand(-1, -1, num_kv_heads, -1)
        topk_length = topk_length.expand(-1, -1, num_kv_heads)
        kept_score = kept_score.expand(-1, -1, num_kv_heads)
    if queries.q_block_offsets is None:
        indices, topk_length = indices.squeeze(1), topk_length.squeeze(1)
        kept_score = kept_score.squeeze(1)
        if isinstance(total_score, Tensor) and total_score.dim() == 3:
            total_score = total_score.squeeze(1)
    return Selection(indices, topk_length, queries.q_block_offsets, kept_score, total_score, hit)


def longest_block(queries: Queries, cache: KVCache) -> tuple[int, int]:
    """The last block in the longest row, in real tokens: what `Policy.is_dense` asks for."""
    end = max((0, *cache.num_real_tokens)) - queries.num_later_tokens  # no default=: dynamo's max
    begin = end - (queries.offsets[-1] - queries.offsets[-2])
    return max(begin, 0), max(end, 0)


def visible_tokens(queries: Queries, cache: KVCache) -> int:
    """Tokens that dense attention would read, summed over rows, query blocks and KV heads."""
    behind = queries.seqlen_q + queries.num_later_tokens
    total = 0
    for offset in queries.offsets[1:]:
        for num_tokens in cache.num_real_tokens:
            total += max(num_tokens + offset - behind, 0)
    return total * cache.num_kv_heads
