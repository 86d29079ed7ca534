"""How much memory a run takes, estimated before it begins, and how much there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kvselect.machine import free_bytes
from kvselect.policies.base import Policy
from kvselect.sketch import bytes_per_token

ROOM_TO_GROW = 1.5  # a cache that grows holds its keys or its values twice for a moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes beyond the weights.

    Attributes
    ----------
    cache_bytes : int
        Keys, values, sketches and what methods remember, of all policies at once, with room to
        grow.
    activation_bytes : int
        Of one forward pass over a whole context, and what the hungriest method takes beside it for
        a moment.
    """

    cache_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.cache_bytes + self.activation_bytes


def estimate(model: Any, policies: Iterable[Policy], num_tokens: int) -> Estimate:
    """For contexts of `num_tokens`, read in one forward pass each.

    Notes
    -----
    Counts keys and values of every layer, so it is an upper bound for models whose layers share
    caches, compress them, or slide.
    """
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    itemsize = model.dtype.itemsize
    cache, momentary = 0.0, 0
    for policy in policies:
        per_layer, taken = layer_bytes(
            policy,
            num_tokens,
            num_q_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            itemsize=itemsize,
        )
        cache += ROOM_TO_GROW * per_layer * config.num_hidden_layers
        momentary = max(momentary, taken)
    channels = 4 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 0)
    channels += 3 * (num_heads + 2 * num_kv_heads) * head_dim
    activations = int(channels * itemsize * num_tokens) + momentary
    return Estimate(cache_bytes=int(cache), activation_bytes=activations)


def layer_bytes(
    policy: Policy,
    num_tokens: int,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
) -> tuple[float, int]:
    """What a layer holds of a row of ``num_tokens``: keys, values, sketch, what the policy
    remembers; and what the policy takes beside that for a moment."""
    per_head = 2.0 * head_dim * itemsize
    if policy.required_sketch is not None:
        per_head += bytes_per_token(policy.required_sketch, head_dim)
    remembered, momentary = policy.extra_bytes(
        num_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        itemsize=itemsize,
    )
    return per_head * num_kv_heads * num_tokens + remembered, momentary


def available_bytes(device: torch.device) -> int | None:
    """Memory that a process may still take there; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes()


def in_units(num_bytes: float) -> str:
    """Such as "3.2 GB" or "41 MB"."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
