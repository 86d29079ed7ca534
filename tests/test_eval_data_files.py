"""Files of InfiniteBench, LongBench and RULER that a user has; what is wrong is named by line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvselect import cli
from kvselect.eval.tasks import data_tasks, find_tasks, prose_sample
from kvselect.eval.tasks.data_files import LAST_TOKENS, DataError, load_folder


class Words:
    """A token for every word and mark."""

    def __init__(self) -> None:
        self.pieces = ["<s>"]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        found = [0] if add_special_tokens else []
        for piece in re.findall(r"\w+|\s+|[^\w\s]", text):
            if piece not in self.pieces:
                self.pieces.append(piece)
            found.append(self.pieces.index(piece))
        return found

    def text(self, tokens: Any) -> str:
        return "".join(self.pieces[token] for token in tokens)


LONGBENCH = {
    "input": "Who wrote it?",
    "context": "A long story. " * 20,
    "answers": ["Ann", "Anna"],
    "length": 60,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "x",
}
INFINITE = {"id": 1, "context": "Noise. " * 30, "input": "What is the pass key?", "answer": "71432"}
CHOICE = INFINITE | {"answer": ["red"], "options": ["blue", "green", "red", "grey"]}
RULER = {"index": 0, "input": "Noise. " * 60 + "Which number?", "outputs": ["12", "34"]}


def write(path: Path, *entries: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "longbench" / "hotpotqa.jsonl", LONGBENCH, "", LONGBENCH | {"input": "Two?"})
    write(tmp_path / "infinite" / "passkey.jsonl", INFINITE)
    write(tmp_path / "infinite" / "longbook_choice_eng.jsonl", CHOICE)
    write(tmp_path / "ruler" / "niah_multikey_2" / "validation.jsonl", RULER, RULER)
    write(tmp_path / "ruler" / "qa_1" / "validation.jsonl", RULER | {"answer_prefix": " It is"})
    return tmp_path


def test_formats_are_known_by_their_fields(folder: Path) -> None:
    found = load_folder(folder)
    assert {name: (file.format, file.prompt, len(file.rows)) for name, file in found.items()} == {
        "hotpotqa": ("longbench", "plain", 2),
        "passkey": ("infinitebench", "plain", 1),
        "longbook_choice_eng": ("infinitebench", "plain", 1),
        "niah_multikey_2": ("ruler", "published", 2),
        "qa_1": ("ruler", "published", 1),
    }
    assert len({file.digest for file in found.values()}) == 5
    first = found["hotpotqa"].rows[0]
    assert first.answers == ("Ann", "Anna")
    assert (first.metric, first.max_new_tokens) == ("qa_f1", 32)
    assert found["longbook_choice_eng"].rows[0].answers == ("C",)
    assert "\nC. red" in found["longbook_choice_eng"].rows[0].question
    assert found["niah_multikey_2"].rows[0].metric == "share"
    assert found["qa_1"].rows[0].metric == "contains"


def test_longbench_prompts_of_the_user_are_taken_as_they_are(folder: Path) -> None:
    prompts = {"hotpotqa": "Read.\n{context}\nAsk: {input}\nSay:"}
    write(folder / "longbench" / "config" / "dataset2prompt.json", prompts)
    file = load_folder(folder)["hotpotqa"]
    assert file.prompt == "published"
    row = file.rows[0]
    whole = prompts["hotpotqa"].format(context=LONGBENCH["context"], input=LONGBENCH["input"])
    assert row.context + row.question == whole and row.question.startswith("\nAsk: Who")
    write(folder / "longbench" / "config" / "dataset2prompt.json", {"qasper": "{context}"})
    with pytest.raises(DataError, match="got no prompt for 'hotpotqa'"):
        load_folder(folder)
    write(folder / "longbench" / "config" / "dataset2prompt.json", {"hotpotqa": "{input}"})
    with pytest.raises(DataError, match=r"got a prompt without \{context\}, expected one with it"):
        load_folder(folder)


def test_samples_are_the_published_text_and_fit_the_length(folder: Path) -> None:
    tasks = data_tasks(folder)
    for name, task in tasks.items():
        assert task.file is not None
        tokenizer = Words()
        longest = task.file.total_tokens(tokenizer)
        sample = prose_sample(task, longest + 2, tokenizer)
        (question,) = sample.questions
        text = tokenizer.text(sample.context) + tokenizer.text(question.tokens)
        assert text in {"<s>" + row.context + row.question for row in task.file.rows}, name
        assert question.max_new_tokens == task.file.rows[0].max_new_tokens
        assert len(question.tokens) == LAST_TOKENS or name != "niah_multikey_2"
        short = prose_sample(task, longest - 20, tokenizer)
        assert short.total_tokens() == longest - 20
        begin, end = short.context[:5], short.context[-5:]
        assert list(begin) == list(sample.context[:5]) and list(end) == list(sample.context[-5:])
        assert list(short.questions[0].tokens) == list(question.tokens)
    with pytest.raises(ValueError, match=r"length: got 35, allowed: an int >= \d+, what the quest"):
        prose_sample(tasks["hotpotqa"], 35, Words())


def test_rows_are_drawn_in_an_order_of_the_seed(tmp_path: Path) -> None:
    rows = [RULER | {"input": f"Noise {n}. " * 30} for n in range(20)]
    write(tmp_path / "niah_x.jsonl", *rows)
    task = data_tasks(tmp_path)["niah_x"]

    def texts(seed: int) -> list[str]:
        tokenizer = Words()
        samples = [prose_sample(task, 999, tokenizer, seed=seed, index=n) for n in range(20)]
        return [tokenizer.text(sample.context[1:4]) for sample in samples]

    assert sorted(texts(0)) == sorted(texts(1)) and texts(0) != texts(1) and texts(0) == texts(0)
    assert len(set(texts(0))) == 20


def test_data_tasks_go_before_generated_ones_of_their_name(folder: Path) -> None:
    files = data_tasks(folder)
    assert find_tasks(["qa_1", "vt"], files)[0].file is not None
    with pytest.raises(ValueError, match=r"tasks: got 'qa_2', allowed: .*qa_1.*"):
        find_tasks(["qa_2"], files)


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("passkey", (INFINITE, "{"), r"line 2: got no JSON \(.*\), expected one JSON object per"),
        ("passkey", (INFINITE, "", [1]), "line 3: got list, expected a JSON object"),
        ("passkey", ({"a": 1},), "line 1: got the fields a, expected longbench: input, context, a"),
        ("passkey", (INFINITE, {"context": "x", "input": "y"}), "line 2: got answer: nothing, exp"),
        ("passkey", (INFINITE | {"context": 7}, INFINITE), "line 1: got context: int, expected co"),
        (
            "passkey",
            (INFINITE | {"answer": []},),
            r"line 1: got answer: \[\], expected answer: a l",
        ),
        ("poems", (INFINITE,), "an InfiniteBench file of an unknown task, allowed: passkey, "),
        ("code_debug", (INFINITE,), "line 1: got options: null, expected options: a list of four"),
        ("code_debug", (CHOICE | {"answer": "no"},), "line 1: got answer: 'no', expected answer: "),
        (
            "hotpotqa",
            (LONGBENCH | {"answers": [None]},),
            r"answers: \[null\], expected answers: a ",
        ),
        ("poems", (LONGBENCH,), "a LongBench file of an unknown task, allowed: narrativeqa"),
        (
            "niah_1",
            (RULER | {"outputs": "12"},),
            "line 1: got outputs: str, expected outputs: list",
        ),
        ("niah_1", (RULER | {"answer_prefix": 3},), "got answer_prefix: int, expected answer_pref"),
        ("poems", (RULER,), "a RULER file of an unknown task, allowed: a name"),
        ("passkey", (), "which is empty, allowed: one object per line"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(
    tmp_path: Path, name: str, entries: tuple[Any, ...], message: str
) -> None:
    path = write(tmp_path / f"{name}.jsonl", *entries)
    with pytest.raises(DataError, match=message) as refused:
        load_folder(tmp_path)
    assert str(path) in str(refused.value) and str(refused.value).startswith("data: ")


def test_folders_that_hold_nothing_or_one_name_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which is not a folder"):
        load_folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"which holds no \.jsonl file"):
        load_folder(tmp_path)
    for part in ("a", "b"):
        write(tmp_path / part / "passkey.jsonl", INFINITE)
    with pytest.raises(DataError, match="two files named 'passkey'"):
        load_folder(tmp_path)
    (tmp_path / "b" / "passkey.jsonl").unlink()
    (tmp_path / "a" / "passkey.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read \\(not UTF-8 text\\)"):
        load_folder(tmp_path)


# ---- end to end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("random")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["Noise. A long story."], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(config("llama", vocab_size=300)).save_pretrained(folder)
    return folder


def evaluate(model: Path, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(
        [
            *("eval", "--model", str(model), "--out", str(out)),
            *("--policies", "dense,streaming_llm:num_recent_tokens=64,q_block_size=16", *more),
        ]
    )
    path = out / "results.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_data_is_run_in_full_and_its_digest_kept(folder: Path, model: Path, tmp_path: Path) -> None:
    code, results = evaluate(model, tmp_path / "out", "--data", str(folder))
    assert code == 0 and list(results["lengths"]) == ["full"]
    counts = {cell["task"]: cell["num_samples"] for cell in results["cells"]}
    assert counts == {
        "hotpotqa": 2,
        "passkey": 1,
        "longbook_choice_eng": 1,
        "niah_multikey_2": 2,
        "qa_1": 1,
    }
    assert results["config"]["prompts"]["niah_multikey_2"] == "published"
    # Other data under the same command is another run.
    write(folder / "infinite" / "passkey.jsonl", INFINITE | {"answer": "1"})
    assert evaluate(model, tmp_path / "out", "--data", str(folder))[0] == 2


def test_written_tasks_run_end_to_end(model: Path, tmp_path: Path) -> None:
    code, results = evaluate(
        model,
        tmp_path / "out",
        *("--tasks", "json_kv,ruler_vt", "--lengths", "1500", "--samples", "3"),
    )
    assert code == 0 and results["config"]["template"] == "prose-1"
    assert {cell["num_samples"] for cell in results["cells"]} == {3}
    assert {cell["score"] for cell in results["cells"]} == {0.0}
    assert all(len(cell["depths"]) == 3 for cell in results["cells"])


def test_the_embedded_model_cannot_read_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["eval", "--data", str(folder), "--out", str(tmp_path / "out")])
    assert code == 2
    assert "text which a model of the dialect cannot read" in capsys.readouterr().err
