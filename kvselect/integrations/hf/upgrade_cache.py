"""The cache of a model becomes one of our layers, in place."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from kvselect.checks import require
from kvselect.integrations.hf.attached_layer import LatentLayer
from kvselect.integrations.hf.cache_layer import KVSelectLayer
from kvselect.integrations.hf.evicting_layer import KVSelectEvictingLayer
from kvselect.integrations.hf.plan import StackPlan, Tier
from kvselect.integrations.hf.static_layer import KVSelectStaticLayer
from kvselect.integrations.hf.tiered_layer import KVSelectTieredLayer

NO_TIERS: Mapping[int, Tier] = MappingProxyType({})


def upgrade_for(plan: StackPlan, cache: Cache, *, several_tokens: bool = True) -> None:
    """`upgrade_cache` with what a plan says of its stack's layers."""
    upgrade_cache(
        cache,
        plan.sketches,
        plan.foreign_layers,
        plan.latent_layers,
        plan.tiers,
        plan.evicting_layers,
        several_tokens=several_tokens,
    )


def empty_cache(plan: StackPlan) -> Cache:
    """The growing cache that a stack makes for itself, with our layers."""
    stack = plan.owner()
    assert stack is not None  # who calls holds it
    config: Any = stack.config
    cache = DynamicCache(config=config)
    upgrade_for(plan, cache)
    return cache


def upgrade_cache(
    cache: Cache,
    sketches: list[str | None],
    foreign_layers: frozenset[int] = frozenset(),
    latent_layers: frozenset[int] = frozenset(),
    tiers: Mapping[int, Tier] = NO_TIERS,
    evicting_layers: frozenset[int] = frozenset(),
    *,
    several_tokens: bool = True,
) -> None:
    """Replace the empty plain layers of a cache by ours, in place.

    `KVSelectLayer` where they grow, `KVSelectStaticLayer` where their room is fixed.

    Parameters
    ----------
    cache : Cache
        Its type stays, so that every check in ``generate`` passes. Layers of any other type, and
        filled ones, stay as they are.
    sketches : list of str or None
        Sketch format of each layer of the decoder stack.
    foreign_layers : frozenset of int
        Layers that `KVCache` cannot hold; they stay as they are.
    latent_layers : frozenset of int
        Layers whose attention makes keys and values of what they hold: they become `LatentLayer`.
    tiers : mapping
        By layer, for those that become `KVSelectTieredLayer`.
    evicting_layers : frozenset of int
        Layers that become `KVSelectEvictingLayer`.
    several_tokens : bool
        Of the coming call. Only then is a layer of fixed room asked whether it is empty: the answer
        lies on its device, and a decode step must not wait for it.

    Raises
    ------
    ValueError
        If the cache moves its layers to the CPU by itself, or one of fixed room should be tiered.
    """
    require(not cache.offloading, "past_key_values.offloading", True, "False")
    layers = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:
        # Layers of a cache made without a config appear during the forward pass; the hooks need
        # them before.
        layers.extend(DynamicLayer() for _ in sketches[len(layers) :])
    for index, sketch in enumerate(sketches[: len(layers)]):
        layer = layers[index]
        if index in foreign_layers or type(layer) not in (DynamicLayer, StaticLayer):
            continue
        if layer.is_initialized and not (several_tokens and _is_allocated_early(layer)):
            continue
        latent, tier = index in latent_layers, tiers.get(index)
        if type(layer) is DynamicLayer:
            if latent:
                layers[index] = LatentLayer()
            elif index in evicting_layers:
                layers[index] = KVSelectEvictingLayer()
            elif tier is None:
                layers[index] = KVSelectLayer(sketch)
            else:
                layers[index] = KVSelectTieredLayer(sketch, tier)
        elif not latent:
            allowed = (
                "a cache of dynamic layers with a policy that evicts (its rows differ in length)"
            )
            got = f"a {type(layer).__name__}"
            require(index not in evicting_layers, "past_key_values", got, allowed)
            allowed = "a cache of dynamic layers with keep='cpu' (what moves cannot be captured)"
            require(tier is None, "past_key_values", f"a {type(layer).__name__}", allowed)
            layers[index] = KVSelectStaticLayer(layer.max_cache_len, sketch)


def _is_allocated_early(layer: DynamicLayer | StaticLayer) -> bool:
    """Whether a layer of fixed room has its tensors, but no token: generate makes such ones before
    it prefills in chunks, and a reset leaves them."""
    if not isinstance(layer, StaticLayer) or torch.compiler.is_compiling():
        return False
    return int(layer.get_seq_length()) == 0
