"""Which layers' states share a StackState: those of one attached model on one cache."""

from __future__ import annotations

import threading
from typing import Any

from kvselect.integrations.hf.attached_layer import AttachedLayer
from kvselect.integrations.hf.plan import LayerPlan
from kvselect.policies.base import PolicyState
from kvselect.policies.stack_state import StackState


def join_stack(state: PolicyState, plan: LayerPlan, cache: Any) -> None:
    """Have a new state share what flows between the model's selecting layers on this cache.

    Parameters
    ----------
    cache : Cache or None
        All cache layers; None: the call has no cache, and what flows lasts one forward pass of one
        thread.
    """
    selecting = [layer for layer in plan.stack.layers if layer.selects]
    state.layer = selecting.index(plan)
    settings = plan.stack.policy
    if cache is None:
        passes, thread = plan.stack.cacheless, threading.get_ident()
        if state.layer == 0 or thread not in passes:
            passes[thread] = StackState(len(selecting), settings)
        state.stack = passes[thread]
        if state.layer == len(selecting) - 1:
            del passes[thread]
        return
    for layer in cache.layers:
        for stack in layer.stacks() if isinstance(layer, AttachedLayer) else ():
            if stack.settings == settings and stack.num_layers == len(selecting):
                state.stack = stack
                return
    state.stack = StackState(len(selecting), settings)
