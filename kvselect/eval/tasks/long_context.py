"""JSON-KV in the manner of HELMET, labels learned from many examples, and facts two hops apart."""

from __future__ import annotations

import numpy as np

from kvselect.eval.tasks.needle_threading import text_of
from kvselect.eval.tasks.sample import Sample
from kvselect.eval.tasks.written import Asked, Draw, fill, nonce_words, uuids

GOLD_DEPTHS = 6
DEMONSTRATIONS = 2
CLASSES, WORDS, CLASS_WORDS, CLASS_WEIGHT, SHOT_WORDS = 64, 200, 8, 10, 12


def json_kv(draw: Draw) -> Sample:
    """The value of a key of a JSON object of UUIDs, after two demonstrations with other keys.

    Source: Yen et al., arXiv:2410.02694; ids are of version 4 and the gold pairs stand at 6 evenly
    spaced depths.
    """

    def write(num_pairs: int) -> tuple[str, list[Asked]]:
        rng = draw.rng()
        names = uuids(rng, 2 * num_pairs)
        pairs = list(zip(names[::2], names[1::2]))
        gold = np.round(np.linspace(0, num_pairs - 1, GOLD_DEPTHS)).astype(int)
        others = np.setdiff1d(np.arange(num_pairs), gold)
        asked = []
        for place in rng.permutation(np.unique(gold))[: draw.max_questions].tolist():
            shown = rng.choice(others, DEMONSTRATIONS, replace=False).tolist()
            turns = [f"Key: {pairs[one][0]}\nCorresponding value: {pairs[one][1]}" for one in shown]
            asked.append(
                Asked(
                    text="\n\nGive the value that belongs to the last key in the JSON object above."
                    + "".join(f"\n\n{turn}" for turn in turns)
                    + f"\n\nKey: {pairs[place][0]}\nCorresponding value:",
                    answer=(pairs[place][1],),
                    max_new_tokens=100,
                    metric="contains",
                    depth=place / num_pairs,
                )
            )
        return f"JSON object:\n{text_of(pairs)}", asked

    return fill(draw, write, smallest=GOLD_DEPTHS + DEMONSTRATIONS)


def many_shots(draw: Draw) -> Sample:
    """Labels of 64 classes, learned from examples: does a policy keep many weak hints?

    Every class is a fixed mixture over 200 words that mean nothing (8 at weight 10); an example is
    12 words and its label. Labels are drawn anew for every sample, so nothing but the context tells
    them.
    """

    def write(size: int) -> tuple[str, list[Asked]]:
        classes = np.random.default_rng(0)  # the mixtures are those of the task
        words = np.array(nonce_words(classes, WORDS))
        weights = np.ones((CLASSES, WORDS))
        for row in weights:
            row[classes.choice(WORDS, CLASS_WORDS, replace=False)] = CLASS_WEIGHT
        weights /= weights.sum(1, keepdims=True)
        rng = draw.rng()
        labels = rng.choice(np.arange(100, 1000), CLASSES, replace=False)

        def example(which: int) -> str:
            return " ".join(rng.choice(words, SHOT_WORDS, p=weights[which]))

        targets = rng.permutation(CLASSES)[: draw.max_questions].tolist()
        tests = [(which, example(which)) for which in targets]
        order: list[int] = []
        while len(order) < size:  # balanced rounds
            order += rng.permutation(CLASSES).tolist()
        shots = [f"{example(which)}\nlabel: {labels[which]}" for which in order[:size]]
        asked = [
            Asked(
                text=f"\n\n{text}\nlabel:",
                answer=(str(labels[which]),),
                max_new_tokens=20,
                metric="label",
            )
            for which, text in tests
        ]
        return "\n\n".join(shots), asked

    return fill(draw, write, smallest=CLASSES)


ATTRIBUTES = {
    "mentor": "person",
    "rival": "person",
    "neighbour": "person",
    "workshop": "place",
    "emblem": "thing",
    "remedy": "thing",
}
_PLAIN = tuple(name for name, kind in ATTRIBUTES.items() if kind != "person")


def two_hop(draw: Draw) -> Sample:
    """Attributes of invented people, asked directly and through another person.

    A passage has three sentences, one attribute each, so people have two passages; those of other
    people and other attributes of the same people are the hard negatives. The two passages that a
    two-hop question needs are at least a quarter of the context apart.
    """

    def write(size: int) -> tuple[str, list[Asked]]:
        rng = draw.rng()
        people = nonce_words(rng, size, letters=7)
        names = [name.capitalize() for name in people]
        plain = [name.capitalize() for name in nonce_words(rng, 3 * size, letters=8)]
        told: list[tuple[int, str]] = []  # (person, text) of a passage
        facts: list[dict[str, str]] = []
        links: list[dict[str, int]] = []
        for person in range(size):
            others = [one for one in range(size) if one != person]
            chosen = rng.choice(others, 3, replace=False).tolist()
            relations = [name for name, kind in ATTRIBUTES.items() if kind == "person"]
            links.append(dict(zip(relations, chosen)))
            facts.append(dict(zip(_PLAIN, plain[3 * person : 3 * person + 3])))
            facts[-1] |= {name: names[other] for name, other in links[-1].items()}
            told.append((person, _passage(names[person], facts[-1], relations)))
            told.append((person, _passage(names[person], facts[-1], list(_PLAIN))))
        order = rng.permutation(len(told)).tolist()
        # Where the passages of relations (even) and of plain attributes (odd) came to stand.
        at = {passage: place for place, passage in enumerate(order)}
        asked: list[Asked] = []
        for person in rng.permutation(size).tolist():
            if len(asked) >= draw.max_questions:
                break
            attribute = _PLAIN[int(rng.integers(len(_PLAIN)))]
            if len(asked) % 2 == 0:
                gold, needed = facts[person][attribute], [at[2 * person + 1]]
                who = names[person]
            else:
                far = [
                    (relation, other)
                    for relation, other in links[person].items()
                    if 4 * abs(at[2 * person] - at[2 * other + 1]) >= len(order)
                ]
                if not far:
                    continue
                relation, other = far[int(rng.integers(len(far)))]
                gold, needed = facts[other][attribute], [at[2 * person], at[2 * other + 1]]
                who = f"the {relation} of {names[person]}"
            asked.append(
                Asked(
                    text=f"\n\nQuestion: What is the {attribute} of {who}? Answer: The {attribute} "
                    f"of {who} is",
                    answer=(gold,),
                    max_new_tokens=20,
                    metric="contains",
                    depth=min(needed) / len(order),
                )
            )
        return "\n\n".join(told[passage][1] for passage in order), asked

    return fill(draw, write, smallest=8)


def _passage(name: str, facts: dict[str, str], attributes: list[str]) -> str:
    return " ".join(f"The {attribute} of {name} is {facts[attribute]}." for attribute in attributes)
