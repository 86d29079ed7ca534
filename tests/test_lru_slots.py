"""LruSlots against an ordered dict, which is the textbook's least-recently-used cache."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvselect.lru_slots import LruSlots

NUM_TOKENS = 24


class Textbook:
    """One list: tokens in the order in which they were wanted last, positions ascending."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.kept: OrderedDict[int, None] = OrderedDict()
        self.num_found = 0

    def take(self, tokens: list[int]) -> None:
        absent = [token for token in tokens if token not in self.kept]
        self.num_found += len(tokens) - len(absent)
        for token in tokens:
            if token in self.kept:
                self.kept.move_to_end(token)
        while len(self.kept) + len(absent) > self.num_slots:
            self.kept.popitem(last=False)
        self.kept.update(dict.fromkeys(tokens))
        for token in tokens:  # of one step: by position
            self.kept.move_to_end(token)


def padded(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, lists))
    rows = [tokens + [0] * (width - len(tokens)) for tokens in lists]
    wanted = torch.arange(width) < torch.tensor([[len(tokens)] for tokens in lists])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(lists), width), wanted


def lists_of(longest: int, num_lists: int = 2) -> st.SearchStrategy[Any]:
    tokens = st.lists(st.integers(0, NUM_TOKENS - 1), max_size=longest, unique=True).map(sorted)
    return st.lists(tokens, min_size=num_lists, max_size=num_lists)


def residents(slots: LruSlots, row: int) -> set[int]:
    return {token for token in slots.token_in[row].tolist() if token >= 0}


@settings(deadline=None, max_examples=300)
@given(num_slots=st.integers(1, 12), data=st.data())
def test_slots_hold_what_the_textbook_keeps(num_slots: int, data: Any) -> None:
    slots, textbooks = LruSlots(2, num_slots), [Textbook(num_slots) for _ in range(2)]
    slots.make_room(NUM_TOKENS)
    num_found = 0
    for _ in range(data.draw(st.integers(1, 12))):
        lists = data.draw(lists_of(num_slots))
        tokens, wanted = padded(lists)
        before = slots.token_in.clone()
        taken = slots.take(tokens, wanted)
        num_found += taken.num_found
        for row, (textbook, listed) in enumerate(zip(textbooks, lists)):
            textbook.take(listed)
            assert residents(slots, row) == set(textbook.kept)
            places = taken.slots[row, : len(listed)]
            assert slots.token_in[row, places].tolist() == listed
            assert (taken.slots[row, len(listed) :] == -1).all()
            stayed = before[row] == slots.token_in[row]  # who was found has not moved
            for token in set(before[row].tolist()) & set(listed):
                assert stayed[before[row] == token].all()
        fresh = taken.place.tolist()
        assert len(fresh) == sum(map(len, lists)) - taken.num_found
        assert wanted.flatten()[taken.place].all()
    assert num_found == sum(textbook.num_found for textbook in textbooks)


def test_who_was_listed_longest_ago_makes_room_and_then_the_lowest_position() -> None:
    slots = LruSlots(1, 4)
    slots.make_room(NUM_TOKENS)
    for listed in ([3, 7], [1, 9], [3, 12]):
        slots.take(*padded([listed]))
    assert residents(slots, 0) == {1, 3, 9, 12}  # 7 was not listed again
    slots.take(*padded([[20]]))
    assert residents(slots, 0) == {3, 9, 12, 20}  # of 1 and 9, listed together, the lower one
    assert slots.take(*padded([[3, 9, 12, 20]])).num_found == 4


class Scored:
    """One list of LRU-S: scores, and when each token was wanted last."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots, self.step = num_slots, 0
        self.kept: dict[int, tuple[float, int]] = {}  # token: score, wanted at

    def take(self, tokens: list[int]) -> None:
        self.step += 1
        absent = [token for token in tokens if token not in self.kept]
        for token in tokens:
            if token in self.kept:
                self.kept[token] = self.kept[token][0], self.step
        while len(self.kept) + len(absent) > self.num_slots:
            free = {t: known for t, known in self.kept.items() if t not in tokens}
            del self.kept[min(free, key=lambda t: (*free[t], t))]
        self.kept.update(dict.fromkeys(absent, (0.0, self.step)))

    def note(self, tokens: list[int], received: list[float]) -> None:
        if tokens:
            self.kept = {t: (0.1 * score, at) for t, (score, at) in self.kept.items()}
        for token, mass in zip(tokens, received):
            score, at = self.kept[token]
            self.kept[token] = score + mass, at


@settings(deadline=None, max_examples=200)
@given(num_slots=st.integers(1, 10), data=st.data())
def test_scored_slots_hold_what_attention_went_to(num_slots: int, data: Any) -> None:
    slots, textbooks = LruSlots(2, num_slots, "lru_s"), [Scored(num_slots) for _ in range(2)]
    slots.make_room(NUM_TOKENS)
    for _ in range(data.draw(st.integers(1, 12))):
        lists = data.draw(lists_of(num_slots))
        tokens, wanted = padded(lists)
        taken = slots.take(tokens, wanted)
        for row, (textbook, listed) in enumerate(zip(textbooks, lists)):
            textbook.take(listed)
            assert residents(slots, row) == set(textbook.kept)
            assert slots.token_in[row, taken.slots[row, : len(listed)]].tolist() == listed
        if data.draw(st.booleans()):  # a step may say nothing; halves: ties are exact
            mass = data.draw(st.lists(st.integers(0, 3), min_size=24, max_size=24))
            received = torch.tensor(mass[: tokens.shape[1]]).expand(2, -1) / 4.0
            received = received.masked_fill(~wanted, torch.nan)  # nobody asks there
            slots.note(taken.slots, received)
            for textbook, listed in zip(textbooks, lists):
                textbook.note(listed, [x / 4.0 for x in mass])


def test_what_was_attended_to_outlives_what_was_only_listed() -> None:
    for replacement, left in (("lru", {9, 12, 20}), ("lru_s", {3, 12, 20})):
        slots = LruSlots(1, 3, replacement)  # type: ignore[arg-type]
        slots.make_room(NUM_TOKENS)
        for token, mass in ((3, 0.9), (9, 0.02), (12, 0.3)):
            taken = slots.take(*padded([[token]]))
            if replacement == "lru_s":
                slots.note(taken.slots, torch.tensor([[mass]]))
        slots.take(*padded([[20]]))  # the scores: 3 has .009, 9 has .002, 12 has .3
        assert residents(slots, 0) == left


def test_tokens_in_use_never_make_room() -> None:
    slots = LruSlots(1, 3, "lru_s")
    slots.make_room(NUM_TOKENS)
    taken = slots.take(*padded([[3, 9, 12]]))
    slots.note(taken.slots, torch.tensor([[0.0, 0.5, 0.7]]))
    slots.take(*padded([[3, 20]]))  # 3 has the lowest score of all
    assert residents(slots, 0) == {3, 12, 20}


def test_scores_go_along_and_end_with_the_token() -> None:
    slots = LruSlots(2, 2, "lru_s")
    slots.make_room(NUM_TOKENS)
    taken = slots.take(*padded([[1, 2], [3, 4]]))
    slots.note(taken.slots, torch.tensor([[0.5, 0.1], [0.1, 0.5]]))
    slots.take_lists(torch.tensor([1, 0]))
    slots.forget(torch.tensor([4, 24]))  # list 0, once 1, loses 4
    slots.take(*padded([[5], [6]]))
    assert [residents(slots, row) for row in range(2)] == [{3, 5}, {1, 6}]
    slots.take(*padded([[7], [6]]))  # 5 came without a score
    assert residents(slots, 0) == {3, 7}


def test_forgotten_tokens_are_fetched_again_and_their_slots_come_first() -> None:
    slots = LruSlots(2, 3)
    slots.make_room(NUM_TOKENS)
    slots.take(*padded([[1, 5, 8], [1, 5, 8]]))
    slots.forget(torch.tensor([5, 24]))
    assert (residents(slots, 0), residents(slots, 1)) == ({1}, {1, 5, 8})
    taken = slots.take(*padded([[5, 9], [5, 9]]))
    assert taken.num_found == 1  # of the second list
    assert (residents(slots, 0), residents(slots, 1)) == ({1, 5, 9}, {5, 8, 9})


def test_lists_take_their_slots_along() -> None:
    slots = LruSlots(2, 2)
    slots.make_room(NUM_TOKENS)
    slots.take(*padded([[1, 2], [3, 4]]))
    slots.take_lists(torch.tensor([1, 1, 0]))
    taken = slots.take(*padded([[3], [4], [5]]))
    assert taken.num_found == 2
    assert [residents(slots, row) for row in range(3)] == [{3, 4}, {3, 4}, {2, 5}]


def test_more_wanted_tokens_than_slots_are_refused_and_nothing_changes() -> None:
    slots = LruSlots(2, 2)
    slots.make_room(NUM_TOKENS)
    slots.take(*padded([[1, 2], [3]]))
    before = slots.token_in.clone()
    allowed = r"got 3, allowed: at most 2 \(raise resident_tokens\)"
    with pytest.raises(ValueError, match=f"tokens of a list outside of the window: {allowed}"):
        slots.take(*padded([[1], [3, 5, 6]]))
    assert torch.equal(slots.token_in, before)
