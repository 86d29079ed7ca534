"""bench/gpu.sh and its report without a GPU: parts, limits, resuming, merging, verdicts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_sizes import SIZES
from test_bench_scripts import BENCH, script

from kvselect.bench.entrants import OUR_DENSE, SELECT_EXACT, SELECT_INT4
from kvselect.cli import main

SCRIPT = BENCH / "gpu.sh"


def gpu_sh(
    state: Path, *arguments: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The script with its state in a folder of the test."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OUT", "LIMIT")}
    names = {"PYTHON": python, "GPU_STATE": str(state)}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**kept, **names, **environment}
    )


def parts() -> list[str]:
    done = gpu_sh(Path("unused"), "--list")
    assert done.returncode == 0
    return done.stdout.split()


# ---- the script


def test_every_part_that_targets_and_tables_name_exists() -> None:
    report, names = script("gpu_report"), parts()
    assert {target.part for target in report.TARGETS} <= set(names)
    kinds = {name.split("-")[0] for name in names}
    assert set(report.KINDS) | {"expect", "build", "test", "sanitize", "report"} == kinds
    assert len(set(names)) == len(names)


def test_sizes_cover_the_matrix() -> None:
    decode = {name for name in parts() if name.startswith("decode-")}
    sizes = ("1x8k", "1x32k", "1x128k", "1x512k", "1x1m", "8x128k", "32x32k")
    assert decode == {f"decode-{size}" for size in sizes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("magic",), "part: got 'magic', allowed: expect build"),
        (("--peers", "/nowhere"), "--peers: got '/nowhere', allowed: a folder"),
        (("--peers",), "--peers: got '', allowed: a folder"),
        (("--seconds", "soon"), "--seconds: got 'soon', allowed: a whole number >= 1"),
    ],
)
def test_the_script_refuses(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = gpu_sh(tmp_path / "state", *arguments)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "state").exists()


def test_a_part_that_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, "--dry-run", "expect", "ops", "build", python="false")
    assert done.returncode == 1
    assert "failed: expect ops-1x1m ops-1x128k report (logs in" in done.stdout
    assert (tmp_path / "build.done").exists() and not (tmp_path / "expect.done").exists()


def test_parts_that_are_done_are_left_out(tmp_path: Path) -> None:
    for name in parts():
        (tmp_path / f"{name}.done").touch()
    (tmp_path / "test.done").unlink()
    done = gpu_sh(tmp_path, "--dry-run", python="false")
    assert re.findall("^=== ([a-z]+)$", done.stdout, re.M) == ["test", "report"]


def test_a_part_ends_at_its_limit(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 20\n")
    slow.chmod(0o755)
    done = gpu_sh(tmp_path / "state", "--dry-run", "expect", python=str(slow), LIMIT="1")
    assert done.returncode == 1 and "stopped after 1 s" in done.stdout


def test_no_part_begins_without_time_for_it(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, "--dry-run", "--seconds", "30", "expect", "build", python="false")
    assert "=== expect and what follows: no time left, call again" in done.stdout
    assert not (tmp_path / "build.done").exists()


def test_what_was_found_outlives_the_machine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    gpu_sh(tmp_path / "state", "--dry-run", "build", python="false", OUT=str(out))
    with tarfile.open(out / "gpu-parts.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"build.done", "build.log"} <= names


def test_expectations_come_first_and_need_no_gpu(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, "--dry-run", "expect")
    assert "1 x 131072" in done.stdout and "135" in done.stdout
    assert parts()[0] == "expect"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_micro_measurements_compile_and_say_what_they_expect(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, "--dry-run", "micro", LIMIT="300")
    assert (tmp_path / "micro.done").exists(), done.stdout
    content = json.loads((tmp_path / "micro" / "micro.json").read_text())
    assert content["measured"] is False and content["copy_gb_per_s"] == 4300.0
    rows = {row["name"]: row for row in content["results"]}
    assert len(rows) == len(content["results"]) == 22
    assert not any("median_us" in row for row in rows.values())
    scan = rows["streaming read, 71 MB (int4 sketch at 128K)"]
    assert scan["bytes"] == 544 * 131072
    assert scan["expected_us"] == pytest.approx(544 * 131072 / 4.3e6 + 4, abs=0.01)
    gathers = [name for name in rows if name.startswith("gather K and V")]
    assert len(gathers) == 12 and all("tokens, rows of" in name for name in gathers)
    assert rows["exponentials of one vote at 128K"]["expected_us"] == pytest.approx(1.0, abs=0.05)
    assert "expected_us" not in rows["cluster barrier, 8 CTAs"]
    wrong = subprocess.run(
        [str(tmp_path / "micro" / "micro"), "--fast"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr == "arguments: got --fast, allowed: none or --expect\n"


# ---- the report


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as parts leave it, at sizes that answer nothing."""
    folder = tmp_path_factory.mktemp("gpu")
    sizes = (*SIZES, "--as-on-gpu", "--tokens", "4k", "--topk", "64", "--rounds", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvselect.bench.measure.READ_BYTES", 1 << 20)
        patch.setattr("kvselect.bench.measure.last_level_cache_bytes", lambda: 1 << 16)
        for kind in ("decode", "ops", "prefill"):
            out = str(folder / f"{kind}-1x128k")
            more = ("--chunk-tokens", "128")
            assert main(["bench", kind, *sizes, *more, "--out", out]) == 0
        out = str(folder / "model-1x128k" / "model.json")
        script("model_step").main(["--quick", "--out", out])
    micro = {"name": "empty kernel", "bytes": 0, "expected_from": "1 to 2 us", "expected_us": 2.0}
    left_out = {**micro, "name": "cluster barrier", "skipped": "not on this GPU: needs 9.0"}
    rows = [micro | {"median_us": 3.0, "over_expected": 1.5}, left_out]
    content = {"question": "?", "gpu": {"name": "Some GPU"}, "measured": False, "results": rows}
    (folder / "micro").mkdir()
    (folder / "micro" / "micro.json").write_text(json.dumps(content | {"copy_gb_per_s": 4300}))
    (folder / "sanitize.log").touch()
    return folder


def test_everything_is_merged(measured: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "deep" / "x.json"
    script("gpu_report").main(["--parts", str(measured), "--out", str(out)])
    content = json.loads(out.read_text())
    order = ["micro", "decode-1x128k", "ops-1x128k", "prefill-1x128k", "model-1x128k"]
    assert list(content["parts"]) == order and content["gpu"] == "no GPU"
    steps = content["parts"]["decode-1x128k"]["results"]
    assert all("samples_ms" in row for row in steps)
    page = out.with_suffix(".md").read_text()
    assert "No GPU took part" in page and "| no GPU took part |" in page and "| met |" not in page
    for row in steps:
        assert f"| {row['contender']} |" in page
    assert "- left out: flashinfer: ModuleNotFoundError" in page
    assert "| empty kernel | 3.00 | 2.00 | 1.50 | – | 1 to 2 us |  |" in page
    assert "| not on this GPU: needs 9.0 |" in page
    assert "## Parts that did not end well\n\n- sanitize" in page
    assert (measured / "report.json").exists() and "written:" in capsys.readouterr().out


def test_a_result_is_named_after_the_gpu(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = script("gpu_report")
    monkeypatch.setattr(report, "OUT_FOLDER", tmp_path)
    micro = json.loads((measured / "micro" / "micro.json").read_text()) | {"measured": True}
    (tmp_path / "parts" / "micro").mkdir(parents=True)
    (tmp_path / "parts" / "micro" / "micro.json").write_text(json.dumps(micro))
    report.main(["--parts", str(tmp_path / "parts")])
    (found,) = tmp_path.glob("*.json")
    assert re.fullmatch(r"some-gpu-\d{4}-\d\d-\d\d\.json", found.name)


def claims(report: ModuleType, rows: list[dict[str, object]], part: str) -> dict[str, object]:
    found = {"micro": {"measured": True, "gpu": {"name": "Some GPU"}, "results": []}}
    parts = {**found, part: {"results": rows}}
    return {target.claim: report.verdict(target, parts) for target in report.TARGETS}


def test_verdicts() -> None:
    report = script("gpu_report")
    rows: list[dict[str, object]] = [
        {"contender": SELECT_INT4, "over_best_torch": 4.25, "kept_mass": 0.9},
        {"contender": SELECT_EXACT, "kept_mass": 0.95},
        {"contender": OUR_DENSE, "over_best_torch": 0.5},
        {"contender": f"{SELECT_INT4}, 50 % hits", "over_best_torch": 6.4},
    ]
    found = claims(report, rows, "decode-1x128k")
    over = "decode step 1x128k, {}, over the fastest dense peer"
    assert found[over.format("cold")] == ("4.25x", "met")
    assert found[over.format("50 % hits")] == ("6.40x", "missed")
    assert found[over.format("all hits")] == ("–", "left out (see below)")
    assert found["decode step 1x128k, kept mass over the exact top-k's"] == ("0.95x", "missed")
    either = "decode step 1x128k, selecting or our dense, whichever is faster, over dense"
    assert found[either] == ("4.25x", "met")
    other = "decode step 1x1m, cold, over the fastest dense peer"
    assert found[other] == ("–", "decode-1x1m did not run")


def test_verdicts_of_ops() -> None:
    report = script("gpu_report")
    gather = "attention, random list of {} tokens"
    rows: list[dict[str, object]] = [
        {"op": gather.format(2688), "median_ms": 0.0095, "share_of_limit": 0.3},
        {"op": gather.format(16384), "median_ms": 0.02, "share_of_limit": 0.80},
    ]
    found = claims(report, rows, "ops-1x128k")
    assert found["attention over 2688 random tokens"] == ("9.50 us", "met")
    share = found["attention over 16K random tokens, share of copy bandwidth"]
    assert share == ("80.00 %", "missed")


def test_verdicts_of_blocks() -> None:
    rows: list[dict[str, object]] = [
        {"contender": "10% of blocks", "gflop_per_s": 400e3, "over_sdpa": 0.1},
        {"contender": "100% of blocks", "gflop_per_s": 420e3, "over_sdpa": 1.1},
    ]
    found = claims(script("gpu_report"), rows, "blocks-1x128k")
    sparse = found["attention over 10 % of the blocks of 128, 128k"]
    assert sparse == ("400.00 TFLOP/s", "missed")
    dense = found["attention over all blocks of 128, 128k, of the dense rate"]
    assert dense == ("0.91x", "met")


def test_blocks_by_hoppers_own_instructions_have_targets_and_need_such_a_gpu(
    tmp_path: Path,
) -> None:
    rows: list[dict[str, object]] = [
        {"contender": "10% of blocks", "gflop_per_s": 560e3, "over_sdpa": 0.1}
    ]
    found = claims(script("gpu_report"), rows, "blocks-sm90a-1x128k")
    sparse = found["attention over 10 % of the blocks of 128, 128k, sm90a"]
    assert sparse == ("560.00 TFLOP/s", "met")
    done = gpu_sh(tmp_path, "--dry-run", "blocks-sm90a-test", "blocks-sm90a-1x32k")
    assert done.stdout.count("no GPU of architecture 9.0: nothing to run") == 2


def test_blocks_run_dry(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, "--dry-run", "blocks-1x32k")
    assert (tmp_path / "blocks-1x32k.done").exists(), done.stdout
    page = (tmp_path / "report.md").read_text()
    assert "## blocks-1x32k" in page and "| 100% of blocks | 64 | 100.0 |" in page


def test_no_peer_is_no_verdict() -> None:
    rows: list[dict[str, object]] = [{"contender": SELECT_INT4, "over_best_torch": float("nan")}]
    found = claims(script("gpu_report"), rows, "prefill-1x1m")
    claim = "prefill chunk of 512 at 1m, over the fastest dense peer"
    assert found[claim] == ("–", "left out (see below)")


@pytest.mark.parametrize(
    ("make", "message"),
    [(False, "allowed: a folder that bench/gpu.sh"), (True, "allowed: a folder with the results")],
)
def test_the_report_refuses(tmp_path: Path, make: bool, message: str) -> None:
    folder = tmp_path / "parts"
    if make:
        folder.mkdir()
    with pytest.raises(ValueError, match=message):
        script("gpu_report").main(["--parts", str(folder)])


def test_graphs_that_were_not_captured_say_why() -> None:
    report = script("gpu_report")
    reason = "RuntimeError: not permitted"
    assert report.graph({"not_captured": reason}) == f"no: {reason}"
    assert (report.graph({"not_captured": ""}), report.graph({})) == ("yes", "–")
