"""`kvselect bench` as a user types it: files, tables, options, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_sizes import SIZES

from kvselect.bench import command, decode, prefill
from kvselect.bench.contenders import DisagreementError
from kvselect.bench.results import load
from kvselect.cli import main

pytestmark = pytest.mark.usefixtures("small_reads")


def run(*arguments: str) -> int:
    return main(["bench", *arguments])


def test_all_benches_write_their_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = (*SIZES, "--tokens", "4k", "--topk", "64", "--rounds", "1")
    assert run("all", "--quick", *sizes, "--out", str(tmp_path)) == 0
    text = capsys.readouterr().out
    names = ("decode.json", "time_against_mass.png", "prefill.json", "ops.json")
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert all(str(tmp_path / name) in text for name in names)
    for kind in command.KINDS:
        content = load(tmp_path / f"{kind}.json")
        assert content["question"].endswith("?") and content["commit"]
        assert content["config"]["tokens"] == [4096] and content["config"]["topk"] == 64
        shape = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32, "dtype": "float32"}
        shape |= {"batch": 1, "device": "cpu"}
        assert content["config"]["shape"] == shape
        for row in content["results"]:
            assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert {"bytes_must_read", "gb_per_s", "times_floor", "samples_ms"} <= set(row)


def asked_for(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> decode.DecodeRequest:
    """The request that a command line stands for."""
    seen: list[decode.DecodeRequest] = []
    monkeypatch.setattr(command.decode, "check", seen.append)
    command.prepare(_options(*arguments))
    return seen[0]


def _options(*arguments: str) -> object:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return parser.parse_args(arguments)


def test_defaults_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    full = asked_for(monkeypatch)
    assert full.tokens == (8192, 32768, 131072) and full.rounds == 7 and full.threads == (1,)
    assert full.curves == decode.BUDGETS and full.topk == 2048 and full.policies is None
    assert str(full.shape) == "32/8 heads of 128, bfloat16"
    quick = asked_for(monkeypatch, "decode", "--quick")
    assert quick.tokens == (8192, 32768) and quick.rounds == 3
    assert quick.curves == decode.QUICK_BUDGETS


def test_every_option_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    policies = ("dense", "token_select:topk=99,similarity_threshold=0.5")
    sizes = ("--tokens", "1k,2k", "--threads", "2,1", "--rounds", "4", "--topk", "77")
    request = asked_for(monkeypatch, "decode", *SIZES, *sizes, "--policies", *policies)
    assert (request.tokens, request.threads) == ((1024, 2048), (2, 1))
    assert (request.rounds, request.topk) == (4, 77)
    assert str(request.shape) == "4/2 heads of 32, float32"
    assert request.policies is not None
    assert [policy.to_dict().get("topk") for policy in request.policies.values()] == [None, 99]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "8q"), "tokens: got '8q', allowed: counts >= 1"),
        (("--tokens", "8"), "tokens: got 8, allowed: an int >= 48"),
        (("--threads", "0"), "threads: got '0', allowed: counts >= 1"),
        (("--rounds", "0"), "rounds: got 0, allowed: an int >= 1"),
        (("--topk", "0"), "topk: got 0, allowed: an int >= 1"),
        (("--kv-heads", "3"), "q-heads: got 32, allowed: a multiple of kv-heads = 3"),
        (("--head-dim", "100"), "head-dim: got 100, allowed: 32 or"),
        (("--policies", "nothing"), "nothing"),
        (("ops", "--policies", "dense"), "bench: got 'ops', allowed: decode or all with"),
        (("prefill", "--tokens", "2k"), "tokens: got 2048, allowed: an int >= 2049"),
        (("ops", "--tokens", "2k"), "tokens: got 2048, allowed: an int >= "),
        (
            ("--policies", "token_select:positions=compact"),
            "got 'compact', allowed: positions='original' (a bench without RoPE)",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("ran")

    for module in (decode, prefill, command.ops):
        monkeypatch.setattr(module, "run", never)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvselect bench: error: ") and message in error


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text("")
    assert run("--out", str(path)) == 2
    expected = f"out: got {str(path)!r}, which is a file, allowed: a folder, there or not"
    assert expected in capsys.readouterr().err


def test_more_than_the_memory_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvselect.bench.memory.free_bytes", lambda: 2 << 30)
    assert run("--tokens", "1m") == 2
    assert "tokens: got 1048576, which needs" in capsys.readouterr().err


def test_a_wrong_output_ends_the_bench_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def off(*_: object) -> None:
        raise DisagreementError("peer, 8 tokens: got an output")

    monkeypatch.setattr(decode, "run", off)
    assert run("decode", "--quick", "--out", str(tmp_path / "none")) == 1
    captured = capsys.readouterr()
    assert captured.err.endswith("kvselect bench: peer, 8 tokens: got an output\n")
    assert "written" not in captured.out and not (tmp_path / "none").exists()
