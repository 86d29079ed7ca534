"""Needle Threading: UUID pairs in a JSON object, one or many keys asked, or threads to follow.

Source: Roberts, Han & Albanie, arXiv:2411.05000. The haystack is the published one bit for bit (its
sample row is a test); questions are in our wording. Which pair a depth names and that repeat `r`
has seed `r` are our reading.
"""

from __future__ import annotations

import json
import random
import uuid

from kvselect.eval.tasks.sample import Sample
from kvselect.eval.tasks.written import Asked, Draw, Rng, fill

DEPTHS = tuple(range(0, 101, 10))
COUNTS = (1, 2, 3, 4, 5, 10, 15, 20, 25)  # keys asked for, links of a thread
BRANCHES = 3
TOKENS_PER_VALUE = 60
MARK = "*"

Pairs = list[tuple[str, str]]


def haystack(seed: int, num_pairs: int) -> Pairs:
    """The published pairs: key first, then value, from 128 random bits each."""
    bits = random.Random(seed)

    def name() -> str:
        return str(uuid.UUID(int=bits.getrandbits(128)))

    return [(name(), name()) for _ in range(num_pairs)]


def text_of(pairs: Pairs) -> str:
    """One JSON object; pairs of one key stay apart, which a dict would not keep."""
    entries = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs)
    return "{" + ", ".join(entries) + "}"


def place_of(depth: int, num_pairs: int) -> int:
    """Index of the pair at a depth in percent."""
    return int((num_pairs - 1) * depth / 100 + 0.5)


def _ask(
    text: str,
    cue: str,
    answer: list[str],
    pairs: Pairs,
    places: list[int],
    *,
    any_order: bool = False,
) -> Asked:
    return Asked(
        text=f"\n{text}\n{cue}",
        answer=tuple(answer),
        max_new_tokens=100 if len(answer) == 1 else TOKENS_PER_VALUE * len(answer),
        metric="uuid_set" if any_order else "uuid_list",
        any_order=any_order,
        depth=min(places) / len(pairs),
    )


def _places(rng: Rng, count: int, num_pairs: int, clustered: bool) -> list[int]:
    """Different places: one run of neighbours in random order, or anywhere."""
    if clustered:
        begin = int(rng.integers(num_pairs - count + 1))
        return (begin + rng.permutation(count)).tolist()
    return rng.choice(num_pairs, count, replace=False).tolist()


def single(draw: Draw) -> Sample:
    """The value of one key; depths 0, 10 ... 100 in random order."""

    def write(num_pairs: int) -> tuple[str, list[Asked]]:
        pairs, rng = haystack(draw.seed, num_pairs), draw.rng()
        asked = []
        for depth in rng.permutation(DEPTHS)[: draw.max_questions].tolist():
            place = place_of(depth, num_pairs)
            key, value = pairs[place]
            text = f'Which value does the key "{key}" have?'
            asked.append(_ask(text, "The value is:", [value], pairs, [place]))
        return text_of(pairs), asked

    return fill(draw, write)


def multiple(draw: Draw) -> Sample:
    """The values of several keys, in the order asked; scattered and neighbouring keys in turn."""

    def write(num_pairs: int) -> tuple[str, list[Asked]]:
        pairs, rng = haystack(draw.seed, num_pairs), draw.rng()
        asked = []
        for number in range(min(draw.max_questions, 2 * len(COUNTS))):
            count = min(COUNTS[number // 2 % len(COUNTS)], num_pairs)
            places = _places(rng, count, num_pairs, clustered=number % 2 == 1)
            keys = json.dumps([pairs[place][0] for place in places])
            text = f"Which values do these keys have, in this order? {keys}"
            values = [pairs[place][1] for place in places]
            asked.append(_ask(text, "The values are:", values, pairs, places))
        return text_of(pairs), asked

    return fill(draw, write)


def conditional(draw: Draw) -> Sample:
    """The values of all keys that contain a mark; only the mark is told."""
    count = COUNTS[draw.seed % len(COUNTS)]

    def write(num_pairs: int) -> tuple[str, list[Asked]]:
        pairs, rng = haystack(draw.seed, num_pairs), draw.rng()
        clustered = draw.seed // len(COUNTS) % 2 == 1
        places = sorted(_places(rng, count, num_pairs, clustered))
        for place in places:
            key, value = pairs[place]
            digit = int(rng.choice([i for i, letter in enumerate(key) if letter != "-"]))
            pairs[place] = (key[:digit] + MARK + key[digit + 1 :], value)
        text = f'Which values do all keys have that contain the character "{MARK}"?'
        values = [pairs[place][1] for place in places]
        asked = _ask(text, "The values are:", values, pairs, places, any_order=True)
        return text_of(pairs), [asked]

    return fill(draw, write, smallest=count)


def thread(pairs: Pairs, places: list[int]) -> None:
    """Make each pair's value the next one's key: the keys of later pairs change."""
    for here, following in zip(places, places[1:]):  # noqa: RUF007
        pairs[following] = (pairs[here][1], pairs[following][1])


_FOLLOW = (
    "A value may be the key of another pair. Begin at the key and go on from each value to the "
    "pair that has it as its key, as long as there is one."
)


def threading(draw: Draw) -> Sample:
    """The end of a thread of 2 to 25 links: forward, backward, or anywhere in the text."""
    links = COUNTS[1:][draw.seed % (len(COUNTS) - 1)]
    direction = ("forward", "backward", "random")[draw.seed // (len(COUNTS) - 1) % 3]

    def write(num_pairs: int) -> tuple[str, list[Asked]]:
        pairs, rng = haystack(draw.seed, num_pairs), draw.rng()
        places = rng.choice(num_pairs, links + 1, replace=False).tolist()
        if direction != "random":
            places.sort(reverse=direction == "backward")
        thread(pairs, places)
        text = f'{_FOLLOW} Which value ends the thread that begins at "{pairs[places[0]][0]}"?'
        gold = [pairs[places[-1]][1]]
        return text_of(pairs), [_ask(text, "The last value is:", gold, pairs, places)]

    return fill(draw, write, smallest=links + 1)


def multi_threading(draw: Draw) -> Sample:
    """The ends of 2 to 5 threads at once, in the order asked."""
    links = (2, 3, 4, 5)[draw.seed % 4]
    threads = (2, 3, 4, 5)[draw.seed // 4 % 4]

    def write(num_pairs: int) -> tuple[str, list[Asked]]:
        pairs, rng = haystack(draw.seed, num_pairs), draw.rng()
        places = rng.choice(num_pairs, threads * (links + 1), replace=False)
        told = places.reshape(threads, links + 1).tolist()
        for one in told:
            thread(pairs, one)
        keys = json.dumps([pairs[one[0]][0] for one in told])
        text = f"{_FOLLOW} Which values end the threads of these keys, in this order? {keys}"
        values = [pairs[one[-1]][1] for one in told]
        return text_of(pairs), [_ask(text, "The last values are:", values, pairs, places.tolist())]

    return fill(draw, write, smallest=threads * (links + 1))


def branched(draw: Draw) -> Sample:
    """The end of the longest thread: at every link but the last three pairs have the key, and one
    of them leads on."""
    links = (2, 3, 4, 5)[draw.seed % 4]
    sizes = [BRANCHES] * (links - 1) + [1]

    def write(num_pairs: int) -> tuple[str, list[Asked]]:
        pairs, rng = haystack(draw.seed, num_pairs), draw.rng()
        places = rng.choice(num_pairs, 1 + sum(sizes), replace=False).tolist()
        here, rest = places[0], places[1:]
        for size in sizes:
            group, rest = rest[:size], rest[size:]
            for place in group:
                pairs[place] = (pairs[here][1], pairs[place][1])
            here = group[0]
        text = (
            f"{_FOLLOW} Several pairs may have the same key; follow the longest thread. Which "
            f'value ends the longest thread that begins at "{pairs[places[0]][0]}"?'
        )
        gold = [pairs[here][1]]
        return text_of(pairs), [_ask(text, "The last value is:", gold, pairs, places)]

    return fill(draw, write, smallest=1 + sum(sizes))
