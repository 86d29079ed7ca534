"""The picture of a decode bench: time of a step against the attention mass that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvselect.bench.contenders import (
    ENABLE_GQA,
    FOLDED,
    MATMUL,
    TORCH_DENSE,
    TORCH_TOKEN_SELECT,
)
from kvselect.bench.decode import PERFECT_DENSE, DecodeRequest, DecodeRow
from kvselect.bench.entrants import (
    OUR_DENSE,
    QUEST,
    SELECT_EXACT,
    SELECT_INT4,
    SELECT_INT8,
    STREAMING,
)

__all__ = ["curves", "draw", "subtitle"]

# Colours that colour-blind readers tell apart (Okabe & Ito), and a marker each for print.
_STYLES = {
    SELECT_INT4: ("#0072b2", "o"),
    SELECT_INT8: ("#56b4e9", "s"),
    SELECT_EXACT: ("#009e73", "D"),
    QUEST["kvselect"]: ("#d55e00", "^"),
    QUEST["torch"]: ("#d55e00", "^"),
    STREAMING: ("#cc79a7", "v"),
    TORCH_TOKEN_SELECT: ("#e69f00", "P"),
}
_MORE_STYLES = (("#8c6bb1", "X"), ("#a6761d", "<"), ("#666666", ">"))
_GREY = "#4d4d4d"
_DENSE = {
    ENABLE_GQA: "torch SDPA, gqa",
    FOLDED: "torch SDPA, folded",
    MATMUL: "torch matmul",
    OUR_DENSE: "kvselect dense",
    PERFECT_DENSE: "bytes / bandwidth",
}


def curves(rows: Sequence[DecodeRow]) -> dict[str, list[tuple[float, float, int]]]:
    """Per method with budgets: (kept mass, median ms, budget), ascending by budget.

    A method with one point is a curve of one point. Methods without a budget are not among them.
    """
    drawn = _drawn(rows)
    found: dict[str, dict[int, tuple[float, float, int]]] = {}
    for row in rows:
        if row.budget_tokens is None or row.note or row.method not in drawn:
            continue
        point = (row.kept_mass, row.timing.median_ms, row.budget_tokens)
        found.setdefault(row.method, {})[row.budget_tokens] = point
    return {method: [points[b] for b in sorted(points)] for method, points in found.items()}


def _drawn(rows: Sequence[DecodeRow]) -> set[str]:
    """Methods of kvselect, and Quest by its better scorer."""
    methods = {row.method for row in rows} - set(TORCH_DENSE) - {OUR_DENSE, PERFECT_DENSE}
    if QUEST["kvselect"] in methods:
        methods -= {QUEST["torch"]}
    return methods


def draw(rows: Sequence[DecodeRow], path: Path, about: str) -> None:
    """Write the picture as PNG: one panel per length, of the first number of threads.

    Parameters
    ----------
    about : str
        Shape and threads, for the reader; see `subtitle`.
    """
    # Imported here: only people who want a picture wait for matplotlib. The Agg canvas needs no
    # display and, unlike pyplot, leaves no global state behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    number = rows[0].timing.threads
    rows = [row for row in rows if row.timing.threads == number]
    lengths = sorted({row.tokens for row in rows})
    columns = len(lengths)
    figure = Figure(
        figsize=(1.2 + 4.6 * columns, 5.2), dpi=150, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    styles = _styles(rows)
    for axes, tokens in zip(panels, lengths):
        _panel(axes, [row for row in rows if row.tokens == tokens], tokens, styles)
    clock = {"cpu": "CPU time", "wall": "wall time"}[rows[0].timing.clock]
    panels[0].set_ylabel(f"one decode step [ms, {clock}]", color="#404040")
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 4 if columns > 1 else 2),
        frameon=False,
        fontsize=9,
    )
    budgets = sorted({budget for points in curves(rows).values() for *_, budget in points})
    between = "; " if columns > 1 else "\n"
    points = f"points: budgets of {_short(budgets[0])} to {_short(budgets[-1])} tokens"
    title = "Time of a decode step against the attention mass that it keeps"
    figure.suptitle(
        f"{title}\n{about}{between}{points}",
        x=0.01,
        ha="left",
        fontsize=11,
        color="#202020",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def subtitle(request: DecodeRequest) -> str:
    """Shape and threads."""
    number = request.threads[0]
    return f"{request.shape}, batch 1, {number} thread{'s' if number > 1 else ''}"


def _styles(rows: Sequence[DecodeRow]) -> dict[str, tuple[str, str]]:
    others = [method for method in curves(rows) if method not in _STYLES]
    return _STYLES | {m: _MORE_STYLES[i % len(_MORE_STYLES)] for i, m in enumerate(others)}


def _panel(
    axes: Any, rows: Sequence[DecodeRow], tokens: int, styles: dict[str, tuple[str, str]]
) -> None:
    from matplotlib.ticker import LogLocator

    for method, points in curves(rows).items():
        colour, marker = styles[method]
        mass, ms, _ = zip(*points)
        axes.plot(
            mass,
            ms,
            color=colour,
            marker=marker,
            label=method,
            linewidth=1.8,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=3,
        )
    dense = sorted(
        (row for row in rows if row.contender in _DENSE), key=lambda row: row.timing.median_ms
    )
    every = [row.timing.median_ms for row in rows]
    low, high = min(every) / 1.5, max(every) * 1.5
    heights = _apart([row.timing.median_ms for row in dense], (high / low) ** 0.05)
    for row, height in zip(dense, heights):
        colour = "#0072b2" if row.contender == OUR_DENSE else _GREY
        axes.plot(
            [1.0],
            [row.timing.median_ms],
            color=colour,
            marker="_" if row.contender == PERFECT_DENSE else "h",
            markersize=8,
            linestyle="none",
            clip_on=False,
            zorder=4,
        )
        axes.text(
            1.04,
            height,
            _DENSE[row.contender],
            va="center",
            fontsize=8,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_xlim(0, 1.36)  # dense attention stands at 1, its names beyond
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_title(f"{_short(tokens)} tokens", loc="left", fontsize=11, color="#202020")
    axes.set_xlabel("attention mass kept", color="#404040")
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")
    axes.tick_params(color="#b0b0b0", labelcolor="#404040", labelsize=9, which="both")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def _apart(values: Sequence[float], factor: float) -> list[float]:
    """Ascending values, moved up as little as keeps neighbours ``factor`` apart."""
    moved: list[float] = []
    for value in values:
        moved.append(max(value, moved[-1] * factor) if moved else value)
    return moved


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
