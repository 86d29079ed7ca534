"""What a task hands to the runner: one context and several questions about it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from kvselect.eval.tasks.dialect import IntArray


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a context that was already read.

    Attributes
    ----------
    tokens : int64 [num_tokens]
        Appended to the context; the answer follows.
    answer : tuple of str
        The gold strings.
    max_new_tokens : int
    any_order : bool
        The answer is a set.
    top_words : bool
        Read the answer off one forward pass, as the ``len(answer)`` likeliest next words, instead
        of generating it. The embedded model learned sets in this form (a set has no first word to
        generate); needs `any_order`.
    metric : str
        How the answer is graded: a name in `grading.METRICS`.
    depth : float or None
        Where in the context the evidence begins: 0 its first token, 1 its last; of several pieces,
        the first. None: not known, or everywhere.
    evidence : tuple of (begin, end)
        Context tokens [begin, end) of every piece that the answer needs, in the order in which it
        needs them; empty: not known.
    """

    tokens: IntArray
    answer: tuple[str, ...]
    max_new_tokens: int
    any_order: bool = False
    top_words: bool = False
    metric: str = "text"
    depth: float | None = None
    evidence: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One context [num_tokens] int64 and its questions; the context is prefilled once and asked
    every question."""

    context: IntArray
    questions: tuple[Question, ...]

    def digest(self) -> str:
        """16 hex digits that differ wherever contexts, questions or gold strings do."""
        state = hashlib.sha256(np.ascontiguousarray(self.context, "<i8").tobytes())
        for question in self.questions:
            state.update(np.ascontiguousarray(question.tokens, "<i8").tobytes())
            told = [question.answer, question.max_new_tokens, question.any_order, question.metric]
            state.update(json.dumps(told).encode())
        return state.hexdigest()[:16]

    def total_tokens(self) -> int:
        """Tokens in the cache at most: the context, the longest question and its answer."""
        return len(self.context) + max(
            len(question.tokens) + question.max_new_tokens for question in self.questions
        )
