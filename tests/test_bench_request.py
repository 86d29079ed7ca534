"""What a user types becomes checked sizes; quick runs stay apart from those that count."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kvselect.bench.layer import Shape
from kvselect.bench.request import (
    add_sizes,
    check_sizes,
    default_threads,
    no_progress,
    one_count,
    parse,
    parse_counts,
    progress_bar,
    script_parser,
    shape_of,
)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("8192", (8192,)),
        ("8k,1m", (8192, 1 << 20)),
        (" 32K , 7,", (32768, 7)),
    ],
)
def test_counts_are_read(text: str, counts: tuple[int, ...]) -> None:
    assert parse_counts(text, "tokens") == counts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8x", "tokens: got '8x', allowed: counts >= 1 such as 8192, 32k or 1m, with commas"),
        ("0", "tokens: got '0', allowed: counts >= 1"),
        ("-4", "tokens: got '-4', allowed: counts >= 1"),
        ("8k,8192", "tokens: got '8192 twice', allowed: each once"),
        (" , ", "tokens: got ' , ', allowed: at least one, such as 8k,32k"),
    ],
)
def test_what_is_no_count_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_counts(text, "tokens")


def test_one_count_is_one() -> None:
    assert one_count("4k", "tokens") == 4096
    message = "threads: got '1,2', allowed: one count: this bench measures one at a time"
    with pytest.raises(ValueError, match=message):
        one_count("1,2", "threads")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tokens": ()}, r"tokens: got \(\), allowed: at least one length"),
        ({"threads": ()}, r"threads: got \(\), allowed: at least one number"),
        ({"threads": (0,)}, "threads: got 0, allowed: an int >= 1"),
        ({"topk": 0}, "topk: got 0, allowed: an int >= 1"),
        ({"rounds": 0}, "rounds: got 0, allowed: an int >= 1"),
        ({"tokens": (64, 63)}, "tokens: got 63, allowed: an int >= 64"),
    ],
)
def test_sizes_are_checked(sizes: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"tokens": (64,), "threads": (1,), "topk": 1, "rounds": 1}
    check_sizes(**good, shortest=64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        check_sizes(**(good | sizes), shortest=64)  # type: ignore[arg-type]


def parser() -> argparse.ArgumentParser:
    made = script_parser("Is it?\n\nMore words.", "/somewhere/bench/question.py")
    add_sizes(made, tokens="128k", rounds=9, heads=(16, 4, 64))
    return made


def test_a_script_has_its_question_and_its_file() -> None:
    made = parser()
    assert made.description == "Is it?"
    options = parse(made, [], quick={"tokens": "4k"})
    assert options.out == Path("/somewhere/bench/results/question.json")
    assert (options.tokens, options.rounds, options.quick) == ("128k", 9, False)
    assert shape_of(options) == Shape(num_q_heads=16, num_kv_heads=4, head_dim=64)


def test_a_quick_run_is_small_and_replaces_no_result() -> None:
    options = parse(parser(), ["--quick"], quick={"tokens": "4k", "rounds": 2})
    assert (options.tokens, options.rounds) == ("4k", 2)
    assert options.out == Path("/somewhere/bench/results/quick/question.json")


def test_who_names_a_size_gets_it() -> None:
    arguments = ["--quick", "--tokens", "1m", "--out", "x.json", "--dtype", "float16"]
    arguments += ["--q-heads", "8", "--kv-heads", "2", "--head-dim", "32", "--topk", "5"]
    options = parse(parser(), [*arguments, "--threads", "2"], quick={"tokens": "4k", "rounds": 2})
    assert (options.tokens, options.rounds, options.out) == ("1m", 2, Path("x.json"))
    assert (options.topk, options.threads) == (5, "2")
    assert shape_of(options) == Shape(num_q_heads=8, num_kv_heads=2, head_dim=32, dtype="float16")


def test_a_result_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(parser(), ["--out", str(tmp_path)], quick={})
    assert f"out: got '{tmp_path}', which is a folder, allowed: a file" in capsys.readouterr().err


def test_threads_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, "1"), (2, "1,2"), (64, "1,2")):
        monkeypatch.setattr("kvselect.bench.request.usable_cores", lambda cores=cores: cores)
        assert default_threads() == expected


def test_progress_can_be_shown_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    no_progress("nothing", 0.5)
    with progress_bar() as on_progress:
        on_progress("half", 0.5)
        on_progress("all", 0.5)
    assert capsys.readouterr().out == ""  # stdout is for tables
