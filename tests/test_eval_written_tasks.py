"""Tasks that are text from the start: bit-exact haystacks, right answers, lengths, grades."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from kvselect.eval.tasks import GROUPS, TASKS, Question, Sample, dialect_sample, find_tasks
from kvselect.eval.tasks import needle_threading as threading
from kvselect.eval.tasks import prose_sample as sample_in_prose
from kvselect.eval.tasks.grading import METRICS, grade
from kvselect.eval.tasks.written import nonce_words, word_keys

WRITTEN = [name for name, task in TASKS.items() if task.write is not None]


class Bytes:
    """Groups of up to four bytes are tokens; remembers what they were."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.known: dict[str, int] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        tokens = [0] if add_special_tokens else []
        for piece in re.findall(r"[A-Za-z]{1,6}|\d{1,3}|\s+|.", text):
            if piece not in self.known:
                self.known[piece] = len(self.pieces) + 1
                self.pieces.append(piece)
            tokens.append(self.known[piece])
        return tokens

    def text(self, tokens: Any) -> str:
        return "".join(self.pieces[token - 1] for token in tokens if token)


class Told:
    """A sample as text."""

    def __init__(self, task: str, length: int, *, seed: int = 0, max_questions: int = 8) -> None:
        self.tokenizer = Bytes()
        self.sample: Sample = sample_in_prose(
            TASKS[task], length, self.tokenizer, seed=seed, max_questions=max_questions
        )
        self.context = self.tokenizer.text(self.sample.context)
        self.questions = [
            (self.tokenizer.text(question.tokens), question) for question in self.sample.questions
        ]


# ---- Needle Threading


def test_the_published_sample_row_bit_for_bit() -> None:
    pairs = threading.haystack(0, 25)
    text = threading.text_of(pairs)
    assert text == json.dumps(dict(pairs))
    assert len(text) == 2000
    assert pairs[0] == (
        "e3e70682-c209-4cac-629f-6fbed82c07cd",
        "f728b4fa-4248-5e3a-0a5d-2f346baa9455",
    )
    assert threading.place_of(50, 25) == 12
    assert pairs[12] == (
        "247a8333-f7b0-b7d2-cda8-056c3d15eef7",
        "1759edc3-72ae-2244-8b01-63c1cd9d2b7d",
    )
    assert pairs[-1][1] == "964a870c-7c87-9b74-1d87-8f9f9cdf5a86"
    digest = "181b5fbf2898649fec9cf64e85f93a66fff45eb15a6dcc79f656a24bdc4a9d72"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_a_shorter_haystack_begins_like_a_longer_one() -> None:
    assert threading.haystack(7, 40)[:11] == threading.haystack(7, 11)
    assert threading.haystack(7, 11) != threading.haystack(8, 11)


@pytest.mark.parametrize(("depth", "num_pairs", "place"), [(0, 9, 0), (100, 9, 8), (10, 26, 3)])
def test_depths_name_pairs(depth: int, num_pairs: int, place: int) -> None:
    assert threading.place_of(depth, num_pairs) == place


UUID = r"[0-9a-f*]{8}(?:-[0-9a-f*]{4}){3}-[0-9a-f*]{12}"


def pairs_of(context: str) -> list[tuple[str, str]]:
    return re.findall(rf'"({UUID})": "({UUID})"', context)


@pytest.mark.parametrize("task", ["nt_single", "nt_multiple"])
def test_asked_keys_have_the_gold_values(task: str) -> None:
    told = Told(task, 6000, seed=3, max_questions=11)
    values = dict(pairs_of(told.context))
    assert list(values.items()) == threading.haystack(3, len(values))  # nothing is inserted
    assert len(told.questions) == 11
    for text, question in told.questions:
        assert tuple(values[key] for key in re.findall(UUID, text)) == question.answer
    counts = [len(question.answer) for _, question in told.questions]
    assert counts == ([1] * 11 if task == "nt_single" else [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 10])


def test_neighbouring_keys_are_neighbours() -> None:
    told = Told("nt_multiple", 6000, max_questions=12)
    keys = [key for key, _ in pairs_of(told.context)]
    for number, (text, _) in enumerate(told.questions):
        places = sorted(keys.index(key) for key in re.findall(UUID, text))
        if number % 2 == 1:
            assert places == list(range(places[0], places[0] + len(places)))


@pytest.mark.parametrize("seed", [0, 4, 13])
def test_all_marked_keys_and_no_others_are_gold(seed: int) -> None:
    told = Told("nt_conditional", 6000, seed=seed)
    marked = [value for key, value in pairs_of(told.context) if "*" in key]
    ((text, question),) = told.questions
    assert Counter(marked) == Counter(question.answer) and '"*"' in text
    assert len(marked) == threading.COUNTS[seed % 9]
    assert question.any_order and question.metric == "uuid_set"


def follow(pairs: list[tuple[str, str]], key: str) -> list[str]:
    values, found = dict(pairs), []
    while key in values:
        key = values[key]
        found.append(key)
    return found


@pytest.mark.parametrize("seed", range(0, 24, 3))
def test_threads_lead_to_the_gold_value(seed: int) -> None:
    told = Told("nt_threading", 8000, seed=seed)
    pairs = pairs_of(told.context)
    ((text, question),) = told.questions
    (key,) = re.findall(UUID, text)
    way = follow(pairs, key)
    links = threading.COUNTS[1:][seed % 8]
    assert len(way) == links + 1 and question.answer == (way[-1],)
    places = [{key: n for n, (key, _) in enumerate(pairs)}[step] for step in [key, *way[:-1]]]
    direction = seed // 8 % 3
    if direction == 0:
        assert places == sorted(places)
    if direction == 1:
        assert places == sorted(places, reverse=True)


@pytest.mark.parametrize("seed", [0, 6, 15])
def test_several_threads_end_where_they_should(seed: int) -> None:
    told = Told("nt_multi_threading", 8000, seed=seed)
    pairs = pairs_of(told.context)
    ((text, question),) = told.questions
    ends = [follow(pairs, key)[-1] for key in re.findall(UUID, text)]
    assert tuple(ends) == question.answer and len(set(ends)) == len(ends) >= 2


@pytest.mark.parametrize("seed", [0, 3])
def test_the_longest_branch_is_gold(seed: int) -> None:
    told = Told("nt_branched", 8000, seed=seed)
    pairs = pairs_of(told.context)
    ((text, question),) = told.questions

    def ends(key: str, length: int) -> list[tuple[int, str]]:
        values = [value for known, value in pairs if known == key]
        return [end for value in values for end in [(length + 1, value), *ends(value, length + 1)]]

    found = sorted(ends(re.findall(UUID, text)[0], 0), reverse=True)
    links = (2, 3, 4, 5)[seed % 4]
    assert found[0] == (links + 1, question.answer[0]) and found[1][0] <= links
    assert len(found) == 1 + 1 + 3 * (links - 1)


# ---- RULER


@pytest.mark.parametrize("task", [name for name in WRITTEN if name.startswith("ruler_")])
def test_needles_are_told_once_with_their_values(task: str) -> None:
    told = Told(task, 3000, seed=2)
    if task in ("ruler_vt", "ruler_cwe", "ruler_fwe"):
        return
    facts = re.findall(r"A registered (?:number|uuid) of ([\w -]+?) is: ([\w-]+)\.", told.context)
    values: dict[str, list[str]] = {}
    for key, value in facts:
        values.setdefault(key, []).append(value)
    for text, question in told.questions:
        asked = re.findall(r" of ([\w ,-]+?)\?", text)[0].split(", ")
        gold = [value for key in asked for value in values[key]]
        assert Counter(gold) == Counter(question.answer)
        assert len(asked) == (4 if task == "ruler_multiquery" else 1)
        assert all(value not in text for value in gold)
    if task.endswith(("multikey_2", "multikey_3")):
        assert len(facts) > 40 and len(told.questions) == 8
    if task == "ruler_multivalue":
        assert len(told.questions[0][1].answer) == 4


def test_variables_form_one_chain() -> None:
    told = Told("ruler_vt", 2000, seed=5)
    chain = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})", told.context)
    ((text, question),) = told.questions
    assert [name for name, _ in chain] == list(question.answer) and len(set(question.answer)) == 5
    assert [source for _, source in chain[1:]] == list(question.answer[:-1])
    assert chain[0][1] in text


@pytest.mark.parametrize(("length", "often", "seldom"), [(2000, 6, 1), (6000, 30, 3)])
def test_common_words_are_the_most_common(length: int, often: int, seldom: int) -> None:
    told = Told("ruler_cwe", length)
    example, rest = told.context.rsplit("Below is a list of words.", 1)
    counts = Counter(re.findall(r"\d+\. (\w+)", rest))
    ((_, question),) = told.questions
    assert {counts[word] for word in question.answer} == {often}
    assert {counts[word] for word in counts.keys() - set(question.answer)} == {seldom}
    assert "Answer: " in example and not set(question.answer) & set(re.findall(r"\w+", example))


@pytest.mark.parametrize("length", [600, 4000])
def test_frequent_words_are_ranks_two_to_four(length: int) -> None:
    told = Told("ruler_fwe", length, seed=1)
    words = told.context.split("\n\n")[1].split()
    ranks = Counter(words).most_common()
    ((_, question),) = told.questions
    assert ranks[0][0] == "..."
    assert [word for word, _ in ranks[1:4]] == list(question.answer)
    counts = [count for _, count in ranks]
    assert counts[1] > counts[2] > counts[3] and counts[3] > (counts[4] if len(counts) > 4 else 0)


# ---- JSON-KV, examples, two hops


def test_json_kv_shows_other_pairs_and_asks_the_last() -> None:
    told = Told("json_kv", 4000, seed=1)
    values = dict(pairs_of(told.context))
    assert len(told.questions) == 6
    for text, question in told.questions:
        *shown, asked = re.findall(rf"Key: ({UUID})", text)
        assert values[asked] == question.answer[0] not in text
        assert [values[key] for key in shown] == re.findall(rf"value: ({UUID})", text)
        assert asked not in shown and len(shown) == 2
        assert asked[14] == "4"  # version 4
    depths = sorted(question.depth or 0.0 for _, question in told.questions)
    assert np.allclose(np.diff(depths), np.diff(depths).mean(), atol=0.02)


def test_examples_are_balanced_and_labels_are_drawn_anew() -> None:
    told, other = (Told("icl", 5000, seed=seed) for seed in (1, 2))
    shots = re.findall(r"label: (\d+)", told.context)
    counts = Counter(shots)
    assert len(counts) == 64 and max(counts.values()) - min(counts.values()) <= 1
    assert all(question.answer[0] in counts for _, question in told.questions)
    assert set(re.findall(r"label: (\d+)", other.context)) != set(counts)
    words = Counter(re.findall(r"\b[a-z]{6}\b", told.context))
    assert len(words) <= 200


def test_two_hops_lead_to_the_gold_fact() -> None:
    told = Told("two_hop", 5000, seed=1, max_questions=10)
    facts = {
        (name, attribute): value
        for attribute, name, value in re.findall(r"The (\w+) of (\w+) is (\w+)\.", told.context)
    }
    passages = told.context.split("\n\n")
    assert all(len(re.findall(r"\.", passage)) == 3 for passage in passages)
    hops = []
    for text, question in told.questions:
        found = re.search(r"What is the (\w+) of (?:the (\w+) of )?(\w+)\?", text)
        assert found is not None
        attribute, relation, name = found.groups()
        person = facts[name, relation] if relation else name
        assert facts[person, attribute] == question.answer[0]
        hops.append(bool(relation))
        if relation:
            places = [
                next(n for n, passage in enumerate(passages) if fact in passage)
                for fact in (f"The {relation} of {name} is", f"The {attribute} of {person} is")
            ]
            assert 4 * abs(places[0] - places[1]) >= len(passages)
    assert any(hops) and not all(hops)


# ---- all of them


@pytest.mark.parametrize("task", WRITTEN)
def test_written_tasks_fit_and_fill_their_length(task: str) -> None:
    for length in (6000, 9000):
        told = Told(task, length)
        assert told.sample.total_tokens() <= length
        assert told.sample.total_tokens() > 0.9 * length
        for _, question in told.questions:
            assert question.metric in METRICS
            assert question.depth is None or 0 <= question.depth < 1


@pytest.mark.parametrize("task", WRITTEN)
def test_written_tasks_are_seeded_and_their_gold_grades_as_right(task: str) -> None:
    one, again, other = (Told(task, 6000, seed=seed) for seed in (1, 1, 2))
    assert one.context == again.context != other.context
    assert one.sample.digest() == again.sample.digest() != other.sample.digest()
    for text, question in one.questions:
        assert grade(question, " " + " ".join(question.answer)) == 1.0
        assert grade(question, "nothing of the kind") == 0.0
        if task not in ("icl", "ruler_cwe", "ruler_fwe"):  # the answer is in the context alone
            assert not any(gold in text for gold in question.answer)


@pytest.mark.parametrize("task", WRITTEN)
def test_written_tasks_say_what_they_need(task: str) -> None:
    with pytest.raises(ValueError, match=r"length: got 20, allowed: an int >= \d+, which is what"):
        Told(task, 20)


def test_a_model_of_the_dialect_is_not_asked_in_text() -> None:
    message = "task: got 'nt_single', text which a model of the dialect cannot read, allowed: niah_"
    with pytest.raises(ValueError, match=message):
        dialect_sample(TASKS["nt_single"], 512)


def test_groups_stand_for_several_tasks() -> None:
    names = [task.name for task in find_tasks(["minimal", "vt"])]
    assert names == [*GROUPS["minimal"], "vt"] and len(names) == 8
    assert len(find_tasks(["nt"])) == 6 and len(find_tasks(["ruler"])) == 11
    with pytest.raises(ValueError, match="tasks: got 'nt_single', allowed: each once"):
        find_tasks(["nt", "nt_single"])


@pytest.mark.parametrize("count", [5, 864, 865, 5000])
def test_word_keys_differ(count: int) -> None:
    assert len(set(word_keys(np.random.default_rng(0), count))) == count
    assert len(set(nonce_words(np.random.default_rng(0), count))) == count


# ---- grading


def question(*answer: str, metric: str) -> Question:
    return Question(np.zeros(1, np.int64), answer, 5, metric=metric)


A, B = (f"{c * 8}-{c * 4}-{c * 4}-{c * 4}-{c * 12}" for c in "ab")


@pytest.mark.parametrize(
    ("metric", "answer", "text", "score"),
    [
        ("share", ("1234567", "7654321"), "it is 1234567 or so", 0.5),
        ("share", ("Amber",), "AMBER", 1.0),
        ("contains", ("one", "two"), "the two", 1.0),
        ("uuid_list", (A, B), f"{A}, {B}", 1.0),
        ("uuid_list", (A, B), f"{B}, {A}", 0.0),
        ("uuid_list", (A, B), A.upper(), 0.5),
        ("uuid_set", (A, B), f"{B}, {A}", 1.0),
        ("uuid_set", (A,), f"{B}, {A}", 0.0),  # guesses beyond the count do not earn
        ("label", ("123",), " 123\nmore", 1.0),
        ("label", ("123",), "1234", 0.0),
        ("label", ("123",), "", 0.0),
        ("qa_f1", ("the red house",), "A red house.", 1.0),
        ("qa_f1", ("red house", "blue"), "red car", 0.5),
        ("qa_f1", ("x",), "", 0.0),
        ("rouge_l", ("w x y z",), "w y q z", 0.75),
        ("rouge_l", ("w x",), "q", 0.0),
        ("class", ("Sport",), "sport news\nother", 1.0),
        ("class", ("Sport",), "news\nsport", 0.0),
        ("first_number", ("12",), "there are 12 or 13", 1.0),
        ("first_number", ("12",), "13 or 12", 0.0),
        ("paragraph", ("Paragraph 12",), "Paragraph 12 or 7", 0.5),
        ("paragraph", ("Paragraph 12",), "none", 0.0),
        ("choice", ("B",), "The answer is B.", 1.0),
        ("choice", ("B",), "About C", 0.0),
        ("edit_similarity", ("return x",), "return y\nmore", 0.875),
        ("edit_similarity", ("ab",), "# note\nab", 1.0),
        ("words", ("v1", "v2"), "v1 v2", 1.0),
        ("text", ("v1",), "is v1.", 1.0),
    ],
)
def test_metrics(metric: str, answer: tuple[str, ...], text: str, score: float) -> None:
    assert grade(question(*answer, metric=metric), text) == pytest.approx(score)


def test_every_metric_is_tried_above() -> None:
    (mark,) = [m for m in test_metrics.pytestmark if m.name == "parametrize"]  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == set(METRICS)
