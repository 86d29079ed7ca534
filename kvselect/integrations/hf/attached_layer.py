"""What every cache layer of an attached model remembers, and the layer that keeps MLA's latents."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvselect.checks import require

RopeState = Literal["rotated", "unrotated"]


class AttachedLayer(DynamicLayer):
    """A layer that knows how its keys are rotated and which of them count.

    Attributes
    ----------
    rope_state : {"rotated", "unrotated"} or None
        How the stored keys are; set by the first append.
    validity : Tensor, [batch, tokens], bool, or None
        Which keys count, where the padding of the last call with several queries had holes; younger
        tokens count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.rope_state: RopeState | None = None
        self.validity: Tensor | None = None
        self._announced: RopeState | None = None

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


class LatentLayer(AttachedLayer):
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
        super().reset()
        self._forget()

    def _take_validity(self, indices: Tensor) -> None:
        if self.validity is not None:
            self.validity = self.validity[indices.to(self.validity.device)]
