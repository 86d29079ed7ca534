"""Tasks that are written as text from the start: pieces, and the largest text that fits."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvselect.eval.tasks.prose import Tokenizer, filler_sentence, largest
from kvselect.eval.tasks.sample import Question, Sample
from kvselect.eval.tasks.words import ADJECTIVES, NOUNS

Rng = np.random.Generator

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question in words; fields as those of `Question`."""

    text: str
    answer: tuple[str, ...]
    max_new_tokens: int
    metric: str
    any_order: bool = False
    depth: float | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """What a written task is drawn from.

    Attributes
    ----------
    length : int
        Tokens that context, question and answer may take.
    seed : int
        Of this sample: that of the run plus the number of the sample.
    max_questions : int
    tokenizer : Tokenizer
    rng : () -> Generator
        A generator that begins anew at every call, so that a text can be written at several sizes.
    """

    length: int
    seed: int
    max_questions: int
    tokenizer: Tokenizer
    rng: Callable[[], Rng]


def sample_of(tokenizer: Tokenizer, context: str, asked: list[Asked]) -> Sample:
    """The tokens of a text and of the questions about it."""
    return Sample(
        context=np.array(tokenizer.encode(context), np.int64),
        questions=tuple(
            Question(
                tokens=np.array(tokenizer.encode(one.text, add_special_tokens=False), np.int64),
                answer=one.answer,
                max_new_tokens=one.max_new_tokens,
                any_order=one.any_order,
                metric=one.metric,
                depth=one.depth,
            )
            for one in asked
        ),
    )


def fill(draw: Draw, write: Callable[[int], tuple[str, list[Asked]]], smallest: int = 1) -> Sample:
    """The text of the most pieces that fits into `draw.length` tokens.

    Parameters
    ----------
    write : (number of pieces) -> (context, questions)
        More pieces, more tokens.
    smallest : int
        Pieces that the task cannot do without.

    Raises
    ------
    ValueError
        If not even those fit.
    """

    def tokens(pieces: int) -> int:
        return sample_of(draw.tokenizer, *write(pieces)).total_tokens()

    # A piece takes at least one token; where it takes many, the doubling stops early.
    upper = smallest
    while upper < draw.length and tokens(upper) <= draw.length:
        upper *= 2
    pieces = smallest + largest(
        lambda more: tokens(smallest + more) <= draw.length, upper - smallest
    )
    if pieces < smallest:
        raise ValueError(
            f"length: got {draw.length}, allowed: an int >= {tokens(smallest)}, which is what the "
            f"smallest text of the task takes"
        )
    return sample_of(draw.tokenizer, *write(pieces))


# ---- words


def word_keys(rng: Rng, count: int) -> list[str]:
    """Different adjective-noun pairs; with a second noun where there are too few pairs."""
    nouns = len(NOUNS)
    population = len(ADJECTIVES) * nouns
    longer = count > population // 2
    chosen = rng.choice(population * nouns if longer else population, count, replace=False)
    keys = []
    for number in chosen.tolist():
        first, rest = number % len(ADJECTIVES), number // len(ADJECTIVES)
        key = f"{ADJECTIVES[first]} {NOUNS[rest % nouns]}"
        keys.append(f"{key} {NOUNS[rest // nouns]}" if longer else key)
    return keys


def nonce_words(rng: Rng, count: int, letters: int = 6) -> list[str]:
    """Different words that mean nothing, consonants and vowels in turn."""
    sizes = [len(_CONSONANTS if place % 2 == 0 else _VOWELS) for place in range(letters)]
    words: list[str] = []
    for number in rng.choice(int(np.prod(sizes)), count, replace=False).tolist():
        word = ""
        for place, size in enumerate(sizes):
            word += (_CONSONANTS if place % 2 == 0 else _VOWELS)[number % size]
            number //= size
        words.append(word)
    return words


def numbers(rng: Rng, count: int, digits: int = 7) -> list[str]:
    """Different numbers of so many digits."""
    low = 10 ** (digits - 1)
    return [str(low + n) for n in rng.choice(9 * low, count, replace=False).tolist()]


def uuids(rng: Rng, count: int) -> list[str]:
    """Random UUIDs, version 4."""
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def essay(rng: Rng, num_sentences: int) -> list[str]:
    """Sentences about nothing."""
    return [filler_sentence(rng) for _ in range(num_sentences)]
