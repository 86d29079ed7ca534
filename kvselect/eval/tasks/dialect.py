"""The embedded model's language: 512 words, of which a context is statements scattered among noise
words.

The ids are at the same time the *symbols* in which every problem is drawn (`problems.py`): a prose
rendering translates them, this dialect uses them as they are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

VOCAB_SIZE = 512
PAD, BOS, END = 0, 1, 2
# A statement and the question about it are different words, so that a model never has to guess
# which one it reads.
SET, GET = 3, 4  # SET key value... ; GET key -> value...
LINK, FOLLOW = 5, 6  # LINK a b ; FOLLOW a -> b c d
ALL = 7  # ALL key -> every value that some SET gave to the key
LET, COPY, SHOW = 8, 9, 10  # LET name value ; COPY new old ; SHOW name -> value
QUOTE, COLON, KEY = 11, 12, 13  # " name name : value value ; KEY name name : -> value value
FIRST_NOISE, NUM_NOISE = 16, 112
FIRST_NAME, NUM_NAMES = 128, 192  # keys, chain stops and variables
FIRST_VALUE, NUM_VALUES = 320, 192
NUM_DIGITS = 10  # the first values double as digits

_STATEMENT_WORDS = (
    *("SET", "GET", "LINK", "FOLLOW", "ALL", "LET", "COPY", "SHOW"),
    *('"', ":", "KEY"),
)

# Noise words follow a power law, as words do: a few are everywhere, most are rare.
_noise_frequency = 1.0 / np.arange(1, NUM_NOISE + 1) ** 0.7
_NOISE_CUMULATIVE = np.cumsum(_noise_frequency / _noise_frequency.sum())


def vocabulary() -> list[str]:
    """The 512 words, in order of their ids."""
    words = ["<pad>", "<bos>", "<end>", *_STATEMENT_WORDS]
    words += [f"<unused{i}>" for i in range(len(words), FIRST_NOISE)]
    words += [f"n{i}" for i in range(NUM_NOISE)]
    words += [f"k{i}" for i in range(NUM_NAMES)]
    words += [f"v{i}" for i in range(NUM_VALUES)]
    assert len(words) == VOCAB_SIZE
    return words


def choose_distinct(rng: np.random.Generator, rows: int, count: int, population: int) -> IntArray:
    """`count` different ints below `population` for each of `rows` rows, in random order; [rows,
    count]."""
    if count >= population:
        return np.argsort(rng.random((rows, population)), axis=1)
    return np.argpartition(rng.random((rows, population)), count - 1, axis=1)[:, :count]


def noise(rng: np.random.Generator, rows: int, length: int, bare_words: float = 0.0) -> IntArray:
    """Noise words [rows, length]; a share of `bare_words` are names and values that belong to no
    statement."""
    ranks = np.searchsorted(_NOISE_CUMULATIVE, rng.random((rows, length)))
    words: IntArray = FIRST_NOISE + np.minimum(ranks, NUM_NOISE - 1)
    if bare_words > 0.0:
        bare = FIRST_NAME + rng.integers(0, NUM_NAMES + NUM_VALUES, (rows, length))
        words = np.where(rng.random((rows, length)) < bare_words, bare, words)
    return words


def scatter(
    rng: np.random.Generator, statements: IntArray, length: int, bare_words: float = 0.0
) -> IntArray:
    """Put statements, in their order, at random places of a noise context.

    Parameters
    ----------
    statements : int64 [rows, num_statements, statement_words]
    length : int
        Tokens of a context, the leading BOS included; must hold every statement.
    bare_words : float
        As in `noise`.

    Returns
    -------
    int64 [rows, length]
    """
    return scatter_at(rng, statements, length, bare_words)[0]


def scatter_at(
    rng: np.random.Generator, statements: IntArray, length: int, bare_words: float = 0.0
) -> tuple[IntArray, IntArray]:
    """`scatter`, and where each statement begins: int64 [rows, num_statements]."""
    rows, num_statements, words = statements.shape
    num_noise = length - 1 - num_statements * words
    if num_noise < 0:
        raise ValueError(
            f"length: got {length}, allowed: an int >= {1 + num_statements * words}, which is what "
            f"{num_statements} statements of {words} words take"
        )
    context = np.empty((rows, length), np.int64)
    context[:, 0] = BOS
    context[:, 1:] = noise(rng, rows, length - 1, bare_words)
    # Statements and noise words are drawn as one shuffled row of items; an item's start counts the
    # words before it.
    items = np.sort(choose_distinct(rng, rows, num_statements, num_statements + num_noise), axis=1)
    starts = 1 + items + np.arange(num_statements) * (words - 1)
    for column in range(words):
        np.put_along_axis(context, starts + column, statements[:, :, column], axis=1)
    return context, starts
