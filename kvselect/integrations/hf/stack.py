"""Reading a transformers model: its decoder stack, attention modules, layers meant to select."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvselect.checks import UnsupportedModelError
from kvselect.integrations.hf.plan import LayerPlan, StackPlan


def find_stack(model: PreTrainedModel) -> nn.Module:
    """The module that owns the decoder's ``layers`` and runs under the text configuration.

    Raises
    ------
    UnsupportedModelError
        If there is none (GPT-2 and its like call them ``h``), the model has an encoder, or runs hub
        kernels.
    """
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name}: got an encoder-decoder model, allowed: decoder-only models"
        )
    if getattr(model, "use_kernels", False):
        raise UnsupportedModelError(
            f"{name}.use_kernels: got True, allowed: False (hub kernels may rotate for themselves)"
        )
    text_config = config.get_text_config(decoder=True)
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and getattr(module, "config", None) is text_config:
            return module
    raise UnsupportedModelError(
        f"{name}: got no decoder stack, allowed: a module with `layers` and the model's text "
        "configuration (Llama, Qwen2, Qwen3, Mistral, ...)"
    )


def execution_device(stack: nn.Module) -> torch.device:
    """Where the stack computes: where its weights lie, or where accelerate brings them from."""
    for parameter in stack.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    for module in stack.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("cpu")


def attention_modules(stack: nn.Module) -> list[nn.Module]:
    """The self-attention module of every layer that has one, in the order of the layers.

    Raises
    ------
    UnsupportedModelError
        If no layer has one.
    """
    found = []
    layers: Any = stack.layers
    for layer in layers:
        for module in layer.modules():
            if type(module).__name__.endswith("Attention") and isinstance(
                getattr(module, "layer_idx", None), int
            ):
                found.append(module)
                break
    if not found:
        raise UnsupportedModelError(
            f"{type(stack).__name__}: got no attention modules, allowed: layers with a module "
            "...Attention that has a layer_idx"
        )
    return found


def require_masks_left_alone(model: PreTrainedModel, modules: list[nn.Module]) -> None:
    """Refuse attention that chooses keys for itself and reads its mask to do so.

    Raises
    ------
    UnsupportedModelError
        Naming every such layer.
    """
    indexed: list[Any] = [
        module.layer_idx
        for module in modules
        if any(type(inner).__name__.endswith("Indexer") for inner in module.modules())
    ]
    if indexed:
        lines = "".join(
            f"\n  layer {index}: an indexer of its own picks the keys and reads the mask (DSA)"
            for index in indexed
        )
        raise UnsupportedModelError(
            f"{type(model).__name__}: got layers that select for themselves, allowed: attention "
            f"that leaves the mask to the registered functions{lines}"
        )


def plan_layer(module: nn.Module, config: Any, plan: StackPlan) -> LayerPlan:
    """The plan before calibration: by design a layer slides, is excluded by the policy, or selects.

    A layer of any other type than full and sliding attention is meant to select: calibration finds
    out that it cannot.
    """
    index: Any = module.layer_idx
    layer = LayerPlan(weakref.ref(module), plan, index)
    layer_types = getattr(config, "layer_types", None)
    layer.layer_type = layer_types[index] if layer_types else None
    window = getattr(config, "sliding_window", None)
    if layer.layer_type == "sliding_attention" or (layer.layer_type is None and window is not None):
        layer.slides, layer.reason = True, f"sliding window of {window} tokens"
    elif index in plan.policy.dense_layers:
        layer.reason = "in policy.dense_layers"
    return layer


def implementation_keys(model: PreTrainedModel, stack_config: Any) -> dict[str, Any]:
    """The stack's attention implementation, as ``set_attn_implementation`` takes it for no other.

    The key ``""`` is the top configuration, others name sub-configurations.
    """

    def search(config: Any) -> Any:
        if config is stack_config:
            return stack_config._attn_implementation
        for key in config.sub_configs:
            inner = getattr(config, key, None)
            below = search(inner) if inner is not None else None
            if below is not None:
                return {key: below}
        return None

    keys = search(model.config)
    if isinstance(keys, dict):
        return keys
    return {"": stack_config._attn_implementation}


def trained_length(config: Any) -> int:
    """Positions that the model was trained on, as its frozen frequencies are [tokens].

    ``max_position_embeddings``; with longrope the length of its short state, which compact
    positions stay in.

    Raises
    ------
    UnsupportedModelError
        If the configuration does not say.
    """
    length = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one per layer type.
    sets = [parameters] if "rope_type" in parameters else list(parameters.values())
    for rope in sets:
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            short = getattr(config, "original_max_position_embeddings", None)
            length = rope.get("original_max_position_embeddings") or short or length
    if not isinstance(length, int):
        name = type(config).__name__
        raise UnsupportedModelError(
            f"{name}.max_position_embeddings: got {length}, allowed: an int"
        )
    return length
