"""What every cache layer of an attached model remembers, and the layer that keeps MLA's latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.crossovers import Crossover
from kvselect.policies.base import Policy, PolicyState
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.policies.stack_state import StackState

RopeState = Literal["rotated", "unrotated"]


class _KeptState(NamedTuple):
    """What a policy remembers, and for which settings."""

    state: PolicyState
    policy: Policy
    crossovers: Mapping[int, Crossover] | None


class AttachedLayer(CacheLayerMixin):
    """A layer that knows how its keys are rotated, which count, what policies remember of them.

    Attributes
    ----------
    cache : KVCache or None
        None until the first `update`, and where transformers stores for itself.
    rope_state : {"rotated", "unrotated"} or None
        How the stored keys are; set by the first append.
    validity : Tensor, [batch, tokens], bool, or None
        Which keys count, where the padding of the last call with several queries had holes; younger
        tokens count.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.cache: KVCache | None = None
        self._states: dict[int, _KeptState] = {}  # by the layer that reads the keys
        self.rope_state: RopeState | None = None
        self.validity: Tensor | None = None
        self._announced: RopeState | None = None

    @property
    def is_filled(self) -> bool:
        """Whether it holds tokens; asks no device."""
        return bool(self.get_seq_length() > 0)

    def announce(self, rope_state: RopeState, sketch: str | None, starts: Tensor | None) -> None:
        """Say what the coming `update` brings: called by the attention hook of an attached model.

        Parameters
        ----------
        rope_state : {"rotated", "unrotated"}
        sketch : {"int4", "int8", None}
            Format that the attached policy wants.
        starts : Tensor, [batch], int32, or None
            First real token of each row; None: leave them as they are.

        Raises
        ------
        ValueError
            If the layer holds keys of the other kind.
        """
        self._require_rope_state(rope_state)
        self._announced = rope_state

    def withdraw(self) -> None:
        """Take back what was announced: the forward pass that it was for failed."""
        self._announced = None

    def state(
        self,
        reader: int,
        policy: Policy,
        statistics: tuple[PhaseStatistics, PhaseStatistics],
        crossovers: Mapping[int, Crossover] | None = None,
    ) -> PolicyState:
        """What ``policy`` remembers of this layer's tokens for the attention layer ``reader``.

        Made anew for another policy, or for other ``crossovers`` (as `Policy.new_state` takes
        them). Several layers may read the keys of one (KV sharing), each with queries of its own.
        """
        assert self.cache is not None
        kept = self._states.get(reader)
        if (
            kept is None
            or kept.policy is not policy
            or (kept.crossovers is not crossovers and kept.crossovers != crossovers)
        ):
            kept = _KeptState(policy.new_state(self.cache, crossovers), policy, crossovers)
            self._states[reader] = kept
        kept.state.prefill, kept.state.decode = statistics
        return kept.state

    def stacks(self) -> list[StackState]:
        """What layers share that read from this one, as far as they do."""
        return [kept.state.stack for kept in self._states.values() if kept.state.stack is not None]

    def renew_states(self) -> None:
        """States of another number of rows; what layers share follows the rows by itself."""
        assert self.cache is not None
        for reader, kept in self._states.items():
            fresh = kept.policy.new_state(self.cache, kept.crossovers)
            fresh.stack, fresh.layer = kept.state.stack, kept.state.layer
            fresh.take_over(kept.state)
            self._states[reader] = kept._replace(state=fresh)

    def validity_of(self, seqlen_k: int) -> Tensor | None:
        """`validity` over ``seqlen_k`` keys: tokens after the last call with holes all count."""
        if self.validity is None:
            return None
        return torch.nn.functional.pad(
            self.validity, (0, seqlen_k - self.validity.shape[1]), value=True
        )

    def _take_announced(self) -> None:
        """Before an append: the kind of its keys.

        Raises
        ------
        ValueError
            If the layer holds un-rotated keys and the caller is not an attached model: a model that
            rotates its queries would meet them without their positions.
        """
        announced, self._announced = self._announced or "rotated", None
        self._require_rope_state(announced)
        self.rope_state = announced

    def _require_rope_state(self, rope_state: RopeState) -> None:
        if self.rope_state in (None, rope_state) or self.get_seq_length() == 0:
            return
        got = f"{self.get_seq_length()} {self.rope_state} keys"
        allowed = (
            f"{rope_state} keys or an empty cache (positions='compact' stores keys un-rotated)"
        )
        require(False, "cache layer", got, allowed)

    def _forget(self) -> None:
        self.rope_state = self.validity = self._announced = None


class LatentLayer(AttachedLayer, DynamicLayer):
    """Latents from which an attention module makes its keys and values anew at every call (MLA).

    transformers' own storage; only what the attached model must know of it is added.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As DynamicLayer; see `AttachedLayer` for what it refuses."""
        self._take_announced()
        stored: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return stored

    def crop(self, tokens_to_remove: int) -> None:
        """As DynamicLayer."""
        super().crop(int(tokens_to_remove))
        if self.validity is not None:
            self.validity = self.validity[:, : self.get_seq_length()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become ``rows[beam_idx]``."""
        super().reorder_cache(beam_idx)
        self._take_validity(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times in a row."""
        super().batch_repeat_interleave(repeats)
        if self.validity is not None:
            self.validity = self.validity.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        super().batch_select_indices(indices)
        self._take_validity(indices)

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None  # older versions would only zero what they hold
        self.is_initialized = False
        self._forget()

    def _take_validity(self, indices: Tensor) -> None:
        if self.validity is not None:
            self.validity = self.validity[indices.to(self.validity.device)]
