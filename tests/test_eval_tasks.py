"""Task generators: seeded, of exact length, every question with one right answer; grading."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from kvselect.eval.tasks import (
    TASKS,
    Problem,
    Question,
    Sample,
    dialect,
    dialect_sample,
    find_tasks,
    grade_text,
    grade_words,
    prose_sample,
)
from kvselect.eval.tasks.problems import (
    draw_chains,
    draw_multivalue,
    draw_needles,
    draw_pairs,
    draw_variables,
)
from kvselect.eval.tasks.prose import largest
from kvselect.eval.tasks.words import (
    ADJECTIVES,
    FILLER_ENDINGS,
    FILLER_OBJECTS,
    FILLER_SUBJECTS,
    FILLER_VERBS,
    NOUNS,
)

SYMBOLIC = [name for name, task in TASKS.items() if task.draw is not None]
IN_SENTENCES = [name for name in SYMBOLIC if TASKS[name].write is None]
LENGTHS = (64, 511, 512, 2048)


class WordTokenizer:
    """Words, numbers and marks, one token each; a first token as many tokenizers add one."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        pieces = re.findall(r"\w+|[^\w\s]", text)
        return [1] * add_special_tokens + [2 + hash(piece) % 1000 for piece in pieces]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def as_text(sample: Sample) -> list[str]:
    words = dialect.vocabulary()
    return [words[token] for token in sample.context]


# ---- the dialect


def test_the_vocabulary_has_512_different_words() -> None:
    words = dialect.vocabulary()
    assert len(set(words)) == dialect.VOCAB_SIZE == 512
    assert words[dialect.BOS] == "<bos>" and words[dialect.SET] == "SET"
    assert words[dialect.SHOW] == "SHOW" and words[dialect.FIRST_NAME] == "k0"
    assert words[dialect.FIRST_VALUE] == "v0" and words[dialect.FIRST_NOISE] == "n0"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", SYMBOLIC)
def test_context_question_and_answer_fill_the_length_exactly(task: str, length: int) -> None:
    sample = dialect_sample(TASKS[task], length)
    for question in sample.questions:
        assert len(sample.context) + len(question.tokens) + len(question.answer) == length
    assert sample.total_tokens() == length
    assert sample.context[0] == dialect.BOS and (sample.context[1:] >= 3).all()


@pytest.mark.parametrize("task", SYMBOLIC)
def test_the_same_seed_gives_the_same_sample(task: str) -> None:
    def sample(**changes: int) -> Sample:
        return dialect_sample(TASKS[task], 512, **({"seed": 3, "index": 5} | changes))

    assert (sample().context == sample().context).all()
    assert [q.answer for q in sample().questions] == [q.answer for q in sample().questions]
    for changes in ({"seed": 4}, {"index": 6}):
        assert (sample(**changes).context != sample().context).any()


def test_the_number_of_questions_changes_only_their_number() -> None:
    few = dialect_sample(TASKS["chain"], 512, max_questions=3)
    assert len(few.questions) == 3
    assert len(dialect_sample(TASKS["niah_single"], 512).questions) == 1


def test_a_length_that_is_too_short_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"length: got 7, allowed: an int >= \d+"):
        dialect_sample(TASKS["chain"], 12)


@pytest.mark.parametrize("bare_words", [0.0, 0.15])
def test_scatter_keeps_statements_whole_and_in_order(bare_words: float) -> None:
    statements = np.arange(600, 600 + 2 * 7 * 3).reshape(2, 7, 3)
    context = dialect.scatter(rng(), statements, 64, bare_words)
    assert context.shape == (2, 64)
    for row, told in zip(context, statements, strict=True):
        assert (row[row >= 600] == told.ravel()).all()
        places = np.flatnonzero(np.isin(row, told[:, 0]))
        assert (row[places[:, None] + np.arange(3)] == told).all()


def test_scatter_fills_a_context_without_noise() -> None:
    statements = np.full((1, 5, 3), 700)
    assert (dialect.scatter(rng(), statements, 16)[0, 1:] == 700).all()
    with pytest.raises(ValueError, match="length: got 15, allowed: an int >= 16"):
        dialect.scatter(rng(), statements, 15)


def test_bare_words_appear_in_noise_only_when_asked_for() -> None:
    plain = dialect.noise(rng(), 1, 4000)
    assert ((plain >= dialect.FIRST_NOISE) & (plain < dialect.FIRST_NAME)).all()
    share = (dialect.noise(rng(), 1, 4000, 0.15) >= dialect.FIRST_NAME).mean()
    assert 0.12 < share < 0.18


# ---- problems: the answer follows from the statements, and from them alone


def told(problem: Any) -> list[tuple[int, ...]]:
    return [tuple(int(word) for word in row) for row in problem.statements[0]]


@pytest.mark.parametrize("key_words", [1, 2])
def test_needles_have_one_value_per_key(key_words: int) -> None:
    problem = draw_needles(rng(), 1, 40, 12, key_words=key_words, value_words=3)
    facts = {row[1 : 1 + key_words]: row[1 + key_words :] for row in told(problem)}
    assert len(facts) == 40
    for row in problem.questions[0]:
        key, answer = tuple(row[1 : 1 + key_words]), tuple(row[1 + key_words :])
        assert row[0] == dialect.GET and facts[key] == answer
    assert len({tuple(row) for row in problem.questions[0]}) == 12


def test_needles_of_distinct_digits() -> None:
    problem = draw_needles(rng(), 3, 4, 4, value_words=5, digits=True, distinct_values=True)
    values = problem.questions[:, :, 2:] - dialect.FIRST_VALUE
    assert values.max() < dialect.NUM_DIGITS
    assert all(len(set(value)) == 5 for value in values.reshape(-1, 5).tolist())


def test_chains_follow_links() -> None:
    problem = draw_chains(rng(), 1, 9, 4, 9)
    links = {row[1]: row[2] for row in told(problem)}
    assert len(links) == 36
    for row in problem.questions[0]:
        stop = int(row[1])
        for expected in row[2:]:
            stop = links[stop]
            assert stop == expected
        assert stop not in links


def test_multivalue_asks_for_every_value_of_a_key() -> None:
    problem = draw_multivalue(rng(), 1, 8, 3, 8)
    assert problem.any_order
    values: dict[int, set[int]] = {}
    for _, key, value in told(problem):
        values.setdefault(key, set()).add(value)
    for row in problem.questions[0]:
        assert set(row[2:].tolist()) == values[int(row[1])] and len(values[int(row[1])]) == 3


def test_variables_lead_to_their_root() -> None:
    problem = draw_variables(rng(), 1, 6, 2, 18)
    value_of: dict[int, int] = {}
    for relation, name, source in told(problem):  # a source is always told before its copies
        assert name not in value_of
        value_of[name] = source if relation == dialect.LET else value_of[source]
    assert len(value_of) == len(problem.questions[0]) == 18
    assert all(value_of[int(row[1])] == row[2] for row in problem.questions[0])


@pytest.mark.parametrize("task", SYMBOLIC)
def test_a_question_knows_what_it_needs(task: str) -> None:
    """Statements that are needed contain the answer and lead to it; what is not needed may go."""
    draw = TASKS[task].draw
    assert draw is not None
    problem = draw(rng(5), 40, 12)
    statements = told(problem)
    for row, needed in zip(problem.questions[0], problem.evidence[0]):
        facts = [statements[place] for place in needed if place >= 0]
        words = {word for fact in facts for word in fact}
        assert set(row[1:].tolist()) <= words
        assert all(set(fact[1:]) & {*row[1:].tolist(), *words} for fact in facts)


@pytest.mark.parametrize("task", SYMBOLIC)
def test_depth_is_where_the_evidence_begins(task: str) -> None:
    sample = dialect_sample(TASKS[task], 700, seed=4)
    words = as_text(sample)
    vocabulary = dialect.vocabulary()
    for asked in sample.questions:
        assert asked.depth is not None and 0 < asked.depth < 1
        first = round(asked.depth * len(words))
        assert words[first] in ("SET", "LINK", "LET", '"')
        if not task.startswith(("vt", "chain")):
            name = [vocabulary[token] for token in asked.tokens[1:]]
            places = [at for at in range(first + 2) if words[at : at + len(name)] == name]
            assert places == [first + 1]
    prose = prose_sample(TASKS[task], 2000, WordTokenizer(), seed=4)
    assert all(0 <= asked.depth <= 1 for asked in prose.questions if asked.depth is not None)


# ---- the pairs of an object


def test_a_json_context_is_all_pairs_and_is_asked_at_six_depths() -> None:
    words, vocabulary = dialect.vocabulary(), dialect.vocabulary().index
    for length in (256, 512, 4096):
        sample = dialect_sample(TASKS["json_kv"], length, seed=3)
        context = sample.context.tolist()
        begins = [at for at, token in enumerate(context) if token == dialect.QUOTE]
        pairs = {tuple(context[at + 1 : at + 3]): context[at + 4 : at + 6] for at in begins}
        assert len(pairs) == len(begins) == (length - 1) // 6 - 1  # different keys, and no room
        assert all(context[at + 3] == dialect.COLON for at in begins)
        assert sum(words[token][0] == "n" for token in context) == (length - 1) % 6
        assert len(sample.questions) == 6
        for question in sample.questions:
            key, first, second, colon = question.tokens.tolist()
            assert (key, colon) == (dialect.KEY, dialect.COLON)
            assert pairs[first, second] == [vocabulary(word) for word in question.answer]
        depths = [question.depth or 0.0 for question in sample.questions]
        assert depths[0] < 0.02 and depths[-1] > 0.94
        assert np.allclose(np.diff(depths), 0.2, atol=0.03)


def test_few_names_make_keys_that_share_words() -> None:
    problem = draw_pairs(rng(), 4, 60, 10, num_names=8)
    for row in problem.statements:
        assert len(np.unique(row[:, 1:3])) == 8
        assert len(np.unique(row[:, 1:3], axis=0)) == 60
    places = [np.unique(evidence) for evidence in problem.evidence]
    assert all(len(asked) == 10 for asked in places)


def keys_and_answers(problem: Problem, key: slice, value: slice) -> list[dict[Any, Any]]:
    return [{tuple(s[key]): tuple(s[value]) for s in row.tolist()} for row in problem.statements]


@pytest.mark.parametrize("num_hubs", [1, 2, 4])
def test_hubs_make_near_misses_of_what_is_asked(num_hubs: int) -> None:
    """As many as 64 windows of free keys have, in a context of one."""
    problem = draw_pairs(rng(), 3, 80, num_hubs**2, num_hubs=num_hubs, num_values=8)
    for told_pairs, questions, evidence in zip(
        keys_and_answers(problem, slice(1, 3), slice(4, 6)), problem.questions, problem.evidence
    ):
        keys = list(told_pairs)
        assert len(keys) == 80  # different ones
        assert len({word for value in told_pairs.values() for word in value}) <= 8
        for row, (place,) in zip(questions.tolist(), evidence):
            asked = tuple(row[1:3])
            assert told_pairs[asked] == tuple(row[4:6]) and keys[place] == asked
            near = [sum(a in key for a in set(asked)) == 1 for key in keys if key != asked]
            assert sum(near) >= 80 // (2 * num_hubs)
        hubs = {word for row in questions for word in row[1:3].tolist()}
        assert len(hubs) == num_hubs and all(hubs & set(key) for key in keys)


def test_what_is_asked_may_come_last() -> None:
    problem = draw_pairs(rng(), 3, 60, 3, num_hubs=3, asked_last=True)
    assert problem.evidence[:, :, 0].tolist() == [[59, 58, 57]] * 3
    for row, questions in zip(problem.statements, problem.questions):
        assert (row[[59, 58, 57], 1:3] == questions[:, 1:3]).all()
        assert (row[[59, 58, 57], 4:] == questions[:, 4:]).all()


def test_needles_of_hubs_have_keys_of_two_words() -> None:
    problem = draw_needles(rng(), 3, 40, 6, key_words=2, value_words=3, num_hubs=2)
    assert problem.question_words == 3
    for row, told_keys in zip(
        problem.questions, keys_and_answers(problem, slice(1, 3), slice(3, 6))
    ):
        assert len(told_keys) == 40
        assert all(told_keys[tuple(q[1:3])] == tuple(q[3:6]) for q in row.tolist())
        # The four keys of two hubs come first; the other two questions name one hub.
        shared = [sum(len({*q[1:3]} & {*key}) > 0 for key in told_keys) for q in row.tolist()]
        assert min(shared[:4]) >= 10


# ---- prose


@pytest.mark.parametrize("length", [400, 1024, 3000])
@pytest.mark.parametrize("task", IN_SENTENCES)
def test_prose_fits_and_fills_the_length(task: str, length: int) -> None:
    sample = prose_sample(TASKS[task], length, WordTokenizer(), seed=2)
    assert length - 30 < sample.total_tokens() <= length


class Recorder(WordTokenizer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.texts.append(text)
        return super().encode(text, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("task", IN_SENTENCES)
def test_prose_tells_the_gold_strings_and_answers_grade_as_right(task: str) -> None:
    tokenizer = Recorder()
    sample = prose_sample(TASKS[task], 1500, tokenizer, seed=2)
    context = tokenizer.texts[-1]
    for question in sample.questions:
        assert all(gold in context for gold in question.answer)
        right = " " + " and then ".join(question.answer) + "."
        assert grade_text(question, right)
        assert not grade_text(question, right.replace(question.answer[0], "nothing"))


def test_prose_is_seeded() -> None:
    first, again, other = (
        prose_sample(TASKS["vt"], 800, WordTokenizer(), seed=seed) for seed in (1, 1, 2)
    )
    assert (first.context == again.context).all()
    assert [q.answer for q in first.questions] == [q.answer for q in again.questions]
    assert [q.answer for q in first.questions] != [q.answer for q in other.questions]


def test_prose_that_cannot_fit_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"length: got 60, allowed: an int >= \d+"):
        prose_sample(TASKS["niah_multikey"], 60, WordTokenizer())


def test_filler_shares_no_word_with_names() -> None:
    filler = (*FILLER_SUBJECTS, *FILLER_VERBS, *FILLER_OBJECTS, *FILLER_ENDINGS)
    words = {word for phrase in filler for word in phrase.split()}
    assert not words & {*ADJECTIVES, *NOUNS}
    assert len(set(ADJECTIVES)) * len(set(NOUNS)) >= dialect.NUM_NAMES


@pytest.mark.parametrize("limit", [-1, 0, 1, 7, 12, 99])
def test_bisection_finds_the_largest_that_fits(limit: int) -> None:
    assert largest(lambda count: count <= limit, 12) == min(limit, 12)


# ---- grading and names


def question(*answer: str, any_order: bool = False) -> Question:
    return Question(np.zeros(1, np.int64), answer, len(answer), any_order)


def test_words_match_exactly() -> None:
    assert grade_words(question("v1", "v2"), ["v1", "v2"])
    assert not grade_words(question("v1", "v2"), ["v2", "v1"])
    assert not grade_words(question("v1"), ["v1", "v1"])


def test_sets_match_in_any_order() -> None:
    wanted = question("v1", "v2", "v3", any_order=True)
    assert grade_words(wanted, ["v3", "v1", "v2"])
    assert not grade_words(wanted, ["v3", "v1", "v1"])
    assert grade_text(question("12", "34", any_order=True), "34, then 12")


def test_text_matches_whole_words_in_order() -> None:
    assert grade_text(question("1234567"), " 1234567.")
    assert not grade_text(question("1234567"), " 12345678")
    assert grade_text(question("amber mill", "old bridge"), "the Amber mill, the old bridge")
    assert not grade_text(question("amber mill", "old bridge"), "old bridge, amber mill")


def test_tasks_are_found_by_name() -> None:
    assert [task.name for task in find_tasks(["vt", "chain"])] == ["vt", "chain"]
    allowed = "niah_single, niah_multikey, niah_pairkey, niah_multivalue, chain, vt"
    with pytest.raises(ValueError, match=f"tasks: got 'nia', allowed: each once of {allowed}"):
        find_tasks(["vt", "nia"])
    with pytest.raises(ValueError, match="tasks: got 'vt', allowed: each once"):
        find_tasks(["vt", "vt"])
    with pytest.raises(ValueError, match="tasks: got none, allowed: at least one"):
        find_tasks([])
