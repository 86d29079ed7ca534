"""Two short runs of the decoder stack show what each layer does with queries, keys, positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvselect.checks import HEAD_DIMS, STORAGE_DTYPES
from kvselect.integrations.hf.dense import dense_attention
from kvselect.integrations.hf.head_dims import stored_head_dim
from kvselect.integrations.hf.masks import KeyRange, read_mask
from kvselect.integrations.hf.plan import LayerContext, LayerPlan, StackPlan
from kvselect.integrations.hf.rope_fit import (
    FIT_TOLERANCE,
    NO_ROPE,
    Frequencies,
    fit_layout,
    freeze_frequencies,
    frequencies_match,
)
from kvselect.integrations.hf.stack import execution_device

NUM_TOKENS = 7
FIRST_POSITION = 5
SHIFT = 3
"""How far the second run's positions lie from the first's: layers that are given no rotation to
take away show whether they have one of their own."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a layer cannot select.

    Attributes
    ----------
    text : str
    fatal : bool
        Our dense attention would not compute what the layer means either.
    rotation : bool
        Only policies that rotate, or un-rotate queries, are affected.
    """

    text: str
    fatal: bool = False
    rotation: bool = False


@dataclass(slots=True)
class Probe:
    """What one layer showed: its call as it is, and its queries and keys without rotation."""

    query: Tensor
    key: Tensor
    out: Tensor
    cos: Tensor | None
    sin: Tensor | None
    problem: Problem | None
    source: int | None
    head_dim: int
    unrotated: tuple[Tensor, Tensor] | None = None


def run_calibration(stack: nn.Module, plan: StackPlan) -> dict[int, Probe]:
    """Run the stack twice on a few random tokens; hooks are installed, random state stays as it is.

    The second run replays the attention outputs of the first, so that each layer sees the same
    input twice.
    """
    probes: dict[int, Probe] = {}

    def record(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        context: LayerContext,
        softmax_scale: float,
        options: dict[str, Any],
    ) -> Tensor:
        index = context.plan.index
        if plan.identity:
            probes[index].unrotated = (query.detach(), key.detach())
            return probes[index].out
        keys = read_mask(mask)
        problem = _problem(context.plan, query, key, value, keys, options)
        out = dense_attention(module, query, key, value, keys, softmax_scale, **options)
        probes[index] = Probe(
            query.detach(),
            key.detach(),
            out,
            context.cos,
            context.sin,
            problem,
            _source(context, key),
            stored_head_dim(key.shape[-1], value.shape[-1]) or 0,
        )
        return out

    config: Any = stack.config
    device = execution_device(stack)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (1, NUM_TOKENS), generator=generator)
    positions = torch.arange(FIRST_POSITION, FIRST_POSITION + NUM_TOKENS)[None]
    positions = positions.to(device)
    training = [module for module in stack.modules() if module.training]
    plan.recorder = record
    try:
        stack.eval()  # dropout would make the two runs differ
        with torch.no_grad():
            for plan.identity in (False, True):
                stack(
                    input_ids=tokens.to(device),
                    position_ids=positions + SHIFT * plan.identity,
                    past_key_values=DynamicCache(config=config),
                    use_cache=True,
                )
    finally:
        for module in training:
            module.training = True
        plan.identity, plan.recorder = False, None
    return probes


def _source(context: LayerContext, key: Tensor) -> int | None:
    """The cache layer that gave ``key``: the same object, the layer's own before others."""
    layers = context.cache.layers
    own = context.plan.index
    for index in (own, *range(len(layers))):
        if index < len(layers) and getattr(layers[index], "keys", None) is key:
            return index
    return None


def _problem(
    plan: LayerPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: KeyRange | Tensor,
    options: dict[str, Any],
) -> Problem | None:
    """Why a layer cannot select, as far as one call tells; None if it can, or need not."""
    window = options.get("sliding_window")
    if plan.reason is not None:
        if plan.slides and window is None and isinstance(keys, KeyRange):
            return Problem("it does not tell its attention function the sliding window", fatal=True)
        return None
    if isinstance(keys, Tensor):
        return Problem(
            "its attention pattern is neither causal nor sliding (chunked, bidirectional, ...)"
        )
    if window is not None:
        return Problem(f"it slides over {window} tokens, but the configuration does not say so")
    if stored_head_dim(key.shape[-1], value.shape[-1]) is None:
        largest = max(key.shape[-1], value.shape[-1])
        return Problem(f"head_dim {largest} is more than {max(HEAD_DIMS)}")
    if key.dtype not in STORAGE_DTYPES or query.dtype != key.dtype:
        return Problem(f"dtype {key.dtype} is not float32, float16 or bfloat16")
    return None


def fit_layers(stack: nn.Module, plan: StackPlan, probes: dict[int, Probe]) -> dict[int, Problem]:
    """Give layers their layout and frozen frequencies; returns why layers cannot select, by index.

    Must follow `run_calibration` at once: some rotary modules change their frequencies with the
    positions they see.
    """
    rotary = getattr(stack, "rotary_emb", None)
    frozen: dict[str | None, Frequencies | None] = {}
    problems: dict[int, Problem] = {}
    for layer in plan.layers:
        probe = probes.get(layer.index)
        if probe is None:
            problems[layer.index] = Problem(
                "its attention does not call the registered function", fatal=True
            )
            continue
        layer.source = probe.source
        layer.head_dim, layer.itemsize = probe.head_dim, probe.key.element_size()
        layer.num_q_heads, layer.num_kv_heads = probe.query.shape[1], probe.key.shape[1]
        layer.dtype = probe.key.dtype
        if layer.layer_type not in frozen:
            frozen[layer.layer_type] = freeze_frequencies(rotary, layer.layer_type)
        problem = probe.problem or _fit_layer(layer, probe, frozen[layer.layer_type])
        if problem is not None:
            problems[layer.index] = problem
    return problems


def _fit_layer(layer: LayerPlan, probe: Probe, frequencies: Frequencies | None) -> Problem | None:
    cos, sin = probe.cos, probe.sin
    assert probe.unrotated is not None
    if cos is None or sin is None:
        shifted = zip((probe.query, probe.key), probe.unrotated)
        if all(torch.equal(first, second) for first, second in shifted):
            return None  # the layer knows no positions
        text = "position_embeddings are not passed by keyword as a pair (cos, sin)"
        return Problem(text, rotation=True)
    layer.layout, layer.fit_error = fit_layout((probe.query, probe.key), probe.unrotated, cos, sin)
    if layer.fit_error > FIT_TOLERANCE:
        layer.layout = NO_ROPE
        return Problem(f"no RoPE layout fits (relative error {layer.fit_error:.2g})", rotation=True)
    if layer.layout.num_pairs == 0:
        return None
    if frequencies is None:
        return Problem("the stack has no rotary_emb with inv_freq", rotation=True)
    positions = torch.arange(FIRST_POSITION, FIRST_POSITION + cos.shape[1], device=cos.device)
    if not frequencies_match(frequencies, layer.layout, cos, positions):
        return Problem("its cos is not attention_scaling * cos(position * inv_freq)", rotation=True)
    layer.frequencies = frequencies
    return None
