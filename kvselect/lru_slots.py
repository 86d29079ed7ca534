"""LruSlots: which tokens of a list have a slot, and which one makes room for another."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvselect.checks import require

__all__ = ["LruSlots", "Replacement", "Taken"]

Replacement = Literal["lru", "lru_s"]

SCORE_DECAY = 0.1
"""What a step leaves of a score of LRU-S; upstream's."""


class Taken(NamedTuple):
    """Where the tokens of a step are."""

    slots: Tensor  # [num_lists, width] int64, -1 where none was wanted
    place: Tensor  # [num_taken] int64, entries of the flattened tokens that had no slot before
    num_found: int


class LruSlots:
    """Slots of each list, and the tokens in them; integers on the host, no tokens themselves.

    With "lru" a token keeps its slot until no slot is free and all others of its list were wanted
    at a later step, or at the same one and have a higher position. With "lru_s" the lowest score
    makes room first (of equal ones as with "lru"), a token that is wanted at this step never:
    ``score <- 0.1 * score + attention received`` (`note`).

    Parameters
    ----------
    num_lists, num_slots : int
        Lists share nothing; each has so many slots.
    replacement : "lru" or "lru_s"

    Notes
    -----
    Source of "lru_s": InfLLM, arXiv:2402.04617, whose scores are of blocks.
    """

    def __init__(self, num_lists: int, num_slots: int, replacement: Replacement = "lru") -> None:
        self._step = 0
        self._scores = replacement == "lru_s"
        with torch.inference_mode(False):  # changed in place by steps of any grad mode
            self._slot_of = torch.zeros((num_lists, 0), dtype=torch.int32)
            self._token_in = torch.full((num_lists, num_slots), -1, dtype=torch.int64)
            # The last entry is nobody's: of tokens that have no slot.
            self._wanted_at = torch.zeros((num_lists, num_slots + 1), dtype=torch.int64)
            self._free_first = torch.arange(-num_slots, 0)
            self._score = torch.zeros((num_lists, num_slots + 1 if self._scores else 0))

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
            if self._scores:
                victims = self._by_score(age)
            else:
                victims = age.topk(int(turn.max()) + 1, dim=1, largest=False).indices
            taken, token = victims[row, turn], tokens.flatten()[place]
            evicted = self._token_in[row, taken]
            had = evicted >= 0
            self._slot_of[row[had], evicted[had]] = -1
            self._slot_of[row, token] = taken.int()
            self._token_in[row, taken] = token
            self._wanted_at[row, taken] = self._step
            if self._scores:
                self._score[row, taken] = 0.0
            slots.view(-1)[place] = taken
        return Taken(slots, place, int(held.sum()))

    def note(self, slots: Tensor, received: Tensor) -> None:
        """Add what the tokens of a step received to their scores, of which a tenth stays.

        Parameters
        ----------
        slots : Tensor, [num_lists, width], int64
            Of `take`; -1 counts for nothing. A list with no other keeps its scores.
        received : Tensor, [num_lists, width], float32, >= 0
            Attention probability; what is not finite counts as 0.
        """
        listed = slots >= 0
        self._score *= torch.where(listed.any(1, keepdim=True), SCORE_DECAY, 1.0)
        received = received.nan_to_num(0.0, 0.0, 0.0).masked_fill(~listed, 0.0)
        self._score.scatter_add_(1, slots.where(listed, self.num_slots), received)

    def _by_score(self, age: Tensor) -> Tensor:
        """Slots in the order in which they make room, [num_lists, num_slots]."""
        oldest = age.argsort(dim=1)
        score = self._score[:, :-1].masked_fill(self._token_in < 0, -1.0)
        score = score.masked_fill(self._wanted_at[:, :-1] == self._step, torch.inf)
        lowest = score.gather(1, oldest).argsort(dim=1, stable=True)
        return oldest.gather(1, lowest)

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
            self._score = self._score.index_select(0, index)
