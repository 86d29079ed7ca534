"""RULER-like tasks in our own wording: needles, variable tracking, common and frequent words.

Source of every parameter: Hsieh et al., arXiv:2404.06654. Haystacks are generated, so scores
compare policies with dense attention and not with published tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvselect.eval.tasks.sample import Sample
from kvselect.eval.tasks.written import (
    Asked,
    Draw,
    Rng,
    essay,
    fill,
    nonce_words,
    numbers,
    uuids,
    word_keys,
)

DEPTHS = np.round(np.linspace(0, 100, 40))
NOISE = "The lamps are lit. The street is wet. The clock is slow. Somebody hums. Nothing happens."

Kind = Literal["word", "number", "uuid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needles:
    """One of the needle tasks.

    Attributes
    ----------
    haystack : "noise", "essay" or "needles"
    keys : int
        Needles with a key of their own, those that nobody asks for included; of "needles" haystacks
        the haystack is more of them.
    values : int
        Told for every key that is asked.
    asked : int
        Keys in one question.
    """

    haystack: Literal["noise", "essay", "needles"]
    keys: int = 1
    values: int = 1
    asked: int = 1
    key_kind: Kind = "word"
    value_kind: Kind = "number"


NEEDLES = {
    "single_1": Needles(haystack="noise"),
    "single_2": Needles(haystack="essay"),
    "single_3": Needles(haystack="essay", value_kind="uuid"),
    "multikey_1": Needles(haystack="essay", keys=4),
    "multikey_2": Needles(haystack="needles"),
    "multikey_3": Needles(haystack="needles", key_kind="uuid", value_kind="uuid"),
    "multivalue": Needles(haystack="essay", values=4),
    "multiquery": Needles(haystack="essay", keys=4, asked=4),
}


def _draw(rng: Rng, kind: Kind, count: int) -> list[str]:
    makers: dict[Kind, Callable[[Rng, int], list[str]]] = {
        "word": word_keys,
        "number": numbers,
        "uuid": uuids,
    }
    return makers[kind](rng, count)


def needles(draw: Draw, task: Needles) -> Sample:
    """Values of keys that are told once each, or all values of one key."""

    def write(size: int) -> tuple[str, list[Asked]]:
        rng = draw.rng()
        is_list = task.haystack == "needles"
        keys = _draw(rng, task.key_kind, size if is_list else task.keys)
        told = [key for key in keys for _ in range(task.values)]
        values = _draw(rng, task.value_kind, len(told))
        kind = task.value_kind
        sentences = [f"A registered {kind} of {k} is: {v}." for k, v in zip(told, values)]
        if is_list:
            lines, places = sentences, list(range(size))
        else:
            rest = [NOISE] * size if task.haystack == "noise" else essay(rng, size)
            lines, places = _insert(rng, rest, sentences, by_depth=task.haystack == "essay")
        order = rng.permutation(len(keys))
        if is_list and task.asked == 1:  # every key may be asked
            groups = [[int(one)] for one in order[: draw.max_questions]]
        else:
            groups = [order[: task.asked].tolist()]
            if task.asked == 1 and task.keys > 1:
                groups = [[int(one)] for one in order[: draw.max_questions]]
        asked = []
        for group in groups:
            needed = [n for n, key in enumerate(told) if key in {keys[one] for one in group}]
            names = ", ".join(keys[one] for one in group)
            several = len(needed) > 1
            plural = "s" if several else ""
            asked.append(
                Asked(
                    text=f"\n\nWhat {'are all' if several else 'is the'} registered {kind}{plural} "
                    f"of {names}? The registered {kind}{plural} of {names} "
                    f"{'are' if several else 'is'}:",
                    answer=tuple(values[n] for n in needed),
                    max_new_tokens=128,
                    metric="share",
                    any_order=True,
                    depth=min(places[n] for n in needed) / len(lines),
                )
            )
        opening = (
            f"Registered {kind}s are hidden in this text. Remember them: questions follow.\n\n"
        )
        joint = " " if task.haystack == "essay" else "\n"
        return opening + joint.join(lines), asked

    return fill(draw, write)


def _insert(
    rng: Rng, lines: list[str], needles: list[str], *, by_depth: bool
) -> tuple[list[str], list[int]]:
    """Needles among lines, and where each stands: at sampled depths of the grid, or at sampled
    lines."""
    count = len(lines)
    if by_depth:
        chosen = rng.choice(len(DEPTHS), len(needles), replace=len(needles) > len(DEPTHS))
        at = [int(count * DEPTHS[one] / 100) for one in chosen]
    else:
        at = rng.integers(0, count + 1, len(needles)).tolist()
    found: list[tuple[int, int, str]] = [(line, 1 + n, needles[n]) for n, line in enumerate(at)]
    found += [(line, len(needles) + 1, text) for line, text in enumerate(lines)]
    found.sort(key=lambda entry: entry[:2])
    places = {which: place for place, (_, which, _) in enumerate(found) if which <= len(needles)}
    return [text for _, _, text in found], [places[1 + n] for n in range(len(needles))]


def variable_tracking(draw: Draw) -> Sample:
    """One chain of four hops among noise; ask for all five names that hold the value."""

    def write(size: int) -> tuple[str, list[Asked]]:
        rng = draw.rng()
        letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
        names: list[str] = []
        while len(names) < 5:
            name = "".join(rng.choice(letters, 5))
            names += [name] if name not in names else []
        value = numbers(rng, 1, digits=5)[0]
        told = [f"VAR {names[0]} = {value}"]
        told += [f"VAR {name} = VAR {source}" for source, name in zip(names, names[1:])]  # noqa: RUF007
        at = np.sort(rng.integers(0, size + 1, len(told)))
        lines: list[str] = []
        begin = 0
        places = []
        for line, sentence in zip(at.tolist(), told):
            lines += [NOISE] * (line - begin)
            places.append(len(lines))
            lines.append(sentence)
            begin = line
        lines += [NOISE] * (size - begin)
        asked = Asked(
            text=f"\n\nWhich five variables have the value {value}? The variables are:",
            answer=tuple(names),
            max_new_tokens=30,
            metric="share",
            any_order=True,
            depth=places[0] / len(lines),
        )
        opening = "Variables are set in this text. Remember which has which value.\n\n"
        return opening + "\n".join(lines), [asked]

    return fill(draw, write)


def common_words(draw: Draw) -> Sample:
    """The ten words that a numbered list repeats most; a shorter list is worked out before it."""
    short = draw.length < 4096
    often, seldom = (6, 1) if short else (30, 3)

    def listed(rng: Rng, words: list[str], others: list[str], often: int, seldom: int) -> str:
        told = [word for word in words for _ in range(often)]
        told += [word for word in others for _ in range(seldom)]
        shuffled = [told[place] for place in rng.permutation(len(told))]
        return " ".join(f"{number}. {word}" for number, word in enumerate(shuffled, 1))

    ask = "Which ten words stand most often in the list?"

    def write(size: int) -> tuple[str, list[Asked]]:
        rng = draw.rng()
        names = nonce_words(rng, 10 + 30 + 10 + size)
        worked, rest, common, others = names[:10], names[10:40], names[40:50], names[50:]
        example = listed(rng, worked, rest, 6, 1)
        context = (
            f"Below is a list of words.\n{example}\n"
            f"Question: {ask}\nAnswer: {', '.join(worked)}\n\n"
            f"Below is a list of words.\n{listed(rng, common, others, often, seldom)}"
        )
        asked = Asked(
            text=f"\nQuestion: {ask}\nAnswer:",
            answer=tuple(common),
            max_new_tokens=120,
            metric="share",
            any_order=True,
        )
        return context, [asked]

    return fill(draw, write)


def frequent_words(draw: Draw) -> Sample:
    """The three most frequent of coded words whose counts fall as 1 / rank^2; the very first is
    dots."""

    def write(size: int) -> tuple[str, list[Asked]]:
        rng = draw.rng()
        count = max(6, draw.length // 50)
        names = nonce_words(rng, count)
        shares = np.arange(1, count + 1) ** -2.0 / (np.pi**2 / 6)
        counts = np.floor(size * shares).astype(int)
        for rank in (3, 2, 1):  # ranks 2 to 4 must differ from what follows them
            counts[rank] = max(counts[rank], counts[rank + 1] + 1)
        counts[4:] = np.minimum(counts[4:], counts[3] - 1)
        told = np.repeat(np.arange(count), np.maximum(counts, 0))
        words = ["..." if rank == 0 else names[rank] for rank in rng.permutation(told)]
        asked = Asked(
            text="\nQuestion: Dots do not count. Which three coded words stand most often in the "
            "text? Answer: The three words are:",
            answer=tuple(names[1:4]),
            max_new_tokens=50,
            metric="share",
            any_order=True,
        )
        opening = "Read this coded text and remember how often each word stands in it.\n\n"
        return opening + " ".join(words), [asked]

    return fill(draw, write, smallest=24)
