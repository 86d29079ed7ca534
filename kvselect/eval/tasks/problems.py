"""Problems in symbols: what is stated and what is asked, before anyone chose words or a length.

Every function draws a whole batch of equally shaped problems with numpy (training needs tens of
thousands), and every question of a context has one right answer by construction: names are drawn
without replacement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvselect.eval.tasks.dialect import (
    ALL,
    COLON,
    COPY,
    FIRST_NAME,
    FIRST_VALUE,
    FOLLOW,
    GET,
    KEY,
    LET,
    LINK,
    NUM_DIGITS,
    NUM_NAMES,
    NUM_VALUES,
    QUOTE,
    SET,
    SHOW,
    IntArray,
    choose_distinct,
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A batch of problems of one shape.

    Attributes
    ----------
    statements : int64 [batch, num_statements, statement_words], in the order in which they are told
    questions : int64 [batch, num_questions, question_words + answer_words]
    question_words : int
        Where the answer begins in a row of `questions`.
    evidence : int64 [batch, num_questions, num_statements_needed]
        Statements that a question needs, by their places in `statements`; -1 pads.
    any_order : bool
        The answer is a set: its words may come in any order.
    """

    statements: IntArray
    questions: IntArray
    question_words: int
    evidence: IntArray
    any_order: bool = False


def _column(rows: int, count: int, word: int) -> IntArray:
    return np.full((rows, count, 1), word, np.int64)


def _draw_near_miss_keys(
    rng: np.random.Generator,
    batch: int,
    num_keys: int,
    num_questions: int,
    num_hubs: int,
    *,
    asked_last: bool = False,
) -> tuple[IntArray, IntArray]:
    """Two-word keys that all hold one of `num_hubs` names, and which of them to ask for.

    A key of two hubs shares its first word, its second, or either at the other place, with some
    ``num_keys / (2 * num_hubs)`` other keys each. Among keys drawn freely from all names that takes
    ``NUM_NAMES / (2 * num_hubs)`` times as many. Keys of two hubs are asked for first.
    `asked_last`: the keys asked for come after all others, that of the first question last.

    Returns
    -------
    keys : int64 [batch, num_keys, 2]
    asked : int64 [batch, num_questions], places in `keys`
    """
    rows = np.arange(batch)[:, None]
    names = choose_distinct(rng, batch, NUM_NAMES, NUM_NAMES)
    num_both = min(num_keys, num_hubs**2)
    both = choose_distinct(rng, batch, num_both, num_hubs**2)
    one = choose_distinct(
        rng, batch, max(1, num_keys - num_both), 2 * num_hubs * (NUM_NAMES - num_hubs)
    )[:, : num_keys - num_both]
    hub, other = one // 2 % num_hubs, num_hubs + one // 2 // num_hubs
    first = np.concatenate([both // num_hubs, np.where(one % 2 == 0, hub, other)], axis=1)
    second = np.concatenate([both % num_hubs, np.where(one % 2 == 0, other, hub)], axis=1)
    keys = np.stack([names[rows, first], names[rows, second]], axis=-1)
    ranks = rng.random((batch, num_keys))
    if asked_last:
        ranks[:, :num_questions] = 2.0 - np.arange(num_questions) / num_questions
    order = np.argsort(ranks, axis=1)
    return FIRST_NAME + keys[rows, order], np.argsort(order, axis=1)[:, :num_questions]


def draw_needles(
    rng: np.random.Generator,
    batch: int,
    num_keys: int,
    num_questions: int,
    *,
    key_words: int = 1,
    value_words: int = 2,
    digits: bool = False,
    distinct_values: bool = False,
    num_hubs: int | None = None,
) -> Problem:
    """`SET key value...` for `num_keys` keys; `GET key` asks for the value.

    `digits` draws values from the ten digits (a passkey). `distinct_values` draws a value's words
    without replacement: a repeated digit asks for more than the embedded model's two-word matching
    can do. With `num_hubs` every key is of two words, one of which is one of so many names: near
    misses.
    """
    rows = np.arange(batch)[:, None]
    asked: IntArray | None = None
    if num_hubs is not None:
        keys, asked = _draw_near_miss_keys(rng, batch, num_keys, num_questions, num_hubs)
        key_words = 2
    elif key_words == 1:
        keys = FIRST_NAME + choose_distinct(rng, batch, num_keys, NUM_NAMES)[:, :, None]
    else:  # pairs share words with each other on purpose: one word alone must not identify a key
        pairs = np.stack([rng.choice(NUM_NAMES**2, num_keys, replace=False) for _ in range(batch)])
        keys = FIRST_NAME + np.stack([pairs // NUM_NAMES, pairs % NUM_NAMES], axis=-1)
    num_choices = NUM_DIGITS if digits else NUM_VALUES
    if distinct_values:
        values = choose_distinct(rng, batch * num_keys, value_words, num_choices)
        values = values.reshape(batch, num_keys, value_words)
    else:
        values = rng.integers(0, num_choices, (batch, num_keys, value_words))
    values = FIRST_VALUE + values
    if asked is None:
        asked = choose_distinct(rng, batch, num_questions, num_keys)
    return Problem(
        statements=np.concatenate([_column(batch, num_keys, SET), keys, values], axis=2),
        questions=np.concatenate(
            [_column(batch, asked.shape[1], GET), keys[rows, asked], values[rows, asked]], axis=2
        ),
        question_words=1 + key_words,
        evidence=asked[:, :, None],
    )


def draw_pairs(
    rng: np.random.Generator,
    batch: int,
    num_pairs: int,
    num_questions: int,
    *,
    num_names: int = NUM_NAMES,
    num_values: int = NUM_VALUES,
    num_hubs: int | None = None,
    asked_last: bool = False,
    even_depths: bool = False,
) -> Problem:
    """`" key key : value value`, the pairs of a JSON object; `KEY key key :` asks for the value.

    Keys are two names out of `num_names`; the fewer, the more pairs differ in one word alone. With
    `num_hubs` they are two of all names, of which one is one of so many: more near misses than any
    `num_names` that leaves room for as many pairs. Values are two out of `num_values` words of a
    context's own. `asked_last`, which needs `num_hubs`, tells the pairs that are asked for after
    all others, that of the first question last. `even_depths` asks for pairs that stand evenly
    spaced from the first to the last, as HELMET's JSON-KV does, rather than for pairs drawn at
    random.
    """
    rows = np.arange(batch)[:, None]
    asked: IntArray | None = None
    if num_hubs is not None:
        keys, asked = _draw_near_miss_keys(
            rng, batch, num_pairs, num_questions, num_hubs, asked_last=asked_last
        )
    else:
        pools = choose_distinct(rng, batch, num_names, NUM_NAMES)
        both = choose_distinct(rng, batch, num_pairs, num_names**2)
        keys = np.stack([pools[rows, both // num_names], pools[rows, both % num_names]], axis=-1)
        keys += FIRST_NAME
    values = rng.integers(0, num_values, (batch, num_pairs, 2))
    if num_values < NUM_VALUES:
        pools = choose_distinct(rng, batch, num_values, NUM_VALUES)
        values = pools[rows[:, :, None], values]
    values += FIRST_VALUE
    if even_depths:
        places = np.unique(np.round(np.linspace(0, num_pairs - 1, num_questions)).astype(np.int64))
        asked = np.tile(places, (batch, 1))
    elif asked is None:
        asked = choose_distinct(rng, batch, num_questions, num_pairs)
    colons, answers = _column(batch, num_pairs, COLON), _column(batch, asked.shape[1], COLON)
    return Problem(
        statements=np.concatenate([_column(batch, num_pairs, QUOTE), keys, colons, values], axis=2),
        questions=np.concatenate(
            [_column(batch, asked.shape[1], KEY), keys[rows, asked], answers, values[rows, asked]],
            axis=2,
        ),
        question_words=4,
        evidence=asked[:, :, None],
    )


def draw_chains(
    rng: np.random.Generator, batch: int, num_chains: int, num_hops: int, num_questions: int
) -> Problem:
    """`LINK a b`, told in random order; `FOLLOW a` asks for the next `num_hops` stops, one hop per
    generated word."""
    rows = np.arange(batch)[:, None]
    stops = FIRST_NAME + choose_distinct(rng, batch, num_chains * (num_hops + 1), NUM_NAMES)
    stops = stops.reshape(batch, num_chains, num_hops + 1)
    num_links = num_chains * num_hops
    links = np.stack([stops[:, :, :-1], stops[:, :, 1:]], axis=-1).reshape(batch, num_links, 2)
    order = np.argsort(rng.random((batch, num_links)), axis=1)
    links = links[rows, order]
    places = np.argsort(order, axis=1).reshape(batch, num_chains, num_hops)
    asked = choose_distinct(rng, batch, num_questions, num_chains)
    return Problem(
        statements=np.concatenate([_column(batch, num_links, LINK), links], axis=2),
        questions=np.concatenate(
            [_column(batch, asked.shape[1], FOLLOW), stops[rows, asked]], axis=2
        ),
        question_words=2,
        evidence=places[rows, asked],
    )


def _interleave(
    rng: np.random.Generator, batch: int, groups: int, members: int
) -> tuple[IntArray, IntArray]:
    """A random merge of `groups` sequences: which group speaks at each place, and its how-manieth
    member."""
    labels = np.repeat(np.arange(groups), members)
    group = labels[np.argsort(rng.random((batch, groups * members)), axis=1)]
    speaks = group[:, :, None] == np.arange(groups)
    member = (np.cumsum(speaks, axis=1) * speaks).sum(axis=2) - 1
    return group, member


def draw_multivalue(
    rng: np.random.Generator, batch: int, num_keys: int, num_values: int, num_questions: int
) -> Problem:
    """`SET key value` told `num_values` times per key, far apart; `ALL key` asks for all of them in
    any order."""
    rows = np.arange(batch)[:, None]
    keys = FIRST_NAME + choose_distinct(rng, batch, num_keys, NUM_NAMES)
    values = FIRST_VALUE + choose_distinct(rng, batch * num_keys, num_values, NUM_VALUES)
    values = values.reshape(batch, num_keys, num_values)
    key, which = _interleave(rng, batch, num_keys, num_values)
    statements = np.stack(
        [np.full_like(key, SET), keys[rows, key], values[rows, key, which]], axis=-1
    )
    asked = choose_distinct(rng, batch, num_questions, num_keys)
    questions = np.concatenate(
        [_column(batch, asked.shape[1], ALL), keys[rows, asked][:, :, None], values[rows, asked]],
        axis=2,
    )
    places = np.argsort(key, axis=1, kind="stable").reshape(batch, num_keys, num_values)
    return Problem(
        statements=statements,
        questions=questions,
        question_words=2,
        evidence=places[rows, asked],
        any_order=True,
    )


def draw_variables(
    rng: np.random.Generator, batch: int, num_roots: int, num_hops: int, num_questions: int
) -> Problem:
    """`LET x value`, then `COPY y x` up to `num_hops` deep; `SHOW y` asks for the value at the
    root.

    The answer is one word, so every hop happens inside one forward pass: the deepest test of what a
    layer was given to attend to.
    """
    rows = np.arange(batch)[:, None]
    members = num_hops + 1
    names = FIRST_NAME + choose_distinct(rng, batch, num_roots * members, NUM_NAMES)
    names = names.reshape(batch, num_roots, members)
    values = FIRST_VALUE + choose_distinct(rng, batch, num_roots, NUM_VALUES)
    root, depth = _interleave(rng, batch, num_roots, members)
    is_root = depth == 0
    source = np.where(is_root, values[rows, root], names[rows, root, np.maximum(depth - 1, 0)])
    statements = np.stack([np.where(is_root, LET, COPY), names[rows, root, depth], source], axis=-1)
    asked = choose_distinct(rng, batch, num_questions, num_roots * members)
    questions = np.stack(
        [
            np.full_like(asked, SHOW),
            names.reshape(batch, -1)[rows, asked],
            values[rows, asked // members],
        ],
        axis=-1,
    )
    places = np.argsort(root, axis=1, kind="stable").reshape(batch, num_roots, members)
    needed = places[rows, asked // members]  # by depth; a variable needs those above it and itself
    needed = np.where(np.arange(members) <= (asked % members)[:, :, None], needed, -1)
    return Problem(statements=statements, questions=questions, question_words=2, evidence=needed)
