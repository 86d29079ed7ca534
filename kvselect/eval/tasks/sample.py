"""What a task hands to the runner: one context, several questions about it, and how an answer is
graded."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
    """

    tokens: IntArray
    answer: tuple[str, ...]
    max_new_tokens: int
    any_order: bool = False
    top_words: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One context [num_tokens] int64 and its questions; the context is prefilled once and asked
    every question."""

    context: IntArray
    questions: tuple[Question, ...]

    def total_tokens(self) -> int:
        """Tokens in the cache at most: the context, the longest question and its answer."""
        return len(self.context) + max(
            len(question.tokens) + question.max_new_tokens for question in self.questions
        )


def grade_words(question: Question, words: list[str]) -> bool:
    """Exact match of the generated words; of the set of them if any order is right."""
    if question.any_order:
        return sorted(words) == sorted(question.answer)
    return words == list(question.answer)


def grade_text(question: Question, text: str) -> bool:
    """Every gold string occurs in the text as a whole word, ignoring case; in the gold order unless
    any is right."""
    position = 0
    for gold in question.answer:
        pattern = rf"(?<!\w){re.escape(gold)}(?!\w)"
        found = re.compile(pattern, re.IGNORECASE).search(text, position)
        if found is None:
            return False
        if not question.any_order:
            position = found.end()
    return True
