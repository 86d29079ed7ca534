"""How answers are graded: METRICS by name, each a score in [0, 1]."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from kvselect.eval.tasks.sample import Question

__all__ = ["METRICS", "grade", "grade_text", "grade_words"]

Metric = Callable[[Question, str], float]

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


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


def _share(question: Question, text: str) -> float:
    """RULER: share of the gold strings contained in the text, ignoring case."""
    lower = text.lower()
    return sum(gold.lower() in lower for gold in question.answer) / len(question.answer)


def _contains(question: Question, text: str) -> float:
    """One of the gold strings is contained in the text, ignoring case."""
    return float(any(gold.lower() in text.lower() for gold in question.answer))


def _uuid_list(question: Question, text: str) -> float:
    """Needle Threading: share of the entries that are right at their place."""
    found = [name.lower() for name in _UUID.findall(text)]
    right = sum(one == gold.lower() for one, gold in zip(found, question.answer))
    return right / len(question.answer)


def _uuid_set(question: Question, text: str) -> float:
    """Needle Threading, conditional: share of the gold values among the first so many found."""
    found = {name.lower() for name in _UUID.findall(text)[: len(question.answer)]}
    return len(found & {gold.lower() for gold in question.answer}) / len(question.answer)


def _label(question: Question, text: str) -> float:
    """The first word is the label."""
    words = text.split()
    return float(bool(words) and words[0].strip(".,") == question.answer[0])


# ---- metrics of LongBench and InfiniteBench, from their description


def _normalised(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    kept = "".join(" " if letter in string.punctuation else letter for letter in text.lower())
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _f1(gold: Sequence[str], found: Sequence[str]) -> float:
    same = sum((Counter(gold) & Counter(found)).values())
    if not same:
        return 0.0
    precision, recall = same / len(found), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def _qa_f1(question: Question, text: str) -> float:
    """Best F1 of words over the gold answers."""
    found = _normalised(text)
    return max(_f1(_normalised(gold), found) for gold in question.answer)


def _longest_common(gold: Sequence[str], found: Sequence[str]) -> int:
    row = [0] * (len(found) + 1)
    for one in gold:
        diagonal = 0
        for place, other in enumerate(found, 1):
            above = row[place]
            row[place] = diagonal + 1 if one == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def _rouge_l(question: Question, text: str) -> float:
    """Best ROUGE-L F-measure over the gold texts."""
    best = 0.0
    found = _normalised(text)
    for gold in (_normalised(one) for one in question.answer):
        common = _longest_common(gold, found)
        if common:
            precision, recall = common / len(found), common / len(gold)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def _exact_class(question: Question, text: str) -> float:
    """The first line names a gold class."""
    first = text.strip().split("\n")[0].lower()
    return float(any(gold.lower() in first for gold in question.answer))


def _first_number(question: Question, text: str) -> float:
    """The first number in the text is the gold one."""
    found = re.search(r"-?\d+", text)
    return float(found is not None and found[0] == question.answer[0].strip())


def _paragraph(question: Question, text: str) -> float:
    """LongBench's passage retrieval: share of the numbers in the text that are the gold one's."""
    gold = re.search(r"\d+", question.answer[0])
    found = re.findall(r"\d+", text)
    return found.count(gold[0]) / len(found) if gold is not None and found else 0.0


def _choice(question: Question, text: str) -> float:
    """The first of the letters A to D that stands alone is the gold one."""
    found = re.search(r"\b([A-D])\b", text)
    return float(found is not None and found[1] == question.answer[0])


def _edit_similarity(question: Question, text: str) -> float:
    """1 minus the edit distance of the first line of code to the gold one, over the longer."""
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith(("#", "//"))]
    found, gold = (lines[0] if lines else ""), question.answer[0]
    row = list(range(len(found) + 1))
    for i, one in enumerate(gold, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            above = row[j]
            row[j] = min(above + 1, row[j - 1] + 1, diagonal + (one != other))
            diagonal = above
    longer = max(len(found), len(gold))
    return 1.0 - row[-1] / longer if longer else 1.0


METRICS: dict[str, Metric] = {
    "words": lambda question, text: float(grade_words(question, text.split())),
    "text": lambda question, text: float(grade_text(question, text)),
    "share": _share,
    "contains": _contains,
    "uuid_list": _uuid_list,
    "uuid_set": _uuid_set,
    "label": _label,
    "qa_f1": _qa_f1,
    "rouge_l": _rouge_l,
    "class": _exact_class,
    "first_number": _first_number,
    "paragraph": _paragraph,
    "choice": _choice,
    "edit_similarity": _edit_similarity,
}
