"""Up to which length each layer's decode steps are dense, and who says so."""

from __future__ import annotations

from typing import NamedTuple

from kvselect.break_even import crossover_for
from kvselect.crossovers import Crossover, Mode
from kvselect.integrations.hf.plan import LayerPlan, StackPlan
from kvselect.policies.base import settled
from kvselect.policies.token_select import TokenSelect


class DenseBorder(NamedTuple):
    """Decode steps of at most ``tokens`` tokens are dense."""

    tokens: int
    source: str  # set in the policy; measured when and how; the budget, for want of what


def settle_crossovers(plan: StackPlan, mode: Mode, device_type: str) -> None:
    """Give every selecting layer the crossover of its workload, once and for all.

    Measures on the CPU only, and with "auto" only; layers of one shape share what was found. Ranks
    that vote together have none: one that is dense where another selects would leave it waiting.
    """
    known: dict[tuple[object, ...], Crossover | None] = {}
    for layer in plan.layers:
        policy = layer.policy
        layer.crossovers, layer.unmeasured = {}, ""
        if not layer.selects or not isinstance(policy, TokenSelect):
            continue
        if policy.dense_below_tokens is not None:
            continue
        if layer.source in plan.tiers:
            layer.unmeasured = "keep='cpu', where longer dense steps would move whole rows"
            continue
        if mode == "off":
            layer.unmeasured = "break_even='off'"
            continue
        if plan.process_group is not None:
            layer.unmeasured = "ranks vote together, and would each follow what they measured"
            continue
        if device_type != "cpu":
            layer.unmeasured = f"no crossover is measured on {device_type}"
            continue
        assert layer.dtype is not None  # it selects, so calibration saw its keys
        sizes = layer.num_q_heads, layer.num_kv_heads, layer.head_dim, layer.dtype
        if (policy, sizes) not in known:
            num_q_heads, num_kv_heads, head_dim, dtype = sizes
            known[policy, sizes] = crossover_for(
                policy,
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                mode=mode,
            )
        found = known[policy, sizes]
        if found is not None:
            layer.crossovers = {layer.num_q_heads: found}
        elif mode == "stored":
            layer.unmeasured = "no crossover is stored for this machine and workload"
        else:
            layer.unmeasured = "the machine was too busy to measure a crossover"


def dense_border(layer: LayerPlan) -> DenseBorder | None:
    """The border of a selecting layer; None: its method has none of this kind, or it never
    selects."""
    policy = layer.policy
    if not layer.selects or not isinstance(policy, TokenSelect):
        return None
    crossover = layer.crossovers.get(layer.num_q_heads)
    given = policy.dense_below_tokens
    if crossover is not None:
        in_use = settled(policy, crossover)
        assert isinstance(in_use, TokenSelect)
        policy, source = in_use, _how_measured(crossover)
    elif given is not None and given > policy.budget:
        source = "dense_below_tokens of the policy"
    elif given is not None:
        source = f"the policy's budget, dense_below_tokens={given}"
    else:
        source = f"the policy's budget: {layer.unmeasured}"
    tokens = policy.dense_limit(None)
    if layer.rotates_itself and tokens > layer.stack.trained_length:
        tokens, source = layer.stack.trained_length, "the trained length, compact positions"
    return DenseBorder(tokens, source)


def _how_measured(crossover: Crossover) -> str:
    threads = crossover.machine["threads"]
    how = f"measured on this machine with {threads} thread{'' if threads == 1 else 's'}"
    if crossover.tokens is None:
        how += ", selecting won nowhere up to it"
    elif crossover.extrapolated:
        how += ", extrapolated"
    return f"{how}, {crossover.measured_at}"
