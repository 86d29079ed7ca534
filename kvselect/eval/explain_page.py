"""An `Explanation` for people: coloured text in a terminal, one HTML page, a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from kvselect.eval.charts import INK, PAGE, Chart, _dress, _figure, svg
from kvselect.eval.page import document, number, row, table
from kvselect.explain import Explanation, LayerChoice, Span, StepChoice

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

HEAVIEST = 16  # tokens of a step whose neighbourhood is shown
AROUND = 6  # tokens shown on either side of them
HEAT_COLUMNS = 240  # runs of positions in the picture
LEAST_MASS = 1e-5  # the picture's darkest

_STYLE = """
.passage { margin: .25rem 0; overflow-wrap: anywhere; line-height: 1.7; }
.passage b { font-weight: inherit; border-radius: 2px; padding: .05em .1em;
  background: color-mix(in srgb, var(--series-1) calc(var(--m) * 1%), transparent); }
.passage u { text-decoration: underline 2px; text-underline-offset: 3px; }
.at { color: var(--muted); font-variant-numeric: tabular-nums; margin-right: .6em; }
"""


@dataclass(frozen=True, slots=True)
class Told:
    """An explanation, and how to write its tokens.

    Attributes
    ----------
    explanation : Explanation
    words : tuple of str
        Text of every token of ``explanation.tokens``, spaces included.
    next_words : tuple of str
        Of what every step found likeliest.
    evidence : tuple of (begin, end)
        Token positions of every piece that the answer needs, where that is known.
    title : str
    """

    explanation: Explanation
    words: tuple[str, ...]
    next_words: tuple[str, ...]
    evidence: tuple[Span, ...]
    title: str


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens [begin, end) that are shown together, and the mass of each, mean over all heads."""

    begin: int
    mass: tuple[float, ...]

    @property
    def end(self) -> int:
        return self.begin + len(self.mass)


def passages(step: StepChoice, heaviest: int = HEAVIEST, around: int = AROUND) -> list[Passage]:
    """The neighbourhoods of the tokens that got most, in the order of the text."""
    mass = step.token_mass()
    order = mass.argsort(descending=True, stable=True)
    chosen = sorted(int(place) for place in order[:heaviest] if mass[place] > 0)
    found: list[list[int]] = []
    for place in chosen:
        begin, end = max(place - around, 0), min(place + around + 1, len(mass))
        if found and begin <= found[-1][1]:
            found[-1][1] = end
        else:
            found.append([begin, end])
    return [Passage(begin, tuple(mass[begin:end].tolist())) for begin, end in found]


def heading(told: Told, index: int) -> str:
    """What a step read and found, in words."""
    step = told.explanation.steps[index]
    read = told.words[step.position].strip()
    counts = [len(head.positions) for layer in step.layers for head in layer.heads]
    lists = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return (
        f"step {index + 1}: after “{read}” (token {step.position}) comes "
        f"“{told.next_words[index].strip()}”; lists of {lists} of {step.position + 1} tokens"
    )


def evidence_rows(told: Told, step: StepChoice) -> Iterator[tuple[str, int, int, float, str]]:
    """Of each piece: text, heads that list it, heads, mean mass, the head that looks hardest."""
    for begin, end in told.evidence:
        if begin > step.position:
            continue
        heads = [
            (head.mass_of((begin, end)), head.lists((begin, end)), layer.layer, place)
            for layer in step.layers
            for place, head in enumerate(layer.heads)
        ]
        most, _, layer_index, head_index = max(heads, key=lambda found: found[0])
        yield (
            "".join(told.words[begin:end]).strip(),
            sum(listed for _, listed, _, _ in heads),
            len(heads),
            sum(mass for mass, _, _, _ in heads) / len(heads),
            f"layer {layer_index}, head {head_index}: {100 * most:.1f} %",
        )


def _earlier(told: Told, index: int, place: int) -> LayerChoice | None:
    return told.explanation.steps[index - 1].layers[place] if index else None


def _overlaps(told: Told, index: int) -> Iterator[tuple[LayerChoice, float | None, float | None]]:
    """Of each layer: overlap of its heads with their lists of the step before, and with each
    other."""
    for place, layer in enumerate(told.explanation.steps[index].layers):
        earlier = _earlier(told, index, place)
        yield layer, None if earlier is None else layer.overlap_with(earlier), layer.head_overlap()


# ---- terminal


def print_steps(told: Told, console: Console) -> None:
    """Every step: passages with a background that grows with the mass, evidence underlined."""
    console.print(f"[bold]{_plain(told.title)}[/bold]", highlight=False)
    for index, step in enumerate(told.explanation.steps):
        console.print(f"\n[bold]{_plain(heading(told, index))}[/bold]", highlight=False)
        found = passages(step)
        most = max((max(passage.mass) for passage in found), default=0.0)
        for passage in found:
            console.print(_passage_text(told, passage, most), soft_wrap=False)
        if told.evidence:
            console.print(_evidence_table(told, step))
        console.print(_layer_table(told, index))


def _plain(text: str) -> str:
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def _passage_text(told: Told, passage: Passage, most: float) -> RenderableType:
    from rich.text import Text

    line = Text(f"{passage.begin:>8}  ", style="dim")
    for place, mass in enumerate(passage.mass, passage.begin):
        strength = (mass / most) ** 0.5 if most else 0.0
        red, green, blue = (round(255 - strength * (255 - end)) for end in (222, 143, 5))
        style = f"black on rgb({red},{green},{blue})" if strength > 0.15 else ""
        if _is_evidence(told, place):
            style += " underline bold"
        line.append(told.words[place].replace("\n", "⏎"), style=style.strip() or None)
    return line


def _is_evidence(told: Told, place: int) -> bool:
    return any(begin <= place < end for begin, end in told.evidence)


def _evidence_table(told: Told, step: StepChoice) -> RenderableType:
    from rich.table import Table

    shown = Table(box=None, title="evidence", title_justify="left", title_style="dim")
    for title in ("piece", "listed by heads", "mass, mean of all", "most of it"):
        shown.add_column(title, justify="left" if title in ("piece", "most of it") else "right")
    for text, listed, heads, mean, most in evidence_rows(told, step):
        shown.add_row(_plain(text), f"{listed} of {heads}", f"{100 * mean:.1f} %", most)
    return shown


def _layer_table(told: Told, index: int) -> RenderableType:
    from rich.table import Table

    shown = Table(box=None, title="overlap of lists (Jaccard)", title_justify="left")
    shown.title_style = "dim"
    for title in ("layer", "with the step before", "between heads"):
        shown.add_column(title, justify="right")
    for layer, before, between in _overlaps(told, index):
        name = f"{layer.layer}{' (dense)' if layer.dense else ''}"
        shown.add_row(name, _index(before), _index(between))
    return shown


def _index(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


# ---- page


def page(told: Told) -> str:
    """Everything as one HTML page; the explanation itself in its script element "results"."""
    policy = told.explanation.policy
    settings = ", ".join(f"{name}={value!r}" for name, value in policy.items() if name != "policy")
    parts = [
        f"<h1>{escape(told.title)}</h1>",
        f'<p class="about">{escape(str(policy["policy"]))}({escape(settings)})</p>',
        '<p class="note">Background: share of attention, mean over layers and KV heads, '
        "square root of the step's most. Underlined: what the answer needs.</p>",
    ]
    drawn = chart(told)
    parts += [
        f"<h2>{escape(drawn.title)}</h2>",
        f'<figure><div class="scroll">{svg(drawn)}</div>'
        f"<figcaption>{escape(drawn.caption)}</figcaption></figure>",
    ]
    for index, step in enumerate(told.explanation.steps):
        title = heading(told, index)
        parts.append(f"<h2>{escape(title[0].upper() + title[1:])}</h2>")
        found = passages(step)
        most = max((max(passage.mass) for passage in found), default=0.0)
        parts += [_passage_html(told, passage, most) for passage in found]
        if told.evidence:
            rows = [
                row(
                    [
                        escape(text),
                        number(listed, f"{listed} of {heads}"),
                        number(mean, f"{100 * mean:.1f} %"),
                        escape(hardest),
                    ],
                    words=1,
                )
                for text, listed, heads, mean, hardest in evidence_rows(told, step)
            ]
            head = ["evidence", "listed by heads", "mass, mean of all", "most of it"]
            parts.append(table("What the answer needs.", head, rows, words=1))
        rows = [
            row(
                [
                    f"{layer.layer}{' (dense)' if layer.dense else ''}",
                    number(before, _index(before)),
                    number(between, _index(between)),
                ],
                words=0,
            )
            for layer, before, between in _overlaps(told, index)
        ]
        caption = "Overlap of lists: Jaccard index, mean over KV heads."
        parts.append(
            table(caption, ["layer", "with the step before", "between heads"], rows, words=0)
        )
    return document(escape(told.title), parts, told.explanation.to_dict(), _STYLE)


def _passage_html(told: Told, passage: Passage, most: float) -> str:
    shown = []
    for place, mass in enumerate(passage.mass, passage.begin):
        text = escape(told.words[place]).replace("\n", "⏎")
        if _is_evidence(told, place):
            text = f"<u>{text}</u>"
        strength = 100 * (mass / most) ** 0.5 if most else 0.0
        if strength >= 5:
            text = f'<b style="--m:{strength:.0f}" title="{100 * mass:.2f} %">{text}</b>'
        shown.append(text)
    return f'<p class="passage"><span class="at">{passage.begin}</span>{"".join(shown)}</p>'


# ---- picture


def heat(step: StepChoice, num_columns: int = HEAT_COLUMNS) -> tuple[Any, list[str]]:
    """Mass by head and run of positions, float64 [heads, columns], and the heads' names."""
    length = step.position + 1
    columns = min(num_columns, length)
    values, names = [], []
    for layer in step.layers:
        for place, head in enumerate(layer.heads):
            runs = head.positions.numpy() * columns // length
            values.append(np.bincount(runs, weights=head.mass.numpy(), minlength=columns))
            names.append(f"{layer.layer}.{place}")
    return np.array(values), names


def chart(told: Told) -> Chart:
    """Every step's mass: a line of tiles per head, runs of positions from left to right."""
    from matplotlib.colors import LogNorm

    steps: Sequence[StepChoice] = told.explanation.steps
    num_heads = max(sum(len(layer.heads) for layer in step.layers) for step in steps)
    height = min(0.16 * num_heads, 6.0) + 0.7
    figure = _figure(11.0, height * len(steps) + 0.2)
    grid = figure.subplots(len(steps), 1, squeeze=False)[:, 0]
    for index, (axes, step) in enumerate(zip(grid, steps)):
        values, names = heat(step)
        edges = (0, step.position + 1, len(names), 0)
        shown = axes.imshow(
            np.where(values > 0, values, np.nan),
            aspect="auto",
            interpolation="nearest",
            extent=(edges[0] - 0.5, edges[1] - 0.5, edges[2], edges[3]),
            cmap="cividis",
            norm=LogNorm(LEAST_MASS, 1.0),
        )
        read = told.words[step.position].strip().replace("$", r"\$")  # no mathematics
        _dress(axes, f"step {index + 1}: after “{read}”")
        axes.grid(visible=False)
        axes.set_facecolor(PAGE)
        every = max(1, len(names) // 16)
        axes.set_yticks([i + 0.5 for i in range(0, len(names), every)], names[::every])
        for begin, end in told.evidence:
            if begin <= step.position:
                axes.plot(
                    [(begin + end - 1) / 2], [-0.02 * len(names)], marker="v", markersize=6,
                    color=INK, clip_on=False,
                )  # fmt: skip
    grid[-1].set_xlabel("token", color=INK, fontsize=9)
    bar = figure.colorbar(shown, ax=list(grid), fraction=0.025, pad=0.01)
    bar.set_label("mass of a run of tokens", color=INK, fontsize=9)
    bar.ax.tick_params(labelcolor=INK, labelsize=8)
    caption = "A line per KV head (layer.head), positions from left to right; blank: in no list."
    if told.evidence:
        caption += " Triangles: the evidence."
    return Chart("heat", "Where every head looks", caption, figure)
