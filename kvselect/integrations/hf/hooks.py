"""The two hooks of an attached model: one on the decoder stack, one on every attention module.

They are plain functions that find their plan in ``module.__dict__``: a bound method or a closure
would carry the original's plan into a copy of the model unnoticed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from kvselect.checks import require
from kvselect.integrations.hf.attached_layer import AttachedLayer
from kvselect.integrations.hf.masks import KeyRange
from kvselect.integrations.hf.plan import (
    NAME,
    PLAN_KEY,
    LayerContext,
    LayerPlan,
    StackPlan,
    plan_of,
)
from kvselect.integrations.hf.prefix_attention import require_shareable
from kvselect.integrations.hf.prefix_layer import KVSelectPrefixLayer, require_whole_prefixes
from kvselect.integrations.hf.upgrade_cache import empty_cache, upgrade_for


def stack_pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the decoder stack: make a missing cache, upgrade its empty layers, refuse.

    Raises
    ------
    ValueError
        For ``output_attentions=True`` (the weights are never formed; transformers would return an
        empty tuple without a word), for caches that offload their layers, and if somebody changed
        the attention implementation since `attach` (un-rotated keys would meet it).
    """
    plan: StackPlan = plan_of(module)
    plan.require_own_thread()
    if plan.mode != "select":
        return None
    require(not kwargs.get("output_attentions"), "output_attentions", True, "False")
    config: Any = module.config
    implementation = config._attn_implementation
    allowed = f"{NAME!r} while attached; call handle.detach() first"
    require(implementation == NAME, "attn_implementation", implementation, allowed)
    _require_one_axis(plan, kwargs.get("position_ids"))
    names = plan.arguments
    place = names.index("past_key_values") if "past_key_values" in names else len(names)
    positional = len(args) > place
    cache = args[place] if positional else kwargs.get("past_key_values")
    if isinstance(cache, Cache):
        if cache.layers and isinstance(cache.layers[0], KVSelectPrefixLayer):
            require_shareable(plan)
            require_whole_prefixes(cache.layers[0], dict(zip(names, args)) | kwargs)
        upgrade_for(plan, cache, several_tokens=_num_tokens(args, kwargs) != 1)
        return None
    use_cache = kwargs.get("use_cache")
    if (
        cache is not None
        or use_cache is False
        or (use_cache is None and not getattr(config, "use_cache", True))
    ):
        return None
    cache = empty_cache(plan)
    if positional:
        return (*args[:place], cache, *args[place + 1 :]), kwargs
    return args, {**kwargs, "past_key_values": cache}


def _num_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Of each row of the call; None: not known."""
    given = kwargs.get("input_ids", args[0] if args else None)
    given = kwargs.get("inputs_embeds") if given is None else given
    return given.shape[1] if isinstance(given, Tensor) and given.ndim >= 2 else None


def _require_one_axis(plan: StackPlan, position_ids: Tensor | None) -> None:
    """Compact positions count tokens one after another; those of images differ by axis (M-RoPE)."""
    if (
        not plan.policy.caches_unrotated
        or position_ids is None
        or position_ids.ndim < 3
        or position_ids.shape[-1] == 1
    ):
        return
    axes = position_ids[-3:]  # a first row of text positions may come before the three axes
    allowed = "the same on every axis (positions='compact': text only, no images)"
    require(bool((axes == axes[:1]).all()), "position_ids", "axes that differ", allowed)


def attention_pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before an attention module: hand cache layer, cos, sin and plan to the attention function.

    With compact positions a selecting layer gets cos = 1 and sin = 0, so that its keys are cached
    un-rotated.
    """
    plan: LayerPlan = plan_of(module)
    stack = plan.stack
    stack.require_own_thread()
    if stack.mode == "stock":
        return None
    rotation = kwargs.get("position_embeddings")
    cos, sin = rotation if isinstance(rotation, tuple) and len(rotation) == 2 else (None, None)
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    place = plan.index if plan.source is None else plan.source
    layer = cache.layers[place] if cache is not None and place < len(cache.layers) else None
    if stack.mode == "calibrate":
        rotates_itself = stack.identity
    else:
        rotates_itself = plan.rotates_itself
        _announce(plan, layer, args, kwargs, rotates_itself)
    kwargs["kvselect"] = LayerContext(layer, cos, sin, plan, cache)
    if rotates_itself and cos is not None and sin is not None:
        kwargs["position_embeddings"] = stack.no_rotation(cos, sin)
    return args, kwargs


def _announce(
    plan: LayerPlan, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rotates_itself: bool
) -> None:
    """Tell the cache layer what comes; raise, before anything is stored, for what cannot be."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        plan.cache_class = "none" if layer is None else type(layer).__name__
    ours = isinstance(layer, AttachedLayer)
    if not ours and not rotates_itself:
        return
    keys = plan.stack.mask(kwargs.get("attention_mask"))
    if rotates_itself:
        _require_compact(plan, layer, keys, kwargs)
    if isinstance(layer, AttachedLayer) and plan.source in (None, plan.index):
        if compiling:  # nothing that is announced may change once a graph is captured
            return
        starts = keys.starts if isinstance(keys, KeyRange) else None
        if starts is not None and starts.device.type != "cpu" and layer.is_filled:
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if hidden_states.shape[1] == 1:
                starts = None  # a decode step reads nothing back; padding is known since prefill
        sketch = plan.stack.sketches[plan.index]
        layer.announce("unrotated" if rotates_itself else "rotated", sketch, starts)
        plan.stack.announced.add(layer)


def _require_compact(
    plan: LayerPlan, layer: Any, keys: KeyRange | Tensor, kwargs: dict[str, Any]
) -> None:
    if not isinstance(keys, KeyRange):
        allowed = "a 2-D padding mask or None (positions='compact')"
        require(False, "attention_mask", "a 4-D mask", allowed)
    if layer is not None and not isinstance(layer, AttachedLayer):
        allowed = "a cache of dynamic layers, empty or filled by this model (positions='compact')"
        require(False, "past_key_values", f"a {plan.cache_class}", allowed)
    if not isinstance(kwargs.get("position_embeddings"), tuple):
        require(False, "position_embeddings", None, "a pair (cos, sin) by keyword")


def install_hooks(
    stack: nn.Module, attention_modules: list[nn.Module], plan: StackPlan
) -> list[RemovableHandle]:
    """Put the plans into the modules and register both hooks; the handles undo the latter."""
    names = list(inspect.signature(stack.forward).parameters)
    plan.arguments = tuple(names)
    stack.__dict__[PLAN_KEY] = plan
    handles = [stack.register_forward_pre_hook(stack_pre_hook, with_kwargs=True)]
    for module, layer_plan in zip(attention_modules, plan.layers):
        module.__dict__[PLAN_KEY] = layer_plan
        handles.append(module.register_forward_pre_hook(attention_pre_hook, with_kwargs=True))
    return handles


def remove_copied_hooks(model: nn.Module) -> StackPlan | None:
    """Clean a copy of an attached model; returns the original's plan, or None if it is no copy."""
    found: StackPlan | None = None
    for module in model.modules():
        plan = module.__dict__.get(PLAN_KEY)
        if plan is None or plan.owner() is module:
            continue
        if isinstance(plan, StackPlan):
            found = plan
        del module.__dict__[PLAN_KEY]
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is stack_pre_hook or hook is attention_pre_hook:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return found
