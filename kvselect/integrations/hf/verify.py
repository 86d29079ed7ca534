"""Does the attached model compute what the stock model computes, where the two must agree?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvselect.checks import require, require_int
from kvselect.integrations.hf.plan import StackPlan
from kvselect.integrations.hf.stack import execution_device
from kvselect.integrations.hf.tiered_layer import make_tiers
from kvselect.policies.base import Policy
from kvselect.policies.dilated import Dilated
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.policies.spatten import SpAtten
from kvselect.sketch import BLOCK_TOKENS

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest ``max |difference| / max |stock|``.

Half precision is looser for two reasons: both sides round every layer's output to it, differently
ordered sums and all; and with compact positions we rotate in float32 where the model rotates in
its own dtype.
"""

PROMPT_TOKENS = 192
"""Default length of the prompt [tokens]."""
QUERY_BLOCK = 32
"""Query blocks of the run through lists [queries]: a prompt of 192 has some that select."""


class VerificationError(RuntimeError):
    """The attached model differs from the stock model where it must not."""


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """Errors of one verification, relative to the largest stock value.

    Attributes
    ----------
    tolerance : float
    logit_error : dict
        By run: "dense" (the policy's dense path) and, where the policy can be widened so, "lists".
    layer_error : dict
        By run: error of each layer's attention output, by ``layer_idx``.
    """

    tolerance: float
    logit_error: dict[str, float]
    layer_error: dict[str, dict[int, float]]

    @property
    def max_error(self) -> float:
        """The worst logit error of all runs."""
        return max(self.logit_error.values())


@dataclass(slots=True)
class _Trace:
    """Logits and attention outputs of one run."""

    logits: Tensor
    layers: dict[int, Tensor]


def verify_attachment(
    model: PreTrainedModel,
    plan: StackPlan,
    stock: Callable[[], AbstractContextManager[None]],
    prompt_tokens: int | None,
    decode_tokens: int,
    tolerance: float | None,
    seed: int,
) -> VerifyResult:
    """See `Handle.verify`. Counters, caches and the random state of the caller stay as they are."""
    require_int(decode_tokens, "decode_tokens", 0)
    if prompt_tokens is None:
        room = plan.trained_length - decode_tokens - QUERY_BLOCK
        prompt_tokens = max(min(PROMPT_TOKENS, room), 1)
    require_int(prompt_tokens, "prompt_tokens", 1)
    length = prompt_tokens + decode_tokens
    allowed = f"at most {plan.trained_length} tokens (the trained length), decode included"
    require(length <= plan.trained_length, "prompt_tokens", length, allowed)
    config: Any = model.config.get_text_config(decoder=True)
    stack = plan.owner()
    assert stack is not None  # the model holds it
    device = execution_device(stack)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator).to(device)

    with stock():
        expected = _run(model, plan, tokens, prompt_tokens)
    dtype = expected.logits.dtype
    bound = TOLERANCE.get(dtype, TOLERANCE[torch.float32]) if tolerance is None else tolerance
    logit_error, layer_error = {}, {}
    for name, policy in widened_policies(plan.policy, length).items():
        with _using(plan, policy):
            got = _run(model, plan, tokens, prompt_tokens)
        logit_error[name] = _error(got.logits, expected.logits)
        layer_error[name] = {i: _error(got.layers[i], out) for i, out in expected.layers.items()}
        bad = [i for i, error in sorted(layer_error[name].items()) if not error <= bound]
        if bad or not logit_error[name] <= bound:
            where = (
                f"first at layer {bad[0]} ({layer_error[name][bad[0]]:.2g})"
                if bad
                else "after the last layer"
            )
            raise VerificationError(
                f"{type(model).__name__} with {policy!r}: got a relative error of "
                f"{logit_error[name]:.2g} in the logits, {where}, allowed: {bound:.2g} "
                f"({name} run, {dtype}, {prompt_tokens} + {decode_tokens} tokens)"
            )
    return VerifyResult(bound, logit_error, layer_error)


def widened_policies(policy: Policy, length: int) -> dict[str, Policy]:
    """Forms of a policy that keep every one of ``length`` tokens.

    "dense": by its dense path. "lists": by selection, with so large an over-selection that every
    candidate is picked, while the rule for short contexts, which goes by ``topk``, still says that
    there is something to select. Its lists are no longer than the context and a query block.
    """
    if isinstance(policy, Dilated):
        inner = widened_policies(policy.inner, length)
        return {name: dataclasses.replace(policy, inner=form) for name, form in inner.items()}
    fields = {field.name for field in dataclasses.fields(policy)}
    forms: dict[str, dict[str, Any]] = {"dense": {}}
    if "topk" in fields:
        forms["dense"] = {"topk": length}
        if "overselect" in fields:
            forms["dense"]["overselect"] = 1.0
        if "ratio" in fields:  # an eviction's, which goes before topk
            forms["dense"] |= {"ratio": None, "drop_below": None}
        if "last_layer" in fields:  # of a schedule, which would keep less in deep layers
            forms["dense"] |= {"first_layer": 2**20, "last_layer": 2**20 + 1}
    elif "token_budget" in fields:
        forms["dense"] = {"token_budget": length + QUERY_BLOCK}  # whole pages of it
    elif "num_recent_tokens" in fields:
        forms["dense"] = {"num_recent_tokens": length}
        if isinstance(policy, SpAtten):  # steps that weigh read less than what is listed
            forms["dense"] |= {"value_fraction": 1.0, "value_mass": None, "refine_below": None}
    if {"topk", "overselect", "num_sink_tokens", "num_recent_tokens", "q_block_size"} <= fields:
        settings: Any = policy
        shortest = BLOCK_TOKENS if policy.required_sketch is not None else QUERY_BLOCK
        recent = min(settings.num_recent_tokens, shortest)
        sinks = min(settings.num_sink_tokens, 4)
        forms["lists"] = {
            "topk": 1,
            "overselect": float(max(length - recent - sinks, 1)),
            "num_recent_tokens": recent,
            "num_sink_tokens": sinks,
            "q_block_size": min(settings.q_block_size, recent, QUERY_BLOCK),
            "max_age": 1,
            "dense_below_tokens": 0,
        }
    return {name: dataclasses.replace(policy, **changes) for name, changes in forms.items()}


@contextmanager
def _using(plan: StackPlan, policy: Policy) -> Iterator[None]:
    """Run another policy for a while, with counters of its own."""
    before = [
        (
            layer.policy,
            layer.needs_unrotated,
            layer.statistics,
            layer.num_lists,
            layer.nonfinite,
            layer.num_steps,
        )
        for layer in plan.layers
    ]
    tiers = plan.tiers
    try:
        if tiers:
            plan.tiers = make_tiers(plan, policy, 0)
        for layer in plan.layers:
            layer.use(policy)
            layer.statistics = (PhaseStatistics(), PhaseStatistics())
        yield
    finally:
        plan.tiers = tiers
        for layer, kept in zip(plan.layers, before):
            layer.policy, layer.needs_unrotated, layer.statistics = kept[:3]
            layer.num_lists, layer.nonfinite, layer.num_steps = kept[3:]


def _run(model: PreTrainedModel, plan: StackPlan, tokens: Tensor, prompt_tokens: int) -> _Trace:
    """Logits of a prompt and teacher-forced decode steps, and every layer's attention outputs."""
    outputs: dict[int, list[Tensor]] = {layer.index: [] for layer in plan.layers}
    handles = []
    for layer in plan.layers:
        module = layer.owner()
        assert module is not None

        def keep(_: Any, args: Any, output: Any, index: int = layer.index) -> None:
            outputs[index].append(output[0].detach().float())

        handles.append(module.register_forward_hook(keep))
    training = [module for module in model.modules() if module.training]
    logits = []
    try:
        model.eval()
        with torch.no_grad():
            cache = None
            steps = range(prompt_tokens, tokens.shape[1])
            for chunk in (tokens[:, :prompt_tokens], *(tokens[:, i : i + 1] for i in steps)):
                result = model(input_ids=chunk, past_key_values=cache, use_cache=True)
                cache = result.past_key_values
                logits.append(result.logits)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return _Trace(
        torch.cat(logits, dim=1), {i: torch.cat(parts, dim=1) for i, parts in outputs.items()}
    )


def _error(got: Tensor, expected: Tensor) -> float:
    """``max |difference| / max |expected|``; infinite where anything is NaN."""
    error = float((got.float() - expected.float()).abs().max() / expected.float().abs().max())
    return error if error == error else float("inf")
