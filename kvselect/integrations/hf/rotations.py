"""The rotation of every selecting layer of an attached model, for those who look at its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from kvselect.rope import Rope

if TYPE_CHECKING:
    from kvselect.integrations.hf.attach import Handle

__all__ = ["frequencies_change", "frequencies_hold", "layer_rotations"]

# Rotary modules of these types change their frequencies with the length of the context.
CHANGING_ROPE_TYPES = ("dynamic", "longrope")


def layer_rotations(handle: Handle) -> dict[int, Rope | None]:
    """By the index of the layer; None: the layer knows no positions.

    Each has a table of one position and the frequencies that `Rope.rotate_at` needs.
    """
    cpu = torch.device("cpu")
    return {
        layer.index: None
        if layer.frequencies is None
        else layer.frequencies.rope(layer.layout, 1, cpu)
        for layer in handle._plan.layers
        if layer.selects
    }


def frequencies_hold(handle: Handle, num_tokens: int) -> bool:
    """Whether the model rotates contexts of ``num_tokens`` with the frequencies of short ones."""
    return num_tokens <= handle._plan.trained_length or not frequencies_change(handle.model)


def frequencies_change(model: PreTrainedModel) -> bool:
    """Whether contexts beyond the trained length are rotated otherwise than short ones."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters] if "rope_type" in parameters else list(parameters.values())
    types = {one.get("rope_type") for one in sets if isinstance(one, dict)}
    return bool(types & set(CHANGING_ROPE_TYPES))
