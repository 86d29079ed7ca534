"""How answers are graded: METRICS by name, each a score in [0, 1]."""

from __future__ import annotations

import re
from collections.abc import Callable

from kvselect.eval.tasks.sample import Question

__all__ = ["METRICS", "grade", "grade_text", "grade_words"]

Metric = Callable[[Question, str], float]


def grade(question: Question, text: str) -> float:
    """Score of a generated text (the dialect's words, joined by blanks), by the question's
    metric."""
    return METRICS[question.metric](question, text)


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


METRICS: dict[str, Metric] = {
    "words": lambda question, text: float(grade_words(question, text.split())),
    "text": lambda question, text: float(grade_text(question, text)),
}
