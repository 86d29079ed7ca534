"""Perplexity by context length: the stock model's numbers, the same targets, resumed, refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hf_models import config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvselect import Dense, StreamingLLM, TokenSelect, cli
from kvselect.eval import perplexity
from kvselect.eval.checkpoint import Checkpoint, load_checkpoint
from kvselect.eval.perplexity import PerplexityCell, PerplexityRequest
from kvselect.eval.results import Length

LENGTHS = (Length(label="96", tokens=96), Length(label="200", tokens=200))
WIDE = TokenSelect(
    topk=200, num_sink_tokens=2, num_recent_tokens=64, q_block_size=16, sketch=None, overselect=1.0
)
NARROW = StreamingLLM(num_sink_tokens=2, num_recent_tokens=24, q_block_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of bytes, which has a token before every text."""
    path = tmp_path_factory.mktemp("bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["x"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    torch.manual_seed(0)
    LlamaForCausalLM(config("llama", vocab_size=256)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


def request(**changes: Any) -> PerplexityRequest:
    settings: dict[str, Any] = {
        "lengths": LENGTHS,
        "policies": {"dense": Dense(), "wide": WIDE, "narrow": NARROW},
        "segments": 3,
        "scored_tokens": 40,
    }
    return PerplexityRequest(**(settings | changes))


@pytest.fixture(scope="module")
def text(checkpoint: Checkpoint) -> perplexity.Text:
    return perplexity.read_text(checkpoint.tokenizer, perplexity.library_text()[:3000])


def test_the_text_is_there_and_held_out() -> None:
    text = perplexity.library_text()
    assert len(text) > 200_000 and "def " in text
    assert text == perplexity.library_text()


def test_dense_and_a_wide_budget_give_the_stock_models_numbers(
    checkpoint: Checkpoint, text: perplexity.Text
) -> None:
    cells = perplexity.measure(checkpoint, request(), text)
    by_place = {(cell.length.tokens, cell.policy): cell for cell in cells}
    ends = perplexity.segment_ends(request(), text)
    for length in LENGTHS:
        for segment, end in enumerate(ends):
            ids = torch.tensor([text.tokens[end - length.tokens : end]])
            with torch.no_grad():
                logits = checkpoint.model(ids).logits[0, -41:-1].double()
            stock = float(F.cross_entropy(logits, ids[0, -40:]))
            for policy in ("dense", "wide"):
                found = by_place[length.tokens, policy]
                assert found.nll[segment] == pytest.approx(stock, rel=1e-5)
                assert found.kept_mass == pytest.approx(1.0, abs=1e-5)
    narrow = by_place[200, "narrow"]
    assert narrow.nll != by_place[200, "dense"].nll
    assert narrow.kept_mass is not None and narrow.kept_mass < 0.9
    dense = by_place[96, "dense"]
    assert dense.bytes_per_token == 1.0  # one byte per token
    assert dense.perplexity == pytest.approx(math.exp(sum(dense.nll) / 3))
    assert dense.bits_per_byte == pytest.approx(math.log2(dense.perplexity))


def test_segments_end_where_the_longest_context_fits(text: perplexity.Text) -> None:
    ends = perplexity.segment_ends(request(segments=50), text)
    assert len(set(ends)) == 50 and ends == sorted(ends)
    assert ends[0] >= 200 and ends[-1] <= len(text.tokens)
    one_length = request(segments=50, lengths=LENGTHS[1:])
    assert perplexity.segment_ends(one_length, text) == ends  # the same targets
    assert perplexity.segment_ends(request(segments=50, seed=1), text) != ends


def test_lengths_that_the_text_cannot_serve(text: perplexity.Text) -> None:
    long = (Length(label="9k", tokens=9216),)
    with pytest.raises(ValueError, match=r"lengths: got '9k', allowed: at most 2997 tokens: the"):
        perplexity.segment_ends(request(lengths=long), text)
    short = (Length(label="41", tokens=41),)
    with pytest.raises(ValueError, match="lengths: got '41', allowed: at least 42 tokens"):
        perplexity.segment_ends(request(lengths=short), text)


def test_ratios_are_paired() -> None:
    dense = PerplexityCell(
        length=LENGTHS[0], policy="d", nll=(1.0, 2.0, 5.0), bytes_per_token=2.0, kept_mass=1.0
    )
    other = dataclasses.replace(dense, nll=(1.1, 2.1, 5.1))
    ratio, low, high = perplexity.ratio_to(other, dense)
    assert ratio == pytest.approx(math.exp(0.1)) == pytest.approx(low) == pytest.approx(high)


ARGUMENTS = (
    *("--lengths", "96,200", "--segments", "3", "--scored-tokens", "40"),
    *("--policies", "dense,streaming_llm:num_recent_tokens=24,num_sink_tokens=2,q_block_size=16"),
)


def test_the_command_writes_resumes_and_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def run(*more: str) -> int:
        command = ["perplexity", "--model", str(folder), "--out", str(out)]
        return cli.main([*command, *ARGUMENTS, *more])

    assert run() == 0
    assert "ratio to dense" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *("perplexity.json", "perplexity.png", "perplexity.jsonl")
    }
    found = json.loads((out / "perplexity.json").read_text())
    assert [cell["length_tokens"] for cell in found["cells"]] == [96, 96, 200, 200]
    assert found["cells"][0]["ratio_to_baseline"] is None
    low, high = found["cells"][3]["ratio_interval_95"]
    assert low <= found["cells"][3]["ratio_to_baseline"] <= high

    journal = out / "perplexity.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:5]))
    assert run() == 0
    assert "4 answered contexts are there already" in capsys.readouterr().err
    assert json.loads((out / "perplexity.json").read_text())["cells"] == found["cells"]

    assert run("--seed", "1") == 2
    assert "another seed 0 (asked: 1)" in capsys.readouterr().err
    assert run("--seed", "1", "--restart") == 0
    assert (out / "perplexity.jsonl.before-1").exists()

    (out / "perplexity.json").write_text('{"cells": [')
    assert run("--seed", "1") == 0
    assert "kept as perplexity.json.damaged-1" in " ".join(capsys.readouterr().err.split())
    assert (out / "perplexity.json.damaged-1").read_text() == '{"cells": ['
    written = (out / "perplexity.json").read_bytes()
    journal.unlink()
    assert run("--seed", "1") == 2
    assert "a perplexity.json without the perplexity.jsonl" in capsys.readouterr().err
    assert (out / "perplexity.json").read_bytes() == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "embedded"), "model: got 'embedded', whose 512 words cannot spell a text"),
        (("--model", "embedded", "--segments", "0"), "segments: got 0, allowed: an int >= 1"),
        (("--model", "/none"), "model: got '/none', which is not a folder"),
        (("--model", "embedded", "--policies", "x"), "policies: got 'x', allowed: act_qkv"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["perplexity", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kvselect perplexity: error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
