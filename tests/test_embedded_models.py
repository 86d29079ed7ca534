"""The embedded models: all of them load by name and answer, and their scripts train and resume.

bench/retrieval.py and kvselect perplexity make the claims; these are regressions with wide margins.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from functools import cache
from glob import glob
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import kvselect
from kvselect.eval import perplexity
from kvselect.eval.checkpoint import (
    EMBEDDED,
    EMBEDDED_MODELS,
    CheckpointError,
    embedded_model_path,
    is_embedded,
    load_checkpoint,
)
from kvselect.eval.models import training
from kvselect.eval.models.code import train as code
from kvselect.eval.models.induction import plant_induction_circuit
from kvselect.eval.models.retrieval import train
from kvselect.eval.tasks import TASKS, dialect_sample

RETRIEVAL = {"retrieval-small": "small", "retrieval": "base"}
SYMBOLIC = [name for name, task in TASKS.items() if task.draw is not None]
MIXED = sorted(
    {task for preset in train.PRESETS.values() for s in preset.stages for task in s.mixture}
)
TOTAL_BYTES = 12 * 10**6

STAGE = train.Stage(
    mixture={"needles": 1.0, "pairs": 1.0}, phases=((32, 8, 3),), learning_rate=2e-3, seed=0
)
TINY = train.Preset(
    hidden_size=96,
    intermediate_size=64,
    num_layers=2,
    num_q_heads=2,
    window_tokens=64,
    stages=(STAGE, dataclasses.replace(STAGE, seed=1)),
)


# ---- files and names


@cache
def stock(name: str) -> tuple[Any, Any]:
    """Model and tokenizer by plain transformers, as the card says."""
    path = embedded_model_path(f"{EMBEDDED}:{name}")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_names() -> None:
    assert embedded_model_path() == embedded_model_path("embedded:retrieval")
    assert is_embedded("embedded") and is_embedded("embedded:code") and is_embedded("embedded:x")
    assert not is_embedded("/models/embedded")
    for load in (load_checkpoint, embedded_model_path):
        with pytest.raises(CheckpointError) as error:
            load("embedded:poetry")
        assert str(error.value).startswith("model: got 'embedded:poetry', allowed: embedded, ")
        assert all(f"embedded:{name}" in str(error.value) for name in EMBEDDED_MODELS)
    assert load_checkpoint("embedded").name == "Embedded model"
    assert load_checkpoint("embedded:retrieval-small").name == "Embedded retrieval-small"


def test_everything_embedded_fits_into_12_megabytes() -> None:
    models = embedded_model_path().parent
    files = [path for path in models.rglob("*") if path.suffix in {".safetensors", ".json"}]
    assert sum(path.stat().st_size for path in files) <= TOTAL_BYTES
    assert {path.parent for path in files} == {
        embedded_model_path(f"embedded:{name}") for name in EMBEDDED_MODELS
    }


def test_the_package_data_are_every_models_files() -> None:
    """As pyproject.toml lists them; `make wheel` looks into a wheel."""
    package = Path(kvselect.__file__).parent
    patterns = re.findall(r'"(eval/models/[^"]+)"', (package.parent / "pyproject.toml").read_text())
    packed = {
        package / name for p in patterns for name in glob(p, root_dir=package, recursive=True)
    }
    for model in EMBEDDED_MODELS:
        folder = embedded_model_path(f"embedded:{model}")
        files = {path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"}}
        assert len(files) == 6 and files <= packed
        assert folder / "README.md" in packed


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_stored_in_half_computed_in_single(name: str) -> None:
    model, tokenizer = stock(name)
    assert isinstance(model, LlamaForCausalLM) and model.dtype == torch.float32
    assert load_checkpoint(f"embedded:{name}").model.dtype == torch.float32
    path = embedded_model_path(f"embedded:{name}")
    with safe_open(path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert tokenizer.bos_token_id == model.config.bos_token_id == 1
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize(("name", "preset"), RETRIEVAL.items())
def test_the_card_and_the_record_are_those_of_the_recipe(name: str, preset: str) -> None:
    path = embedded_model_path(f"embedded:{name}")
    recipe = train.PRESETS[preset]
    stages = json.loads((path / "training.json").read_text())["stages"]
    assert [stage["seed"] for stage in stages] == [stage.seed for stage in recipe.stages]
    assert [stage["steps"] for stage in stages] == [len(s.schedule()) for s in recipe.stages]
    config = json.loads((path / "config.json").read_text())
    assert config["max_position_embeddings"] == recipe.window_tokens
    assert config["hidden_size"] == recipe.hidden_size
    assert config["num_hidden_layers"] == recipe.num_layers
    assert config["num_attention_heads"] == recipe.num_q_heads
    card = (path / "README.md").read_text()
    assert "hand-made" in card and "synthetic" in card and "cannot tell" in card


def test_the_language_model_has_a_card_and_the_record_of_its_recipe() -> None:
    path = embedded_model_path("embedded:code")
    found = json.loads((path / "training.json").read_text())
    assert [stage["steps"] for stage in found["stages"]] == [len(code.RECIPE.schedule())]
    assert found["text"]["bytes"] > 8_000_000
    card = (path / "README.md").read_text()
    assert "hand-made" in card and "cannot tell" in card and "held out" in card


# ---- answers


@pytest.mark.parametrize("task", SYMBOLIC)
@pytest.mark.parametrize("name", RETRIEVAL)
def test_stock_attention_answers_in_the_window(name: str, task: str) -> None:
    """Without any part of kvselect but the questions; a set is read off one forward pass."""
    model, tokenizer = stock(name)
    right = total = 0
    for index in range(4 if task == "niah_single" else 1):
        window = model.config.max_position_embeddings
        sample = dialect_sample(TASKS[task], window, seed=5, index=index, max_questions=6)
        for question in sample.questions:
            tokens = torch.as_tensor(np.concatenate([sample.context, question.tokens]))[None]
            with torch.inference_mode():
                if question.top_words:
                    logits = model(tokens).logits[0, -1]
                    words = logits.topk(len(question.answer)).indices
                else:
                    count = len(question.answer)
                    words = model.generate(tokens, max_new_tokens=count)[0, -count:]
            found = tokenizer.convert_ids_to_tokens(words.tolist())
            if question.any_order:
                right += set(found) == set(question.answer)
            else:
                right += found == list(question.answer)
            total += 1
    # The small model leaves a third of the sets and a quarter of the pairs unfound; see its card.
    weak = name == "retrieval-small" and task in ("niah_multivalue", "json_kv")
    assert right >= (total // 3 if weak else total - 1) and total >= 4


def test_the_language_model_predicts_held_out_text() -> None:
    checkpoint = load_checkpoint("embedded:code")
    text = perplexity.read_text(checkpoint.tokenizer, perplexity.library_text()[20_000:40_000])
    assert text.prefix == [1]
    rows = torch.tensor(text.tokens[: 8 * 511]).view(8, 511)
    tokens = torch.cat([torch.ones(8, 1, dtype=torch.long), rows], dim=1)
    with torch.inference_mode():
        logits = checkpoint.model(tokens).logits[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1), rows.flatten()).item()
    num_bytes = len(checkpoint.tokenizer.decode(rows.flatten().tolist()).encode())
    assert nll / np.log(2) * rows.numel() / num_bytes < 2.0  # bits per byte; untrained 3.7


def test_any_text_survives_the_byte_pairs() -> None:
    tokenizer = load_checkpoint("embedded:code").tokenizer
    text = "def f(x):\n\treturn 'Übung' + \"日本\" * 3  # 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


# ---- training data


@pytest.mark.parametrize("task", MIXED)
@pytest.mark.parametrize("length", [64, 256, 1024])
def test_training_sequences_have_the_asked_length_and_true_targets(task: str, length: int) -> None:
    batch = train.draw_batch(np.random.default_rng(3), task, 4, length)
    assert batch.tokens.shape == (4, length)
    assert batch.targets.shape == (4, length, train.MAX_VALUES_PER_KEY)
    answers = batch.targets[..., 0] >= 0
    assert answers.any(axis=1).all() and not answers[:, 0].any()
    # What stands at an answer's place is one of its targets, and every target was told.
    hits = (batch.targets == batch.tokens[..., None]).any(-1)
    assert hits[answers].all()
    for row in range(4):
        told = set(batch.tokens[row][~answers[row]].tolist())
        assert set(batch.targets[row][answers[row]].ravel().tolist()) - {-1} <= told


def test_values_of_a_set_need_not_compete() -> None:
    """One value of three that is found with certainty is no reason to lower it."""

    class Fixed(nn.Module):
        """Logits of its own at every place, by way of one-hot states."""

        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(4, 4)
            with torch.no_grad():
                self.embed_tokens.weight.copy_(torch.diag(torch.tensor(logits)))
            self.model = self

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 4))

    logits = torch.tensor([3.0, 1.0, 0.5, -2.0])
    targets = np.full((1, 3, train.MAX_VALUES_PER_KEY), -1)
    targets[0, 1, :2] = [0, 1]
    targets[0, 2, 0] = 2
    batch = train.Batch(tokens=np.zeros((1, 3), np.int64), targets=targets)
    model: Any = Fixed(logits.tolist())
    together, hit, row = train.answer_loss(model, batch)
    apart, *same = train.answer_loss(model, batch, values_compete=False)
    assert hit.tolist() == [True, False] == same[0].tolist() and row.tolist() == [0, 0]
    logs = logits.log_softmax(0)
    assert torch.allclose(together, torch.stack([-(logs[0] + logs[1]) / 2, -logs[2]]))
    each = [logits[[i, 2, 3]].log_softmax(0)[0] for i in (0, 1)]
    assert torch.allclose(apart, torch.stack([-sum(each) / 2, -logs[2]]))


def test_even_drawings_weigh_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing with nine times the answers of the others counts as one of four, not as three."""
    answers = [9, 1, 1, 1]
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor(answers))
    losses = torch.where(rows == 0, 4.0, 1.0)
    monkeypatch.setattr(train, "answer_loss", lambda *_, **__: (losses, losses > 2, rows))
    found = {}
    for even in (False, True):
        stage = dataclasses.replace(STAGE, phases=((32, 4, 3),), even_drawings=even)
        loss, _, values = train.training_step(stage, None, np.random.default_rng(0), 0)  # type: ignore[arg-type]
        found[even] = loss.item()
        assert [value for _, value in values] == [1.0, 0.0, 0.0, 0.0]
    assert found == {False: 39 / 12, True: 7 / 4}


def test_unknown_training_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="task: got 'poetry'"):
        train.draw_batch(np.random.default_rng(0), "poetry", 4, 64)


def test_training_text_holds_nothing_that_is_held_out() -> None:
    texts = code.training_texts()
    kept = [path for path in perplexity.library_files() if perplexity.held_out(path.name)]
    assert len(kept) >= 20 and len(texts) > 8 * len(kept)
    whole = "\0".join(texts)
    long = [text for path in kept if len(text := path.read_text(errors="ignore")) > 2000]
    assert long and not any(text in whole for text in long)


# ---- training


@pytest.mark.parametrize("preset", train.PRESETS)
def test_the_planted_circuit_looks_words_up_without_training(preset: str) -> None:
    torch.manual_seed(0)
    model = train.PRESETS[preset].random_model().eval()
    batch = train.draw_batch(np.random.default_rng(1), "needles", 16, 64)
    with torch.no_grad():
        before = train.answer_loss(model, batch)[1].float().mean()
        plant_induction_circuit(model, sink_logit=train.PRESETS[preset].sink_logit)
        after = train.answer_loss(model, batch)[1].float().mean()
    # 96 channels are too few to hold the circuit apart from what surrounds it; it still trains.
    assert before < 0.05 and after > (0.015 if preset == "small" else 0.15)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_an_interrupted_run_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train.train(TINY, whole)
    calls = 0
    while not train.train(TINY, broken, stop_after=2):  # stops inside both stages, and between
        assert (broken / training.STATE_NAME).exists() and not (broken / "config.json").exists()
        calls += 1
    assert calls == 3
    expected, found = weights_of(whole), weights_of(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert not (broken / training.STATE_NAME).exists()
    stages = [json.loads((f / "training.json").read_text())["stages"] for f in (whole, broken)]
    for one, other in zip(*stages, strict=True):
        assert one["running_mean"] == other["running_mean"] and one["tokens"] == other["tokens"]
    loaded = load_checkpoint(whole)
    assert loaded.speaks_dialect and loaded.window_tokens == 64


def test_later_stages_go_on_from_weights(tmp_path: Path) -> None:
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    assert train.train(TINY, whole)
    assert train.train(dataclasses.replace(TINY, stages=TINY.stages[:1]), first)
    assert train.train(TINY, second, first_stage=2, weights=first)
    # The weights in between were rounded to bfloat16, so these are near, not the same.
    expected, found = weights_of(whole), weights_of(second)
    for key in expected:
        assert torch.allclose(expected[key].float(), found[key].float(), atol=0.02)
    assert not all(torch.equal(value, found[key]) for key, value in weights_of(first).items())
    stages = json.loads((second / "training.json").read_text())["stages"]
    assert [stage["seed"] for stage in stages] == [0, 1]


def test_the_state_of_another_recipe_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    assert not train.train(TINY, tmp_path, stop_after=1)
    other = dataclasses.replace(TINY, stages=(STAGE,))
    with pytest.raises(ValueError, match=r"state: got .*state.pt', of another recipe, allowed"):
        train.train(other, tmp_path)
    path = tmp_path / training.STATE_NAME
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"state: got .*state.pt', which is damaged, allowed"):
        train.train(TINY, tmp_path)


def test_a_few_steps_learn_needles() -> None:
    torch.manual_seed(0)
    model = train.PRESETS["base"].new_model()
    stage = train.Stage(
        mixture={"needles": 1.0}, phases=((64, 16, 25),), learning_rate=2e-3, seed=0
    )
    optimizers = train.new_optimizers(stage.learning_rate, model)
    rng = np.random.default_rng(0)
    shown: list[float] = []
    for step in range(25):
        loss, _, values = train.training_step(stage, model, rng, step)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        shown += [value for _, value in values]
    assert np.mean(shown[-12:]) > 0.7


def test_the_language_model_trains_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = code.training_texts()[:12]
    monkeypatch.setattr(code, "training_texts", lambda: texts)
    recipe = code.Recipe(phases=((32, 4, 4),), hidden_size=96, intermediate_size=64, num_layers=2)
    assert code.train(tmp_path / "whole", recipe)
    assert not code.train(tmp_path / "broken", recipe, stop_after=2)
    assert code.train(tmp_path / "broken", recipe)
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    loaded = load_checkpoint(tmp_path / "whole")
    assert not loaded.speaks_dialect and loaded.tokenizer.encode("") == [1]


def test_muon_makes_every_update_orthogonal() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(24, 8))
    parameter.grad = torch.randn(24, 8) * torch.logspace(-1, 1, 8)
    training.Muon([parameter], lr=1.0, weight_decay=0.0).step()
    sizes = torch.linalg.svdvals(parameter.detach()) / 3**0.5  # (24 / 8) ** 0.5 for tall matrices
    assert sizes.min() > 0.6 and sizes.max() < 1.3
    assert (
        torch.linalg.svdvals(parameter.grad).max() > 50 * torch.linalg.svdvals(parameter.grad).min()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("huge", "--out", "x"), "invalid choice: 'huge'"),
        (("base", "--out", "x", "--first-stage", "11"), "first-stage: got 11, allowed: 1 to 10"),
        (("base", "--out", "x", "--first-stage", "2"), "weights: allowed: with --first-stage 2"),
    ],
)
def test_the_training_command_refuses(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit):
        train.main()
    assert message in capsys.readouterr().err


def test_the_training_command_reports_progress_and_writes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(train.PRESETS, "small", TINY)
    threads = str(torch.get_num_threads())
    arguments = ["train", "small", "--out", str(tmp_path), "--threads", threads]
    monkeypatch.setattr(sys, "argv", arguments)
    train.main()
    assert "step 6/6 2/2 needles" in capsys.readouterr().err.replace("pairs", "needles")
    assert load_checkpoint(tmp_path).speaks_dialect
