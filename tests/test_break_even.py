"""The break-even: its arithmetic, the timer under a clock that is not one, and what steps do with
a crossover. Nothing here depends on how long anything takes."""

from __future__ import annotations

import dataclasses
import random
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch

from kvselect import (
    Dense,
    KVCache,
    Rope,
    StreamingLLM,
    TokenSelect,
    break_even,
    crossovers,
    decode_step,
    prefill,
    reference,
)
from kvselect.break_even import (
    FEWEST_REPEATS,
    REPEATS,
    StepTimer,
    crossover_for,
    find_crossover,
    measure,
)
from kvselect.crossovers import Crossover, Point, Workload
from kvselect.testing import make_qkv, rel_err

DIM, HEADS, GROUP = 32, 2, 4
SIZES: dict[str, Any] = {
    "num_q_heads": GROUP * HEADS,
    "num_kv_heads": HEADS,
    "head_dim": DIM,
    "dtype": torch.float32,
}


@pytest.fixture(autouse=True)
def empty_store(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSELECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KVSELECT_BREAK_EVEN", "stored")
    monkeypatch.setattr(crossovers, "_known", crossovers._Known())
    monkeypatch.setattr(crossovers, "_said", set())


def small(**settings: Any) -> TokenSelect:
    defaults: dict[str, Any] = {
        "topk": 10,
        "num_sink_tokens": 3,
        "num_recent_tokens": 20,
        "sketch": None,
        "overselect": 1.0,
    }
    return TokenSelect(**(defaults | settings))


class Costs:
    """Time of both steps as functions of the length, and how often it was asked for."""

    def __init__(self, dense: Callable[[int], float], selecting: Callable[[int], float]) -> None:
        self.dense, self.selecting = dense, selecting
        self.asked: list[int] = []

    def __call__(self, tokens: int) -> Point:
        self.asked.append(tokens)
        return Point(tokens, self.dense(tokens), self.selecting(tokens), 0.01)


def never() -> bool:
    return False


# --- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overhead_us", [20.0, 400.0, 1500.0, 6000.0])
@pytest.mark.parametrize("scan", [0.0, 0.02, 0.1])
def test_lines_meet_where_they_meet(overhead_us: float, scan: float) -> None:
    """Dense: 0.2 us per token. Selecting: the same up to 3000 tokens, then a scan."""
    costs = Costs(lambda n: 10 + 0.2 * n, lambda n: overhead_us + 610 + scan * n)
    exact = (overhead_us + 600) / (0.2 - scan)
    tokens, extrapolated, points = find_crossover(costs, 3000, 131072, never)
    assert not extrapolated
    if exact < 3000:
        assert tokens == 2999
    else:
        assert tokens == pytest.approx(exact, rel=0.03)
    assert [point.tokens for point in points] == sorted(costs.asked)
    assert len(set(costs.asked)) == len(costs.asked) <= 12
    assert min(costs.asked) == 3000 and max(costs.asked) <= 131072


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_some_per_cent_moves_the_result_by_some_per_cent(seed: int) -> None:
    rng = random.Random(seed)

    def noisy(us: float) -> float:
        return us * (1.0 + abs(rng.gauss(0.0, 0.02)))

    costs = Costs(lambda n: noisy(0.2 * n), lambda n: noisy(2400 + 0.08 * n))
    tokens, _, _ = find_crossover(costs, 3713, 131072, never)
    assert tokens == pytest.approx(20_000, rel=0.08)


def test_selecting_is_never_slower_from_there_on() -> None:
    """A win below a later loss does not count."""
    costs = Costs(lambda n: 100.0 + n / 100, lambda n: 90.0 if n < 1500 or n > 5000 else 200.0)
    tokens, _, points = find_crossover(costs, 1000, 64000, never)
    losses = [point.tokens for point in points if point.ratio > 1]
    assert tokens is not None and max(losses) <= tokens <= 9000


def test_selecting_that_always_wins_leaves_the_shortest() -> None:
    tokens, extrapolated, points = find_crossover(
        Costs(lambda n: 2.0 * n, lambda n: 1.0 * n), 500, 64000, never
    )
    assert (tokens, extrapolated) == (499, False)
    assert [point.tokens for point in points] == [500]  # a clear win: nothing longer is needed
    narrowly = Costs(lambda n: 1.1 * n, lambda n: 1.0 * n)
    assert find_crossover(narrowly, 500, 4000, never)[:2] == (499, False)
    assert narrowly.asked == [500, 1000, 2000, 4000]


def test_selecting_that_never_wins_is_said_so() -> None:
    costs = Costs(lambda n: 100 + 0.10 * n, lambda n: 900 + 0.095 * n)
    tokens, extrapolated, points = find_crossover(costs, 1000, 8000, never)
    assert (tokens, extrapolated) == (None, False)
    assert costs.asked == [1000, 2000, 4000, 8000] == [point.tokens for point in points]


def test_lines_that_clearly_close_are_extrapolated_but_not_far() -> None:
    costs = Costs(lambda n: 100 + 0.1 * n, lambda n: 900 + 0.06 * n)  # they meet at 20,000
    assert find_crossover(costs, 1000, 8000, never)[:2] == (20_000, True)
    assert find_crossover(costs, 1000, 4000, never)[:2] == (None, False)  # 5 times the longest


@pytest.mark.parametrize("last_us", [850.0, 899.0, 900.0, 980.0, 1000.0])
@pytest.mark.parametrize("selecting_us", [1010.0, 1100.0, 1200.0])
def test_dense_that_got_faster_by_noise_says_nothing_about_slopes(
    last_us: float, selecting_us: float
) -> None:
    costs = Costs(
        lambda n: 1000.0 if n == 1000 else last_us, lambda n: 1100.0 if n == 1000 else selecting_us
    )
    assert find_crossover(costs, 1000, 2000, never)[:2] == (None, False)


def test_one_length_says_nothing_about_slopes() -> None:
    costs = Costs(lambda n: 0.1 * n, lambda n: 900.0)
    tokens, extrapolated, points = find_crossover(costs, 1000, 8000, lambda: True)
    assert (tokens, extrapolated) == (None, False) and len(points) == 1


@pytest.mark.parametrize("late_after", [1, 2, 3, 4, 5, 6])
def test_no_length_is_begun_after_the_time_is_up(late_after: int) -> None:
    costs = Costs(lambda n: 0.2 * n, lambda n: 2400 + 0.08 * n)
    tokens, _, points = find_crossover(costs, 3713, 131072, lambda: len(costs.asked) >= late_after)
    assert len(points) == late_after
    if late_after >= 4:  # 3713, 7426, 14852, 29704: both sides are known
        assert tokens == pytest.approx(20_000, rel=0.05)


@pytest.mark.parametrize(("noisy_times", "ends"), [(1, False), (2, True)])
def test_a_busy_machine_ends_the_search(noisy_times: int, ends: bool) -> None:
    """A length that was disturbed is tried once more; if that does not help, nothing longer is."""
    costs = Costs(lambda n: 0.2 * n, lambda n: 2400 + 0.08 * n)

    def disturbed(tokens: int) -> Point:
        point = costs(tokens)
        is_noisy = tokens == 7426 and costs.asked.count(7426) <= noisy_times
        return dataclasses.replace(point, noise=0.8 if is_noisy else 0.01)

    tokens, _, points = find_crossover(disturbed, 3713, 131072, never)
    assert costs.asked[:3] == [3713, 7426, 7426]
    assert all(point.steady for point in points) is not ends
    if ends:
        assert len(costs.asked) == 3
    else:
        assert tokens == pytest.approx(20_000, rel=0.03)


# --- the timer ------------------------------------------------------------------------------------


def new_cache(policy: TokenSelect, page_block_size: int | None = None) -> Any:
    def make(capacity: int) -> KVCache:
        return KVCache(
            1,
            HEADS,
            DIM,
            capacity=capacity,
            sketch=policy.sketch,
            page_block_size=page_block_size,
        )

    return make


def script(times: Iterator[float], busy: float = 1.0) -> Callable[[], tuple[float, float]]:
    """A clock: every second reading is ``next(times)`` seconds after the one before."""
    now, readings = 0.0, count()

    def read() -> tuple[float, float]:
        nonlocal now
        if next(readings) % 2:
            now += next(times)
        return now, now * busy

    return read


@pytest.fixture(autouse=True)
def small_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "last_level_cache_bytes", lambda: 1 << 10)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sketch": "int4", "num_recent_tokens": 128},
        {"positions": "compact"},
        {"similarity_threshold": 0.01},
        {"scope": "layer", "pool_width": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("page_block_size", [None, 16])
def test_both_steps_run_on_one_cache_and_do_what_they_should(
    settings: dict[str, Any], page_block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(break_even, "CHUNK_TOKENS", 64)
    policy = small(**settings)
    alternating = script(iter([3e-6, 2e-6] * 100))
    timer = StepTimer(
        policy, new_cache(policy, page_block_size), GROUP * HEADS, 1.0, clock=alternating
    )
    for tokens in (200, 400, 300, 900):  # longer, then shorter, then longer again
        point = timer(tokens)
        assert point == Point(tokens, dense_us=3.0, selecting_us=2.0, noise=0.0)
        held = timer._cache.max_seqlen
        assert tokens <= held < tokens + REPEATS
        assert timer._cache.capacity >= held
        keys = timer._cache.k[0]
        assert len(keys) == held == len(keys.unique(dim=0))  # equal keys would tie
        dense, selecting = timer._states["dense"].decode, timer._states["selecting"].decode
        assert dense.num_calls == dense.num_dense_calls > 0
        assert selecting.num_calls == dense.num_calls and selecting.num_dense_calls == 0
        assert selecting.num_hits == 0  # every step of the selection cache misses
        if "similarity_threshold" in settings:
            assert selecting.num_misses > 0


@pytest.mark.parametrize(
    ("times", "repeats", "noise"),
    [
        ([1.0, 2.0] * 3, FEWEST_REPEATS, 0.0),
        ([1.0, 5.0, 1.05, 5.0, 1.1, 5.0], FEWEST_REPEATS, 0.05),  # far apart: roughly will do
        ([1.0, 1.0, 1.3, 1.3, 1.2, 1.2, 1.01, 1.01], 4, 0.01),  # near: until met twice
        ([1.0, 1.0] + [1.3, 1.3] * REPEATS, REPEATS, 0.3),  # never: then all there are
    ],
)
def test_repeats_until_the_least_time_was_met_twice(
    times: list[float], repeats: int, noise: float
) -> None:
    policy = small()
    timer = StepTimer(policy, new_cache(policy), GROUP * HEADS, 1.0, now=lambda: 0.0)
    timer._clock = script(iter(times))
    point = timer(100)
    assert timer._states["dense"].decode.num_calls == repeats
    assert point.noise == pytest.approx(noise, abs=1e-3)
    assert point.dense_us == 1e6 and point.selecting_us == 1e6 * min(times[1::2])


def test_repeats_end_with_the_time_for_one_length() -> None:
    policy, seconds = small(), count()
    timer = StepTimer(policy, new_cache(policy), GROUP * HEADS, 4.5, now=lambda: next(seconds))
    timer._clock = script(iter([1.0, 1.0] + [1.3, 1.3] * REPEATS))
    timer(100)
    assert timer._states["dense"].decode.num_calls == FEWEST_REPEATS + 4


def test_waiting_for_others_is_noise() -> None:
    """Several threads: wall time in which this thread did little says nothing."""
    policy = small()
    timer = StepTimer(policy, new_cache(policy), GROUP * HEADS, 1.0, now=lambda: 0.0)
    timer._clock = script(iter([1.0, 2.0] * REPEATS), busy=0.25)
    assert timer(100).noise == 0.75


def test_a_clock_that_stands_still_gives_no_zero() -> None:
    policy = small()
    timer = StepTimer(policy, new_cache(policy), GROUP * HEADS, 1.0, clock=lambda: (0.0, 0.0))
    point = timer(100)
    assert point.dense_us > 0.0 and point.ratio == 1.0 and point.noise == 1.0


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_is_timed_by_its_cpu_time(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, before = small(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        timer = StepTimer(policy, new_cache(policy), GROUP * HEADS, 1.0)
    finally:
        torch.set_num_threads(before)
    expected = break_even._cpu_time if threads == 1 else break_even._wall_and_cpu_time
    assert timer._clock is expected
    seconds, busy = expected()
    assert (seconds == busy) == (threads == 1)


# --- measure --------------------------------------------------------------------------------------


def test_measure_says_what_was_measured_and_changes_nothing() -> None:
    policy = small(topk=50, overselect=2.0, dense_below_tokens=7)
    costs = Costs(lambda n: 0.2 * n, lambda n: 100 + 0.05 * n)
    ticks = count()
    state, cached = torch.get_rng_state(), crossovers.find_all()
    found = measure(policy, **SIZES, time_steps=costs, now=lambda: next(ticks) / 1000)
    assert min(costs.asked) == 3 + 100 + 20 + 1  # where lists stop to hold everything
    assert found.tokens == pytest.approx(100 / 0.15, rel=0.03)
    assert found.machine == crossovers.machine_identity()
    assert found.workload == Workload.of(policy.to_dict(), *SIZES.values())
    assert 0 < found.seconds < 0.1 and re.fullmatch(r"20.+T.+\+00:00", found.measured_at)
    assert found.steady and Crossover.from_dict(found.to_dict()) == found
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert crossovers.find_all() == cached  # storing is another step


def test_measure_with_a_clock_runs_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the clock is real. Each step takes its tokens attended, and selecting 300 more."""
    monkeypatch.setattr(break_even, "CHUNK_TOKENS", 64)
    random_state = torch.get_rng_state()
    steps: list[int] = []
    real = break_even.decode_step

    def counting(q: Any, cache: KVCache, *rest: Any, **options: Any) -> Any:
        out, info = real(q, cache, *rest, **options)
        full = info.selection is None
        attended = cache.max_seqlen if full else 300 + int(info.selection.topk_length[0, 0])
        steps.append(attended)
        return out, info

    monkeypatch.setattr(break_even, "decode_step", counting)
    monkeypatch.setattr(break_even, "_cpu_time", lambda: (float(sum(steps)), float(sum(steps))))
    found = measure(small(), **SIZES, now=lambda: 0.0)
    assert found.tokens == pytest.approx(333, rel=0.03)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_longest_length_is_bounded_by_memory_and_by_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def longest(policy: TokenSelect, **changes: Any) -> int:
        costs = Costs(lambda n: 1.0, lambda n: 2.0)
        measure(policy, **(SIZES | changes), time_steps=costs)
        return max(costs.asked)

    assert longest(small()) == 131072
    assert longest(small(), num_kv_heads=256, num_q_heads=256, head_dim=256) == 1024
    assert longest(small(topk=200_000)) == 2 * 200_024


@pytest.mark.parametrize(
    ("policy", "changes", "error", "message"),
    [
        (Dense(), {}, TypeError, r"policy: got Dense Dense\(\), allowed: a TokenSelect"),
        (small(), {"num_q_heads": 0}, ValueError, "num_q_heads: got 0, allowed: an int >= 1"),
        (small(), {"num_q_heads": 7}, ValueError, "num_q_heads: got 7, allowed: a multiple of num"),
        (small(), {"num_kv_heads": 0}, ValueError, "num_kv_heads: got 0"),
        (small(), {"head_dim": 33}, ValueError, "head_dim: got 33"),
        (small(), {"dtype": torch.int8}, ValueError, "dtype: got torch.int8"),
        (small(), {"page_block_size": 0}, ValueError, "page_block_size: got 0"),
        (small(), {"max_seconds": 0.0}, ValueError, "max_seconds: got 0.0, allowed: a float > 0"),
        (small(), {"max_seconds": "1"}, TypeError, "max_seconds: got str '1'"),
    ],
)
def test_bad_workloads_are_named(
    policy: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measure(policy, **(SIZES | changes), time_steps=Costs(float, float))


# --- measured when --------------------------------------------------------------------------------


def stored(policy: TokenSelect, tokens: int | None = 200, **changes: Any) -> Crossover:
    """A crossover as if it had been measured here."""
    sizes = SIZES | changes
    found = Crossover(
        machine=crossovers.machine_identity(),
        workload=Workload.of(policy.to_dict(), *sizes.values()),
        tokens=tokens,
        extrapolated=False,
        points=(Point(300, 2.0, 1.0, 0.01),),
        measured_at="2026-01-02T03:04:05+00:00",
        seconds=1.0,
    )
    crossovers.save(found)
    return found


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked to be measured; the answer is 200 tokens."""
    asked: list[dict[str, Any]] = []

    def answer(policy: TokenSelect, **workload: Any) -> Crossover:
        asked.append(workload)
        costs = Costs(lambda n: float(n), lambda n: 200.0)
        return measure(policy, **workload, time_steps=costs)

    monkeypatch.setattr(break_even, "measure", answer)
    return asked


def test_only_auto_measures_and_only_once(measurements: list[dict[str, Any]]) -> None:
    policy = small()
    assert crossover_for(policy, **SIZES, mode="stored") is None
    assert crossover_for(policy, **SIZES, mode="off") is None
    assert measurements == []
    found = crossover_for(policy, **SIZES)
    assert found is not None and found.tokens == pytest.approx(200, abs=4)
    assert measurements == [SIZES | {"page_block_size": None}]
    assert crossover_for(policy, **SIZES) == found == crossover_for(policy, **SIZES, mode="stored")
    assert crossover_for(policy, **SIZES, mode="off") is None
    assert len(measurements) == 1
    crossover_for(small(topk=11), **SIZES)
    assert len(measurements) == 2


def test_a_busy_machine_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(policy: TokenSelect, **workload: Any) -> Crossover:
        costs = Costs(lambda n: float(n), lambda n: 200.0)
        found = measure(policy, **workload, time_steps=costs)
        return dataclasses.replace(found, points=(Point(300, 2.0, 1.0, noise=0.8),))

    monkeypatch.setattr(break_even, "measure", busy)
    message = "break-even not measured: other processes leave too little of the machine"
    with pytest.warns(UserWarning, match=message):
        assert crossover_for(small(), **SIZES) is None
    assert crossovers.find_all() == []


# --- what steps do with it ------------------------------------------------------------------------


def filled(seqlens: tuple[int, ...], seqlen_q: int = 1) -> tuple[torch.Tensor, KVCache]:
    q, k, v = make_qkv(len(seqlens), seqlen_q, max(seqlens), GROUP * HEADS, HEADS, DIM, seed=5)
    cache = KVCache(len(seqlens), HEADS, DIM, sketch=None)
    cache.append(k, v, list(seqlens))
    return q, cache


def dense_steps(policy: TokenSelect, *seqlens: int, rope: Rope | None = None) -> list[bool]:
    """Whether a step at each length is dense."""
    found = []
    for seqlen in seqlens:
        q, cache = filled((seqlen,))
        out, info = decode_step(q, cache, policy, policy.new_state(cache), rope=rope)
        found.append(info.selection is None)
        expected = dataclasses.replace(policy, dense_below_tokens=10**6 if found[-1] else 0)
        table = rope if policy.positions == "compact" else None
        truth, _ = reference.decode_step(q, cache, expected, reference.DecodeState(), rope=table)
        assert rel_err(out, truth) <= 4e-6
    return found


def test_the_stored_crossover_decides_what_the_policy_leaves_open() -> None:
    policy = small()
    assert dense_steps(policy, 33, 34, 200, 201) == [True, False, False, False]
    stored(policy)
    assert dense_steps(policy, 33, 34, 200, 201) == [True, True, True, False]


@pytest.mark.parametrize(("given", "border"), [(0, 33), (100, 100), (300, 300)])
def test_what_the_user_set_stands(given: int, border: int) -> None:
    policy = small(dense_below_tokens=given)
    stored(policy)
    assert dense_steps(policy, border, border + 1) == [True, False]
    assert policy.new_state(filled((5,))[1]).decode_policies == {}


def test_the_budget_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    stored(small(), tokens=0)
    assert dense_steps(small(), 33, 34) == [True, False]
    monkeypatch.setenv("KVSELECT_BREAK_EVEN", "off")
    stored(small())
    assert dense_steps(small(), 33, 34) == [True, False]


def test_selecting_that_never_won_is_dense_as_far_as_was_measured() -> None:
    stored(small(), tokens=None)
    assert dense_steps(small(), 300, 301) == [True, False]


@pytest.mark.parametrize(
    "changes",
    [{"num_q_heads": HEADS}, {"head_dim": 64}, {"dtype": torch.bfloat16}, {"num_kv_heads": 4}],
    ids=str,
)
def test_another_shape_has_another_crossover(changes: dict[str, Any]) -> None:
    stored(small(), **changes)
    assert dense_steps(small(), 34) == [False]


def test_pages_have_their_own() -> None:
    policy = small()
    stored(policy, page_block_size=16)
    q, k, v = make_qkv(1, 1, 100, GROUP * HEADS, HEADS, DIM)
    paged = KVCache(1, HEADS, DIM, sketch=None, page_block_size=16)
    paged.append(k, v)
    assert decode_step(q, paged, policy, policy.new_state(paged))[1].selection is None
    assert dense_steps(policy, 100) == [False]


def test_query_heads_are_known_at_the_step() -> None:
    policy = small()
    stored(policy, tokens=60, num_q_heads=HEADS)
    stored(policy, tokens=200)
    q, cache = filled((100,))
    state = policy.new_state(cache)
    assert state.decode_policy(7) is policy
    assert decode_step(q, cache, policy, state)[1].selection is None
    assert decode_step(q[:, :, :HEADS].contiguous(), cache, policy, state)[1].selection is not None


def test_a_state_keeps_what_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step looks anything up, and a later measurement changes no running request."""
    policy = small()
    q, cache = filled((100,))
    state = policy.new_state(cache)
    stored(policy)
    monkeypatch.setattr(crossovers, "find_all", None)
    assert decode_step(q, cache, policy, state)[1].selection is not None


def test_other_settings_bring_their_own_crossover() -> None:
    policy, other = small(similarity_threshold=0.9), small(similarity_threshold=0.8)
    stored(other)
    q, cache = filled((100,))
    state = policy.new_state(cache)
    assert decode_step(q, cache, policy, state)[1].selection is not None
    assert decode_step(q, cache, other, state)[1].selection is None
    assert decode_step(q, cache, policy, state)[1].selection is not None


def test_given_crossovers_need_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small()
    found = stored(policy)
    crossovers.forget()
    monkeypatch.setattr(crossovers, "find_all", None)
    q, cache = filled((100,))
    state = policy.new_state(cache, {GROUP * HEADS: found})
    assert decode_step(q, cache, policy, state)[1].selection is None
    none = policy.new_state(cache, {})
    assert decode_step(q, cache, policy, none)[1].selection is not None
    for method in (Dense(), StreamingLLM()):
        assert method.new_state(cache, {GROUP * HEADS: found}).decode_policies == {}


def test_given_crossovers_serve_the_next_policy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, other = small(), small(topk=11)
    found = stored(policy)
    stored(other)
    q, cache = filled((100,))
    monkeypatch.setattr(crossovers, "find_all", None)
    for given in ({}, {GROUP * HEADS: found}):
        state = policy.new_state(cache, given)
        for one in (policy, other, policy):
            assert (decode_step(q, cache, one, state)[1].selection is None) == bool(given)


def test_compact_positions_end_at_the_trained_length() -> None:
    policy = small(positions="compact")
    stored(policy)
    rope = Rope.from_frequencies(100.0 ** (-torch.arange(DIM // 2) / (DIM // 2)), 180)
    assert policy.capacity <= 180
    assert dense_steps(policy, 180, 181, rope=rope) == [True, False]


def test_rows_decide_alone() -> None:
    """As with a border set by hand: short rows beside a long one attend to everything."""
    policy = small(similarity_threshold=0.9)
    stored(policy)
    by_hand = dataclasses.replace(policy, dense_below_tokens=200)
    q, cache = filled((230, 150, 20))
    states = [one.new_state(cache) for one in (policy, by_hand)]
    for _ in range(3):
        out, info = decode_step(q, cache, policy, states[0])
        expected, expected_info = decode_step(q, cache, by_hand, states[1])
        assert torch.equal(out, expected)
        assert torch.equal(info.selection.indices, expected_info.selection.indices)
        assert info.selection.topk_length[:, 0].tolist()[1:] == [
            cache.lengths[1],
            cache.lengths[2],
        ]
        cache.append(*make_qkv(3, 1, 1, 1, HEADS, DIM, seed=9)[1:])
    for name in ("num_dense_calls", "tokens_attended", "num_hits", "num_misses"):
        assert getattr(states[0].decode, name) == getattr(states[1].decode, name)


def test_prefill_goes_by_its_own_rule() -> None:
    """Blocks select above the budget: a decode crossover says nothing about them."""
    policy = small(q_block_size=16, num_tail_tokens=0, tail_q_block_size=4)
    q, cache = filled((150,), seqlen_q=150)
    before = prefill(q, cache, policy, policy.new_state(cache))[0]
    stored(policy)
    state = policy.new_state(cache)
    out, _ = prefill(q, cache, policy, state)
    assert torch.equal(out, before)
    assert state.prefill.num_calls > state.prefill.num_dense_calls
    by_hand = dataclasses.replace(policy, dense_below_tokens=200)
    state = by_hand.new_state(cache)
    prefill(q, cache, by_hand, state)
    assert state.prefill.num_calls == state.prefill.num_dense_calls


def test_a_few_queries_on_a_filled_cache_are_decode_steps() -> None:
    policy = small(tail_q_block_size=4)
    stored(policy)
    q, cache = filled((150,), seqlen_q=3)
    state = policy.new_state(cache)
    out, _ = prefill(q, cache, policy, state)
    assert state.decode.num_calls == state.decode.num_dense_calls == 1
    assert rel_err(out, reference.sparse_attention(q, cache)[0]) <= 2e-6


def test_steps_above_the_crossover_are_what_they_were() -> None:
    policy = small(similarity_threshold=0.5)
    q, cache = filled((250,))
    plain, _ = decode_step(q, cache, policy, policy.new_state(cache))
    stored(policy)
    state = policy.new_state(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, info = decode_step(q, cache, policy, state)
    assert torch.equal(out, plain) and state.selection_cache is not None
    assert info.selection is not None
