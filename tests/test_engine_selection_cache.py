"""Lists of rows that come in any order: each finds its own, and nobody another's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvselect import KVCache, TokenSelect, decode_step
from kvselect.engine_cache import EngineKVCache
from kvselect.engine_selection_cache import EngineSelectionCache

HEADS, GROUP, DIM, PAGE = 2, 2, 32, 16
POLICY = TokenSelect(
    topk=6,
    num_sink_tokens=2,
    num_recent_tokens=4,
    sketch=None,
    overselect=1.0,
    similarity_threshold=0.9,
    max_age=3,
)


class Alone:
    """A request with a cache of its own, beside its pages in the engine."""

    def __init__(self, seed: int, pages: list[int], num_tokens: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.pages = pages
        self.cache = KVCache(1, HEADS, DIM, sketch=None)
        self.state = POLICY.new_state(self.cache)
        self.q = self.randn(1, 1, HEADS * GROUP, DIM)
        self.k, self.v = (
            self.randn(1, num_tokens, HEADS, DIM),
            self.randn(1, num_tokens, HEADS, DIM),
        )
        self.cache.append(self.k, self.v)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    @property
    def length(self) -> int:
        return self.cache.max_seqlen


class Engine:
    """Blocks of an engine, and one layer that decodes over them."""

    def __init__(self) -> None:
        shape = (32, PAGE, HEADS, DIM)
        self.cache = EngineKVCache(torch.zeros(shape), torch.zeros(shape), sketch=None)
        self.state = POLICY.new_state(self.cache)
        self.number = 0

    def serve(self, rows: list[Alone], counts: Tensor | None = None, ahead: int = 0) -> None:
        table = torch.zeros(len(rows), 8, dtype=torch.int32)
        for place, row in enumerate(rows):
            table[place, : len(row.pages)] = torch.tensor(row.pages)
        lengths = [row.length + ahead for row in rows]
        self.cache.serve(table, torch.tensor(lengths, dtype=torch.int32), lengths, counts)

    def fill(self, row: Alone) -> None:
        self.serve([row], ahead=-row.length)
        self.cache.append(row.k, row.v)

    def step(self, rows: list[Alone], missing: float = 0.0) -> list[list[int]]:
        """One decode step of these rows, each compared with itself alone; their hits."""
        self.number += 1
        new = [(row.randn(1, 1, HEADS, DIM) + missing, row.randn(1, 1, HEADS, DIM)) for row in rows]
        self.serve(rows)
        self.cache.append(torch.cat([k for k, _ in new]), torch.cat([v for _, v in new]))
        counts = self.cache.num_nonfinite
        alone, wanted = [], []
        for row, (k, v) in zip(rows, new):
            row.cache.append(k, v)
            out, info = decode_step(row.q, row.cache, POLICY, row.state)
            alone.append(out)
            wanted += [[0] * HEADS] if info.hit is None else info.hit.tolist()
        self.serve(rows, counts)
        selections = self.state.selection_cache
        assert isinstance(selections, EngineSelectionCache)
        places = [(row, row.length - 1) for row in rows]
        before = [row.pages[(last - 1) // PAGE] for row, last in places]
        selections.serve(self.number, before, [row.pages[last // PAGE] for row, last in places])
        q = torch.cat([row.q for row in rows])
        out, info = decode_step(q, self.cache, POLICY, self.state)
        self.hits = [[0] * HEADS] * len(rows) if info.hit is None else info.hit.tolist()
        self.wanted = wanted
        torch.testing.assert_close(out, torch.cat(alone), equal_nan=True)
        return self.hits


def engine_with(*rows: Alone) -> Engine:
    engine = Engine()
    for row in rows:
        engine.fill(row)
    return engine


HIT, MISS = [1] * HEADS, [0] * HEADS


def test_rows_in_any_order_find_their_lists() -> None:
    a, b, c = Alone(1, [3, 4, 5, 6], 40), Alone(2, [9, 8, 7, 2], 30), Alone(3, [11, 12, 13], 20)
    engine = engine_with(a, b, c)
    assert engine.step([a, b]) == [MISS, MISS]
    assert engine.step([b, c, a]) == [HIT, MISS, HIT] == engine.wanted  # 30 to 32: b's next page
    assert engine.step([c, a, b]) == [HIT] * 3 == engine.wanted
    assert engine.step([c, a, b]) == [HIT] * 3 == engine.wanted  # in place
    assert engine.step([a, b, c]) == [MISS, MISS, HIT] == engine.wanted  # max_age
    a.q = -a.q
    assert engine.step([b, c, a]) == [HIT, MISS, MISS] == engine.wanted
    assert engine.step([a]) == [HIT] == engine.wanted


def test_rows_that_were_left_out_select() -> None:
    a, b = Alone(1, [3, 4, 5, 6], 40), Alone(2, [9, 8, 7, 2], 40)
    engine = engine_with(a, b)
    engine.step([a, b])
    assert engine.step([a]) == [HIT]
    b.state.invalidate()
    assert engine.step([a, b]) == [HIT, MISS] == engine.wanted


def test_a_page_that_changed_hands_brings_no_list_along() -> None:
    """The same page, length and query, two steps later: as when a request ends and one begins."""
    a = Alone(1, [3, 4, 5, 6], 40)
    engine = engine_with(a)
    engine.step([a])
    b = Alone(2, [3, 4, 5, 6], 41)
    b.q = a.q
    engine.fill(b)
    engine.number += 1  # the step that prefilled it
    assert engine.step([b]) == [MISS]
    assert engine.step([b]) == [HIT]


def test_a_new_defect_misses_once() -> None:
    a, b = Alone(1, [3, 4, 5, 6], 40), Alone(2, [9, 8, 7, 2], 40)
    engine = engine_with(a, b)
    engine.step([a, b])
    assert engine.step([a, b]) == [HIT, HIT]
    assert engine.step([b], missing=float("inf")) == [MISS] == engine.wanted
    assert engine.step([b]) == [HIT] == engine.wanted


def test_lists_get_room_when_rows_outgrow_them() -> None:
    a, b = Alone(1, [3], 8), Alone(2, [9, 8, 7, 2], 50)
    engine = engine_with(a, b)
    engine.step([b])
    selections = engine.state.selection_cache
    assert selections is not None and selections.lists is not None
    indices, length, _ = selections.lists
    selections.lists = selections.lists._replace(indices=indices[..., : int(length.max())])
    assert engine.step([b]) == [HIT] == engine.wanted
    assert selections.lists.indices.shape[-1] > int(length.max())


def test_rows_are_those_that_were_served() -> None:
    a = Alone(1, [3, 4, 5, 6], 40)
    engine = engine_with(a)
    selections = engine.state.selection_cache
    assert isinstance(selections, EngineSelectionCache)
    with pytest.raises(ValueError, match=r"^after: got 1, allowed: as many pages as before, 2$"):
        selections.serve(1, [1, 2], [3])
    selections.serve(1, [1, 2], [1, 2])
    engine.serve([a])
    with pytest.raises(ValueError, match=r"^q: got '1 rows', allowed: 2 rows, as served$"):
        decode_step(a.q, engine.cache, POLICY, engine.state)


def test_clear_forgets() -> None:
    a = Alone(1, [3, 4, 5, 6], 40)
    engine = engine_with(a)
    engine.step([a])
    engine.state.invalidate()
    a.state.invalidate()
    assert engine.step([a]) == [MISS]
    assert engine.step([a]) == [HIT]


def test_counts_of_defects_are_checked() -> None:
    a = Alone(1, [3, 4, 5, 6], 40)
    with pytest.raises(TypeError, match=r"^num_nonfinite: got "):
        engine_with(a).serve([a], torch.zeros(1, HEADS))
