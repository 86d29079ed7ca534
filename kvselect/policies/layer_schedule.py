"""LayerSchedule: deeper layers keep less of the prompt (AIM, arXiv:2412.03248)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvselect.cache import KVCache
from kvselect.checks import require, require_int, require_type
from kvselect.crossovers import Crossover
from kvselect.policies.base import POLICIES, Policy, PolicyState, register_policy
from kvselect.policies.eviction import EvictionPolicy
from kvselect.queries import Queries
from kvselect.selection import Selection

__all__ = ["LayerSchedule"]


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSchedule(EvictionPolicy):
    """Another eviction, with a budget that falls from layer to layer.

    Layer ``l`` keeps ``fraction(l)`` of what the settings say: 1 before ``first_layer``, linear to
    0 at ``last_layer``, 0 from there on. Without ``ratio`` and with the default ``topk`` 1024 that
    is 1024 tokens in the first layers; ``ratio=1`` keeps everything there, as AIM does.

    Parameters
    ----------
    method : str
        Name of the eviction that chooses, with its own settings' defaults.
    first_layer, last_layer : int
        ``first_layer < last_layer``; AIM, of 28 layers: 14 and 21.
    topk, ratio, span, num_sink_tokens, num_recent_tokens, num_window_queries, drop_below
        See `EvictionPolicy`.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds, the method is no eviction, or a step meets the schedule
        itself instead of what `for_layer` gives (`attach` asks for it).

    Notes
    -----
    Source: Zhong et al., AIM, arXiv:2412.03248; ToDRE, arXiv:2505.18757.
    """

    query_aware: ClassVar[bool] = True
    needs_keys_before_rope: ClassVar[bool] = True  # a method may ask

    method: str = "SnapKV"
    first_layer: int = 14
    last_layer: int = 21

    def __post_init__(self) -> None:
        EvictionPolicy.__post_init__(self)
        require_type(self.method, str, "method", "the name of an eviction")
        kind = POLICIES.get(self.method)
        names = [
            name
            for name, known in sorted(POLICIES.items())
            if issubclass(known, EvictionPolicy) and name != "LayerSchedule"
        ]
        fits = kind is not None and self.method in names
        require(fits, "method", self.method, " or ".join(repr(name) for name in names))
        require_int(self.first_layer, "first_layer", 0)
        allowed = f"an int >= {self.first_layer + 1} (first_layer + 1)"
        require_int(self.last_layer, "last_layer", self.first_layer + 1, allowed)

    def fraction(self, layer: int) -> float:
        """Of the budget, that a layer keeps."""
        done = (layer - self.first_layer) / (self.last_layer - self.first_layer)
        return min(max(1.0 - done, 0.0), 1.0)

    def for_layer(self, index: int) -> Policy:
        fraction = self.fraction(index)
        settings: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(EvictionPolicy)
        }
        if self.ratio is None or fraction == 0.0:
            settings |= {"topk": round(fraction * self.topk), "ratio": None}
        else:
            settings["ratio"] = fraction * self.ratio
        return POLICIES[self.method](**settings)

    def new_states(
        self, caches: Sequence[KVCache], crossovers: Mapping[int, Crossover] | None = None
    ) -> list[PolicyState]:
        """As `Policy.new_states`, each of what its layer runs: ``state.policy``."""
        states = super(LayerSchedule, self).new_states(caches, crossovers)
        for layer, state in enumerate(states):
            state.policy = self.for_layer(layer)
        return states

    def extra_bytes(self, num_tokens: int, **sizes: int) -> tuple[int, int]:
        return self.for_layer(0).extra_bytes(num_tokens, **sizes)

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        """ValueError: only a layer's share of it can be run."""
        require(False, "policy", "a LayerSchedule", "policy.for_layer(index): one of a layer")
        raise AssertionError
