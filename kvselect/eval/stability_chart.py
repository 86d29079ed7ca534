"""The picture of `bench/stability.py`: what old lists are worth, and what sweeps keep for what."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kvselect.eval.charts import INK, MUTED, SERIES, _dress, _figure

_AGES = ([1, 1], [2, 8], [9, 32], [33, 64])
_AGE_SHADES = ("#08306b", "#2171b5", "#6baed6", "#9ecae1")
_FAMILIES = {
    "full scan": (SERIES[0], "o"),
    "cosine cache": (SERIES[5], "s"),
    "rolling 4": (SERIES[6], "^"),
    "rolling 8": (SERIES[3], "D"),
    "rolling 16": (SERIES[1], "v"),
}
_COSTS = {"bytes_over_full": "bytes", "time_over_full": "CPU time"}
MOST_STREAMS = 4


def stability_chart(rows: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure with a column per stream of steps.

    On top the share of fresh mass that an old list holds, by the cosine of its query, a line per
    range of ages; below, of every layer, the kept mass of ways to save the scan against the bytes
    and the time of a step.
    """
    streams = list(dict.fromkeys(row["stream"] for row in rows))[:MOST_STREAMS]
    figure = _figure(1.2 + 4.4 * len(streams), 11.0)
    grid = figure.subplots(3, len(streams), squeeze=False, sharey="row")
    for axes, stream in zip(grid[0], streams):
        _pairs(axes, [row for row in rows if row["stream"] == stream and row["part"] == "pairs"])
        _dress(axes, stream, large=True)
    for line, (what, told) in zip(grid[1:], _COSTS.items()):
        for axes, stream in zip(line, streams):
            mine = [row for row in rows if row["stream"] == stream and row["part"] == "sweep"]
            _sweeps(axes, mine, what)
            _dress(axes, "")
            axes.set_xlabel(f"{told} of a step / full scan's", color=INK, fontsize=9.5)
        line[0].set_ylabel("kept mass / full scan's", color=INK, fontsize=9.5)
    grid[0][0].set_ylabel("share of the fresh candidates' mass", color=INK, fontsize=9.5)
    for line in grid[:2]:  # of its own each: the lines mean different things
        handles: dict[str, Any] = {}
        for axes in line:
            for handle, label in zip(*axes.get_legend_handles_labels()):
                handles.setdefault(label, handle)
        line[0].legend(
            handles.values(), handles.keys(), loc="lower right", frameon=False, fontsize=8.5,
            labelcolor=INK,
        )  # fmt: skip
    figure.suptitle(
        "Above: what a list of an earlier step still holds, from exact scores. "
        "Below: ways to save the scan; numbers are layers that keep less than 0.97",
        x=0.01, ha="left", fontsize=11, color=INK,
    )  # fmt: skip
    return figure


def _pairs(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    axes.axvline(0.9, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    for ages, colour in zip(_AGES, _AGE_SHADES):
        mine = [row for row in rows if row["ages"] == ages and row["count"] >= 5]
        told = f"age {ages[0]}" if ages[0] == ages[1] else f"ages {ages[0]} to {ages[1]}"
        at = [row["cosine_mean"] for row in mine]
        share = [row["share"] for row in mine]
        axes.plot(
            at, share, color=colour, label=told, marker="o", markersize=5, linewidth=1.7,
            markeredgecolor="white", markeredgewidth=0.6,
        )  # fmt: skip
    mine = [row for row in rows if row["ages"] == [1, 64]]
    axes.plot(
        [row["cosine_mean"] for row in mine], [row["share_p10"] for row in mine], color=MUTED,
        linewidth=1.3, linestyle=(0, (1, 1.5)), label="all ages, 10 % quantile",
    )  # fmt: skip
    axes.set_xlim(0.0, 1.02)
    axes.set_ylim(0.0, 1.08)
    axes.set_xlabel("cosine of the queries before RoPE (dashes: 0.9)", color=INK, fontsize=9.5)


def _sweeps(axes: Any, rows: Sequence[dict[str, Any]], what: str) -> None:
    for family, (colour, marker) in _FAMILIES.items():
        mine = [row for row in rows if re.match(rf"{family}\b", row["contender"])]
        for place, row in enumerate(mine):
            at = row[what], row["mass_over_full"]
            axes.plot(
                *at, linestyle="none", color=colour, marker=marker, markersize=6.5,
                markeredgecolor="white", markeredgewidth=0.6, alpha=0.9,
                label="_" if place else family,
            )  # fmt: skip
            if at[1] < 0.97:
                axes.annotate(
                    str(row["layer"]), at, xytext=(6, 0), textcoords="offset points",
                    fontsize=7.5, color=MUTED, va="center",
                )  # fmt: skip
