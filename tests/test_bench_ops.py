"""Single ops at tiny sizes: floors, limits, and a check that can fail for each."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench_sizes import ROW_BYTES, SHAPE

from kvselect.bench import ops, single_ops
from kvselect.bench.contenders import DisagreementError
from kvselect.bench.ops import OpRow, OpsRequest
from kvselect.bench.single_ops import DENSE, HIT, SCAN, STEP, listed_tokens

pytestmark = pytest.mark.usefixtures("small_reads")

TOKENS, TOPK = 2048, 64
LISTS = ("attention, selected list", "attention, random list", "attention, latest tokens")


def request(**settings: object) -> OpsRequest:
    fields: dict[str, object] = {"tokens": (TOKENS,), "shape": SHAPE, "topk": TOPK, "rounds": 2}
    return OpsRequest(**(fields | settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rows() -> dict[str, OpRow]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvselect.bench.measure.READ_BYTES", 1 << 20)
        patch.setattr("kvselect.bench.measure.PRODUCT_SIZE", 64)
        return {row.op: row for row in ops.run(request())}


def test_every_op_is_there_with_its_bytes(rows: dict[str, OpRow]) -> None:
    listed = 128 + 512 + 96
    assert listed_tokens(TOPK) == listed
    append = 4 * ROW_BYTES + 34
    assert {name: row.timing.bytes_must_read for name, row in rows.items()} == {
        "append 1 token": append,
        "append 2048 tokens": 2048 * append,
        SCAN["int4"]: 34 * TOKENS,
        SCAN["int8"]: 66 * TOKENS,
        SCAN[None]: ROW_BYTES * TOKENS,
        "select": 4 * 2 * TOKENS,
        **dict.fromkeys(LISTS, 2 * ROW_BYTES * listed),
        DENSE: 2 * ROW_BYTES * TOKENS,
        STEP: 34 * TOKENS + 2 * ROW_BYTES * listed,
        HIT: 2 * ROW_BYTES * listed,
    }


def test_limits_are_the_slower_of_bytes_and_products(rows: dict[str, OpRow]) -> None:
    for name, row in rows.items():
        limits = {"bandwidth": row.timing.floor_ms}
        if name in (SCAN["int4"], SCAN["int8"]):
            macs = SHAPE.num_q_heads * SHAPE.head_dim * TOKENS
            limits["int8 products"] = macs / row.int8_gmac_per_s / 1e6
            assert row.gmac_per_s == pytest.approx(macs / row.timing.median_ms / 1e6)
        assert row.limit == max(limits, key=lambda limit: limits[limit])
        assert row.share_of_limit == pytest.approx(limits[row.limit] / row.timing.median_ms)


def test_stored_bits_agree_and_scans_are_as_near_as_their_sketch(rows: dict[str, OpRow]) -> None:
    assert rows["append 1 token"].output_error == rows["append 2048 tokens"].output_error == 0.0
    assert rows[SCAN["int8"]].output_error < rows[SCAN["int4"]].output_error < 0.3
    for name in (SCAN[None], *LISTS, DENSE, STEP, HIT):
        assert rows[name].output_error <= 2e-5, name


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("score_tokens", SCAN["int4"]),
        ("sparse_attention", LISTS[0]),
        ("encode", "append 1 token"),
        ("decode_step", STEP),
    ],
)
def test_nothing_is_timed_when_an_op_is_off(
    monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    real = getattr(single_ops, name)

    def off(*arguments: object, **more: object) -> object:
        out = real(*arguments, **more)
        if name == "encode":
            return out + 1
        if isinstance(out, tuple):
            return (out[0] * 1.5, *out[1:])
        return out * 1.5

    monkeypatch.setattr(single_ops, name, off)
    with pytest.raises(DisagreementError, match=f"{what}, {TOKENS} tokens: got an output"):
        ops.run(request())


def test_a_selection_that_keeps_less_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = single_ops.select_tokens

    def worse(scores: torch.Tensor, *rest: object, **more: object) -> object:
        return real(scores, *rest, **(more | {"topk": TOPK - 1}))  # type: ignore[arg-type]

    monkeypatch.setattr(single_ops, "select_tokens", worse)
    with pytest.raises(DisagreementError, match=f"select, {TOKENS} tokens"):
        ops.run(request())


def test_threads_lengths_and_progress() -> None:
    told: list[float] = []
    asked = request(tokens=(1024, 2048), threads=(1, 2), rounds=1)
    found = ops.run(asked, lambda what, amount: told.append(amount))
    assert {(row.tokens, row.timing.threads) for row in found} == {
        (tokens, number) for tokens in (1024, 2048) for number in (1, 2)
    }
    assert sum(told) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": (863,)}, "tokens: got 863, allowed: an int >= 864"),
        ({"rounds": 0}, "rounds: got 0, allowed: an int >= 1"),
    ],
)
def test_requests_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.run(request(**settings))


def test_more_than_fits_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvselect.bench.memory.free_bytes", lambda: 4 << 30)
    ops.check(request())
    with pytest.raises(ValueError, match="tokens: got 16777216, which needs"):
        ops.check(request(tokens=(1 << 24,)))


def test_the_shortest_length_runs() -> None:
    found = ops.run(request(tokens=(864,), rounds=1))
    assert len(found) == 12


def test_the_table_shows_every_op(
    rows: dict[str, OpRow], capsys: pytest.CaptureFixture[str]
) -> None:
    ops.show(request(), list(rows.values()))
    text = capsys.readouterr().out
    assert all(name in text for name in rows) and "bandwidth" in text
    assert "ops, 2048 tokens, 4/2 heads of 32, float32, 1 thread(s), CPU time" in text


def test_rows_are_flat_in_json(rows: dict[str, OpRow]) -> None:
    from kvselect.bench.results import as_row

    flat = as_row(rows[DENSE])
    assert flat["median_ms"] == rows[DENSE].timing.median_ms and "timing" not in flat
    assert set(flat) >= {field.name for field in dataclasses.fields(OpRow)} - {"timing"}
