"""LruSlots: which tokens of a list have a slot; the least recently listed one makes room."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.checks import require

__all__ = ["LruSlots", "Taken"]


class Taken(NamedTuple):
    """Where the tokens of a step are."""

    slots: Tensor  # [num_lists, width] int64, -1 where none was wanted
    place: Tensor  # [num_taken] int64, entries of the flattened tokens that had no slot before
    num_found: int


class LruSlots:
    """Slots of each list, and the tokens in them; integers on the host, no tokens themselves.

    A token keeps its slot until no slot is free and all others of its list were wanted at a later
    step, or at the same one and have a higher position.

    Parameters
    ----------
    num_lists, num_slots : int
        Lists share nothing; each has so many slots.
    """

    def __init__(self, num_lists: int, num_slots: int) -> None:
        self._step = 0
        with torch.inference_mode(False):  # changed in place by steps of any grad mode
            self._slot_of = torch.zeros((num_lists, 0), dtype=torch.int32)
            self._token_in = torch.full((num_lists, num_slots), -1, dtype=torch.int64)
            # The last entry is nobody's: of tokens that have no slot.
            self._wanted_at = torch.zeros((num_lists, num_slots + 1), dtype=torch.int64)
            self._free_first = torch.arange(-num_slots, 0)

    @property
    def num_slots(self) -> int:
        return self._token_in.shape[1]

    @property
    def token_in(self) -> Tensor:
        """Position of the token in each slot, int64 [num_lists, num_slots]; -1: free."""
        return self._token_in

    def make_room(self, num_tokens: int) -> None:
        """Positions will be below ``num_tokens``."""
        num_lists, known = self._slot_of.shape
        if num_tokens > known:
            with torch.inference_mode(False):
                more = torch.full((num_lists, num_tokens - known), -1, dtype=torch.int32)
                self._slot_of = torch.cat([self._slot_of, more], dim=1)

    def take(self, tokens: Tensor, wanted: Tensor) -> Taken:
        """A slot for every wanted token; those that had none take the place of others.

        Parameters
        ----------
        tokens : Tensor, [num_lists, width], int64
            Positions, each once in a list; anything valid where not wanted.
        wanted : Tensor, [num_lists, width], bool

        Raises
        ------
        ValueError
            If a list wants more tokens than it has slots; nothing changes then.
        """
        num_slots = self.num_slots
        most = int(wanted.sum(1).max()) if wanted.numel() else 0
        allowed = f"at most {num_slots} (raise resident_tokens)"
        require(most <= num_slots, "tokens of a list outside of the window", most, allowed)
        self._step += 1
        slots = self._slot_of.gather(1, tokens).long().masked_fill_(~wanted, -1)
        held = slots >= 0
        self._wanted_at.scatter_(1, torch.where(held, slots, num_slots), self._step)
        absent = wanted & ~held
        place = absent.flatten().nonzero().squeeze(1)
        if place.numel():
            # The n-th absent token of a list takes its n-th slot in the order of eviction.
            age = (self._wanted_at[:, :-1] << 32) + self._token_in
            age = torch.where(self._token_in < 0, self._free_first, age)
            turn = absent.cumsum(1).sub_(1).flatten()[place]
            row = place // tokens.shape[1]
            victims = age.topk(int(turn.max()) + 1, dim=1, largest=False).indices
            taken, token = victims[row, turn], tokens.flatten()[place]
            evicted = self._token_in[row, taken]
            had = evicted >= 0
            self._slot_of[row[had], evicted[had]] = -1
            self._slot_of[row, token] = taken.int()
            self._token_in[row, taken] = token
            self._wanted_at[row, taken] = self._step
            slots.view(-1)[place] = taken
        return Taken(slots, place, int(held.sum()))

    def forget(self, num_tokens: Tensor) -> None:
        """Free the slots of tokens at or behind ``num_tokens``, int64 [num_lists]."""
        gone = self._token_in >= num_tokens[:, None]
        row, slot = gone.nonzero(as_tuple=True)
        self._slot_of[row, self._token_in[row, slot]] = -1
        self._token_in[row, slot] = -1

    def take_lists(self, index: Tensor) -> None:
        """Lists become ``lists[index]``, int64; one may appear more than once."""
        with torch.inference_mode(False):
            self._slot_of = self._slot_of.index_select(0, index)
            self._token_in = self._token_in.index_select(0, index)
            self._wanted_at = self._wanted_at.index_select(0, index)
