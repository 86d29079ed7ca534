"""The pictures of a run, each once: as PNG for documents, and as SVG that takes its colours from
the page around it."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kvselect.eval.results import CLAIM_SAMPLES, Length, Macro, Results

# What the page may change: `page.py` gives each of these a value in the light and in the dark.
INK, MUTED, RULE, PAGE = "#1f2328", "#656d76", "#d8dee4", "#fefefe"
# Colours that colour-blind readers tell apart (Okabe & Ito), and a marker each for print.
SERIES = ("#4d4d4d", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAGE: "--page"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES)
}
_TITLES = {
    "niah_single": "single needle",
    "niah_multikey": "multi-key needles",
    "niah_pairkey": "two-word keys",
    "niah_multivalue": "multi-value",
    "chain": "key-value chains",
    "vt": "variable tracking",
    "json_kv": "JSON-KV",
    "icl": "labels by example",
}
DEPTH_BINS = 5
MOST_PANELS = 4  # lengths beside each other: the first, the last, and some between


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture.

    Attributes
    ----------
    name : str
        Of its file.
    title, caption : str
        What it shows, and how to read it.
    figure : matplotlib Figure
    """

    name: str
    title: str
    caption: str
    figure: Any


def charts(results: Results) -> list[Chart]:
    """Every picture that this run has numbers for."""
    made = [
        _scores(results),
        _depths(results),
        _pareto(results),
        _costs(results),
        _layers(results),
    ]
    return [chart for chart in made if chart is not None]


def save_pngs(made: Sequence[Chart], folder: Path) -> list[Path]:
    """One file each; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{chart.name}.png" for chart in made]
    for chart, path in zip(made, paths):
        chart.figure.savefig(path, facecolor=PAGE)
    return paths


def svg(chart: Chart) -> str:
    """The picture as an element for a page: its colours are CSS variables, its text is text."""
    import matplotlib as mpl

    out = io.StringIO()
    # A salt of its own: ids of two pictures on one page differ.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name}):
        chart.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    head = re.match(r"<svg[^>]*>", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert head is not None and box is not None
    label = escape(f"{chart.title}. {chart.caption}", quote=True)
    text = f'<svg {box[0]} role="img" aria-label="{label}">' + text[head.end() :]
    text = re.sub(r'\bid="', f'id="{chart.name}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{chart.name}-', text)
    text = text.replace("url(#", f"url(#{chart.name}-")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()


# ---- pieces


def _figure(width: float, height: float) -> Any:
    # Imported here: only people who want a picture wait for matplotlib. The Agg canvas needs no
    # display and, unlike pyplot, leaves no global state behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor=PAGE, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Any, title: str, *, large: bool = False) -> None:
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(color=MUTED, labelcolor=INK, labelsize=10 if large else 8.5)
    axes.set_title(title, loc="left", fontsize=12 if large else 10, color=INK)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": _MARKERS[(index + index // len(SERIES)) % len(_MARKERS)],
        "markeredgecolor": PAGE,
        "markeredgewidth": 0.8,
    }


def _legend(figure: Any, axes: Any, results: Results) -> None:
    handles, labels = axes.get_legend_handles_labels()
    entry_inches = 0.6 + 0.083 * max((len(label) for label in labels), default=0)
    fitting = max(1, int(figure.get_figwidth() / entry_inches))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels), fitting),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )


def _tick(length: Length) -> str:
    return f"{length.tokens // 1024}K" if length.tokens % 1024 == 0 else str(length.tokens)


def _length_axis(axes: Any, results: Results) -> None:
    axes.set_xscale("log", base=2)
    ticks = [length.tokens for length in results.lengths]
    axes.set_xticks(ticks, [_tick(length) for length in results.lengths])
    axes.minorticks_off()
    if len(ticks) > 1:
        axes.set_xlim(min(ticks) * 0.9, max(ticks) * 1.12)
    if ticks[0] <= results.window_tokens < ticks[-1]:
        axes.axvline(results.window_tokens, color=MUTED, lw=1, ls=(0, (3, 3)), zorder=1)


def _panels(lengths: Sequence[Length]) -> list[Length]:
    """At most `MOST_PANELS` of them, first and last included."""
    if len(lengths) <= MOST_PANELS:
        return list(lengths)
    places = np.linspace(0, len(lengths) - 1, MOST_PANELS).round().astype(int)
    return [lengths[place] for place in places]


def _samples(results: Results) -> str:
    counts = sorted({len(cell.outcomes) for cell in results.cells})
    if not counts:
        return "no questions"
    told = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    note = (
        "" if counts[0] >= CLAIM_SAMPLES else f", a demonstration (a claim needs {CLAIM_SAMPLES})"
    )
    return f"{told} questions per task and length{note}"


def title_of(task: str) -> str:
    """A task's name as people say it."""
    words = task.replace("_", " ")
    for short, long in (("nt ", "Needle Threading "), ("ruler ", "RULER ")):
        if words.startswith(short):
            words = long + words.removeprefix(short)
    return _TITLES.get(task, words)


# ---- score against length


def _curve(
    results: Results, policy: str, tasks: tuple[str, ...]
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Lengths, scores and their intervals [%]: macro mean over tasks, interval of all their
    questions together."""
    from kvselect.eval.intervals import wilson

    at, scores, lows, highs = [], [], [], []
    for length in results.lengths:
        cells = [results.cell(task, length, policy) for task in tasks]
        present = [cell for cell in cells if cell is not None]
        if not present:
            continue
        score = sum(cell.score for cell in present) / len(present)
        count = sum(len(cell.outcomes) for cell in present)
        low, high = wilson(score * count, count)
        at.append(length.tokens)
        scores.append(100 * score)
        lows.append(100 * low)
        highs.append(100 * high)
    return at, scores, lows, highs


def _score_panel(
    axes: Any, results: Results, tasks: tuple[str, ...], title: str, *, large: bool
) -> None:
    for index, policy in enumerate(results.policies):
        at, scores, lows, highs = _curve(results, policy, tasks)
        style = _style(index)
        axes.fill_between(at, lows, highs, color=style["color"], alpha=0.14, linewidth=0)
        axes.plot(
            at,
            scores,
            label=policy,
            linewidth=(2.4 if large else 1.6) + (1.6 if index == 0 else 0.0),  # shows under others
            markersize=7 if large else 4.5,
            zorder=3 + index,
            clip_on=not at,  # whole markers at the border; without points that upsets the layout
            **style,
        )
    _length_axis(axes, results)
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 25, 50, 75, 100])
    _dress(axes, title, large=large)


def _scores(results: Results) -> Chart:
    num_tasks = len(results.tasks)
    columns = 0 if num_tasks == 1 else min(3, (num_tasks + 1) // 2)
    rows = max(2, -(-num_tasks // columns)) if columns else 2
    figure = _figure(5.6 + 2.1 * columns, 1.9 * rows + 0.6)
    grid = figure.add_gridspec(rows, 2 + columns, width_ratios=[1.5, 1.5, *[1.25] * columns])
    main = figure.add_subplot(grid[:, :2])
    title = title_of(results.tasks[0]) if num_tasks == 1 else f"mean of {num_tasks} tasks"
    _score_panel(main, results, results.tasks, title, large=True)
    main.set_ylabel("score [%]", color=INK)
    main.set_xlabel("context [tokens]", color=INK)
    if results.lengths[0].tokens <= results.window_tokens < results.lengths[-1].tokens:
        main.annotate(
            "trained\nwindow",
            (results.window_tokens, 8),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
            va="center",
        )
    for index, task in enumerate(results.tasks if columns else ()):
        axes = figure.add_subplot(grid[index // columns, 2 + index % columns])
        _score_panel(axes, results, (task,), title_of(task), large=False)
    _legend(figure, main, results)
    return Chart(
        "score",
        "Score by context length",
        f"{_samples(results)}; bands are 95 % intervals (Wilson).",
        figure,
    )


# ---- depth and length


def depth_scores(results: Results, policy: str) -> tuple[Any, Any]:
    """Mean score [depth bins, lengths], NaN where nothing was asked, and the questions behind
    it."""
    totals = np.zeros((DEPTH_BINS, len(results.lengths)))
    counts = np.zeros_like(totals)
    for column, length in enumerate(results.lengths):
        for cell in results.cells_of(length, policy):
            for score, depth in zip(cell.outcomes, cell.depths):
                if depth is not None:
                    row = min(DEPTH_BINS - 1, int(depth * DEPTH_BINS))
                    totals[row, column] += score
                    counts[row, column] += 1
    with np.errstate(invalid="ignore"):
        return totals / np.where(counts > 0, counts, np.nan), counts


def _heat(
    axes: Any, values: Any, texts: Callable[[float], str], *, low: float, high: float
) -> None:
    """Coloured tiles with their numbers; the first row on top."""
    from matplotlib import colormaps

    colours = colormaps["cividis"]
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            value = float(values[row, column])
            if np.isnan(value):
                continue
            place = min(1.0, max(0.0, (value - low) / (high - low)))
            axes.fill(
                [column - 0.5, column + 0.5, column + 0.5, column - 0.5],
                [row - 0.5, row - 0.5, row + 0.5, row + 0.5],
                facecolor=colours(place),
                edgecolor=PAGE,
                linewidth=1.0,
            )
            axes.text(
                column,
                row,
                texts(value),
                ha="center",
                va="center_baseline",
                fontsize=8,
                color="#ffffff" if place < 0.55 else "#101010",
            )
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)


def _heat_grid(num_panels: int, panel: tuple[float, float]) -> tuple[Any, list[Any]]:
    columns = max(1, min(4, num_panels, int(11.0 // panel[0])))
    rows = -(-num_panels // columns)
    columns = -(-num_panels // rows)  # rows of equal length
    figure = _figure(max(6.0, panel[0] * columns + 0.5), max(2.2, panel[1] * rows + 0.3))
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.ravel())
    for spare in axes[num_panels:]:
        spare.set_axis_off()
    return figure, axes[:num_panels]


def _depths(results: Results) -> Chart | None:
    maps = {policy: depth_scores(results, policy) for policy in results.policies}
    if not any(counts.any() for _, counts in maps.values()):
        return None
    width = max(2.1, 0.55 * len(results.lengths) + 0.9)
    figure, panels = _heat_grid(len(maps), (width, 2.4))
    edges = np.linspace(0, 100, DEPTH_BINS + 1)
    bins = [f"{low:.0f}–{high:.0f}" for low, high in pairwise(edges)]
    for axes, (policy, (values, _)) in zip(panels, maps.items()):
        _heat(axes, 100 * values, lambda value: f"{value:.0f}", low=0.0, high=100.0)
        _dress(axes, textwrap.fill(policy, 18))  # panels are narrow
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(range(len(results.lengths)), [_tick(length) for length in results.lengths])
        axes.set_yticks(range(DEPTH_BINS), bins)
        axes.set_xlabel("context [tokens]", color=INK, fontsize=8.5)
    panels[0].set_ylabel("evidence begins at [%]", color=INK, fontsize=9)
    return Chart(
        "depth",
        "Score by depth and length",
        "Mean score in %, all tasks together, by where in the context the first piece of evidence "
        "stands; 0 is the start, 100 the end.",
        figure,
    )


# ---- time against quality


def _families(results: Results) -> dict[str, list[str]]:
    """Labels that differ in numbers only: one method at several budgets."""
    found: dict[str, list[str]] = {}
    for policy in results.policies:
        found.setdefault(re.sub(r"\d[\d.]*", "", policy).strip(), []).append(policy)
    return found


def _pareto(results: Results) -> Chart:
    lengths = _panels(results.lengths)
    figure = _figure(2.9 * max(2, len(lengths)) + 0.6, 5.4)
    grid = figure.subplots(2, len(lengths), squeeze=False)
    means = {
        (length, policy): results.macro(length, policy)
        for length in lengths
        for policy in results.policies
    }
    rows: list[tuple[str, Callable[[Macro], float | None]]] = [
        ("score [%]", lambda mean: 100 * mean.score),
        ("kept mass [%]", lambda mean: None if mean.kept_mass is None else 100 * mean.kept_mass),
    ]
    order = list(results.policies)
    for row, (what, value) in enumerate(rows):
        for column, length in enumerate(lengths):
            axes = grid[row][column]
            for family in _families(results).values():
                points = [
                    (mean.decode_ms, value(mean), order.index(policy))
                    for policy in family
                    if (mean := means[length, policy]) is not None
                ]
                known = [(x, y, i) for x, y, i in points if y is not None]
                axes.plot(
                    [x for x, _, _ in known],
                    [y for _, y, _ in known],
                    color=SERIES[order.index(family[0]) % len(SERIES)],
                    linewidth=1.0,
                    zorder=2,
                )
                for x, y, index in known:
                    axes.plot(
                        x,
                        y,
                        linestyle="none",
                        markersize=8,
                        label=order[index],
                        zorder=3,
                        clip_on=False,
                        **_style(index),
                    )
            times = [mean.decode_ms for (at, _), mean in means.items() if mean and at == length]
            axes.set_xlim(0, 1.15 * max(times, default=1.0))
            axes.set_ylim(-3, 103)
            axes.set_yticks([0, 25, 50, 75, 100])
            _dress(axes, f"{_tick(length)} tokens" if row == 0 else "")
            if row == 1:
                axes.set_xlabel("decode step [ms]", color=INK, fontsize=9)
            if column == 0:
                axes.set_ylabel(what, color=INK, fontsize=9)
    _legend(figure, grid[0][0], results)
    return Chart(
        "pareto",
        "Time against quality",
        "Upper left is better. Wall time of one decode step of the whole model, median, all "
        "policies timed in turn; score above, kept attention mass below, mean over tasks.",
        figure,
    )


# ---- costs


def _costs(results: Results) -> Chart:
    panels: list[tuple[str, str, Callable[[Macro], float | None]]] = [
        ("bytes read", "% of dense", lambda mean: 100 * mean.bytes_ratio),
        ("decode step", "ms", lambda mean: mean.decode_ms),
        ("reading the context", "s", lambda mean: mean.prefill_s),
        ("keys, values, sketch", "MB", lambda mean: mean.cache_bytes / 1e6),
    ]
    means = [
        (policy, results.macro(length, policy), length)
        for policy in results.policies
        for length in results.lengths
    ]
    if any(mean is not None and mean.hit_rate is not None for _, mean, _ in means):
        panels.append(
            (
                "lists reused",
                "%",
                lambda mean: None if mean.hit_rate is None else 100 * mean.hit_rate,
            )
        )
    figure = _figure(2.55 * len(panels), 3.1)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, unit, value) in zip(row, panels):
        for index, policy in enumerate(results.policies):
            points = [
                (length.tokens, value(mean))
                for name, mean, length in means
                if name == policy and mean is not None
            ]
            known = [(x, y) for x, y in points if y is not None]
            axes.plot(
                [x for x, _ in known],
                [y for _, y in known],
                label=policy,
                linewidth=1.8,
                markersize=5,
                zorder=3 + index,
                **_style(index),
            )
        _length_axis(axes, results)
        axes.set_ylim(bottom=0)
        _dress(axes, f"{title} [{unit}]")
    _legend(figure, row[0], results)
    return Chart(
        "cost",
        "What a step costs",
        "By context length; bytes are counted per step from the sizes of what is read, the others "
        "are measured. Means over tasks, medians of times, the most memory.",
        figure,
    )


# ---- layers and heads


def layer_masses(results: Results, policy: str) -> tuple[Length | None, Any]:
    """Kept mass [layers, KV heads] at the longest length that has any; mean over tasks."""
    for length in reversed(results.lengths):
        found = [c.mass_by_head for c in results.cells_of(length, policy) if c.mass_by_head]
        # Layers of different width are told by their mean alone.
        if found:
            narrow = min(len(heads) for heads in found[0])
            if any(len(heads) != narrow for heads in found[0]):
                found = [tuple((sum(heads) / len(heads),) for heads in one) for one in found]
            return length, np.mean(np.asarray(found, float), axis=0)
    return None, np.zeros((0, 0))


def _layers(results: Results) -> Chart | None:
    maps = {policy: layer_masses(results, policy) for policy in results.policies}
    maps = {policy: found for policy, found in maps.items() if found[0] is not None}
    if not maps:
        return None
    num_layers, num_heads = next(iter(maps.values()))[1].shape
    width, height = max(2.1, 0.42 * num_heads + 1.0), max(1.5, 0.22 * num_layers + 0.9)
    figure, panels = _heat_grid(len(maps), (width, height))
    longest = next(iter(maps.values()))[0]
    assert longest is not None
    for axes, (policy, (_, values)) in zip(panels, maps.items()):
        _heat(axes, 100 * values, lambda value: f"{value:.0f}", low=0.0, high=100.0)
        _dress(axes, textwrap.fill(policy, 18))  # panels are narrow
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        layers = list(results.layers) or list(range(values.shape[0]))
        every = max(1, values.shape[0] // 16)
        axes.set_yticks(range(0, values.shape[0], every), layers[: values.shape[0]][::every])
        axes.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 8)))
        axes.set_xlabel("KV head", color=INK, fontsize=8.5)
    panels[0].set_ylabel("layer", color=INK, fontsize=9)
    return Chart(
        "layers",
        "Kept mass by layer and head",
        f"Share of the attention mass, in %, that the attended tokens hold at {_tick(longest)} "
        "tokens, by the exact keys; mean over decode steps and tasks.",
        figure,
    )


# ---- perplexity


def perplexity_chart(found: dict[str, Any]) -> Chart:
    """Bits per byte against context length, of what `perplexity.to_dict` gives."""
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for index, policy in enumerate(found["request"]["policies"]):
        cells = [cell for cell in found["cells"] if cell["policy"] == policy]
        axes.plot(
            [cell["length_tokens"] for cell in cells],
            [cell["bits_per_byte"] for cell in cells],
            label=policy,
            linewidth=2.0,
            markersize=6,
            zorder=3 + index,
            **_style(index),
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({cell["length_tokens"] for cell in found["cells"]})
    axes.set_xticks(ticks, [_tick(Length(label="", tokens=tokens)) for tokens in ticks])
    axes.minorticks_off()
    if ticks[0] <= found["window_tokens"] < ticks[-1]:
        axes.axvline(found["window_tokens"], color=MUTED, lw=1, ls=(0, (3, 3)), zorder=1)
    axes.set_xlabel("context [tokens]", color=INK)
    axes.set_ylabel("bits per byte", color=INK)
    _dress(axes, f"{found['model']}: the same text, with more before it", large=True)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )
    return Chart("perplexity", "Perplexity by context length", "Lower is better.", figure)
