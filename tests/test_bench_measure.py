"""How benches measure: order, clocks, quantiles, cold caches, memory that is asked for first."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvselect.bench import measure, memory
from kvselect.bench.bisection import fewest
from kvselect.bench.measure import ColdCaches, Contender, interleaved_ms, quantiles, threads


def test_contenders_take_turns_and_prepare_each_time() -> None:
    log: list[str] = []
    contenders = {
        "a": Contender(call=lambda: log.append("a"), prepare=lambda: log.append("prepare a")),
        "b": Contender(call=lambda: log.append("b"), repeats=2),
    }
    told: list[str] = []
    samples = interleaved_ms(
        contenders, 2, cold=lambda: log.append("cold"), on_call=lambda name: told.append(name)
    )
    warm_up = ["prepare a", "a", "b", "b"]
    assert log == warm_up + ["prepare a", "cold", "a", "cold", "b", "b"] * 2
    assert told == ["a", "b", "a", "b"]
    assert {name: len(found) for name, found in samples.items()} == {"a": 2, "b": 2}
    assert all(ms >= 0 for found in samples.values() for ms in found)


def test_a_slow_contender_gets_fewer_rounds_but_one() -> None:
    told: list[str] = []
    contenders = {
        "slow": Contender(call=lambda: time.sleep(0.02)),
        "fast": Contender(call=lambda: None),
    }
    samples = interleaved_ms(contenders, 3, max_seconds=0.01, on_call=told.append)
    assert len(samples["slow"]) == 1 and len(samples["fast"]) == 3
    assert told.count("slow") == 3  # progress goes on


def test_one_thread_is_cpu_time_and_several_are_wall_time() -> None:
    asleep = {"asleep": Contender(call=lambda: time.sleep(0.05))}
    assert interleaved_ms(asleep, 1, num_threads=1)["asleep"][0] < 40
    assert interleaved_ms(asleep, 1, num_threads=2)["asleep"][0] >= 50
    assert [measure.clock_name(number) for number in (1, 2)] == ["cpu", "wall"]


def test_preparing_and_cooling_are_not_timed() -> None:
    contender = Contender(call=lambda: None, prepare=lambda: time.sleep(0.03))
    samples = interleaved_ms({"a": contender}, 2, num_threads=2, cold=lambda: time.sleep(0.03))
    assert max(samples["a"]) < 20


def test_a_kept_heap_is_kept_once_and_handed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self) -> None:
            self.asked: list[tuple[int, ...]] = []

        def mallopt(self, option: int, value: int) -> int:
            self.asked.append((option, value))
            return 1

        def malloc_trim(self, pad: int) -> int:
            self.asked.append((pad,))
            return 1

    library = Library()
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(measure, "can_keep_heap", lambda: True)
    kept = [(-4, 0), (-1, -1)]  # no mmap, no trimming
    with measure.kept_heap():
        assert library.asked == kept
        with measure.kept_heap():
            pass
        assert library.asked == kept
        interleaved_ms({}, 1)
        assert library.asked == kept
    handed_back = [(-4, 65536), (-3, 32 << 20), (-1, 64 << 20), (0,)]
    assert library.asked == kept + handed_back
    with pytest.raises(KeyError), measure.kept_heap():
        raise KeyError
    assert library.asked == 2 * (kept + handed_back)
    monkeypatch.setattr(measure, "can_keep_heap", lambda: False)
    with measure.kept_heap():  # another C library: nothing is asked, result files say so
        pass
    assert len(library.asked) == 2 * len(kept + handed_back)


@pytest.mark.skipif(not measure.can_keep_heap(), reason="needs glibc")
def test_memory_freed_on_a_kept_heap_stays_with_the_process() -> None:
    size = 1 << 26  # beyond what glibc would ever keep
    with measure.kept_heap():
        for _ in range(2):
            torch.ones(size, dtype=torch.uint8)
        kept = memory.resident_bytes()
    assert memory.resident_bytes() <= kept - size // 2


@pytest.mark.skipif(not measure.can_keep_heap(), reason="needs glibc")
def test_freed_memory_is_returned_even_from_a_kept_heap() -> None:
    size = 1 << 26
    with measure.kept_heap():
        torch.ones(size, dtype=torch.uint8)
        kept = memory.resident_bytes()
        measure.return_freed_memory()
        assert memory.resident_bytes() <= kept - size // 2


def test_a_heap_that_is_not_glibcs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "can_keep_heap", lambda: False)
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: pytest.fail("asked a library"))
    measure.return_freed_memory()


def test_rounds_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds: got 0, allowed: an int >= 1"):
        interleaved_ms({}, 0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_quantiles_lie_in_order_among_the_samples(samples: list[float]) -> None:
    median, p20, p80 = quantiles(samples)
    slack = 1e-12 * max(samples)  # of interpolating between equal numbers
    assert min(samples) - slack <= p20 <= median + slack
    assert median - slack <= p80 <= max(samples) + slack


def test_quantiles_of_known_samples() -> None:
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 2.0, 5.0)
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_threads_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads: got 0"), threads(0):
        pass


def test_rates_of_the_machine_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "READ_BYTES", 1 << 22)
    assert 0 < measure.read_gb_per_s(1) < float("inf")
    assert 0 < measure.int8_gmac_per_s(1) < float("inf")


def test_cold_caches_read_more_than_the_largest_cache() -> None:
    cold = ColdCaches()
    assert cold._words.numel() * 8 >= 2 * measure.last_level_cache_bytes() - 8
    cold()
    assert ColdCaches(64)._words.numel() == 8


# ---- memory


def test_what_fits_is_let_through_and_what_does_not_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 10 * 10**9)
    memory.require_memory("tokens", 8192, 9 * 10**9)
    message = r"tokens: got 1048576, which needs 9\.1 GB, allowed: 9\.0 GB"
    with pytest.raises(ValueError, match=message):
        memory.require_memory("tokens", 1 << 20, 9_100_000_000)


def test_where_the_system_does_not_say_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    memory.require_memory("tokens", 1, 1 << 60)


def test_resident_memory_grows_with_what_is_touched() -> None:
    before = memory.resident_bytes()
    held = torch.ones(1 << 26, dtype=torch.uint8)  # beyond what a heap reuses
    assert memory.resident_bytes() >= before + (1 << 25)
    assert held.numel()


# ---- bisection


@given(low=st.integers(0, 100), width=st.integers(0, 200), edge=st.integers(-10, 320))
def test_fewest_is_the_first_that_is_enough(low: int, width: int, edge: int) -> None:
    asked: list[int] = []

    def enough(budget: int) -> bool:
        asked.append(budget)
        return budget >= edge

    found = fewest(low, low + width, enough)
    assert found == min(max(edge, low), low + width)
    assert len(asked) <= 8 and low + width not in asked


def test_fewest_needs_a_range() -> None:
    with pytest.raises(ValueError, match="low: got 3, allowed: at most high = 2"):
        fewest(3, 2, bool)
