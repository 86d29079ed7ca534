"""The same problems in English sentences, for any checkpoint: sized by the model's own tokenizer.

Wording and word lists are ours (`words.py`); the haystack is generated filler. Results compare
policies with dense attention on one model; they are not comparable with published benchmark tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from kvselect.eval.tasks import dialect, words
from kvselect.eval.tasks.dialect import IntArray
from kvselect.eval.tasks.problems import Problem
from kvselect.eval.tasks.sample import Question, Sample

EXTRA_ANSWER_TOKENS = 16  # a model may begin with a few words of its own before the answer
_NUMBERS = 9_000_000  # seven digits
_STRIDE = 5_999_993  # coprime to _NUMBERS, so that different values become different numbers


class Tokenizer(Protocol):
    """What we need of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


class Wording:
    """Turns symbols into words, for one sample: names become adjective-noun pairs, values
    seven-digit numbers."""

    def __init__(self, rng: np.random.Generator) -> None:
        pairs = rng.choice(
            len(words.ADJECTIVES) * len(words.NOUNS), dialect.NUM_NAMES, replace=False
        )
        self._names = [
            f"{words.ADJECTIVES[pair // len(words.NOUNS)]} {words.NOUNS[pair % len(words.NOUNS)]}"
            for pair in pairs
        ]
        self._offset = int(rng.integers(_NUMBERS))

    def name(self, symbols: IntArray) -> str:
        """One name symbol: an adjective and a noun; two: both joined."""
        return " of the ".join(self._names[symbol - dialect.FIRST_NAME] for symbol in symbols)

    def number(self, symbols: IntArray) -> str:
        """The value symbols of one statement, as one number."""
        code = 0
        for symbol in symbols:
            code = code * dialect.NUM_VALUES + int(symbol) - dialect.FIRST_VALUE
        return str(1_000_000 + (self._offset + code * _STRIDE) % _NUMBERS)

    def statement(self, symbols: IntArray) -> str:
        """A statement as one sentence."""
        relation, arguments = symbols[0], symbols[1:]
        is_name = arguments < dialect.FIRST_VALUE
        subject = self.name(arguments[is_name][:1])
        if relation == dialect.SET:
            return (
                f"The registered number of the {self.name(arguments[is_name])} is "
                f"{self.number(arguments[~is_name])}."
            )
        if relation == dialect.LINK:
            return f"From the {subject} the courier rides on to the {self.name(arguments[1:])}."
        if relation == dialect.LET:
            return f"The dial of the {subject} is set to {self.number(arguments[1:])}."
        if relation == dialect.COPY:
            source = self.name(arguments[1:])
            return f"The dial of the {subject} shows the same number as the dial of the {source}."
        raise AssertionError(f"no sentence for relation {relation}")

    def question(self, symbols: IntArray, question_words: int) -> tuple[str, tuple[str, ...]]:
        """A question that ends where the answer begins, and the gold strings."""
        relation, asked, answer = symbols[0], symbols[1:question_words], symbols[question_words:]
        name = self.name(asked)
        if relation == dialect.GET:
            gold: tuple[str, ...] = (self.number(answer),)
            return (
                f"What is the registered number of the {name}? "
                f"The registered number of the {name} is",
                gold,
            )
        if relation == dialect.ALL:
            gold = tuple(self.number(value[None]) for value in answer)
            return (
                f"What are all {len(gold)} registered numbers of the {name}? "
                f"The {len(gold)} registered numbers of the {name} are",
                gold,
            )
        if relation == dialect.FOLLOW:
            gold = tuple(self.name(stop[None]) for stop in answer)
            return (
                f"The courier starts at the {name}. Which are the next {len(gold)} stops, "
                f"in order? "
                f"From the {name} the courier rides on to the",
                gold,
            )
        if relation == dialect.SHOW:
            gold = (self.number(answer),)
            return (
                f"Which number does the dial of the {name} show? The dial of the {name} shows",
                gold,
            )
        raise AssertionError(f"no question for relation {relation}")


def filler_sentence(rng: np.random.Generator) -> str:
    """One sentence about nothing."""
    subject, verb, thing, ending = (
        choices[int(rng.integers(len(choices)))]
        for choices in (
            words.FILLER_SUBJECTS,
            words.FILLER_VERBS,
            words.FILLER_OBJECTS,
            words.FILLER_ENDINGS,
        )
    )
    return f"{subject[0].upper()}{subject[1:]} {verb} {thing} {ending}."


def largest(fits: Callable[[int], bool], upper: int) -> int:
    """The largest int in [0, upper] that fits, by bisection; -1 if not even 0 does."""
    low, high = -1, upper
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def render(rng: np.random.Generator, problem: Problem, length: int, tokenizer: Tokenizer) -> Sample:
    """The first problem of a batch as prose, with as much filler as `length` tokens hold.

    ``tokens(context) + tokens(question) + max_new_tokens <= length`` for every question, as near to
    `length` as whole sentences allow.

    Raises
    ------
    ValueError
        If the statements alone do not fit.
    """
    wording = Wording(rng)
    depths = np.sort(rng.random(problem.statements.shape[1]))
    questions = []
    for row, needed in zip(problem.questions[0], problem.evidence[0]):
        text, gold = wording.question(row, problem.question_words)
        answer_tokens = len(tokenizer.encode(" " + ", ".join(gold), add_special_tokens=False))
        questions.append(
            Question(
                tokens=np.array(
                    tokenizer.encode(f"\n\nQuestion: {text}", add_special_tokens=False), np.int64
                ),
                answer=gold,
                max_new_tokens=answer_tokens + EXTRA_ANSWER_TOKENS,
                any_order=problem.any_order,
                depth=float(depths[needed[needed >= 0]].min()),
            )
        )
    reserved = max(len(question.tokens) + question.max_new_tokens for question in questions)
    statements = [wording.statement(row) for row in problem.statements[0]]
    filler: list[str] = []

    def context(num_filler: int) -> list[int]:
        while len(filler) < num_filler:
            filler.append(filler_sentence(rng))
        sentences: list[str] = []
        begin = 0
        for statement, depth in zip(statements, depths, strict=True):
            end = int(depth * (num_filler + 1))
            sentences += [*filler[begin:end], statement]
            begin = end
        sentences += filler[begin:num_filler]
        return tokenizer.encode(
            "Read these notes. Questions about them follow.\n\n" + " ".join(sentences)
        )

    # A filler sentence is longer than four tokens in any tokenizer that has words.
    num_filler = largest(lambda count: len(context(count)) + reserved <= length, length // 4)
    if num_filler < 0:
        raise ValueError(
            f"length: got {length}, allowed: an int >= {len(context(0)) + reserved}, which is what "
            f"the {len(statements)} statements, one question and its answer take"
        )
    return Sample(context=np.array(context(num_filler), np.int64), questions=tuple(questions))
