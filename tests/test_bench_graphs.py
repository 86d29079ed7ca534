"""What benches do on a GPU, on one that pretends: capture, replay, flush, fall back, report."""

from __future__ import annotations

from types import SimpleNamespace

import pretend_gpu
import pytest
import torch
from bench_sizes import SHAPE
from pretend_gpu import PretendGraph

from kvselect.bench import graphs
from kvselect.bench.graphs import as_reason, capture, copy_gb_per_s, interleaved_replays
from kvselect.bench.measure import Contender
from kvselect.bench.memory import free_device_bytes, require_cuda


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu.install(monkeypatch)


@pytest.mark.usefixtures("gpu")
def test_a_contender_is_captured_and_its_replay_compared() -> None:
    calls: list[str] = []

    def call() -> torch.Tensor:
        calls.append("call")
        return torch.ones(3)

    found = capture(Contender(call=call, prepare=lambda: calls.append("prepare")), 1e-3)
    assert found.not_captured == "" and isinstance(found.graph, PretendGraph)
    assert PretendGraph.replays == 1
    pair = ["prepare", "call"]
    assert calls == pair * (graphs.WARM_UPS + 1) + ["prepare"]


@pytest.mark.usefixtures("gpu")
def test_a_replay_that_differs_is_not_timed_as_a_graph() -> None:
    values = iter((1.0, 1.0, 1.5))
    found = capture(Contender(call=lambda: [torch.full((2,), next(values))]), 1e-3)
    assert found.graph is None
    assert found.not_captured == "its replay is 5.0e-01 from its eager call"


def test_what_cannot_be_captured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu.install(monkeypatch, capturable=lambda: False)
    call = Contender(call=lambda: torch.ones(1))
    samples = interleaved_replays({"eager": call}, 2, cold=lambda: None, bound=1.0)
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert samples["eager"] == ([0.5, 0.5], samples["eager"].wall_ms, reason)
    assert len(samples["eager"].wall_ms) == 2 and PretendGraph.replays == 0


@pytest.mark.usefixtures("gpu")
def test_contenders_take_turns_prepared_and_flushed() -> None:
    order: list[str] = []

    def contender(name: str) -> Contender:
        return Contender(call=lambda: torch.ones(1), prepare=lambda: order.append(name))

    told: list[str] = []
    samples = interleaved_replays(
        {"a": contender("a"), "b": contender("b")},
        3,
        cold=lambda: order.append("cold"),
        bound=1.0,
        on_call=told.append,
    )
    assert told == ["a", "b"] * 3
    assert order[-8:] == ["a", "cold", "a", "cold", "b", "cold", "b", "cold"]
    assert {name: len(found.event_ms) for name, found in samples.items()} == {"a": 3, "b": 3}
    few = interleaved_replays(
        {"a": contender("a")}, 9, cold=lambda: None, bound=1.0, max_seconds=0.0
    )
    assert len(few["a"].event_ms) == 1
    with pytest.raises(ValueError, match="rounds: got 0, allowed: an int >= 1"):
        interleaved_replays({}, 0, cold=lambda: None, bound=1.0)


@pytest.mark.usefixtures("gpu")
def test_who_fails_takes_nobody_with_it() -> None:
    def fails() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    both = {"a": Contender(call=fails), "b": Contender(call=lambda: torch.ones(1))}
    told: list[str] = []
    samples = interleaved_replays(
        both,
        2,
        cold=lambda: None,
        bound=1.0,
        on_fail=lambda name, error: told.append(f"{name}: {as_reason(error)}"),
    )
    assert list(samples) == ["b"] and told == ["a: OutOfMemoryError: CUDA out of memory"]
    with pytest.raises(torch.OutOfMemoryError):
        interleaved_replays(both, 2, cold=lambda: None, bound=1.0)


@pytest.mark.usefixtures("gpu")
def test_bandwidth_counts_both_directions() -> None:
    assert copy_gb_per_s(torch.device("cpu")) == pytest.approx(2 * (1 << 16) / 0.5e-3 / 1e9)


@pytest.mark.usefixtures("gpu")
def test_flushes_are_larger_than_l2() -> None:
    cold = graphs.ColdL2(torch.device("cpu"))
    cold()
    assert cold._words.nbytes == 4 << 16


@pytest.mark.parametrize(
    ("l2_mib", "tokens", "layers"), [(60, 8192, 29), (60, 131072, 8), (9000, 128, 32)]
)
def test_layers_are_more_than_l2_holds(
    monkeypatch: pytest.MonkeyPatch, l2_mib: int, tokens: int, layers: int
) -> None:
    pretend_gpu.install(monkeypatch)
    properties = SimpleNamespace(L2_cache_size=l2_mib << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    shape = graphs.Shape()
    assert graphs.layers_beyond_l2(shape, tokens) == layers


def test_without_a_gpu_two_layers() -> None:
    assert graphs.layers_beyond_l2(SHAPE, 1024) == 2


def test_a_gpu_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: got 'cuda', allowed: cpu, or one of the 0 GPUs"):
        require_cuda("cuda")
    pretend_gpu.install(monkeypatch)
    require_cuda("cuda:0")
    assert free_device_bytes("cuda") == 8 << 30
    with pytest.raises(ValueError, match="device: got 'cuda:1', allowed: cpu, or one of the 1 GPU"):
        require_cuda("cuda:1")


def test_reasons_are_one_line() -> None:
    assert as_reason(ValueError("a\nb")) == "ValueError: a"
    assert as_reason(MemoryError()) == "MemoryError: no message"
