"""Several runs as one report, or one clear refusal; the form of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvselect import cli
from kvselect.eval.compare import IncomparableError, combine
from kvselect.eval.lm_eval_results import lm_eval_dict, save_lm_eval
from kvselect.eval.results import Cell, Length, Results, ResultsFileError, load_results

LENGTH = Length(label="1x", tokens=512)


def results_of(policies: dict[str, list[float]], samples: str = "s", **config: Any) -> Results:
    """One task, whose outcomes are given by policy."""
    made = Results(
        model="model",
        window_tokens=512,
        tasks=("vt",),
        lengths=(LENGTH,),
        policies={policy: {"policy": policy} for policy in policies},
        baseline=next(iter(policies)),
        config={"seed": 0, "template": "dialect-1", "model_fingerprint": "a", **config},
        environment={"commit": "c", "begun": "2026-01-01T00:00:00+00:00"},
        complete=True,
    )
    for policy, outcomes in policies.items():
        made.cells.append(
            Cell(
                task="vt",
                length=LENGTH,
                policy=policy,
                outcomes=tuple(outcomes),
                depths=tuple(0.5 for _ in outcomes),
                kept_mass=0.5,
                tokens_attended=100.0,
                bytes_ratio=0.25,
                decode_ms=2.0,
                prefill_s=1.0,
                cache_bytes=2_500_000,
                samples=(samples,),
            )
        )
    return made


RIGHT, MIXED = [1.0] * 10, [1.0] * 6 + [0.0] * 4


def test_runs_of_the_same_questions_become_one_with_paired_differences() -> None:
    first, second = results_of({"dense": RIGHT, "a": MIXED}), results_of({"a": RIGHT, "b": MIXED})
    combined = combine([("one", first), ("two", second)])
    assert list(combined.policies) == ["dense", "a (one)", "a (two)", "b"]
    assert combined.baseline == "dense"
    differences = {cell.policy: combined.difference(cell) for cell in combined.cells}
    assert differences["a (two)"] == (0.0, 0.0, 0.0)
    assert differences["a (one)"][0] == differences["b"][0] == pytest.approx(-0.4)
    assert combine([("one", first)]) is first
    assert any("not interleaved" in note for note in combined.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"which differ in seed \(0 and 1\), allowed: runs of one model, template"),
        ({"template": "prose-1"}, r"template \('dialect-1' and 'prose-1'\)"),
        ({"model_fingerprint": "b"}, r"model_fingerprint \('a' and 'b'\)"),
        ({"model_fingerprint": "b", "seed": 2}, r"\('a' and 'b'\); seed \(0 and 2\)"),
        ({"samples": "t"}, "which differ in the samples of vt at 512, allowed"),
    ],
)
def test_runs_of_other_questions_are_refused(changes: dict[str, Any], message: str) -> None:
    other = results_of({"a": RIGHT}, **changes)
    with pytest.raises(IncomparableError, match=message):
        combine([("one", results_of({"dense": RIGHT})), ("two", other)])


def test_other_tasks_and_lengths_are_refused() -> None:
    other = results_of({"a": RIGHT})
    other.tasks, other.lengths = ("chain",), (Length(label="2x", tokens=1024),)
    with pytest.raises(
        IncomparableError, match=r"tasks \(vt and chain\); lengths \(1x and 2x\), allowed"
    ):
        combine([("one", results_of({"dense": RIGHT})), ("two", other)])


def test_report_compares_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results_of({"dense": RIGHT}).save(tmp_path / "one" / "results.json")
    results_of({"a": MIXED}).save(tmp_path / "two" / "results.json")
    results_of({"a": MIXED}, seed=7).save(tmp_path / "three" / "results.json")
    out = tmp_path / "out"
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    assert cli.main(["report", one, two, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "dense" in text and "60" in text
    assert load_results(out).difference(load_results(out).cells[1])[0] == pytest.approx(-0.4)
    assert cli.main(["report", one, three, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvselect report: error: runs: got 'one' and 'three', which differ in")
    assert error.count("\n") == 1


def test_no_display_is_needed(tmp_path: Path) -> None:
    results_of({"dense": RIGHT, "a": MIXED}).save(tmp_path / "one" / "results.json")
    environment = os.environ | {"MPLBACKEND": "TkAgg", "TERM": "dumb"}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    environment.pop("DISPLAY", None)
    command = ["report", str(tmp_path / "one"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "kvselect", *command],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout and (tmp_path / "out" / "score.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "is damaged or of another program"), ('{"a": 1}', "format")],
)
def test_report_refuses_what_is_no_results_file(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ResultsFileError, match=message):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (RIGHT, "no loss"),
        ([0.0] * 10, "loss"),
        ([1.0] * 9 + [0.0], "undecided"),
    ],
)
def test_verdicts(ours: list[float], verdict: str) -> None:
    mean = results_of({"dense": RIGHT, "a": ours}).macro(LENGTH, "a")
    assert mean is not None and mean.verdict == verdict
    better = results_of({"dense": [0.0] * 10, "a": ours}).macro(LENGTH, "a")
    assert better is not None
    assert better.verdict == ("both fail" if not any(ours) else "better")


def test_the_form_of_lm_eval(tmp_path: Path) -> None:
    results = results_of({"dense": RIGHT, "token_select 227": MIXED})
    told = lm_eval_dict(results, "token_select 227")
    row = told["results"]["vt"]
    assert row["512,none"] == pytest.approx(0.6)
    # the harness's own: sample standard deviation over sqrt(n)
    assert row["512_stderr,none"] == pytest.approx(math.sqrt(0.24 * 10 / 9 / 10))
    assert told["n-samples"] == {"vt": {"original": 10, "effective": 10}}
    assert told["higher_is_better"]["vt"]["512"] is True
    paths = save_lm_eval(results, tmp_path / "lm_eval")
    assert [path.name for path in paths] == ["results_dense.json", "results_token_select_227.json"]
    assert json.loads(paths[1].read_text()) == told
