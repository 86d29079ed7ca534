"""What an attached model keeps beside its modules: a plan for the stack, one for each layer."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kvselect.crossovers import Crossover
from kvselect.integrations.hf.masks import KeyRange, read_mask
from kvselect.integrations.hf.rope_fit import NO_ROPE, Frequencies, RopeLayout, Unrotation
from kvselect.lru_slots import Replacement
from kvselect.policies.base import Policy
from kvselect.policies.captured_statistics import CapturedStatistics
from kvselect.policies.eviction import EvictionPolicy
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.policies.stack_state import StackState
from kvselect.queries import Phase
from kvselect.rope import Rope
from kvselect.tensor_parallel import ProcessGroup
from kvselect.tiered_rows import Residency

NAME = "kvselect"
"""Of the attention implementation. transformers gives a meaning to names with "flash", "sdpa",
"flex_attention", "/" and "|" in them."""

PLAN_KEY = "_kvselect_plan"
"""Where a plan sits in ``module.__dict__``."""


@dataclass(slots=True)
class PrefixCounts:
    """What decode steps, and all calls, read of shared prefixes in one layer.

    Attributes
    ----------
    num_steps : int
        Decode steps on a cache with shared prefixes.
    step_tokens, separate_step_tokens : int or Tensor, 0-d
        Prefix tokens that they read, summed over KV heads, and what rows would have that do not
        share: with a policy that selects, by lists of their own.
    saved_tokens : int or Tensor, 0-d
        What attended to tokens of prefixes, over all calls, was not read for.
    held_bytes, separate_held_bytes : int
        Of the prefixes of the last cache, and what its rows would hold with one each.
    """

    num_steps: int = 0
    step_tokens: int | Tensor = 0
    separate_step_tokens: int | Tensor = 0
    saved_tokens: int | Tensor = 0
    held_bytes: int = 0
    separate_held_bytes: int = 0


KEPT_MASKS = 3
"""Older masks that stay known: a forward has one per kind of layer."""
MIN_TABLE_ROWS = 1024
"""First size of a rotation table [positions]."""

Recorder = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Tier:
    """What the `TieredKVCache` of one cache layer is made with.

    Attributes
    ----------
    num_sink_tokens, num_recent_tokens, resident_tokens : int
    residency : Residency
        Counts of all caches that the layer meets while attached.
    replacement : "lru" or "lru_s"
    block_tokens : int
    """

    num_sink_tokens: int
    num_recent_tokens: int
    resident_tokens: int
    residency: Residency = field(default_factory=Residency)
    replacement: Replacement = "lru"
    block_tokens: int = 1


class CopiedModelError(RuntimeError):
    """The model is a copy of an attached one: hooks came along, but the plan is the original's."""


@dataclass(slots=True, eq=False)
class StackPlan:
    """One attachment: the policy and what all layers of the decoder stack share.

    Attributes
    ----------
    mode : {"calibrate", "select", "stock"}
        "calibrate": layers only show their queries and keys to ``recorder``; "stock": hooks do
        nothing.
    trained_length : int
        Positions that the model was trained on [tokens]; compact positions stay below it.
    process_group : ProcessGroup or None
        Ranks over which the heads are spread (tensor parallel).
    previous : dict
        Attention implementation of each sub-config before, in the form of
        ``set_attn_implementation``.
    """

    owner: weakref.ref[nn.Module]
    policy: Policy
    trained_length: int
    previous: dict[str, Any]
    layers: list[LayerPlan] = field(default_factory=list)
    mode: Literal["calibrate", "select", "stock"] = "calibrate"
    recorder: Recorder | None = None
    identity: bool = False  # calibration's second run: every layer gets cos = 1, sin = 0
    sketches: list[str | None] = field(default_factory=list)  # of the cache layers, by layer_idx
    foreign_layers: frozenset[int] = frozenset()  # whose cache layer stays transformers' own
    latent_layers: frozenset[int] = frozenset()  # whose cache layer holds latents (MLA)
    tiers: dict[int, Tier] = field(default_factory=dict)  # of the cache layers with keep="cpu"
    evicting_layers: frozenset[int] = frozenset()  # whose cache layer may drop tokens for good
    process_group: ProcessGroup | None = None
    thread: int = field(default_factory=threading.get_ident)  # that attaches
    arguments: tuple[str, ...] = ()  # names of the stack's, in their order
    announced: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)  # cache layers, ever
    _masks: list[tuple[weakref.ref[Tensor], KeyRange]] = field(default_factory=list)
    _ones: tuple[Tensor, Tensor] | None = None
    _unrotation: tuple[weakref.ref[Tensor], RopeLayout, Unrotation] | None = None
    cacheless: dict[int, StackState] = field(default_factory=dict)  # by thread: of its last pass
    _tables: dict[tuple[Any, ...], Rope] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> StackPlan:
        return self  # a copied module finds that it is not the owner

    def require_own_thread(self) -> None:
        """Refuse calls from elsewhere while `attach` runs the model for itself.

        Raises
        ------
        RuntimeError
            If another thread runs the model.
        """
        if self.mode == "calibrate" and threading.get_ident() != self.thread:
            raise RuntimeError(
                "forward: got a call from another thread while attach runs, allowed: one after "
                "attach has returned"
            )

    def withdraw(self) -> None:
        """No cache layer waits for this model's keys any more."""
        for layer in self.announced:
            layer.withdraw()

    def mask(self, attention_mask: Tensor | None) -> KeyRange | Tensor:
        """`read_mask`, once per forward: all layers of a kind get the same mask object."""
        if torch.compiler.is_compiling():  # which finds common work by itself
            return read_mask(attention_mask)
        for mask, keys in self._masks:
            if attention_mask is not None and mask() is attention_mask:
                return keys
        read = read_mask(attention_mask)
        if isinstance(read, Tensor):
            return read
        # A step's starts are a new tensor with the old values; a cache reads values only of a
        # tensor that it does not know. Comparing here costs one read per step instead of one per
        # layer, and none off the CPU.
        for _, keys in self._masks:
            on_cpu = keys.starts.device.type == read.starts.device.type == "cpu"
            if on_cpu and torch.equal(keys.starts, read.starts):
                read = KeyRange(keys.starts, read.ends, read.validity)
                break
        else:
            if read.starts.is_inference():  # kept: a cache knows a tensor again by its version
                with torch.inference_mode(False):
                    read = KeyRange(read.starts.clone(), read.ends, read.validity)
        assert attention_mask is not None
        self._masks = [(weakref.ref(attention_mask), read), *self._masks[:KEPT_MASKS]]
        return read

    def no_rotation(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Ones and zeros in the form of ``cos`` and ``sin``, made once per shape."""
        if torch.compiler.is_compiling():
            return torch.ones_like(cos), torch.zeros_like(sin)
        kept = self._ones
        if (
            kept is None
            or kept[0].shape != cos.shape
            or kept[0].dtype != cos.dtype
            or kept[0].device != cos.device
            or (kept[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            self._ones = kept = (torch.ones_like(cos), torch.zeros_like(sin))
        return kept

    def table(self, layer: LayerPlan, num_positions: int, device: torch.device) -> Rope:
        """The layer's rotation for ``num_positions`` positions or more, up to the trained length.

        Layers with the same rotation share a table; it grows by doubling.
        """
        needed = min(num_positions, self.trained_length)
        rope = layer.rope
        if rope is not None and rope.num_positions >= needed and rope.cos.device == device:
            return rope
        assert layer.frequencies is not None
        key = (layer.frequencies, layer.layout, device)
        rope = self._tables.get(key)
        held = 0 if rope is None else rope.num_positions
        if rope is None or held < needed:
            rows = min(max(needed, 2 * held, MIN_TABLE_ROWS), self.trained_length)
            rope = layer.frequencies.rope(layer.layout, rows, device)
            self._tables[key] = rope
        layer.rope = rope
        return rope

    def unrotate(self, layer: LayerPlan, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``q`` before RoPE, from this call's cos and sin; factors are made once per forward."""
        if torch.compiler.is_compiling():  # a graph has no use for what was made outside of it
            return layer.layout.unrotation(cos, sin, q.shape[-1])(q)
        kept = self._unrotation
        if kept is None or kept[0]() is not cos or kept[1] != layer.layout:
            factors = layer.layout.unrotation(cos, sin, q.shape[-1])
            self._unrotation = kept = (weakref.ref(cos), layer.layout, factors)
        return kept[2](q)

    def inverse(self, layer: LayerPlan, device: torch.device) -> Rope:
        """`Frequencies.inverse` of the layer's rotation, kept like the tables."""
        assert layer.frequencies is not None
        key = (layer.frequencies, layer.layout, device, "inverse")
        if key not in self._tables:
            self._tables[key] = layer.frequencies.inverse(layer.layout, device)
        return self._tables[key]


_SERIALS = itertools.count()


@dataclass(slots=True, eq=False)
class LayerPlan:
    """What one attention layer does.

    Attributes
    ----------
    index : int
        ``layer_idx``: the layer's place in the cache.
    reason : str or None
        Why the layer runs dense; None: it selects.
    layer_type : str or None
        Of ``config.layer_types``.
    slides : bool
        Whether its attention slides over a window.
    layout, fit_error, frequencies
        The layer's rotation (`rope_fit`).
    source : int or None
        The cache layer whose keys the layer reads: its own ``index``, or with KV sharing an earlier
        one. None: none holds them (MLA: the cache has latents, and every call makes keys and values
        of all tokens anew).
    needs_unrotated : frozenset of {"prefill", "decode"}
        Phases in which the policy asks for the queries before RoPE.
    rope : Rope or None
        The table that the last call used.
    policy : Policy or None
        The stack's policy; with original positions where the layer has no rotation to compact.
    head_dim, itemsize : int
        Of its keys [channels, bytes].
    num_q_heads, num_kv_heads, dtype
        Of its queries and keys, as calibration saw them.
    crossovers : dict
        What decides which decode steps are dense, as ``Policy.new_state`` takes it; empty: the
        policy alone.
    unmeasured : str
        Why there is none where the policy leaves it to measurement.
    statistics : pair of PhaseStatistics
        Of prefill and decode: shared by every cache that the layer meets while attached.
    audit_every : int or None
        Every so many decode steps are scored exactly.
    prefix_counts : PrefixCounts
        Of calls on a cache with shared prefixes.
    num_steps : int
        Decode steps so far.
    num_lists : int
        Queries of decode steps so far, times rows, times KV heads: what the decode counts are
        summed over.
    nonfinite : Tensor, [batch, num_kv_heads], int64, or None
        Counter of the last cache.
    captured, captured_before : list, WeakSet of CapturedStatistics
        Counts of decode steps on static caches, which no host code sees, of the newest cache and of
        others in use; see `count_captured`.
    serial : int
        Its own among all plans of the process.
    cache_class : str
        Type of the cache layer of the last call.
    runtime_dense : Counter
        Calls of a selecting layer that ran dense, by reason.
    """

    owner: weakref.ref[nn.Module]
    stack: StackPlan
    index: int
    reason: str | None = None
    layer_type: str | None = None
    slides: bool = False
    layout: RopeLayout = NO_ROPE
    fit_error: float = 0.0
    frequencies: Frequencies | None = None
    source: int | None = None
    needs_unrotated: frozenset[Phase] = frozenset()
    rope: Rope | None = None
    policy: Policy | None = None
    head_dim: int = 0
    itemsize: int = 0
    num_q_heads: int = 0
    num_kv_heads: int = 0
    dtype: torch.dtype | None = None
    crossovers: dict[int, Crossover] = field(default_factory=dict)
    unmeasured: str = ""
    statistics: tuple[PhaseStatistics, PhaseStatistics] = field(
        default_factory=lambda: (PhaseStatistics(), PhaseStatistics())
    )
    prefix_counts: PrefixCounts = field(default_factory=PrefixCounts)
    audit_every: int | None = None
    num_steps: int = 0
    num_lists: int = 0
    nonfinite: Tensor | None = None
    captured: list[CapturedStatistics] = field(default_factory=list)
    captured_before: weakref.WeakSet[CapturedStatistics] = field(default_factory=weakref.WeakSet)
    serial: int = field(default_factory=_SERIALS.__next__)
    cache_class: str = ""
    runtime_dense: Counter[str] = field(default_factory=Counter)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerPlan:
        return self

    @property
    def selects(self) -> bool:
        return self.reason is None

    @property
    def rotates_itself(self) -> bool:
        """Whether keys are cached un-rotated and our kernels rotate them."""
        return (
            self.reason is None and self.stack.policy.caches_unrotated and self.layout.num_pairs > 0
        )

    def use(self, policy: Policy) -> None:
        """Run ``policy``, as this layer has it, from the next call on."""
        policy = policy.for_layer(self.index)
        if policy.caches_unrotated and self.layout.num_pairs == 0:
            policy = dataclasses.replace(policy, positions="original")  # type: ignore[call-arg]
        self.policy = policy
        self.needs_unrotated = (
            unrotated_phases(policy) if self.layout.num_pairs > 0 else frozenset()
        )

    def count_later(self, captured: CapturedStatistics) -> None:
        """Have `count_captured` read these counts: of the newest cache, and of older ones that are
        still in use."""
        if self.captured[-1:] == [captured]:
            return
        if captured not in self.captured_before:
            self.count_captured()  # before an older cache, and its counts, may go
        self.captured_before.update(self.captured)
        self.captured_before.discard(captured)
        self.captured[:] = [captured]

    def count_captured(self) -> None:
        """Add what captured steps counted to ``statistics`` (reads the device)."""
        for captured in (*self.captured, *self.captured_before):
            self.num_lists += captured.move_to(self.statistics[1])

    def ran_dense(self, reason: str) -> None:
        """Count a call that should have selected; say so once per reason.

        Not inside torch.compile: the prefill before it, which is eager, was counted.
        """
        if torch.compiler.is_compiling():
            return
        if reason not in self.runtime_dense:
            warnings.warn(f"kvselect: layer {self.index} runs dense: {reason}", stacklevel=3)
        self.runtime_dense[reason] += 1


class LayerContext(NamedTuple):
    """What the attention hook hands to the attention function, as the keyword ``kvselect``."""

    layer: Any  # the cache layer that the keys come from, or None without a cache
    cos: Tensor | None  # None: the model passes no pair position_embeddings by keyword
    sin: Tensor | None
    plan: LayerPlan
    cache: Any = None  # all layers


def unrotated_phases(policy: Policy) -> frozenset[Phase]:
    """Phases in which a policy with original positions asks for the queries before RoPE.

    Prefill averages them over query blocks; in decode the selection cache compares them.
    """
    if policy.caches_unrotated:
        return frozenset()
    phases: set[Phase] = set()
    if isinstance(policy, EvictionPolicy) and policy.needs_keys_before_rope:
        phases.add("decode")
    selects = not getattr(policy, "dense_prefill", False)
    if selects and getattr(policy, "average_queries", None) == "before_rope":
        phases.add("prefill")
    reuses = getattr(policy, "similarity_threshold", None) is not None
    if reuses and getattr(policy, "similarity_on", None) == "unrotated":
        phases.add("decode")
    return frozenset(phases)


def plan_of(module: nn.Module) -> Any:
    """The plan of an attached module.

    Raises
    ------
    CopiedModelError
        If the module is a copy of an attached one.
    """
    plan = module.__dict__[PLAN_KEY]
    if plan.owner() is not module:
        raise CopiedModelError(
            f"{type(module).__name__}: got a copy of an attached model, allowed: the original, or "
            "a copy after kvselect.attach(copy, policy) (re-attach)"
        )
    return plan
