"""Retrieval tasks: seeded, offline, each in the embedded model's dialect and in prose for any other
checkpoint.

A task draws a `Problem` in symbols (`problems.py`) and renders it at an exact length (`dialect.py`,
`prose.py`). The same (task, length, seed, index) is the same sample everywhere, so every policy is
asked the same questions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from kvselect.eval.tasks import dialect, prose
from kvselect.eval.tasks.grading import grade, grade_text, grade_words
from kvselect.eval.tasks.problems import (
    Problem,
    draw_chains,
    draw_multivalue,
    draw_needles,
    draw_variables,
)
from kvselect.eval.tasks.prose import Tokenizer
from kvselect.eval.tasks.sample import Question, Sample

__all__ = [
    "TASKS",
    "Problem",
    "Question",
    "Sample",
    "Task",
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
    draw : (rng, max_statements, max_questions) -> Problem with a batch of one
    """

    name: str
    summary: str
    draw: Callable[[np.random.Generator, int, int], Problem]


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


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(name="niah_single", summary="one key, one value", draw=_single),
        Task(name="niah_multikey", summary="one of up to 32 keys", draw=_multikey),
        Task(name="niah_pairkey", summary="keys of two words that share words", draw=_pairkey),
        Task(name="niah_multivalue", summary="all 3 values of a key", draw=_multivalue),
        Task(name="chain", summary="3 hops, one per generated word", draw=_chain),
        Task(name="vt", summary="up to 2 hops inside one forward pass", draw=_variables),
    )
}


def find_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks of these names, in this order.

    Raises
    ------
    ValueError
        Naming the first unknown or repeated one and all that exist.
    """
    found: list[Task] = []
    for name in names:
        if name not in TASKS or any(task.name == name for task in found):
            raise ValueError(f"tasks: got {name!r}, allowed: each once of {', '.join(TASKS)}")
        found.append(TASKS[name])
    if not found:
        raise ValueError(f"tasks: got none, allowed: at least one of {', '.join(TASKS)}")
    return found


def default_tasks(speaks_dialect: bool) -> list[Task]:
    """What `kvselect eval` runs unless it is told: every task of retrieval."""
    names = ["niah_single", "niah_multikey", "niah_multivalue", "chain", "vt"]
    return find_tasks(names)


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
        If the statements do not fit into `length`.
    """
    rng = _generator(task, length, seed, index)
    problem = task.draw(rng, length // _DIALECT_TOKENS_PER_STATEMENT, max_questions)
    context, starts = dialect.scatter_at(
        rng, problem.statements, length - problem.questions.shape[2]
    )
    words = dialect.vocabulary()
    questions = []
    for row, needed in zip(problem.questions[0], problem.evidence[0]):
        first = int(starts[0, needed[needed >= 0]].min())
        answer = tuple(words[symbol] for symbol in row[problem.question_words :])
        questions.append(
            Question(
                tokens=row[: problem.question_words],
                answer=answer,
                max_new_tokens=len(answer),
                any_order=problem.any_order,
                top_words=problem.any_order,
                metric="words",
                depth=first / context.shape[1],
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
    rng = _generator(task, length, seed, index)
    problem = task.draw(rng, length // _PROSE_TOKENS_PER_STATEMENT, max_questions)
    return prose.render(rng, problem, length, tokenizer)
