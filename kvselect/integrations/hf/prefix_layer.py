"""A cache layer whose rows begin with prefixes that are stored once for all who share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvselect.checks import require
from kvselect.integrations.hf.attached_layer import RopeState
from kvselect.integrations.hf.cache_layer import KVSelectLayer
from kvselect.prefix_groups import PrefixGroups


class KVSelectPrefixLayer(KVSelectLayer):
    """One layer's keys and values: shared prefixes, and what every row has after its own.

    A row is laid out as ``[nothing, prefix, padding, its own tokens]``: prefixes end where the
    longest one does. ``keys`` and ``values`` show what comes after that place, as a sliding layer
    shows only what it keeps; the attention of an attached model sees the rest as well.

    Parameters
    ----------
    groups : PrefixGroups
        One per layer: its prefixes' keys, rotated as the model does.
    """

    def __init__(self, groups: PrefixGroups) -> None:
        super().__init__(None)
        self.groups = groups
        self.rope_state = "rotated"

    def __repr__(self) -> str:
        return (
            f"KVSelectPrefixLayer(prefixes={self.groups.num_prefixes}, rows={self.groups.batch}, "
            f"tokens={self.get_seq_length()})"
        )

    @property
    def num_own_tokens(self) -> int:
        """Tokens that every row stores for itself (padding included)."""
        return 0 if self.cache is None else self.cache.max_seqlen

    def get_seq_length(self) -> int:
        """Tokens of a row (padding included): the longest prefix, and what follows."""
        return self.groups.num_tokens + self.num_own_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next `update` will show, and the position of the first."""
        return self.num_own_tokens + query_length, self.groups.num_tokens

    def announce(self, rope_state: RopeState, sketch: str | None, starts: Tensor | None) -> None:
        """As `AttachedLayer`; a row's own tokens are attended to in full and need no sketch."""
        super().announce(rope_state, None, starts)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to the rows' own tokens; return views of these.

        Raises
        ------
        ValueError
            If the caller is not an attached model, which alone attends to the prefixes.
        """
        if self._announced is None:
            allowed = "a call of an attached model: only it attends to the shared prefixes"
            require(False, "cache layer", "a KVSelectPrefixLayer", allowed)
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens of every row, which must be its own.

        Raises
        ------
        ValueError
            For a positive number, and for one that reaches into the prefixes.
        """
        allowed = f"at least -{self.num_own_tokens} (the rows' own tokens; prefixes stay)"
        require(int(tokens_to_remove) >= -self.num_own_tokens, "crop", tokens_to_remove, allowed)
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times in a row."""
        self._take_rows(torch.arange(self.groups.batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """Not supported: what would be left is a cache without its prefixes."""
        allowed = "crop(-n), which drops the rows' own tokens and keeps the prefixes"
        require(False, "cache layer", "reset()", allowed)

    def _take_rows(self, index: Tensor) -> None:
        self.groups.take_rows(index.tolist())
        if self.num_own_tokens == 0 and self.cache is not None:  # of another number of rows
            self._past_versions = self.version + 1
            self.cache = self.keys = self.values = self._stores = None
            self._states.clear()
            self.is_initialized = False
        super()._take_rows(index)


def require_whole_prefixes(layer: KVSelectPrefixLayer, call: dict[str, Any]) -> None:
    """Refuse calls on a cache with shared prefixes whose rows, mask or positions are not theirs.

    Off the CPU only calls of several tokens are looked at closely: a decode step reads nothing
    back.

    Parameters
    ----------
    layer : KVSelectPrefixLayer
        Any one of the cache's.
    call : dict
        The decoder stack's arguments by name.

    Raises
    ------
    ValueError
        If the rows are not those that share the prefixes, the mask hides a part of a prefix, shows
        what is none or has holes in a row's own tokens, or the positions skip something.
    """
    tokens, longest = layer.groups.row_tokens, layer.groups.num_tokens
    given = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
    batch, seqlen_q = given.shape[:2]
    allowed = (
        f"{len(tokens)} (rows that share the prefixes; for beams and several returns call "
        "past_key_values.batch_repeat_interleave first)"
    )
    require(batch == len(tokens), "batch", batch, allowed)
    mask, position_ids = call.get("attention_mask"), call.get("position_ids")
    width = layer.get_seq_length() + seqlen_q
    if mask is None:
        allowed = "the mask that share_prefixes gave: its prefixes differ in length"
        require(min(tokens, default=longest) == longest, "attention_mask", None, allowed)
        mask = torch.ones(batch, width, dtype=torch.bool, device=given.device)
    allowed = "a 2-D padding mask, as share_prefixes gave it"
    got = f"a {type(mask).__name__}"
    require(isinstance(mask, Tensor) and mask.ndim == 2, "attention_mask", got, allowed)
    allowed = f"{width}: those of the cache (past_key_values.crop goes back) and of the call"
    require(mask.shape[1] == width, "columns of attention_mask", mask.shape[1], allowed)
    if mask.device.type != "cpu" and seqlen_q == 1:
        return
    real = mask.bool()
    place = torch.arange(longest, device=mask.device)
    whole = place >= longest - torch.tensor(tokens, device=mask.device)[:, None]
    allowed = f"1 in the columns of every prefix, which end before {longest}, and 0 before them"
    same = torch.equal(real[:, :longest], whole)
    require(same, "attention_mask", "one that cuts or lengthens a shared prefix", allowed)
    own = real[:, longest:]
    holes = bool(((own.cumsum(-1) > 0) & ~own).any())
    allowed = "left padding between a prefix and a row's own tokens"
    require(not holes, "attention_mask", "holes in the padding", allowed)
    if position_ids is None and bool(real.all()):
        return  # the model counts places by itself
    allowed = (
        "positions that count real tokens: generate makes them from the mask, but assisted "
        "generation sends a filled cache its whole prompt once more"
    )
    require(position_ids is not None, "position_ids", None, allowed)
    assert isinstance(position_ids, Tensor)
    counted = (real.cumsum(-1) - 1)[:, -seqlen_q:]
    wrong = (position_ids != counted) & real[:, -seqlen_q:]
    require(not bool(wrong.any()), "position_ids", "others", allowed)
