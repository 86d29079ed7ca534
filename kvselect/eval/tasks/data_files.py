"""Files of published benchmarks that a user has: InfiniteBench, LongBench and RULER, as JSON lines.

Which format a file has is told by the fields of its first line; every line is checked. Formats,
prompts and metrics: docs/eval.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvselect.eval.tasks.prose import Tokenizer
from kvselect.eval.tasks.sample import Question, Sample

PROMPTS_NAME = "dataset2prompt.json"  # LongBench's own, from its folder config/
LAST_TOKENS = 32  # of a RULER prompt without answer_prefix: asked after the rest was read


class DataError(ValueError):
    """A data file that is not as it should be; the message names file, line and what was
    expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line: the text that is read, what is asked after it, and how the answer is graded."""

    context: str
    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A loaded file.

    Attributes
    ----------
    path : Path
    format : "infinitebench", "longbench" or "ruler"
    digest : str
        16 hex digits of the file's content.
    prompt : str
        Where the prompt comes from: "published", or "plain" for ours.
    rows : tuple of Row
    """

    path: Path
    format: str
    digest: str
    prompt: str
    rows: tuple[Row, ...]

    def sample(self, index: int, length: int, tokenizer: Tokenizer) -> Sample:
        """One row; a prompt that is longer than `length` loses the middle of its context, as the
        published harnesses do it."""
        row = self.rows[index]
        question = tokenizer.encode(row.question, add_special_tokens=False) if row.question else []
        context = tokenizer.encode(row.context)
        if not question:
            context, question = context[:-LAST_TOKENS], context[-LAST_TOKENS:]
        room = length - len(question) - row.max_new_tokens
        if room < 2 or not context:
            raise ValueError(
                f"length: got {length}, allowed: an int >= "
                f"{2 + len(question) + row.max_new_tokens}, what the question and its answer take"
            )
        if len(context) > room:
            context = context[: room - room // 2] + context[len(context) - room // 2 :]
        return Sample(
            context=np.array(context, np.int64),
            questions=(
                Question(
                    tokens=np.array(question, np.int64),
                    answer=row.answers,
                    max_new_tokens=row.max_new_tokens,
                    any_order=True,
                    metric=row.metric,
                ),
            ),
        )

    def total_tokens(self, tokenizer: Tokenizer) -> int:
        """What the longest row takes, answer included."""
        return max(
            len(tokenizer.encode(row.context + row.question)) + row.max_new_tokens
            for row in self.rows
        )


def load_folder(folder: Path) -> dict[str, DataFile]:
    """Task name -> file, for every ``.jsonl`` below a folder, by name.

    A file is named by its stem; RULER's ``validation.jsonl`` and ``test.jsonl`` by their folder.

    Raises
    ------
    DataError
        If the folder holds none, two have one name, or a line is not as its format asks.
    """
    if not folder.is_dir():
        raise DataError(f"data: got {str(folder)!r}, which is not a folder, allowed: a folder")
    found: dict[str, DataFile] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        name = path.stem
        if name in ("validation", "test"):
            name = path.parent.name
        if name in found:
            raise DataError(
                f"data: got two files named {name!r} ({found[name].path} and {path}), allowed: one"
            )
        found[name] = load_file(path, name)
    if not found:
        raise DataError(
            f"data: got {str(folder)!r}, which holds no .jsonl file, allowed: files of "
            "InfiniteBench, LongBench or RULER"
        )
    return found


def load_file(path: Path, name: str) -> DataFile:
    """One file; `name` tells which of a benchmark's tasks it is."""
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"data: got {str(path)!r}, which cannot be read ({reason})") from error
    entries = [
        (number, _object(path, number, line))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not entries:
        raise DataError(f"data: got {str(path)!r}, which is empty, allowed: one object per line")
    number, first = entries[0]
    known = [form for form, needs in _FIELDS.items() if needs.keys() <= first.keys()]
    if not known:
        wanted = "; ".join(f"{form}: {', '.join(needs)}" for form, needs in _FIELDS.items())
        raise _wrong(path, number, f"the fields {', '.join(sorted(first)) or 'none'}", wanted)
    form = known[0]
    for number, entry in entries:
        for field, kinds in _FIELDS[form].items():
            if not isinstance(entry.get(field), kinds):
                got = type(entry[field]).__name__ if field in entry else "nothing"
                wanted = f"{field}: {' or '.join(kind.__name__ for kind in kinds)} ({form})"
                raise _wrong(path, number, f"{field}: {got}", wanted)
    prompt, make = _MAKERS[form](path, name)
    rows = []
    for number, entry in entries:
        try:
            rows.append(make(entry))
        except _RowError as error:
            raise _wrong(path, number, error.got, error.wanted) from None
    return DataFile(
        path=path,
        format=form,
        digest=hashlib.sha256(data).hexdigest()[:16],
        prompt=prompt,
        rows=tuple(rows),
    )


# What a line must hold. LongBench before InfiniteBench: "answers" is its own.
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "longbench": {"input": (str,), "context": (str,), "answers": (list,)},
    "infinitebench": {"context": (str,), "input": (str,), "answer": (str, list, int)},
    "ruler": {"input": (str,), "outputs": (list,)},
}


class _RowError(Exception):
    def __init__(self, got: str, wanted: str) -> None:
        super().__init__(got)
        self.got, self.wanted = got, wanted


def _wrong(path: Path, number: int, got: str, wanted: str) -> DataError:
    return DataError(f"data: {path}, line {number}: got {got}, expected {wanted}")


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise _wrong(path, number, f"no JSON ({error})", "one JSON object per line") from None
    if not isinstance(found, dict):
        raise _wrong(path, number, type(found).__name__, "a JSON object")
    return found


def _strings(values: list[Any], field: str) -> tuple[str, ...]:
    if not values or not all(isinstance(value, (str, int)) for value in values):
        raise _RowError(f"{field}: {json.dumps(values)[:60]}", f"{field}: a list of strings")
    return tuple(str(value) for value in values)


Maker = Callable[[Mapping[str, Any]], Row]


# ---- LongBench

_LONGBENCH = {  # metric and tokens to generate, as published
    "narrativeqa": ("qa_f1", 128),
    "qasper": ("qa_f1", 128),
    "multifieldqa_en": ("qa_f1", 64),
    "hotpotqa": ("qa_f1", 32),
    "2wikimqa": ("qa_f1", 32),
    "musique": ("qa_f1", 32),
    "gov_report": ("rouge_l", 512),
    "qmsum": ("rouge_l", 512),
    "multi_news": ("rouge_l", 512),
    "trec": ("class", 64),
    "triviaqa": ("qa_f1", 32),
    "samsum": ("rouge_l", 128),
    "passage_retrieval_en": ("paragraph", 32),
    "passage_count": ("first_number", 32),
    "lcc": ("edit_similarity", 64),
    "repobench-p": ("edit_similarity", 64),
}


def _longbench(path: Path, name: str) -> tuple[str, Maker]:
    task = name.removesuffix("_e")
    if task not in _LONGBENCH:
        raise DataError(
            f"data: got {str(path)!r}, a LongBench file of an unknown task, allowed: "
            f"{', '.join(_LONGBENCH)} (or with _e)"
        )
    metric, max_new_tokens = _LONGBENCH[task]
    template, source = "{context}\n\n{input}\nAnswer:", "plain"
    for prompts in (path.parent / PROMPTS_NAME, path.parent / "config" / PROMPTS_NAME):
        if prompts.is_file():
            try:
                template, source = json.loads(prompts.read_text("utf-8"))[task], "published"
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"data: {prompts}: got no prompt for {task!r} ({type(error).__name__}), "
                    "expected a JSON object: task -> prompt with {context}"
                ) from None
            break
    before, mark, after = template.partition("{context}")
    if not mark:
        raise DataError(f"data: {path}: got a prompt without {{context}}, expected one with it")

    def make(entry: Mapping[str, Any]) -> Row:
        return Row(
            context=before.replace("{input}", entry["input"]) + entry["context"],
            question=after.replace("{input}", entry["input"]),
            answers=_strings(entry["answers"], "answers"),
            max_new_tokens=max_new_tokens,
            metric=metric,
        )

    return source, make


# ---- InfiniteBench

_INFINITEBENCH = {
    "passkey": ("contains", 6),
    "number_string": ("contains", 12),
    "kv_retrieval": ("contains", 50),
    "longbook_sum_eng": ("rouge_l", 1200),
    "longbook_choice_eng": ("choice", 40),
    "longbook_qa_eng": ("qa_f1", 40),
    "longdialogue_qa_eng": ("contains", 40),
    "math_find": ("first_number", 3),
    "code_run": ("first_number", 5),
    "code_debug": ("choice", 5),
}


def _infinitebench(path: Path, name: str) -> tuple[str, Maker]:
    if name not in _INFINITEBENCH:
        raise DataError(
            f"data: got {str(path)!r}, an InfiniteBench file of an unknown task, allowed: "
            f"{', '.join(_INFINITEBENCH)}"
        )
    metric, max_new_tokens = _INFINITEBENCH[name]

    def make(entry: Mapping[str, Any]) -> Row:
        given = entry["answer"]
        answers = _strings(given if isinstance(given, list) else [given], "answer")
        asked = entry["input"]
        if metric == "choice":
            options = entry.get("options")
            if not isinstance(options, list) or len(options) != 4:
                raise _RowError(f"options: {json.dumps(options)[:60]}", "options: a list of four")
            if answers[0] not in options:
                raise _RowError(f"answer: {answers[0][:60]!r}", "answer: one of the options")
            asked += "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", options))
            answers = ("ABCD"[options.index(answers[0])],)
        return Row(
            context=entry["context"],
            question=f"\n\n{asked}\nAnswer:",
            answers=answers,
            max_new_tokens=max_new_tokens,
            metric=metric,
        )

    return "plain", make


# ---- RULER

_RULER: tuple[tuple[re.Pattern[str], str, int], ...] = (
    (re.compile(r"niah"), "share", 128),
    (re.compile(r"vt|variable"), "share", 30),
    (re.compile(r"cwe|common"), "share", 120),
    (re.compile(r"fwe|freq"), "share", 50),
    (re.compile(r"qa"), "contains", 32),
)


def _ruler(path: Path, name: str) -> tuple[str, Maker]:
    known = [(metric, most) for pattern, metric, most in _RULER if pattern.search(name.lower())]
    if not known:
        raise DataError(
            f"data: got {str(path)!r}, a RULER file of an unknown task, allowed: a name (of the "
            "file, or of the folder of validation.jsonl) with niah, vt, cwe, fwe or qa in it"
        )
    metric, max_new_tokens = known[0]

    def make(entry: Mapping[str, Any]) -> Row:
        prefix = entry.get("answer_prefix", "")
        if not isinstance(prefix, str):
            raise _RowError(f"answer_prefix: {type(prefix).__name__}", "answer_prefix: str")
        return Row(
            context=entry["input"],
            question=prefix,
            answers=_strings(entry["outputs"], "outputs"),
            max_new_tokens=max_new_tokens,
            metric=metric,
        )

    return "published", make


_MAKERS: dict[str, Callable[[Path, str], tuple[str, Maker]]] = {
    "longbench": _longbench,
    "infinitebench": _infinitebench,
    "ruler": _ruler,
}
