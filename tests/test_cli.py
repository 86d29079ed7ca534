"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import config
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvselect import TokenSelect, break_even, cli, cli_eval, crossovers, doctor, ops
from kvselect.crossovers import Point
from kvselect.eval import demo
from kvselect.eval.checkpoint import CheckpointError, embedded_model_path, load_checkpoint
from kvselect.eval.tasks.words import ADJECTIVES, NOUNS


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"kvselect {ops.build_info()['version']}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("doctor", "demo", "eval", "bench", "break-even"))


# ---- doctor


def test_doctor_is_well_and_forces_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    in_use = ops.cpu_implementation()
    assert run("doctor") == 0
    assert ops.cpu_implementation() == in_use
    text = capsys.readouterr().out
    assert "all well" in text and "sparse_attention" in text
    info = ops.build_info()
    assert isinstance(info["cpu_compiled"], list) and isinstance(info["cpu_notes"], dict)
    assert all(name in text for name in info["cpu_compiled"])
    assert all(note.split(";")[0][:30] in text for note in info["cpu_notes"].values())


def test_doctor_notices_a_wrong_op(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor.recovered_mass
    monkeypatch.setattr(doctor, "recovered_mass", lambda *arguments: real(*arguments) * 1.001)
    assert run("doctor") == 1
    text = capsys.readouterr().out
    assert "not healthy" in text and "recovered_mass" in text and "allowed: 2e-06" in text


# ---- eval and demo


def test_eval_writes_json_and_picture_and_prints_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code = run(
        *("eval", "--model", "embedded", "--tasks", "niah_multikey,vt", "--lengths", "128"),
        *("--policies", "dense", "token_select:topk=8,sketch=none,num_recent_tokens=16"),
        *("--samples", "6", "--out", str(out)),
    )
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("cost.png", "depth.png", "layers.png", "lm_eval", "pareto.png", "report.html"),
        *("results.json", "samples.jsonl", "score.png"),
    ]
    results = json.loads((out / "results.json").read_text())
    assert results["complete"] and len(results["cells"]) == 4
    assert results["config"]["rendering"] == "dialect"
    assert results["versions"]["torch"] and "commit" in results and results["machine"]["cores"] >= 1
    assert all(cell["num_samples"] == 6 for cell in results["cells"])
    assert results["cells"][0]["score"] == 1.0
    text = capsys.readouterr().out
    assert "multi" in text and "results.json" in text


def test_demo_shows_four_policies(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "WINDOWS", (1,))
    assert run("demo", "--samples", "2", "--out", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["policies"]) == list(demo.demo_policies())
    assert {cell["task"] for cell in results["cells"]} == set(demo.TASKS)
    text = " ".join(capsys.readouterr().out.split())
    assert "Dense" in text and "a demonstration; a claim needs 500" in text


def test_demo_begins_anew_where_one_is_complete(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "WINDOWS", (1,))
    monkeypatch.setattr(demo, "TASKS", ("vt",))

    def times(*arguments: str) -> list[float]:
        assert run("demo", "--samples", "2", "--out", str(tmp_path), *arguments) == 0
        cells = json.loads((tmp_path / "results.json").read_text())["cells"]
        return [cell["decode_ms"] for cell in cells]

    first = times()
    assert times() != first and not list(tmp_path.glob("*before*"))
    assert times("--seed", "4")  # another request: a complete one makes way too
    (tmp_path / "results.json").write_text("damaged")
    assert times("--seed", "4")
    assert (tmp_path / "results.json.damaged-1").read_text() == "damaged"


def test_eval_asks_other_checkpoints_in_prose(tmp_path: Path) -> None:
    """A random model with a tokenizer of its own: nothing is right, everything is counted."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    text = [f"The registered number of the {a} {b} is 1234567." for a, b in zip(ADJECTIVES, NOUNS)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    folder = tmp_path / "random"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(config("llama", vocab_size=500)).save_pretrained(folder)
    code = run(
        *("eval", "--model", str(folder), "--tasks", "niah_multikey,chain", "--lengths", "700"),
        *("--policies", "dense", "streaming_llm", "--samples", "3", "--out", str(tmp_path / "out")),
    )
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"] == "random" and results["config"]["rendering"] == "prose"
    assert all(cell["num_correct"] == 0 for cell in results["cells"])
    dense = results["cells"][0]
    assert 550 < dense["tokens_attended"] <= 700


EMBEDDED = ("--model", "embedded")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/no/such/place"), "model: got '/no/such/place', which is not a folder"),
        ((*EMBEDDED, "--tasks", "niah"), "tasks: got 'niah', allowed: each once of niah_single"),
        ((*EMBEDDED, "--policies", "sparse"), "policies: got 'sparse', allowed: act_qkv, "),
        ((*EMBEDDED, "--policies", "dense:k=1"), "settings of Dense: got ['k']"),
        ((*EMBEDDED, "--policies", "token_select:topk=x"), "topk: got str 'x', allowed: an int"),
        ((*EMBEDDED, "--lengths", "soon"), "lengths: got 'soon', allowed: tokens (4096)"),
        ((*EMBEDDED, "--samples", "0"), "samples: got 0, allowed: an int >= 1"),
        ((*EMBEDDED, "--seed", "-1"), "seed: got -1, allowed: an int >= 0"),
        (
            (*EMBEDDED, "--lengths", "9", "--policies", "dense", "--tasks", "chain"),
            "chain at 9: length: got 4, allowed: an int >= 10",
        ),
        (
            (*EMBEDDED, "--policies", "token_select:positions=compact"),
            "token_select positions=compact: policy.capacity: got",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    assert run("eval", *arguments, "--out", str(out)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"kvselect eval: error: {message}")
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_out_may_not_be_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert run("demo", "--out", str(taken)) == 2
    assert "which is a file, allowed: a folder" in capsys.readouterr().err
    assert taken.read_text() == "mine"


# ---- damaged checkpoints


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(embedded_model_path(), folder, ignore=shutil.ignore_patterns("*.py", "__*"))
    return folder


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def change_a_size(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 256', '"intermediate_size": 64'))


def cut(name: str, length: int) -> object:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:length])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_tensor, "lack or misshape 1 tensors, first 'model.layers.2.self_attn.k_proj"),
        (change_a_size, "which does not load"),
        (cut("model.safetensors", 100_000), "which does not load"),
        (cut("config.json", 40), "which does not load"),
        (cut("tokenizer.json", 100), "which does not load"),
        (lambda folder: (folder / "model.safetensors").unlink(), "which does not load"),
        (lambda folder: (folder / "config.json").unlink(), "which has no config.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_as_such(copy: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    assert load_checkpoint(copy).speaks_dialect
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as refused:
        load_checkpoint(copy)
    assert str(refused.value).startswith(f"model: got '{copy}'") and "\n" not in str(refused.value)


def test_a_checkpoint_without_tokenizer_is_refused(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    message = r"which has no tokenizer \(none of tokenizer.json, .*, with the tokenizer beside it"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copy)


def test_progress_is_lines_with_the_time_left_where_no_terminal_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    clock = iter([0.0, 5.0, 60.0, 61.0, 700.0])
    monkeypatch.setattr(cli_eval.time, "monotonic", lambda: next(clock))
    with cli_eval.progress_shown(Console(file=out), 100) as advance:
        for amount in (5, 20, 1, 74):
            advance("vt at 4x", amount)
    assert out.getvalue() == "vt at 4x: 25 %, about 3 min left\n"


def test_progress_is_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with cli_eval.progress_shown(Console(file=out, force_terminal=True, width=90), 10) as advance:
        advance("vt at 4x", 5)
    assert "vt at 4x" in out.getvalue() and "50%" in out.getvalue()


def test_another_folder_is_loaded_by_its_name(copy: Path) -> None:
    checkpoint = load_checkpoint(copy, dtype="bfloat16")
    assert checkpoint.name == "checkpoint" and checkpoint.window_tokens == 512
    assert str(checkpoint.model.dtype) == "torch.bfloat16"


# ---- bench


def test_bench_is_a_command_and_refuses_unknown_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("bench", "nothing")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "nothing" in message and "'decode', 'prefill', 'ops', 'all'" in message
    assert run("bench", "--rounds", "0") == 2
    assert "kvselect bench: error: rounds: got 0" in capsys.readouterr().err


# ---- break-even


@pytest.fixture
def crossover_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVSELECT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(crossovers, "_known", crossovers._Known())
    monkeypatch.setattr(crossovers, "_said", set())
    return tmp_path / "crossovers"


def no_clock(monkeypatch: pytest.MonkeyPatch, noise: float = 0.01) -> None:
    """Dense: 0.1 us per token. Selecting: 1000 us and 0.05 us per token. They meet at 20,000."""
    real = break_even.measure

    def measure(policy: TokenSelect, **workload: Any) -> Any:
        def time_steps(n: int) -> Point:
            return Point(n, 0.1 * n, 1000 + 0.05 * n, noise)

        return real(policy, **workload, time_steps=time_steps)

    monkeypatch.setattr(break_even, "measure", measure)


def test_break_even_measures_shows_and_forgets(
    capsys: pytest.CaptureFixture[str], crossover_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_clock(monkeypatch)
    threads = torch.get_num_threads()
    sizes = ("--q-heads", "8", "--kv-heads", "2", "--head-dim", "64", "--dtype", "float32")
    policy = ("--policy", "token_select:topk=1024", "--page-block-size", "16", "--threads", "2")
    assert run("break-even", "measure", *sizes, *policy) == 0
    assert torch.get_num_threads() == threads
    text = capsys.readouterr().out
    assert "8/2 heads of 64, float32, pages of 16, TokenSelect(topk=1024); " in text
    assert "2 threads" in text and "selecting / dense" in text and "2177" in text
    (path,) = crossover_folder.iterdir()
    found = json.loads(path.read_text())
    assert found["tokens"] == pytest.approx(20_000, rel=0.03)
    assert f"dense up to {found['tokens']} tokens; measured in" in text
    assert f"stored: {path}" in text and "it will not be used" in text  # the tests' "off"

    assert run("break-even", "show") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "1 crossover" in text and "float32" in text and " no " in text
    found["machine"]["cpu"] = "Somebody's CPU"
    (crossover_folder / "other.json").write_text(json.dumps(found))
    monkeypatch.setattr(crossovers, "_known", crossovers._Known())
    assert run("break-even", "show") == 0
    assert "1 crossover" in capsys.readouterr().out
    assert run("break-even", "show", "--all") == 0
    text = capsys.readouterr().out
    assert "2 crossovers" in text and "Somebody" in text

    assert run("break-even", "forget") == 0
    assert capsys.readouterr().out == "removed 1 crossover\n"
    assert run("break-even", "forget", "--all") == 0
    assert capsys.readouterr().out == "removed 1 crossover\n"
    assert not list(crossover_folder.iterdir())


def test_break_even_stores_nothing_of_a_busy_machine(
    capsys: pytest.CaptureFixture[str], crossover_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_clock(monkeypatch, noise=0.7)
    assert run("break-even", "measure") == 1
    text = capsys.readouterr().out
    assert "no result: other processes took more than 30% of" in text and "dense up to" not in text
    assert not crossover_folder.exists()


def test_break_even_says_when_it_cannot_store(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_clock(monkeypatch)
    monkeypatch.setattr(crossovers, "_known", crossovers._Known())
    monkeypatch.setattr(crossovers, "_said", set())
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("KVSELECT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="measured, but not stored"):
        assert run("break-even", "measure") == 1
    assert "stored:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--q-heads", "7"), "num_q_heads: got 7, allowed: a multiple of num_kv_heads = 8"),
        (("--kv-heads", "0"), "num_kv_heads: got 0, allowed: an int >= 1"),
        (("--head-dim", "7"), "head_dim: got 7, allowed: 32 or 64"),
        (("--page-block-size", "0"), "page_block_size: got 0, allowed: an int >= 1"),
        (("--policy", "dense"), "policy: got Dense Dense(), allowed: a TokenSelect"),
        (("--policy", "fast"), "policies: got 'fast', allowed: act_qkv, "),
        (("--threads", "0"), "threads: got 0, allowed: an int >= 1"),
        (("--seconds", "-1"), "max_seconds: got -1.0, allowed: a float > 0"),
    ],
)
def test_bad_break_even_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run("break-even", "measure", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"kvselect break-even: error: {message}")


def test_doctor_lists_what_counts_here(
    capsys: pytest.CaptureFixture[str], crossover_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_clock(monkeypatch)
    rows = dict(doctor.describe())
    assert rows["break-even"] == (
        "0 measured for this machine, build and number of threads, in "
        f"{crossover_folder}; KVSELECT_BREAK_EVEN=off"
    )
    monkeypatch.setenv("KVSELECT_BREAK_EVEN", "auto")
    assert run("break-even", "measure") == 0
    assert run("break-even", "measure", "--threads", str(torch.get_num_threads() + 1)) == 0
    lines = dict(doctor.describe())["break-even"].splitlines()
    assert lines[0].startswith("1 measured") and "KVSELECT_BREAK_EVEN" not in lines[0]
    assert lines[1].startswith("32/8 heads of 128, bfloat16, TokenSelect(): dense up to ")
    monkeypatch.setenv("KVSELECT_BREAK_EVEN", "maybe")
    assert dict(doctor.describe())["break-even"].startswith("KVSELECT_BREAK_EVEN: got 'maybe'")
    assert run("doctor") == 0
    assert "got 'maybe'" in capsys.readouterr().out


def test_doctor_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("KVSELECT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(crossovers.Path, "home", refuse)
    assert "in nowhere (no home)" in dict(doctor.describe())["break-even"]
