"""Retrieval tasks: seeded, offline, each in the embedded model's dialect and in prose for any other
checkpoint.

A task draws a `Problem` in symbols (`problems.py`) and renders it at an exact length (`dialect.py`,
`prose.py`). The same (task, length, seed, index) is the same sample everywhere, so every policy is
asked the same questions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kvselect.eval.tasks import dialect, long_context, prose, ruler
from kvselect.eval.tasks import needle_threading as threading
from kvselect.eval.tasks.data_files import DataFile, load_folder
from kvselect.eval.tasks.grading import grade, grade_text, grade_words
from kvselect.eval.tasks.problems import (
    Problem,
    draw_chains,
    draw_multivalue,
    draw_needles,
    draw_pairs,
    draw_variables,
)
from kvselect.eval.tasks.prose import Tokenizer
from kvselect.eval.tasks.sample import Question, Sample
from kvselect.eval.tasks.written import Draw

__all__ = [
    "GROUPS",
    "MINIMAL",
    "TASKS",
    "Problem",
    "Question",
    "Sample",
    "Task",
    "data_tasks",
    "default_tasks",
    "dialect_sample",
    "find_tasks",
    "grade",
    "grade_text",
    "grade_words",
    "prose_sample",
]

# How many statements a context may hold: about one third of a dialect context (one statement is
# three or four words), a fifth of a prose context (one is some 16 tokens). The rest is haystack.
_DIALECT_TOKENS_PER_STATEMENT = 12
_PROSE_TOKENS_PER_STATEMENT = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A named kind of problem.

    Attributes
    ----------
    name, summary : str
    draw : (rng, max_statements, max_questions) -> Problem with a batch of one, or None
        For tasks in symbols, which every model can be asked.
    write : (Draw) -> Sample, or None
        For tasks that are text from the start: no model of the dialect can be asked them, unless
        the task has a `draw` of its own for it.
    file : DataFile or None
        For tasks whose samples a user has.
    only_statements : int
        If above 0, a context of the dialect holds nothing but statements, of so many words each;
        otherwise they stand among noise.
    """

    name: str
    summary: str
    draw: Callable[[np.random.Generator, int, int], Problem] | None = None
    write: Callable[[Draw], Sample] | None = None
    file: DataFile | None = None
    only_statements: int = 0


def _single(rng: np.random.Generator, max_statements: int, max_questions: int) -> Problem:
    return draw_needles(rng, 1, 1, 1)


def _multikey(rng: np.random.Generator, max_statements: int, max_questions: int) -> Problem:
    num_keys = max(2, min(32, max_statements))
    return draw_needles(rng, 1, num_keys, min(num_keys, max_questions))


def _pairkey(rng: np.random.Generator, max_statements: int, max_questions: int) -> Problem:
    num_keys = max(2, min(32, max_statements))
    return draw_needles(rng, 1, num_keys, min(num_keys, max_questions), key_words=2)


def _multivalue(rng: np.random.Generator, max_statements: int, max_questions: int) -> Problem:
    num_keys = max(1, min(12, max_statements // 3))
    return draw_multivalue(rng, 1, num_keys, 3, min(num_keys, max_questions))


def _chain(rng: np.random.Generator, max_statements: int, max_questions: int) -> Problem:
    num_chains = max(1, min(12, max_statements // 3))
    return draw_chains(rng, 1, num_chains, 3, min(num_chains, max_questions))


def _variables(rng: np.random.Generator, max_statements: int, max_questions: int) -> Problem:
    num_roots = max(1, min(10, max_statements // 3))
    return draw_variables(rng, 1, num_roots, 2, min(3 * num_roots, max_questions))


def _pairs(rng: np.random.Generator, max_statements: int, max_questions: int) -> Problem:
    num_questions = min(max_statements, max_questions, long_context.GOLD_DEPTHS)
    return draw_pairs(rng, 1, max_statements, num_questions, even_depths=True)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(name="niah_single", summary="one key, one value", draw=_single),
        Task(name="niah_multikey", summary="one of up to 32 keys", draw=_multikey),
        Task(name="niah_pairkey", summary="keys of two words that share words", draw=_pairkey),
        Task(name="niah_multivalue", summary="all 3 values of a key", draw=_multivalue),
        Task(name="chain", summary="3 hops, one per generated word", draw=_chain),
        Task(name="vt", summary="up to 2 hops inside one forward pass", draw=_variables),
        Task(name="nt_single", summary="UUID pairs, one key", write=threading.single),
        Task(name="nt_multiple", summary="UUID pairs, 1 to 25 keys", write=threading.multiple),
        Task(name="nt_conditional", summary="all keys with a mark", write=threading.conditional),
        Task(name="nt_threading", summary="2 to 25 links of UUIDs", write=threading.threading),
        Task(name="nt_multi_threading", summary="2 to 5 threads", write=threading.multi_threading),
        Task(name="nt_branched", summary="threads that part", write=threading.branched),
        *(
            Task(
                name=f"ruler_{name}",
                summary="needles, in the manner of RULER",
                write=partial(ruler.needles, task=task),
            )
            for name, task in ruler.NEEDLES.items()
        ),
        Task(name="ruler_vt", summary="a chain of 4 hops", write=ruler.variable_tracking),
        Task(name="ruler_cwe", summary="the ten commonest words", write=ruler.common_words),
        Task(name="ruler_fwe", summary="the most frequent words", write=ruler.frequent_words),
        Task(
            name="json_kv",
            summary="HELMET's JSON-KV",
            draw=_pairs,
            write=long_context.json_kv,
            only_statements=6,
        ),
        Task(name="icl", summary="labels of 64 classes by example", write=long_context.many_shots),
        Task(name="two_hop", summary="facts, direct and over a person", write=long_context.two_hop),
    )
}

# METHODS.md 4.6: what says most in little time, for models that read text.
MINIMAL = (
    *("json_kv", "ruler_multikey_3", "ruler_multivalue", "nt_multiple", "nt_conditional"),
    *("icl", "two_hop"),
)
GROUPS = {
    "nt": tuple(name for name in TASKS if name.startswith("nt_")),
    "ruler": tuple(name for name in TASKS if name.startswith("ruler_")),
    "minimal": MINIMAL,
}


def data_tasks(folder: Path) -> dict[str, Task]:
    """The tasks whose files a folder holds; see `data_files.load_folder`."""
    return {
        name: Task(name=name, summary=f"{file.format}, {file.prompt} prompt", file=file)
        for name, file in load_folder(folder).items()
    }


def find_tasks(names: Iterable[str], more: Mapping[str, Task] | None = None) -> list[Task]:
    """The tasks of these names, in this order; a name of `GROUPS` stands for several.

    Parameters
    ----------
    names : iterable of str
    more : mapping or None
        Tasks that exist besides, by name: those of data files. They come first.

    Raises
    ------
    ValueError
        Naming the first unknown or repeated one and all that exist.
    """
    known = {**TASKS, **(more or {})}
    found: list[Task] = []
    for asked in names:
        for name in GROUPS.get(asked, (asked,)):
            if name not in known or any(task.name == name for task in found):
                allowed = ", ".join([*known, *GROUPS])
                raise ValueError(f"tasks: got {name!r}, allowed: each once of {allowed}")
            found.append(known[name])
    if not found:
        raise ValueError(f"tasks: got none, allowed: at least one of {', '.join(known)}")
    return found


def default_tasks(speaks_dialect: bool) -> list[Task]:
    """What `kvselect eval` runs unless it is told."""
    dialect_names = ("niah_single", "niah_multikey", "niah_multivalue", "chain", "vt")
    return find_tasks(dialect_names if speaks_dialect else MINIMAL)


def _generator(task: Task, length: int, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(task.name.encode()), length, seed, index])


def dialect_sample(
    task: Task, length: int, *, seed: int = 0, index: int = 0, max_questions: int = 32
) -> Sample:
    """A sample in the embedded model's words: context, question and answer take exactly `length`
    tokens.

    Raises
    ------
    ValueError
        If the statements do not fit into `length`, or the task is text from the start.
    """
    if task.draw is None:
        allowed = ", ".join(name for name, known in TASKS.items() if known.draw is not None)
        raise ValueError(
            f"task: got {task.name!r}, text which a model of the dialect cannot read, allowed: "
            f"{allowed}"
        )
    rng = _generator(task, length, seed, index)
    if task.only_statements > 0:
        # All that fit beside BOS and a question with its answer, which is as long as a statement;
        # what is left over, less than a statement, is noise between them.
        max_statements = max(1, (length - 1) // task.only_statements - 1)
    else:
        max_statements = length // _DIALECT_TOKENS_PER_STATEMENT
    problem = task.draw(rng, max_statements, max_questions)
    context, starts = dialect.scatter_at(
        rng, problem.statements, length - problem.questions.shape[2]
    )
    words = dialect.vocabulary()
    questions = []
    for row, needed in zip(problem.questions[0], problem.evidence[0]):
        pieces = [int(start) for start in starts[0, needed[needed >= 0]]]
        answer = tuple(words[symbol] for symbol in row[problem.question_words :])
        questions.append(
            Question(
                tokens=row[: problem.question_words],
                answer=answer,
                max_new_tokens=len(answer),
                any_order=problem.any_order,
                top_words=problem.any_order,
                metric="words",
                depth=min(pieces) / context.shape[1],
                evidence=tuple((start, start + problem.statements.shape[2]) for start in pieces),
            )
        )
    return Sample(context=context[0], questions=tuple(questions))


def prose_sample(
    task: Task,
    length: int,
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    index: int = 0,
    max_questions: int = 32,
) -> Sample:
    """A sample in English: context, longest question and generation take at most `length` tokens of
    this tokenizer.

    Raises
    ------
    ValueError
        If the statements do not fit into `length`.
    """
    if task.write is not None:
        return task.write(
            Draw(
                length=length,
                seed=seed + index,
                max_questions=max_questions,
                tokenizer=tokenizer,
                rng=lambda: _generator(task, length, seed, index),
            )
        )
    if task.file is not None:
        order = _generator(task, 0, seed, 0).permutation(len(task.file.rows))
        return task.file.sample(int(order[index]), length, tokenizer)
    assert task.draw is not None
    rng = _generator(task, length, seed, index)
    problem = task.draw(rng, length // _PROSE_TOKENS_PER_STATEMENT, max_questions)
    return prose.render(rng, problem, length, tokenizer)
