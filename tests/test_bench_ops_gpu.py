"""Ops alone as on a GPU: which take part, several layers, who is left out, what is refused."""

from __future__ import annotations

import dataclasses

import pretend_gpu
import pytest
from bench_sizes import ROW_BYTES, SHAPE

from kvselect.bench import ops, single_ops
from kvselect.bench.contenders import DisagreementError
from kvselect.bench.layer import Shape
from kvselect.bench.ops import OpsRequest
from kvselect.bench.results import Skipped

pytestmark = pytest.mark.usefixtures("small_reads")

TOKENS = 4096
LISTS = {f"attention, {kind}" for kind in ("random list of 2688 tokens", "latest 2688 tokens")}
EVERYTHING = {"scan int4", "scan exact keys", "select", "dense attention"} | LISTS


def request(**settings: object) -> OpsRequest:
    usual: dict[str, object] = {"tokens": (TOKENS,), "shape": SHAPE, "topk": 64, "rounds": 2}
    return OpsRequest(**(usual | {"gpu_ops": True, "layers": 2} | settings))  # type: ignore[arg-type]


def test_ops_of_two_layers(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row.op: row for row in ops.run(request())}
    assert rows.keys() == EVERYTHING
    for row in rows.values():
        assert row.int8_gmac_per_s is None and row.limit == "bandwidth"
        assert row.share_of_limit == pytest.approx(row.timing.floor_ms / row.timing.median_ms)
    for name in LISTS:
        assert rows[name].timing.bytes_must_read == 2 * ROW_BYTES * 2688
        assert rows[name].output_error <= 1e-5
    assert rows["scan int4"].timing.bytes_must_read == 2 * (32 // 2 + 1) * TOKENS
    ops.show(request(), list(rows.values()))
    text = capsys.readouterr().out
    assert "int8 products" not in text and all(name in text for name in EVERYTHING)


def test_a_gather_of_16k_where_there_are_so_many() -> None:
    found = single_ops.gpu_ops(SHAPE, 16384, 64, 0)
    assert "attention, random list of 16384 tokens" in found
    assert found["attention, random list of 16384 tokens"].error() <= 1e-5


def test_graphs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu.install(monkeypatch)
    for row in ops.run(request()):
        assert row.timing.samples_ms == [0.25, 0.25] and row.timing.not_captured == ""
        assert row.timing.clock == "events"


def test_an_op_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> object:
        raise ValueError("score_tokens: got CUDA tensors, allowed: tensors on the CPU")

    monkeypatch.setattr(single_ops, "score_tokens", fails)
    skipped: list[Skipped] = []
    rows = ops.run(request(rounds=1), on_skip=skipped.append)
    assert {row.op for row in rows} == LISTS | {"dense attention"}
    assert {one.contender for one in skipped} == {"scan int4", "scan exact keys", "select"}
    assert {one.reason[:24] for one in skipped} == {"ValueError: score_tokens"}
    with pytest.raises(ValueError, match="score_tokens: got CUDA tensors"):
        ops.run(request(rounds=1))


def test_an_op_that_is_off_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = single_ops.attention_over
    monkeypatch.setattr(single_ops, "attention_over", lambda *args: 1.1 * real(*args))
    skipped: list[Skipped] = []
    rows = ops.run(request(rounds=1), on_skip=skipped.append)
    assert {row.op for row in rows} == {"scan int4", "scan exact keys", "select"}
    assert {one.reason[:17] for one in skipped} == {"DisagreementError"}
    with pytest.raises(DisagreementError):
        ops.run(request(rounds=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers: got 0, allowed: an int >= 1"),
        ({"shape": dataclasses.replace(SHAPE, batch=2)}, r"batch: got 2, allowed: 1 \(ops alone\)"),
    ],
)
def test_requests_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.check(request(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": (2,)}, r"threads: got \(2,\), allowed: \(1,\) on a GPU"),
        ({"gpu_ops": False}, "gpu_ops: got False, allowed: True on a GPU"),
        ({"shape": Shape(), "tokens": (1 << 20,)}, "tokens: got 1048576, which needs .* GB"),
    ],
)
def test_a_gpu_is_asked_only_what_it_does(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], message: str
) -> None:
    pretend_gpu.install(monkeypatch)
    with pytest.raises(ValueError, match=message):
        ops.check(request(**settings))
