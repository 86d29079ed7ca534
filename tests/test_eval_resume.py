"""A run on disk: killed and resumed, damaged, locked, refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from kvselect import StreamingLLM, TokenSelect, cli
from kvselect.eval import checkpoint, runner
from kvselect.eval.journal import Journal, keep_aside
from kvselect.eval.memory import available_bytes, estimate, in_units
from kvselect.eval.request import parse_policy
from kvselect.eval.results import Length, load_results
from kvselect.policies.block_policy import BlockState

ROOT = Path(__file__).resolve().parent.parent
SELECT = "token_select:topk=8,sketch=none,num_recent_tokens=16,positions=compact"


def arguments(out: Path, *more: str, lengths: str = "128,256", samples: int = 24) -> list[str]:
    return [
        *("eval", "--tasks", "niah_multikey,vt", "--lengths", lengths, "--samples", str(samples)),
        *("--policies", f"dense,{SELECT}", "--out", str(out), *more),
    ]


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """Everything that is not a clock's."""
    kept = {name: value for name, value in results.items() if name != "begun"}
    for group in ("cells", "means"):
        kept[group] = [
            {name: value for name, value in row.items() if name not in ("decode_ms", "prefill_s")}
            for row in kept[group]
        ]
    return kept


def started(command: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    environment.pop("DISPLAY", None)
    return subprocess.Popen(
        [sys.executable, "-m", "kvselect", *command],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_a_random_moment_and_resumed_gives_the_same_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main(arguments(whole)) == 0
    journal = killed / runner.JOURNAL_NAME
    total = num_lines(whole / runner.JOURNAL_NAME)
    dice = random.Random(time.time_ns())
    stop_after = dice.randrange(3, total - 1)
    process = started(arguments(killed))
    deadline = time.monotonic() + 120
    while num_lines(journal) < stop_after and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(dice.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    if process.returncode == 0:  # it was faster than we: cut what it wrote
        (killed / "results.json").unlink()
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:stop_after]))
    else:
        assert process.returncode == -signal.SIGKILL, errors
    answered = journal.read_bytes()
    # A kill inside a write leaves part of a line.
    with journal.open("ab") as file:
        file.write(b'{"crc":12,"record":{"kind":"answ')
    capsys.readouterr()
    assert cli.main(arguments(killed)) == 0
    told = "are there already (--restart measures anew)" in capsys.readouterr().err
    assert told == (b'"kind":"answers"' in answered)  # it may have been killed before the first
    assert journal.read_bytes().startswith(answered)  # nothing is asked twice
    assert without_times(read(killed)) == without_times(read(whole))
    assert read(killed)["complete"] and not list(killed.glob("*damaged*"))

    # A complete run is a function of its journal, to the last digit of every time.
    before = (killed / "results.json").read_bytes()
    assert cli.main(arguments(killed)) == 0
    assert (killed / "results.json").read_bytes() == before
    (killed / "results.json").unlink()
    assert cli.main(arguments(killed)) == 0
    assert (killed / "results.json").read_bytes() == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(arguments(out, lengths="128", samples=10)) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("samples.jsonl", "results.json"):
        (out / name).write_bytes((finished / name).read_bytes())
    return out


def again(out: Path, *more: str) -> int:
    return cli.main(arguments(out, *more, lengths="128", samples=10))


def test_a_damaged_journal_is_kept_aside_and_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = run / "samples.jsonl"
    expected = without_times(read(run))
    lines = journal.read_bytes().splitlines(keepends=True)
    middle = next(i for i, line in enumerate(lines) if b'"answers"' in line)
    damaged = bytearray(lines[middle])
    damaged[len(damaged) // 2] ^= 1
    lines[middle] = bytes(damaged)
    journal.write_bytes(b"".join(lines))
    found = journal.read_bytes()
    assert again(run) == 0
    assert (run / "samples.jsonl.damaged-1").read_bytes() == found
    note = "1 lines of samples.jsonl were damaged; the file is kept as samples.jsonl.damaged-1"
    assert note in capsys.readouterr().err
    results = read(run)
    assert note in results["notes"][0]
    assert without_times(results) | {"notes": []} == expected


def test_a_finished_mark_without_its_answers_is_not_believed(run: Path) -> None:
    """What a damaged line held is asked again, also when the cell counted as finished."""
    journal = run / "samples.jsonl"
    expected = without_times(read(run))
    lines = journal.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"policy":"dense"' not in line]
    assert len(kept) < len(lines)
    journal.write_bytes(b"".join(kept))
    assert again(run) == 0
    assert without_times(read(run)) == expected


def test_a_journal_without_its_first_line_begins_anew(run: Path) -> None:
    journal = run / "samples.jsonl"
    found = b"garbage\n" + journal.read_bytes()
    journal.write_bytes(found)
    expected = without_times(read(run))
    assert again(run) == 0
    assert (run / "samples.jsonl.damaged-1").read_bytes() == found
    assert without_times(read(run)) | {"notes": []} == expected


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"format": "something else"}'])
def test_a_damaged_results_file_is_kept_aside(
    run: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "results.json").write_bytes(content)
    (run / "results.json.damaged-1").write_bytes(b"an earlier one")
    assert again(run) == 0
    assert (run / "results.json.damaged-1").read_bytes() == b"an earlier one"
    assert (run / "results.json.damaged-2").read_bytes() == content
    assert "kept as results.json.damaged-2" in capsys.readouterr().err
    assert read(run)["complete"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seed", "5"), "another seed 0 (asked: 5)"),
        (("--samples", "11"), "another samples 10 (asked: 11)"),
        (("--dtype", "bfloat16"), 'dtype "float32" (asked: "bfloat16")'),
        (("--tasks", "vt"), 'another tasks ["niah_multikey", "vt"] (asked: ["vt"])'),
        (("--policies", "dense"), "another policies {"),
    ],
)
def test_another_request_is_refused_and_nothing_touched(
    run: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert again(run, *more) == 2
    error = capsys.readouterr().err
    assert message in error and "allowed: a run of the same request, another folder" in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_results_without_a_journal_are_not_overwritten(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "samples.jsonl").unlink()
    before = (run / "results.json").read_bytes()
    assert again(run) == 2
    assert "without the samples.jsonl" in capsys.readouterr().err
    assert (run / "results.json").read_bytes() == before


def test_restart_moves_everything_aside(run: Path) -> None:
    before = (run / "samples.jsonl").read_bytes()
    assert again(run, "--restart", "--seed", "5") == 0
    assert (run / "samples.jsonl.before-1").read_bytes() == before
    assert (run / "results.json.before-1").exists()
    assert read(run)["config"]["seed"] == 5


def test_two_runs_do_not_share_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = json.loads((run / "samples.jsonl").read_bytes().splitlines()[0])
    with Journal(run / "samples.jsonl", header["record"]["request"]):
        assert again(run) == 2
    assert "into which another run is writing, allowed: a folder of its own" in (
        capsys.readouterr().err
    )


def test_samples_that_are_drawn_otherwise_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (run / "samples.jsonl").write_bytes(
        b"".join(line for line in lines if b'"finished"' not in line)
    )
    real = runner.dialect_sample
    monkeypatch.setattr(
        runner, "dialect_sample", lambda task, n, **rest: real(task, n, **(rest | {"seed": 9}))
    )
    assert again(run) == 2
    assert "journal: sample 0 of niah_multikey at 128: got '" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["/proc/kvselect-results", "/dev/null/results"])
def test_no_write_permission(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(Path(out))) == 2
    error = capsys.readouterr().err
    assert f"out: got '{out}', which cannot be written (" in error or "which is a file" in error
    assert "allowed: a folder" in error and error.count("\n") <= 2


def test_keeping_aside_finds_a_free_name(tmp_path: Path) -> None:
    for expected in ("x.damaged-1", "x.damaged-2"):
        (tmp_path / "x").write_text(expected)
        assert keep_aside(tmp_path / "x").name == expected
    assert (tmp_path / "x.damaged-2").read_text() == "x.damaged-2"


def test_results_are_read_as_they_were_written(finished: Path) -> None:
    assert load_results(finished).to_dict() == read(finished)


# ---- memory


def test_lengths_beyond_memory_are_refused_with_the_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "available_bytes", lambda device: 1_500_000_000)
    out = tmp_path / "out"
    assert cli.main(arguments(out, lengths="128,1024k")) == 2
    error = capsys.readouterr().err
    # 4 layers, 2 KV heads of 64, keys and values in float32: 4 KiB a token, twice, half more.
    assert "lengths: got '1024k', which takes about" in error
    assert "12.9 GB of caches for 2 policies at once" in error
    assert "allowed: what fits into the 1.5 GB that are free" in error
    assert error.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("text", ["quest", "landmark:attention=residual", "inf_llm", "act_qkv"])
def test_what_blocks_remember_is_estimated_exactly(text: str) -> None:
    policy = parse_policy(text)
    cache = policy.new_cache(1, 2, 64, dtype=torch.bfloat16)
    keys = torch.zeros(1, 5000, 2, 64, dtype=torch.bfloat16)
    cache.append(keys, keys)
    state = policy.new_state(cache)
    policy.update(state, cache)
    sizes = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "itemsize": 2}
    remembered, momentary = policy.extra_bytes(5000, **sizes)
    assert isinstance(state, BlockState) and momentary == 0
    assert remembered <= state.blocks.nbytes <= 1.5 * remembered  # room to grow


@pytest.mark.parametrize(
    ("name", "fits"), [("snap_kv", True), ("max_min", True), ("coverage", False)]
)
def test_an_eviction_that_compares_all_tokens_is_refused_at_length(
    name: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "available_bytes", lambda device: 8_000_000_000)
    lengths, policies = [Length(label="64k", tokens=65536)], {name: parse_policy(name)}
    embedded = checkpoint.load_checkpoint("embedded")
    with (
        nullcontext()
        if fits  # 16 bytes for each of 65,536 ** 2 pairs
        else pytest.raises(
            ValueError, match=r"lengths: got '64k', which .* 6\d\.\d GB of activations"
        )
    ):
        runner.require_memory(embedded, policies, lengths, at_once=1)


def test_a_schedule_takes_what_its_method_takes() -> None:
    sizes = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "itemsize": 2}
    schedule = parse_policy("layer_schedule:method=Coverage")
    assert schedule.extra_bytes(4096, **sizes) == parse_policy("coverage").extra_bytes(
        4096, **sizes
    )


PEAK = """
import resource, torch
from kvselect.eval import runner
from kvselect.eval.checkpoint import load_checkpoint
from kvselect.eval.memory import estimate
from kvselect.eval.request import parse_policies
from kvselect.eval.results import Length
from kvselect.eval.tasks import TASKS

torch.set_num_threads(1)
checkpoint = load_checkpoint("embedded")
policies = parse_policies(["streaming_llm:num_recent_tokens=64,q_block_size=64", "SELECT"])


def run(tokens):
    runner.run(checkpoint, runner.Request(
        tasks=(TASKS["niah_single"],), lengths=(Length(label="x", tokens=tokens),),
        policies=policies, samples=1, timed_steps=1))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


before = run(2048)
print(run(65536) - before, estimate(checkpoint.model, policies.values(), 65536).total_bytes)
""".replace("SELECT", SELECT)


def test_the_estimate_is_near_what_a_run_takes() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=True
    )
    taken, estimated = map(int, done.stdout.split())
    assert 0.25 * estimated < taken < 1.25 * estimated, (taken, estimated)


def test_free_memory_is_known_here() -> None:
    free = available_bytes(torch.device("cpu"))
    assert free is not None and 1e8 < free < 1e14
    assert in_units(3.21e9) == "3.2 GB" and in_units(41e6) == "41 MB"


def test_an_estimate_counts_sketches_and_policies() -> None:
    model = checkpoint.load_checkpoint("embedded").model
    plain = estimate(model, [StreamingLLM.at_budget(227)], 1000)
    both = [StreamingLLM.at_budget(227), TokenSelect.at_budget(227)]
    assert plain.cache_bytes == 1.5 * 1000 * 4 * 2 * 2 * 64 * 4
    assert estimate(model, both, 1000).cache_bytes > 2 * plain.cache_bytes
    assert estimate(model, both, 1000).activation_bytes == plain.activation_bytes
