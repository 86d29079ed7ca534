"""FixedKVCache: a KVCache whose lengths the host does not know."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import KVCache, Rope, TokenSelect, decode_step, prefill
from kvselect.fixed_cache import FixedKVCache
from kvselect.policies.captured_statistics import CapturedStatistics
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.testing import make_qkv

ROOM = 400


def both(batch: int = 2, sketch: str | None = "int4", **options: Any) -> tuple[KVCache, Any]:
    sizes: dict[str, Any] = {"sketch": sketch, **options}
    return KVCache(batch, 2, 32, **sizes), FixedKVCache(batch, 2, 32, capacity=ROOM, **sizes)


def tokens(batch: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return make_qkv(batch, count, count, 4, 2, 32, seed=seed)


def assert_same(plain: KVCache, fixed: FixedKVCache) -> None:
    assert torch.equal(fixed.cache_seqlens, plain.cache_seqlens)
    assert torch.equal(fixed.num_nonfinite, plain.num_nonfinite)
    with fixed.known_lengths():
        assert fixed.lengths == plain.lengths
        assert fixed.num_real_tokens == plain.num_real_tokens
        assert torch.equal(fixed.k, plain.k) and torch.equal(fixed.v, plain.v)
    if plain.sketch_data is not None:
        starts = [0] * plain.batch if plain.starts is None else plain.starts.tolist()
        for row, (length, start) in enumerate(zip(plain.lengths, starts)):
            whole = max(length - start, 0) // 128
            expected = plain.sketch_data[row, :, :whole]
            assert torch.equal(fixed.sketch_data[row, :, :whole], expected)


@pytest.mark.parametrize("sketch", ["int4", "int8", None])
def test_it_stores_what_a_cache_stores_and_nothing_moves(sketch: str | None) -> None:
    plain, fixed = both(sketch=sketch)
    places = [tensor.data_ptr() for tensor in fixed.tensors()]
    for step, count in enumerate((130, 1, 1, 140)):
        _, k, v = tokens(2, count, seed=step)
        for cache in (plain, fixed):
            cache.append(k, v)
        assert_same(plain, fixed)
    for change in (
        lambda cache: cache.crop(30),
        lambda cache: cache.reorder([1, 0]),
        lambda cache: cache.set_starts([0, 7]),
        lambda cache: cache.set_starts(torch.tensor([5, 0])),
        lambda cache: cache.set_starts(None),
    ):
        before = plain.version, fixed.version
        change(plain), change(fixed)
        assert (plain.version > before[0]) == (fixed.version > before[1])
        assert_same(plain, fixed)
    fixed.reset()
    assert fixed.cache_seqlens.tolist() == [0, 0]
    assert [tensor.data_ptr() for tensor in fixed.tensors()] == places


def test_the_host_knows_bounds_only() -> None:
    _, fixed = both()
    assert fixed.lengths_are_bounds and not KVCache(1, 1, 32).lengths_are_bounds
    assert fixed.max_seqlen == fixed.capacity == ROOM and fixed.num_real_tokens == (ROOM, ROOM)
    _, k, v = tokens(2, 5)
    fixed.append(k, v, torch.tensor([5, 2], dtype=torch.int32))
    with fixed.known_lengths():
        assert fixed.lengths == (5, 2) and not fixed.lengths_are_bounds
    assert fixed.lengths == (ROOM, ROOM) and fixed.lengths_are_bounds


def policy_at(positions: str, **changes: Any) -> TokenSelect:
    settings: dict[str, Any] = {
        "topk": 10,
        "num_sink_tokens": 3,
        "num_recent_tokens": 128,
        "overselect": 1.5,
        "max_age": 1,
        "positions": positions,
    }
    return TokenSelect(**(settings | changes))


@pytest.mark.parametrize("dense_below", [None, 180])
@pytest.mark.parametrize("scope", ["kv_head", "layer"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_decode_steps_are_those_of_a_cache_that_grows(
    positions: str, scope: str, dense_below: int | None
) -> None:
    """Rows below and beyond the budget, two of them padded; a dense row lists all it has."""
    policy = policy_at(positions, scope=scope, dense_below_tokens=dense_below)
    rope = Rope.from_frequencies(torch.logspace(0, -3, 16), 512)
    options: dict[str, Any] = {"rope": rope if positions == "compact" else None}
    plain, fixed = both(batch=3)
    starts = torch.tensor([0, 9, 60], dtype=torch.int32)
    q, k, v = tokens(3, 230)
    for cache in (plain, fixed):
        cache.set_starts(starts)
        cache.append(k[:, :220], v[:, :220])
    states = [policy.new_state(cache) for cache in (plain, fixed)]
    captured = CapturedStatistics(fixed)
    states[1].decode = captured
    lists = 0
    for step in range(220, 230):
        results = []
        for cache, state in zip((plain, fixed), states):
            cache.append(k[:, step : step + 1], v[:, step : step + 1])
            results.append(decode_step(q[:, step : step + 1], cache, policy, state, **options))
        (out, info), (fixed_out, fixed_info) = results
        assert torch.equal(fixed_out, out) and torch.equal(fixed_info.lse, info.lse)
        assert torch.equal(fixed_info.selection.topk_length, info.selection.topk_length)
        lists += info.selection.topk_length.numel()
    counts, expected = PhaseStatistics(), states[0].decode.to_dict()
    assert captured.move_to(counts) == lists
    assert counts.to_dict() == pytest.approx(expected)
    assert captured.move_to(counts) == 0  # moved, not copied
    assert counts.to_dict() == pytest.approx(expected)


def test_short_rows_at_compact_positions_have_their_own_ranks() -> None:
    """A row that is not full has its query at the rank of its own token, which the host lacks."""
    policy = policy_at("compact", dense_below_tokens=0)
    rope = Rope.from_frequencies(torch.logspace(0, -3, 16), 512)
    plain, fixed = both()
    q, k, v = tokens(2, 145)
    for cache in (plain, fixed):
        cache.append(k, v, torch.tensor([145, 143], dtype=torch.int32))
    outs = [
        decode_step(q[:, -1:], cache, policy, policy.new_state(cache), rope=rope)[0]
        for cache in (plain, fixed)
    ]
    assert torch.equal(*outs)


def test_dense_steps_are_counted() -> None:
    _, fixed = both()
    policy = policy_at("original", dense_below_tokens=ROOM)
    q, k, v = tokens(2, 20)
    fixed.append(k, v)
    state = policy.new_state(fixed)
    state.decode = captured = CapturedStatistics(fixed)
    decode_step(q[:, -1:], fixed, policy, state)
    counts = PhaseStatistics()
    assert captured.move_to(counts) == 0
    assert (counts.num_calls, counts.num_dense_calls) == (1, 1)
    assert counts.tokens_visible == counts.tokens_attended == 2 * 2 * 20


def test_prefill_reads_the_lengths() -> None:
    policy = policy_at("original")
    plain, fixed = both()
    q, k, v = tokens(2, 300)
    outs = []
    for cache in (plain, fixed):
        cache.append(k, v)
        state = policy.new_state(cache)
        if isinstance(cache, FixedKVCache):
            with cache.known_lengths():
                outs.append(prefill(q, cache, policy, state)[0])
        else:
            outs.append(prefill(q, cache, policy, state)[0])
    assert torch.equal(*outs)


def test_a_step_is_one_graph() -> None:
    policy = policy_at("original")
    _, fixed = both()
    q, k, v = tokens(2, 210)
    fixed.append(k[:, :200], v[:, :200])
    state = policy.new_state(fixed)
    state.decode = CapturedStatistics(fixed)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fixed.append(k, v)
        return decode_step(q, fixed, policy, state)[0]

    other = FixedKVCache(2, 2, 32, capacity=ROOM)
    other.append(k[:, :200], v[:, :200])
    plain_state = policy.new_state(other)
    for at in range(200, 206):
        now = slice(at, at + 1)
        got = step(q[:, now], k[:, now], v[:, now])
        other.append(k[:, now], v[:, now])
        assert torch.equal(got, decode_step(q[:, now], other, policy, plain_state)[0])
    assert len(graphs) == 1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="capacity: got 0, allowed: an int >= 1"):
        FixedKVCache(1, 1, 32, capacity=0)
    _, fixed = both()
    _, k, v = tokens(2, 5)
    with pytest.raises(ValueError, match=r"v: got shape .*, allowed: \[2, 5, 2, 32\]"):
        fixed.append(k, v[:, :3])
    with pytest.raises(ValueError, match=r"seqlens: got shape \(1,\), allowed: \[2\]"):
        fixed.append(k, v, torch.ones(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"index: got \(3,\), allowed: 2 rows"):
        fixed.reorder([0, 1, 1])
    with pytest.raises(ValueError, match="num_tokens: got -1, allowed: an int >= 0"):
        fixed.crop(-1)
    _, k, v = tokens(2, ROOM + 200)
    with pytest.raises(ValueError, match="capacity: got 0 \\+ 600 tokens in row 0"):
        fixed.append(k, v)


@pytest.mark.parametrize("settings", [{}, {"scope": "layer"}, {"dense_below_tokens": 260}], ids=str)
def test_lists_are_reused_as_on_a_growing_cache(settings: dict[str, Any]) -> None:
    """The same hits and bits, also after changes of the cache; tensors stay where they are."""
    policy = TokenSelect(
        topk=32,
        num_sink_tokens=8,
        num_recent_tokens=128,
        similarity_threshold=0.6,
        max_age=5,
        **settings,
    )
    plain, fixed = both(batch=3)
    states = policy.new_state(plain), policy.new_state(fixed)
    captured = CapturedStatistics(fixed)
    states[1].decode = captured
    q, k, v = tokens(3, 250)
    for cache in (plain, fixed):
        cache.append(k, v)
    with fixed.known_lengths():
        prefill(q, fixed, policy, states[1])
    prefill(q, plain, policy, states[0])
    written = policy.prepare_capture(states[1], fixed, 4, None)
    places = [tensor.data_ptr() for tensor in written]
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(3, 1, 4, 32, generator=generator)
    for step in range(40):
        query = query + 0.25 * torch.randn(query.shape, generator=generator)
        _, k, v = tokens(3, 1, seed=step)
        infos, outs = [], []
        for cache, state in zip((plain, fixed), states):
            cache.append(k, v)
            out, info = decode_step(query, cache, policy, state)
            outs.append(out)
            infos.append(info)
        assert torch.equal(*outs), step
        if infos[0].hit is not None:
            assert torch.equal(infos[0].hit, infos[1].hit), step
        if step == 20:
            plain.crop(2)
            fixed.crop(2)
        if step == 30:
            plain.reorder([2, 1, 0])
            fixed.reorder([2, 1, 0])
    assert [tensor.data_ptr() for tensor in written] == places
    counted = PhaseStatistics()
    captured.move_to(counted)
    for count in ("num_hits", "num_calls"):
        assert getattr(counted, count) == getattr(states[0].decode, count), count
    assert counted.num_misses > states[0].decode.num_misses  # a void list is one to the device
    assert counted.num_hits > 0
    if not settings:
        assert counted.tokens_scanned == states[0].decode.tokens_scanned
        assert counted.tokens_attended == states[0].decode.tokens_attended


def test_a_copy_of_what_is_remembered_follows_its_own_cache() -> None:
    policy = TokenSelect(topk=8, num_sink_tokens=8, similarity_threshold=0.1, num_recent_tokens=128)
    _, fixed = both()
    state = policy.new_state(fixed)
    q, k, v = tokens(2, 200)
    fixed.append(k, v)
    decode_step(q[:, -1:], fixed, policy, state)
    copied_cache, copied = copy.deepcopy((fixed, state))
    pickle.loads(pickle.dumps(fixed))
    copied_cache.crop(1)
    for cache, kept, valid in ((fixed, state, True), (copied_cache, copied, False)):
        assert kept.selection_cache is not None
        assert (kept.selection_cache.expected_seqlens >= 0).all() == valid
        assert list(cache.followers) == [kept.selection_cache]


def test_starts_are_set_anew_after_a_reset_and_a_reorder() -> None:
    _, fixed = both()
    _, k, v = tokens(2, 20)
    starts = torch.tensor([3, 0], dtype=torch.int32)
    fixed.append(k, v)
    fixed.set_starts(starts)
    fixed.reorder([1, 0])
    assert fixed.starts.tolist() == [0, 3]
    fixed.set_starts(starts)
    assert fixed.starts.tolist() == [3, 0]
    fixed.reset()
    assert fixed.starts.tolist() == [0, 0]
    fixed.set_starts(starts)
    assert fixed.starts.tolist() == [3, 0]


def test_room_is_made_for_the_settled_policy() -> None:
    """A measured crossover makes longer rows dense than the budget does."""
    policy = TokenSelect(topk=8, num_sink_tokens=8, num_recent_tokens=128, similarity_threshold=0.5)
    _, fixed = both()
    state = policy.new_state(fixed)
    settled = dataclasses.replace(policy, dense_below_tokens=250)
    state.decode_policies = {4: settled}
    q, k, v = tokens(2, 200)
    fixed.append(k, v)
    policy.prepare_capture(state, fixed, 4, None)
    out, info = decode_step(q[:, -1:], fixed, policy, state)
    assert info.selection is not None and (info.selection.topk_length == 200).all()
    fresh = policy.new_state(fixed)
    fresh.decode_policies = {4: settled}
    assert torch.equal(out, decode_step(q[:, -1:], fixed, policy, fresh)[0])
