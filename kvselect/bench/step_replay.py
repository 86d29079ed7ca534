"""The same decode steps under several policies in turn: time, bytes, and the mass they keep."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvselect.cache import KVCache
from kvselect.decode import decode_step
from kvselect.eval.audit import Audit, audited
from kvselect.eval.step_streams import Steps
from kvselect.policies.base import Policy

__all__ = ["Outcome", "replay", "run"]


@dataclass(slots=True)
class Outcome:
    """One contender, all layers."""

    step_ms: list[float]  # summed over layers
    bytes_read: float
    num_hits: int
    num_rolled: int
    num_stopped: int
    mass_by_layer: list[float]

    @property
    def kept_mass(self) -> float:
        return statistics.fmean(self.mass_by_layer)


def replay(layer: Steps, policies: Mapping[str, Policy]) -> Iterator[dict[str, tuple[float, Any]]]:
    """CPU milliseconds and state of every contender, step after step, on one cache."""
    (sketch,) = {policy.required_sketch for policy in policies.values()}
    num_heads, head_dim = layer.k.shape[1:]
    cache = KVCache(
        1, num_heads, head_dim, dtype=layer.k.dtype, capacity=layer.k.shape[0], sketch=sketch
    )
    n = layer.num_context
    cache.append(layer.k[None, :n], layer.v[None, :n])
    states = {name: policy.new_state(cache) for name, policy in policies.items()}
    options: dict[str, Any] = {
        "rope": layer.rope,
        "softmax_scale": layer.softmax_scale,
        "softcap": layer.softcap or None,
    }
    for t, q in enumerate(layer.q):
        own = None if layer.q_unrotated is None else layer.q_unrotated[None, t : t + 1]
        cache.append(layer.k[None, n + t : n + t + 1], layer.v[None, n + t : n + t + 1])
        taken = {}
        names = list(policies)
        for name in names[t % len(names) :] + names[: t % len(names)]:
            policy, state = policies[name], states[name]
            before = time.process_time()
            decode_step(q[None, None], cache, policy, state, q_unrotated=own, **options)
            taken[name] = (1e3 * (time.process_time() - before), state)
        yield taken


def run(layers: Sequence[Steps], policies: Mapping[str, Policy]) -> dict[str, Outcome]:
    """Every policy's outcome over all layers; mass on the exact keys, in a second pass, untimed."""
    num_steps = layers[0].q.shape[0]
    outcomes = {name: Outcome([0.0] * num_steps, 0.0, 0, 0, 0, []) for name in policies}
    for layer in layers:
        for t, taken in enumerate(replay(layer, policies)):
            for name, (milliseconds, _) in taken.items():
                outcomes[name].step_ms[t] += milliseconds
        for name, (_, state) in taken.items():
            counts, outcome = state.decode, outcomes[name]
            outcome.bytes_read += counts.bytes_read(
                layer.k.shape[2], layer.k.dtype.itemsize, policies[name].required_sketch
            )
            outcome.num_hits += counts.num_hits
            outcome.num_rolled += counts.num_rolled
            outcome.num_stopped += counts.num_stopped
        audits = {name: Audit() for name in policies}
        watched = {name: audited(policy, audits[name]) for name, policy in policies.items()}
        for _ in replay(layer, watched):
            pass
        for name, audit in audits.items():
            assert audit.recovered_mass is not None  # every step was audited
            outcomes[name].mass_by_layer.append(audit.recovered_mass)
    return outcomes
