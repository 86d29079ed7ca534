"""The picture of a run: score against context length, one line per policy, one panel per task and
one for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvselect.eval.intervals import wilson
from kvselect.eval.results import CLAIM_SAMPLES, Length, Results

# Colours that colour-blind readers tell apart (Okabe & Ito), and a marker each for print.
_STYLES = (
    ("#4d4d4d", "o"),
    ("#e69f00", "s"),
    ("#56b4e9", "^"),
    ("#009e73", "D"),
    ("#cc79a7", "v"),
    ("#d55e00", "P"),
    ("#0072b2", "X"),
)
_TITLES = {
    "niah_single": "single needle",
    "niah_multikey": "multi-key needles",
    "niah_pairkey": "two-word keys",
    "niah_multivalue": "multi-value",
    "chain": "key-value chains",
    "vt": "variable tracking",
}


def _curve(
    results: Results, policy: str, tasks: tuple[str, ...]
) -> tuple[list[Length], list[float], list[float], list[float]]:
    """Lengths, scores and their intervals [%]: macro mean over tasks, interval of all their
    questions together."""
    lengths, scores, lows, highs = [], [], [], []
    for length in results.lengths:
        cells = [results.cell(task, length, policy) for task in tasks]
        present = [cell for cell in cells if cell is not None]
        if not present:
            continue
        score = sum(cell.score for cell in present) / len(present)
        count = sum(len(cell.outcomes) for cell in present)
        low, high = wilson(round(score * count), count)
        lengths.append(length)
        scores.append(100 * score)
        lows.append(100 * min(low, score))
        highs.append(100 * max(high, score))
    return lengths, scores, lows, highs


def _panel(axes: Any, results: Results, tasks: tuple[str, ...], title: str, *, large: bool) -> None:
    for index, policy in enumerate(results.policies):
        colour, marker = _STYLES[index % len(_STYLES)]
        lengths, scores, lows, highs = _curve(results, policy, tasks)
        at = [length.tokens for length in lengths]
        axes.fill_between(at, lows, highs, color=colour, alpha=0.14, linewidth=0)
        axes.plot(
            at,
            scores,
            color=colour,
            marker=marker,
            label=policy,
            linewidth=(2.4 if large else 1.6) + (1.6 if index == 0 else 0.0),  # shows under others
            markersize=7 if large else 4.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=3 + index,
            clip_on=False,
        )
    axes.set_xscale("log", base=2)
    ticks = [length.tokens for length in results.lengths]
    axes.set_xticks(ticks, [_tick(length, large) for length in results.lengths])
    axes.minorticks_off()
    if len(ticks) > 1:
        axes.set_xlim(min(ticks) * 0.9, max(ticks) * 1.12)
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")
    axes.tick_params(color="#b0b0b0", labelcolor="#404040", labelsize=10 if large else 8)
    axes.set_title(title, loc="left", fontsize=12 if large else 9.5, color="#202020")
    if ticks[0] <= results.window_tokens < ticks[-1]:
        dashes = (0, (3, 3))
        axes.axvline(results.window_tokens, color="#b0b0b0", lw=1, ls=dashes, zorder=1)


def _tick(length: Length, large: bool) -> str:
    number = f"{length.tokens // 1024}K" if length.tokens % 1024 == 0 else str(length.tokens)
    if not large or length.label.lower() == number.lower():
        return number
    return f"{number}\n({length.label})"


def draw(results: Results, path: Path) -> None:
    """Write the picture as PNG."""
    # Imported here: only people who want a picture wait for matplotlib. The Agg canvas needs no
    # display and, unlike pyplot, leaves no global state behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_tasks = len(results.tasks)
    columns = 0 if num_tasks == 1 else (num_tasks + 1) // 2
    size = (5.6 + 2.1 * columns, 4.4)
    figure = Figure(figsize=size, dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2 + columns, width_ratios=[1.5, 1.5, *[1.25] * columns])
    main = figure.add_subplot(grid[:, :2])
    only = results.tasks[0]
    title = _TITLES.get(only, only) if num_tasks == 1 else f"mean of {num_tasks} tasks"
    _panel(main, results, results.tasks, title, large=True)
    main.set_ylabel("exact match [%]", color="#404040")
    main.set_xlabel("context [tokens]", color="#404040")
    if main.get_xlim()[0] <= results.window_tokens < results.lengths[-1].tokens:
        main.annotate(
            "trained\nwindow",
            (results.window_tokens, 8),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=8,
            color="#808080",
            va="center",
        )
    for index, task in enumerate(results.tasks if columns else ()):
        axes = figure.add_subplot(grid[index // columns, 2 + index % columns])
        _panel(axes, results, (task,), _TITLES.get(task, task), large=False)
    handles, labels = main.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10
    )
    counts = sorted({len(cell.outcomes) for cell in results.cells})
    samples = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else f"{counts[0] if counts else 0}"
    note = "" if counts and counts[0] >= CLAIM_SAMPLES else " (a demonstration)"
    figure.suptitle(
        f"{results.model}: what is still found, by context length · "
        f"{samples} questions per point{note}, bands 95 %",
        x=0.01,
        ha="left",
        fontsize=11,
        color="#202020",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
