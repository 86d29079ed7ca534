"""A prefill bench at tiny sizes: every contender computes the chunk, and is scaled by its heads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench_sizes import ROW_BYTES, SHAPE
from torch import Tensor

from kvselect.bench import prefill
from kvselect.bench.contenders import DisagreementError
from kvselect.bench.entrants import DENSE_KERNEL, OUR_DENSE, SELECT_INT4
from kvselect.bench.prefill import MASKED, MATMUL, TORCH, UNMASKED, PrefillRequest, PrefillRow
from kvselect.bench.watch import REST

pytestmark = pytest.mark.usefixtures("small_reads")

TOKENS, CHUNK = 2048, 300


def request(**settings: object) -> PrefillRequest:
    fields: dict[str, object] = {"tokens": (TOKENS,), "shape": SHAPE, "topk": 64, "rounds": 2}
    return PrefillRequest(**(fields | {"chunk_tokens": CHUNK} | settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rows() -> dict[str, PrefillRow]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvselect.bench.measure.READ_BYTES", 1 << 20)
        return {row.contender: row for row in prefill.run(request())}


def test_everybody_takes_part_and_says_how_many_heads_were_timed(
    rows: dict[str, PrefillRow],
) -> None:
    assert set(rows) == {MASKED, UNMASKED, MATMUL, OUR_DENSE, SELECT_INT4, DENSE_KERNEL}
    for name, row in rows.items():
        ours = name in (SELECT_INT4, DENSE_KERNEL)
        assert (row.timed_kv_heads, row.num_kv_heads) == ((2 if ours else 1), 2)
        assert row.output_error <= 1e-5 and row.chunk_tokens == CHUNK


def test_dense_forms_keep_everything_and_ours_says_what(rows: dict[str, PrefillRow]) -> None:
    for name in (MASKED, UNMASKED, MATMUL, OUR_DENSE):
        assert rows[name].kept_mass == pytest.approx(1.0)
        assert rows[name].attended_tokens == TOKENS
    ours = rows[SELECT_INT4]
    assert 0.1 < ours.kept_mass < 1.0 and 64 + 640 <= ours.attended_tokens < TOKENS


def test_bytes_and_ratios_are_arithmetic(rows: dict[str, PrefillRow]) -> None:
    for name, row in rows.items():
        if name not in (SELECT_INT4, DENSE_KERNEL):
            assert row.timing.bytes_must_read == 2 * ROW_BYTES * TOKENS
            pairs = sum(range(TOKENS - CHUNK + 1, TOKENS + 1))
            gmac = 2 * pairs * SHAPE.num_q_heads * SHAPE.head_dim / row.timing.median_ms / 1e6
            assert row.gmac_per_s == pytest.approx(gmac)
        ms = {peer: rows[peer].timing.median_ms for peer in TORCH}
        for peer in TORCH:
            assert row.over[peer] == pytest.approx(ms[peer] / row.timing.median_ms)
        best_sdpa = min(ms[MASKED], ms[UNMASKED])
        assert row.over_best_sdpa == pytest.approx(best_sdpa / row.timing.median_ms)
        assert row.over_best_torch == pytest.approx(min(ms.values()) / row.timing.median_ms)
    ours = rows[SELECT_INT4]
    lists = 2 * ROW_BYTES * ours.attended_tokens * -(-CHUNK // 128)
    assert ours.timing.bytes_must_read == int(34 * TOKENS + lists) and ours.gmac_per_s is None


def test_our_stages_are_named(rows: dict[str, PrefillRow]) -> None:
    stages = rows[SELECT_INT4].stages_ms
    assert {"append and sketch", "scan", "select", "attention", REST} <= set(stages)
    assert all(ms >= 0 for ms in stages.values())
    assert not rows[OUR_DENSE].stages_ms
    assert stages.keys() | {"gather"} == rows[DENSE_KERNEL].stages_ms.keys()


def test_both_ways_to_attend_lists_take_part_and_are_named(rows: dict[str, PrefillRow]) -> None:
    ours, copying = rows[SELECT_INT4], rows[DENSE_KERNEL]
    assert (ours.attention, copying.attention) == ("sparse_attention", "sdpa")
    assert rows[OUR_DENSE].attention is None
    assert ours.attended_tokens == copying.attended_tokens
    assert ours.kept_mass == copying.kept_mass


def test_all_heads_threads_and_progress() -> None:
    told: list[float] = []
    asked = request(dense_kv_heads=5, threads=(1, 2), rounds=1)
    found = prefill.run(asked, lambda what, amount: told.append(amount))
    assert {row.timed_kv_heads for row in found} == {2}
    assert {(row.timing.threads, row.timing.clock) for row in found} == {(1, "cpu"), (2, "wall")}
    assert sum(told) == pytest.approx(1.0)


def test_times_of_some_heads_are_scaled_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_told(contenders: dict[str, object], rounds: int, **_: object) -> dict[str, list[float]]:
        return {name: [3.0] * rounds for name in contenders}

    monkeypatch.setattr(prefill, "interleaved_ms", as_told)
    found = {row.contender: row for row in prefill.run(request())}
    assert found[MASKED].timing.samples_ms == [6.0, 6.0]
    assert found[SELECT_INT4].timing.samples_ms == [3.0, 3.0]


def test_nothing_is_timed_when_an_output_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prefill.scaled_dot_product_attention

    def off(*arguments: Tensor, **more: object) -> Tensor:
        out: Tensor = real(*arguments, **more)  # type: ignore[arg-type]
        return out + 1e-3 * torch.randn_like(out)

    monkeypatch.setattr(prefill, "scaled_dot_product_attention", off)
    with pytest.raises(DisagreementError, match=f"{MASKED}, {TOKENS} tokens: got an output"):
        prefill.run(request())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens: got 0, allowed: an int >= 1"),
        ({"dense_kv_heads": 0}, "dense_kv_heads: got 0, allowed: an int >= 1"),
        ({"tokens": (CHUNK,)}, "tokens: got 300, allowed: an int >= 301"),
    ],
)
def test_requests_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefill.run(request(**settings))


def test_more_than_fits_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvselect.bench.memory.free_bytes", lambda: 4 << 30)
    prefill.check(request())
    with pytest.raises(ValueError, match=r"tokens: got 16777216, which needs"):
        prefill.check(request(tokens=(1 << 24,)))


def test_the_table_shows_stages(
    rows: dict[str, PrefillRow], capsys: pytest.CaptureFixture[str]
) -> None:
    prefill.show(request(), [*rows.values()])
    text = capsys.readouterr().out
    assert all(name in text for name in rows)
    assert "prefill chunk of 300 queries at 2048 tokens" in text and "1 of 2" in text
    assert f"{SELECT_INT4}: append and sketch" in text


def test_a_chunk_as_long_as_one_token() -> None:
    found = prefill.run(dataclasses.replace(request(), chunk_tokens=1, rounds=1))
    assert all(row.output_error <= 1e-5 for row in found)
