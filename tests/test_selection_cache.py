"""SelectionCache: reused while queries are similar, never blind, and void after anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import KVCache, PolicyState, TokenSelect, decode_step, prefill

HEADS, GROUP, DIM = 2, 2, 32
BATCH = 2


class Layer:
    """One layer that decodes: a cache, a policy, and queries with a chosen cosine."""

    def __init__(self, num_tokens: int = 60, batch: int = BATCH, **settings: Any) -> None:
        defaults: dict[str, Any] = {
            "topk": 6,
            "num_sink_tokens": 2,
            "num_recent_tokens": 4,
            "sketch": None,
            "overselect": 1.0,
            "similarity_threshold": 0.9,
        }
        self.policy = TokenSelect(**(defaults | settings))
        self.generator = torch.Generator().manual_seed(3)
        self.cache = KVCache(batch, HEADS, DIM, sketch=None)
        self.state: PolicyState = self.policy.new_state(self.cache)
        self.append(num_tokens)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def append(self, count: int = 1, seqlens: list[int] | None = None) -> None:
        batch = self.cache.batch
        new = [self.randn(batch, count, HEADS, DIM) for _ in range(2)]
        self.cache.append(new[0], new[1], seqlens)

    def query(self) -> Tensor:
        return self.randn(self.cache.batch, 1, HEADS * GROUP, DIM)

    def step(self, q: Tensor, append: bool = True) -> list[list[int]]:
        """Hit flags of one decode step; an empty list: nothing could hit."""
        if append:
            self.append()
        _, info = decode_step(q, self.cache, self.policy, self.state)
        assert info.selection is not None
        self.indices, self.lengths = info.selection.indices, info.selection.topk_length
        flags: list[list[int]] = [] if info.hit is None else info.hit.tolist()
        return flags

    def lists(self) -> list[set[int]]:
        flat, lengths = self.indices.flatten(0, 1).tolist(), self.lengths.flatten().tolist()
        return [set(row[:length]) for row, length in zip(flat, lengths)]


HIT, MISS = [[1, 1]] * BATCH, [[0, 0]] * BATCH


def turned(q: Tensor, cosine: float, generator: torch.Generator) -> Tensor:
    """Vectors of another length whose cosine with q is exactly what is asked for."""
    noise = torch.randn(q.shape, generator=generator)
    unit = torch.nn.functional.normalize(q, dim=-1)
    noise = torch.nn.functional.normalize(noise - (noise * unit).sum(-1, True) * unit, dim=-1)
    return 3.0 * (cosine * unit + (1 - cosine**2) ** 0.5 * noise)


@pytest.mark.parametrize("cosine, flags", [(0.92, HIT), (0.88, MISS), (-1.0, MISS)])
def test_similar_queries_hit(cosine: float, flags: list[list[int]]) -> None:
    layer = Layer()
    q = layer.query()
    assert layer.step(q) == []  # nothing to reuse yet
    assert layer.step(turned(q, cosine, layer.generator)) == flags


def test_never_blind_and_each_hit_adds_the_newest_token() -> None:
    layer = Layer()
    q = layer.query()
    layer.step(q)
    before, length = layer.lists(), layer.lengths.clone()
    for age in range(1, 20):
        assert layer.step(q) == HIT
        newest = layer.cache.max_seqlen - 1
        assert torch.equal(layer.lengths, length + age)
        for old, new in zip(before, layer.lists()):
            assert new == old | set(range(newest - age + 1, newest + 1))
        # Every token of the window at the refresh, and all since, is still there.
        horizon = layer.cache.max_seqlen - age - layer.policy.num_recent_tokens
        assert all(set(range(horizon, newest + 1)) <= one for one in layer.lists())
    ordered = layer.indices[0, 0, : int(layer.lengths[0, 0])]
    assert torch.equal(ordered, ordered.sort().values)


@pytest.mark.parametrize("max_age", [1, 3, 64])
def test_one_refresh_per_max_age(max_age: int) -> None:
    layer = Layer(max_age=max_age)
    q = layer.query()
    layer.step(q)
    flags = [layer.step(q) for _ in range(2 * (max_age + 1))]
    assert flags == ([HIT] * max_age + [MISS]) * 2
    assert int(layer.lengths.max()) <= layer.policy.capacity
    assert layer.state.decode.num_hits == 2 * max_age * BATCH * HEADS
    assert layer.state.decode.hit_rate == pytest.approx(max_age / (max_age + 1))


@pytest.mark.parametrize("scope", ["kv_head", "layer"])
def test_threshold_1_with_distinct_queries_equals_no_cache(scope: str) -> None:
    layers = [Layer(scope=scope, similarity_threshold=t) for t in (1.0, None)]
    for _ in range(5):
        queries = [layer.query() for layer in layers]
        assert torch.equal(queries[0], queries[1])
        for layer, q in zip(layers, queries):
            layer.step(q)
        assert layers[0].lists() == layers[1].lists()
    assert layers[0].state.decode.num_hits == 0 and layers[1].state.selection_cache is None


def test_heads_and_rows_decide_alone() -> None:
    layer = Layer()
    q = layer.query()
    layer.step(q)
    first = layer.lists()
    other = q.clone()
    other[0, 0, 2 * GROUP - 1] *= -1.0  # row 0, last head of KV head 1
    assert layer.step(other) == [[1, 0], [1, 1]]
    newest = layer.cache.max_seqlen - 1
    now = layer.lists()
    assert [now[i] == first[i] | {newest} for i in (0, 2, 3)] == [True] * 3
    # The anchor is the query of the last refresh, of each list by itself.
    assert layer.step(q) == [[1, 0], [1, 1]]
    assert layer.step(other) == [[1, 0], [1, 1]]
    assert layer.step(other) == [[1, 1], [1, 1]]


def test_the_anchor_is_not_the_last_query() -> None:
    layer = Layer(similarity_threshold=0.8)
    q = layer.query()
    layer.step(q)
    near = turned(q, 0.85, layer.generator)
    away = 2 * (q / q.norm(dim=-1, keepdim=True) @ torch.eye(DIM)).sum() * near - q  # far from q
    assert layer.step(near) == HIT
    assert layer.step(away) == MISS


@pytest.mark.parametrize(
    "similarity, flags",
    [("min", [[0, 0]] * BATCH), ("q10", [[0, 0]] * BATCH), ("flat", HIT)],
)
def test_statistics_over_the_heads_of_a_list(similarity: str, flags: list[list[int]]) -> None:
    layer = Layer(similarity=similarity)
    q = layer.query()
    q[:, :, ::GROUP] *= 100.0  # one loud head in each group
    layer.step(q)
    other = q.clone()
    other[:, :, 1::GROUP] *= -1.0  # the quiet one turns around: "flat" does not notice
    assert layer.step(other) == flags


@pytest.mark.parametrize("turned_heads, hit", [(1, 1), (2, 0)])
def test_q10_is_the_lower_value_of_the_quantile(turned_heads: int, hit: int) -> None:
    # 12 heads share a list: the 10 % quantile is the second smallest cosine.
    policy = TokenSelect(
        topk=6,
        num_sink_tokens=2,
        num_recent_tokens=4,
        sketch=None,
        scope="layer",
        similarity_threshold=0.9,
    )
    cache = KVCache(1, HEADS, DIM, sketch=None)
    state = policy.new_state(cache)
    assert state.selection_cache is not None and state.selection_cache.similarity == "q10"
    cache.append(torch.randn(1, 60, HEADS, DIM), torch.randn(1, 60, HEADS, DIM))
    q = torch.randn(1, 1, 12, DIM)
    decode_step(q, cache, policy, state)
    cache.append(torch.randn(1, 1, HEADS, DIM), torch.randn(1, 1, HEADS, DIM))
    q[:, :, :turned_heads] *= -1.0
    _, info = decode_step(q, cache, policy, state)
    assert info.hit is not None and info.hit.tolist() == [[hit]]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("similarity", ["min", "q10", "flat"])
def test_zero_and_non_finite_vectors_miss(value: float, similarity: str) -> None:
    layer = Layer(similarity=similarity)
    q = layer.query()
    layer.step(q)
    bad = q.clone()
    bad[0, 0, :GROUP] = value
    assert layer.step(bad) == [[0, 1], [1, 1]]
    assert layer.step(bad) == [[0, 1], [1, 1]]  # nor can it be an anchor
    assert layer.step(q) == [[0, 1], [1, 1]]


def prefill_call(layer: Layer) -> None:
    layer.append(20)
    q = layer.randn(layer.cache.batch, 20, HEADS * GROUP, DIM)
    prefill(q, layer.cache, layer.policy, layer.state)


def short_prefill_call(layer: Layer) -> None:
    layer.append(1)
    prefill(layer.query(), layer.cache, layer.policy, layer.state)


def swap(layer: Layer) -> None:
    layer.cache.reorder([1, 0])


def to_one_row(layer: Layer) -> None:
    layer.cache.reorder([1])


def recreate(layer: Layer) -> None:
    layer.cache.crop(1)
    layer.append(1)


def missed_step(layer: Layer) -> None:
    layer.append(1)


def test_ranks_cannot_remember_a_list_they_share() -> None:
    class TwoRanks:
        def size(self) -> int:
            return 2

    group: Any = TwoRanks()
    layer = Layer(scope="layer")
    layer.append()
    message = r"^ranks of process_group: got 2, allowed: 1 with scope='layer' and remembered"
    with pytest.raises(ValueError, match=message):
        decode_step(layer.query(), layer.cache, layer.policy, layer.state, process_group=group)


def change_settings(layer: Layer) -> None:
    layer.policy = dataclasses.replace(layer.policy, topk=7, similarity_threshold=0.8)


INTERRUPTIONS: list[Callable[[Layer], None]] = [
    prefill_call,
    short_prefill_call,
    swap,
    to_one_row,
    recreate,
    missed_step,
    lambda layer: layer.append(2),
    lambda layer: layer.cache.set_starts([1] * layer.cache.batch),
    lambda layer: layer.state.invalidate(),
    change_settings,
]


@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
def test_the_step_after_an_interruption_misses(interrupt: Callable[[Layer], None]) -> None:
    layer = Layer()
    q = layer.query()
    layer.step(q)
    assert layer.step(q) == HIT
    interrupt(layer)
    q = q[: layer.cache.batch]
    assert not any(map(any, layer.step(q)))
    assert all(map(all, layer.step(q)))  # and then it goes on as before


def test_a_row_without_a_new_token_misses_alone() -> None:
    layer = Layer()
    q = layer.query()
    layer.step(q)
    layer.append(1, [1, 0])
    assert layer.step(q, append=False) == [[1, 1], [0, 0]]
    assert layer.step(q) == HIT


def test_repeating_a_step_without_an_append_misses() -> None:
    layer = Layer()
    q = layer.query()
    layer.step(q)
    lists = layer.lists()
    assert layer.step(q, append=False) == MISS
    assert layer.lists() == lists


def test_unrotated_queries_are_compared_by_default() -> None:
    """A fixed query turns by its position alone once it is rotated."""
    outcomes = {}
    for similarity_on in ("unrotated", "rotated"):
        layer = Layer(similarity_on=similarity_on)
        q = layer.query()
        hits = []
        for sign in (1.0, -1.0):
            layer.append()
            _, info = decode_step(sign * q, layer.cache, layer.policy, layer.state, q_unrotated=q)
            hits.append(None if info.hit is None else info.hit.tolist())
        outcomes[similarity_on] = hits
    assert outcomes == {"unrotated": [None, HIT], "rotated": [None, MISS]}


def test_a_hit_is_not_scanned() -> None:
    layer = Layer()
    q = layer.query()
    layer.step(q)
    scanned = layer.state.decode.tokens_scanned
    assert scanned == 61 * BATCH * HEADS
    layer.step(q)
    assert layer.state.decode.tokens_scanned == scanned
    assert layer.state.decode.kept_mass is not None  # of the fresh lists alone
