"""attach and the break-even: who measures when, what layers then do, what the report says."""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from test_hf_attach import error, fingerprint, logits_of
from transformers import DynamicCache

from kvselect import Dense, TokenSelect, attach, break_even, crossovers
from kvselect.crossovers import Crossover, Point, Workload

SIZES = (4, 2, 32, torch.float32)  # of the tiny models
BORDER = 70


@pytest.fixture(autouse=True)
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSELECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KVSELECT_BREAK_EVEN")
    monkeypatch.setattr(crossovers, "_known", crossovers._Known())
    monkeypatch.setattr(crossovers, "_said", set())


def answer(policy: TokenSelect, tokens: int | None = BORDER, **workload: Any) -> Crossover:
    sizes = workload or dict(zip(("q", "kv", "dim", "dtype"), SIZES))
    return Crossover(
        machine=crossovers.machine_identity(),
        workload=Workload.of(policy.to_dict(), *sizes.values()),
        tokens=tokens,
        extrapolated=False,
        points=(Point(60, 2.0, 3.0, 0.01), Point(90, 3.0, 1.0, 0.01)),
        measured_at="2026-01-02T03:04:05+00:00",
        seconds=1.0,
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[TokenSelect]:
    """Policies that were measured; nothing is timed."""
    asked: list[TokenSelect] = []

    def measure(policy: TokenSelect, **workload: Any) -> Crossover:
        asked.append(policy)
        return answer(policy, **workload)

    monkeypatch.setattr(break_even, "measure", measure)
    return asked


def dense_steps(handle: Any, prompt: int = 60, steps: int = 20) -> tuple[int, ...]:
    """Dense decode steps of each layer, of ``steps`` at prompt + 1 and longer."""
    ids, new = hf_models.tokens(1, prompt), hf_models.tokens(1, steps, seed=1)
    before = [layer.decode["num_dense_calls"] for layer in handle.report().layers]
    logits_of(handle.model, ids, new)
    after = [layer.decode["num_dense_calls"] for layer in handle.report().layers]
    return tuple(int(a) - int(b) for a, b in zip(after, before))  # type: ignore[arg-type]


# --- who measures ---------------------------------------------------------------------------------


def test_attach_measures_once_for_all_layers_and_every_later_attach(
    measured: list[TokenSelect], tmp_path: Path
) -> None:
    policy = hf_models.narrow()
    for _ in range(2):
        with attach(hf_models.model("llama"), policy) as handle:
            assert dense_steps(handle) == (10, 10, 10)  # 61 .. 70 of 61 .. 80
            assert handle.policy is policy and handle.policy.dense_below_tokens is None
    assert measured == [policy]
    assert len(list((tmp_path / "cache" / "crossovers").iterdir())) == 1
    with attach(hf_models.model("llama"), hf_models.narrow(topk=9)) as handle:
        assert dense_steps(handle) == (10, 10, 10)
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("keyword", "environment", "measures", "uses"),
    [
        (None, None, True, True),
        (None, "auto", True, True),
        (None, "stored", False, True),
        (None, "off", False, False),
        ("auto", "off", True, True),
        ("stored", "off", False, True),
        ("off", "auto", False, False),
    ],
)
def test_keyword_before_environment_before_auto(
    keyword: str | None,
    environment: str | None,
    measures: bool,
    uses: bool,
    measured: list[TokenSelect],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if environment is not None:
        monkeypatch.setenv("KVSELECT_BREAK_EVEN", environment)
    policy = hf_models.narrow()
    with attach(hf_models.model("llama"), policy, break_even=keyword) as handle:
        assert len(measured) == measures
        assert dense_steps(handle) == ((10,) * 3 if measures else (0,) * 3)
    crossovers.save(answer(policy))
    with attach(hf_models.model("llama"), policy, break_even=keyword) as handle:
        assert len(measured) == measures
        assert dense_steps(handle) == ((10,) * 3 if uses else (0,) * 3)


@pytest.mark.parametrize(
    "policy",
    [
        Dense(),
        hf_models.narrow(dense_below_tokens=0),
        hf_models.narrow(dense_below_tokens=65),
        hf_models.narrow(dense_layers=(0, 1, 2)),
    ],
    ids=repr,
)
def test_nothing_is_measured_where_nothing_depends_on_it(
    policy: Any, measured: list[TokenSelect]
) -> None:
    with attach(hf_models.model("llama"), policy) as handle:
        steps = dense_steps(handle)
    assert measured == []
    if getattr(policy, "dense_below_tokens", None) == 65:
        assert steps == (5, 5, 5)


def test_the_workload_is_what_calibration_saw(measured: list[TokenSelect]) -> None:
    settings = hf_models.config("llama", num_hidden_layers=2)
    model = hf_models.build(settings, dtype=torch.bfloat16)
    with attach(model, hf_models.narrow("compact")) as handle:
        assert dense_steps(handle) == (10, 10)
    (found,) = crossovers.find_all()
    assert found.workload == Workload.of(
        hf_models.narrow("compact").to_dict(), 4, 2, 32, torch.bfloat16
    )
    assert [policy.positions for policy in measured] == ["compact"]


def test_a_failed_attach_measures_nothing_and_leaves_the_model(
    measured: list[TokenSelect],
) -> None:
    model = hf_models.model("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="break_even: got 'on', allowed: 'auto' or 'stored' or"):
        attach(model, hf_models.narrow(), break_even="on")
    with pytest.raises(ValueError, match="dense_layers: got"):
        attach(model, hf_models.narrow(dense_layers=(9,)))
    assert measured == [] and fingerprint(model) == before


def test_an_attach_that_cannot_measure_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(break_even, "measure", fail)
    model = hf_models.model("llama")
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        attach(model, hf_models.narrow())
    assert fingerprint(model) == before


def test_a_busy_machine_leaves_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TokenSelect] = []

    def busy(policy: TokenSelect, **workload: Any) -> Crossover:
        asked.append(policy)
        return dataclasses.replace(
            answer(policy, **workload), points=(Point(60, 2.0, 3.0, noise=0.9),)
        )

    monkeypatch.setattr(break_even, "measure", busy)
    with (
        pytest.warns(UserWarning, match="break-even not measured: other processes leave") as said,
        attach(hf_models.model("llama"), hf_models.narrow()) as handle,
    ):
        assert len(said) == 1 == len(asked)  # not once for each layer
        assert dense_steps(handle) == (0, 0, 0)
        assert "too busy to measure" in str(handle.report())


# --- what layers then do --------------------------------------------------------------------------


def test_below_the_crossover_logits_are_the_stock_ones(measured: list[TokenSelect]) -> None:
    """Prefill within the budget of 24, then dense steps up to 70: nothing is left out."""
    model = hf_models.model("llama")
    ids, new = hf_models.tokens(1, 24), hf_models.tokens(1, 40, seed=1)
    expected = logits_of(model, ids, new)
    for positions in hf_models.POSITIONS:
        with attach(model, hf_models.narrow(positions)):
            assert error(logits_of(model, ids, new), expected) <= 1e-5
        with attach(model, hf_models.narrow(positions), break_even="off"):
            assert error(logits_of(model, ids, new), expected) > 1e-3


def test_compact_positions_end_at_the_trained_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        break_even, "measure", lambda policy, **workload: answer(policy, 10**6, **workload)
    )
    model = hf_models.build(hf_models.config("llama", max_position_embeddings=66))
    policy = hf_models.narrow("compact", q_block_size=8, max_age=8)
    with attach(model, policy) as handle:
        assert dense_steps(handle, prompt=60, steps=12)[0] == 6
        assert handle.report().layers[0].dense_up_to == 66
        assert "66 tokens are dense (the trained length, compact positions)" in str(handle.report())


def test_threads_may_change_after_attach(measured: list[TokenSelect]) -> None:
    """What attach settled stays, whatever the machine looks like when the cache is made."""
    threads = torch.get_num_threads()
    with attach(hf_models.model("llama"), hf_models.narrow()) as handle:
        torch.set_num_threads(threads + 1)
        try:
            assert dense_steps(handle) == (10, 10, 10)
        finally:
            torch.set_num_threads(threads)


def test_a_cache_that_outlives_its_attachment_forgets_the_crossover(
    measured: list[TokenSelect],
) -> None:
    model, policy = hf_models.model("llama"), hf_models.narrow()
    cache = DynamicCache(config=model.config)
    for number, mode in enumerate(("auto", "off")):
        with attach(model, policy, break_even=mode) as handle, torch.no_grad():
            model(hf_models.tokens(1, 60 if number == 0 else 1), past_key_values=cache)
            model(hf_models.tokens(1, 1), past_key_values=cache)
            dense = handle.report().layers[0].decode["num_dense_calls"]
        assert dense == (1 if mode == "auto" else 0)


def test_calls_without_a_cache_go_by_the_rule_of_prefill(measured: list[TokenSelect]) -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 60)
    outs = []
    for mode in ("auto", "off"):
        with attach(model, hf_models.narrow(), break_even=mode), torch.no_grad():
            outs.append(model(ids, use_cache=False).logits)
    assert torch.equal(*outs)


def test_verify_passes_and_detach_restores(measured: list[TokenSelect]) -> None:
    model = hf_models.model("llama")
    before = fingerprint(model)
    handle = attach(model, hf_models.narrow())
    dense_steps(handle)
    report = str(handle.report())
    assert set(handle.verify().logit_error) == {"dense", "lists"}
    assert str(handle.report()) == report and len(measured) == 1
    handle.detach()
    assert fingerprint(model) == before


# --- what the report says -------------------------------------------------------------------------


def line(handle: Any) -> str:
    """The line on the border."""
    (found,) = [text for text in str(handle.report()).splitlines() if "steps of at most" in text]
    return found


def test_the_report_names_the_border_and_where_it_came_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = "decode steps of at most"

    def said(policy: TokenSelect, mode: str) -> str:
        with attach(hf_models.model("llama"), policy, break_even=mode) as handle:
            return line(handle)

    policy = hf_models.narrow()
    budget = f"{start} 24 tokens are dense (the policy's budget"
    assert said(policy, "off") == f"{budget}: break_even='off')"
    assert said(policy, "stored") == (
        f"{budget}: no crossover is stored for this machine and workload)"
    )
    assert said(hf_models.narrow(dense_below_tokens=0), "off") == (
        f"{budget}, dense_below_tokens=0)"
    )
    assert said(hf_models.narrow(dense_below_tokens=99), "auto") == (
        f"{start} 99 tokens are dense (dense_below_tokens of the policy)"
    )
    how = "measured on this machine with 1 thread"
    day = "2026-01-02T03:04:05+00:00"
    for tokens, border, words in (
        (BORDER, BORDER, f"{how}, {day}"),
        (5, 24, f"{how}, {day}"),
        (None, 90, f"{how}, selecting won nowhere up to it, {day}"),
    ):
        crossovers.save(answer(policy, tokens))
        assert said(policy, "stored") == f"{start} {border} tokens are dense ({words})"
    crossovers.save(dataclasses.replace(answer(policy), extrapolated=True))
    assert said(policy, "stored") == f"{start} 70 tokens are dense ({how}, extrapolated, {day})"


def test_the_report_counts_dense_steps_and_goes_to_json(measured: list[TokenSelect]) -> None:
    with attach(hf_models.model("qwen2_mixed"), hf_models.narrow(dense_layers=(2,))) as handle:
        dense_steps(handle)
        report = handle.report()
    text = str(report)
    assert "selects; 10 of 20 steps dense: short" in text
    first, second, third = json.loads(json.dumps(report.to_dict()))["layers"]
    assert first["dense_up_to"] == BORDER
    assert first["dense_up_to_source"].startswith("measured on this machine")
    assert second["dense_up_to"] is third["dense_up_to"] is None
    assert first["decode"]["tokens_attended"] < first["decode"]["tokens_visible"]


def test_borders_that_differ_name_their_layers(measured: list[TokenSelect]) -> None:
    with attach(hf_models.model("llama"), hf_models.narrow()) as handle:
        handle._plan.layers[1].crossovers = {}
        handle._plan.layers[1].unmeasured = "break_even='off'"
        text = str(handle.report())
    assert "decode steps of at most 70 tokens are dense in layers 0, 2 (measured" in text
    assert "decode steps of at most 24 tokens are dense in layers 1 (the policy's budget" in text


def test_ranks_that_vote_together_follow_no_measurement(
    measured: list[TokenSelect], monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(plan: Any, config: object) -> None:
        plan.process_group = object()

    monkeypatch.setattr(import_module("kvselect.integrations.hf.attach"), "_join_ranks", join)
    with attach(hf_models.model("llama"), hf_models.narrow(scope="layer")) as handle:
        report = handle.report()
    assert measured == []
    assert {layer.dense_up_to for layer in report.layers} == {24}
    assert "ranks vote together" in str(report.layers[0].dense_up_to_source)


def test_other_methods_have_no_border(measured: list[TokenSelect]) -> None:
    with attach(hf_models.model("llama"), Dense()) as handle:
        dense_steps(handle)
        report = handle.report()
    assert "steps of at most" not in str(report) and "short" not in str(report)
    assert all(layer.dense_up_to is None for layer in report.layers)
