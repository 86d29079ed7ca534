"""A decode bench at tiny sizes: who takes part, which bytes count, what is compared and drawn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from bench_sizes import ROW_BYTES, SHAPE

from kvselect import TokenSelect
from kvselect.bench import decode, entrants, picture, results
from kvselect.bench.contenders import (
    ENABLE_GQA,
    FOLDED,
    MATMUL,
    TORCH_DENSE,
    TORCH_TOKEN_SELECT,
    DisagreementError,
)
from kvselect.bench.decode import PERFECT_DENSE, DecodeRequest, DecodeRow
from kvselect.bench.entrants import (
    OUR_DENSE,
    QUEST,
    SELECT_EXACT,
    SELECT_INT4,
    SELECT_INT8,
    STREAMING,
)
from kvselect.policies.base import policy_from_dict
from kvselect.policies.dense import Dense

pytestmark = pytest.mark.usefixtures("small_reads")

TOKENS, TOPK, ENDS = 2048, 64, 128 + 512
EQUAL_MASS, EQUAL_TOKENS = f"{QUEST['kvselect']}, equal kept mass", "equal tokens"


def request(**settings: object) -> DecodeRequest:
    fields: dict[str, object] = {"tokens": (TOKENS,), "shape": SHAPE, "topk": TOPK, "rounds": 2}
    return DecodeRequest(**(fields | {"curves": (128, 256)} | settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rows() -> dict[str, DecodeRow]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvselect.bench.measure.READ_BYTES", 1 << 20)
        found = decode.run(request())
    assert len({row.contender for row in found}) == len(found)
    return {row.contender: row for row in found}


def test_everybody_takes_part(rows: dict[str, DecodeRow]) -> None:
    main = {name for name, row in rows.items() if row.main}
    quests = {f"{QUEST[scorer]}, equal kept mass" for scorer in ("kvselect", "torch")}
    quests |= {f"{QUEST['kvselect']}, {EQUAL_TOKENS}"}
    ours = {SELECT_INT4, SELECT_INT8, SELECT_EXACT, STREAMING, OUR_DENSE}
    assert main == {*TORCH_DENSE, TORCH_TOKEN_SELECT, PERFECT_DENSE} | ours | quests
    methods = (SELECT_INT4, SELECT_INT8, SELECT_EXACT, STREAMING, TORCH_TOKEN_SELECT)
    points = {f"{name}, {budget}" for name in methods for budget in (128, 256)}
    points |= {f"{QUEST['kvselect']}, {budget}" for budget in (128, 256)}
    assert rows.keys() - main == points


def test_bytes_are_those_of_the_plan(rows: dict[str, DecodeRow]) -> None:
    # Per KV head 32 codes, and a step and a low (float16) per channel that 128 tokens share.
    sketch = {"int4": 2 * (32 // 2 + 1), "int8": 2 * (32 + 1)}
    int4, int8, exact = ENDS + 96, ENDS + TOPK, ENDS + TOPK  # 1.5 times topk for int4
    pages = TOKENS // 16 - 1
    expected = {
        **dict.fromkeys(TORCH_DENSE, 2 * ROW_BYTES * TOKENS),
        PERFECT_DENSE: 2 * ROW_BYTES * TOKENS,
        OUR_DENSE: 2 * ROW_BYTES * TOKENS,
        TORCH_TOKEN_SELECT: ROW_BYTES * (TOKENS + 2 * (ENDS + TOPK)),
        SELECT_INT4: sketch["int4"] * TOKENS + 2 * ROW_BYTES * int4,
        SELECT_INT8: sketch["int8"] * TOKENS + 2 * ROW_BYTES * int8,
        SELECT_EXACT: ROW_BYTES * TOKENS + 2 * ROW_BYTES * exact,
        STREAMING: 2 * ROW_BYTES * (ENDS + TOPK),
        f"{QUEST['kvselect']}, 256": 2 * ROW_BYTES * pages + 2 * ROW_BYTES * 256,
    }
    found = {name: rows[name].timing.bytes_must_read for name in expected}
    assert found == expected


def test_ratios_are_those_of_the_times(rows: dict[str, DecodeRow]) -> None:
    ms = {name: row.timing.median_ms for name, row in rows.items()}
    best = min(ms[name] for name in TORCH_DENSE)
    for name, row in rows.items():
        for peer in (ENABLE_GQA, FOLDED, MATMUL, TORCH_TOKEN_SELECT):
            assert row.over[peer] == pytest.approx(ms[peer] / ms[name])
        assert row.over_best_torch == pytest.approx(best / ms[name])
        assert row.over_perfect_dense == pytest.approx(ms[PERFECT_DENSE] / ms[name])
        bandwidth = row.timing.streaming_gb_per_s
        assert row.timing.floor_ms == pytest.approx(row.timing.bytes_must_read / bandwidth / 1e6)
        if name != PERFECT_DENSE:
            assert len(row.timing.samples_ms) == 2


def test_kept_mass_stands_beside_the_time(rows: dict[str, DecodeRow]) -> None:
    for name in (*TORCH_DENSE, OUR_DENSE, PERFECT_DENSE):
        assert (rows[name].kept_mass, rows[name].attended_tokens) == (1.0, TOKENS)
    chosen, quest = rows[SELECT_INT4], rows[EQUAL_MASS]
    assert chosen.kept_mass <= quest.kept_mass < chosen.kept_mass + 0.05
    assert rows[SELECT_EXACT].kept_mass == pytest.approx(rows[TORCH_TOKEN_SELECT].kept_mass)
    for name in (SELECT_INT4, SELECT_EXACT, STREAMING, TORCH_TOKEN_SELECT):
        small, large = rows[f"{name}, 128"], rows[f"{name}, 256"]
        assert 0.0 < small.kept_mass <= large.kept_mass < 1.0
        assert small.attended_tokens < large.attended_tokens


def test_outputs_are_those_of_float32(rows: dict[str, DecodeRow]) -> None:
    for name, row in rows.items():
        if name == PERFECT_DENSE:
            assert row.output_error is None
            continue
        assert row.output_error is not None and row.output_error <= 1e-5
        assert row.output_error_vs_dense is not None
        assert (row.output_error_vs_dense <= 1e-5) == (row.kept_mass == 1.0)


def test_the_sketch_is_weighed(rows: dict[str, DecodeRow]) -> None:
    assert rows[OUR_DENSE].sketch_over_kv is None and rows[SELECT_EXACT].sketch_over_kv is None
    share = rows[SELECT_INT4].sketch_over_kv
    assert share == pytest.approx(34 / (2 * ROW_BYTES))


def test_json_holds_every_row_and_the_policies(rows: dict[str, DecodeRow], tmp_path: Path) -> None:
    asked = request()
    path = results.save(tmp_path / "x.json", decode.QUESTION, decode.config(asked), rows.values())
    content = results.load(path)
    assert content["results"] == json.loads(json.dumps([results.as_row(r) for r in rows.values()]))
    policies = content["config"]["policies"]
    again = {name: policy_from_dict(settings) for name, settings in policies.items()}
    assert again == dict(asked.contestants)
    assert content["config"]["shape"] == dataclasses.asdict(SHAPE)


def test_curves_go_up_by_budget_and_leave_out_quest_set_equal(rows: dict[str, DecodeRow]) -> None:
    found = picture.curves(list(rows.values()))
    assert set(found) == {
        SELECT_INT4,
        SELECT_INT8,
        SELECT_EXACT,
        STREAMING,
        TORCH_TOKEN_SELECT,
        QUEST["kvselect"],
    }
    assert [budget for *_, budget in found[SELECT_INT4]] == [64, 128, 256]
    assert [budget for *_, budget in found[QUEST["kvselect"]]] == [128, 256]
    mass, ms, _ = found[SELECT_INT4][0]
    assert (mass, ms) == (rows[SELECT_INT4].kept_mass, rows[SELECT_INT4].timing.median_ms)


@pytest.mark.parametrize("lengths", [1, 2])
def test_a_picture_is_written(rows: dict[str, DecodeRow], tmp_path: Path, lengths: int) -> None:
    drawn = list(rows.values())
    if lengths == 2:
        drawn += [dataclasses.replace(row, tokens=2 * TOKENS) for row in rows.values()]
    odd = dataclasses.replace(rows[SELECT_INT4], method="somebody's own", contender="own")
    path = tmp_path / "deep" / "image.png"
    picture.draw([*drawn, odd], path, picture.subtitle(request()))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert picture.subtitle(request(threads=(2,))) == f"{SHAPE}, batch 1, 2 threads"


def test_labels_are_moved_apart() -> None:
    assert picture._apart([1.0, 1.1, 4.0], 1.5) == [1.0, 1.5, 4.0]


def test_the_table_shows_main_rows_only(
    rows: dict[str, DecodeRow], capsys: pytest.CaptureFixture[str]
) -> None:
    decode.show(request(), list(rows.values()))
    text = capsys.readouterr().out
    for name, row in rows.items():
        assert (name in text) == row.main, name
    assert "2048 tokens, 4/2 heads of 32, float32, 1 thread(s), CPU time" in text


def test_threads_curves_policies_and_slow_peers_can_be_chosen() -> None:
    told: list[tuple[str, float]] = []
    asked = request(
        tokens=(1024, 2048),
        threads=(1, 2),
        rounds=1,
        curves=(),
        slow_tokens=1024,
        policies={"mine": TokenSelect(topk=32, sketch="int8", dense_below_tokens=0)},
    )
    found = decode.run(asked, lambda what, amount: told.append((what, amount)))
    assert all(row.main for row in found)
    for tokens in (1024, 2048):
        for number in (1, 2):
            here = [r for r in found if r.tokens == tokens and r.timing.threads == number]
            names = {row.contender for row in here}
            assert "mine" in names and SELECT_INT4 not in names and EQUAL_MASS in names
            assert (ENABLE_GQA in names) == (tokens == 1024)
            assert all(ENABLE_GQA in row.over for row in here) == (tokens == 1024)
            assert {row.timing.clock for row in here} == {"cpu" if number == 1 else "wall"}
    assert sum(amount for _, amount in told) == pytest.approx(1.0)


def test_without_a_method_that_selects_there_is_no_quest() -> None:
    found = decode.run(request(policies={"all": Dense()}, rounds=1))
    assert not [row for row in found if row.method in QUEST.values()]


def test_a_head_dim_that_kvselect_cannot_double_leaves_quest_to_torch() -> None:
    shape = dataclasses.replace(SHAPE, head_dim=160)
    found = {row.contender for row in decode.run(request(shape=shape, rounds=1, curves=()))}
    assert f"{QUEST['torch']}, equal kept mass" in found and EQUAL_MASS not in found


def test_nothing_is_timed_when_an_output_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = entrants.dense_attention
    monkeypatch.setattr(entrants, "dense_attention", lambda name, *rest: real(name, *rest) * 1.01)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(decode, "interleaved_ms", never)
    message = f"{ENABLE_GQA}, {TOKENS} tokens: got an output 1.0e-02 from float32, allowed: 1.0e-05"
    with pytest.raises(DisagreementError, match=message):
        decode.run(request())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": (47,)}, "tokens: got 47, allowed: an int >= 48"),
        ({"topk": 0, "policies": {"all": Dense()}}, "topk: got 0, allowed: an int >= 1"),
        (
            {"policies": {"far": TokenSelect(positions="compact")}},
            "policy far: got 'compact', allowed: positions='original'",
        ),
    ],
)
def test_requests_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode.run(request(**settings))


def test_more_than_fits_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvselect.bench.memory.free_bytes", lambda: 4 << 30)
    decode.check(request())
    with pytest.raises(ValueError, match=r"tokens: got 16777216, which needs .* GB, allowed: 3.9"):
        decode.check(request(tokens=(1 << 24,)))


def test_caches_are_those_that_the_policies_need() -> None:
    assert request().sketches == ("int4", "int8", None)
    assert request(policies={"all": Dense()}).sketches == (None,)
    few = request(policies={"all": Dense()}, slow_tokens=0)
    assert decode.needed_bytes(few, 1 << 20) < decode.needed_bytes(request(), 1 << 20)
    gap = decode.needed_bytes(request(slow_tokens=1 << 30), 1 << 20)
    assert gap >= decode.needed_bytes(few, 1 << 20)


def test_what_is_kept_is_measured_exactly() -> None:
    from kvselect.bench.layer import StructuredLayer

    layer, cache = StructuredLayer(SHAPE), SHAPE.new_cache(1024, None)
    layer.fill([cache], 1024)
    q = layer.query(layer.draw_query(), cache)[0]
    peer = entrants.TorchTokenSelect(cache.k.transpose(1, 2), cache.v.transpose(1, 2), 4, 16)
    selection = peer.selection(q, 100)
    mass, attended = entrants.kept(q, cache, selection)
    logits = torch.einsum("ghd,tgd->ght", q.view(2, 2, 32).double(), cache.k[0].double()) / 32**0.5
    weights = torch.softmax(logits, -1)
    expected = torch.stack(
        [weights[g][:, selection.indices[0, g, :120].long()].sum(-1) for g in range(2)]
    )
    assert attended == 120 and mass == pytest.approx(float(expected.mean()), rel=1e-5)
    assert entrants.kept(q, cache, None) == (1.0, 1024.0)
