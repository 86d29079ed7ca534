"""The picture of `bench/fidelity.py`: attention mass against bytes, a line per sketch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kvselect.eval.charts import INK, MUTED, _dress, _figure

# Colours that colour-blind readers tell apart (Okabe & Ito), and a marker each for print.
_STYLES = {
    "none": ("#4d4d4d", "o", "exact keys"),
    "int8": ("#56b4e9", "s", "int8"),
    "int4": ("#0072b2", "D", "int4 (default)"),
    "int4 planes": ("#009e73", "^", "int4 planes: 2 bits filter, 4 rank"),
    "high plane": ("#cc79a7", "v", "high 2-bit plane alone"),
    "channels": ("#e69f00", "P", "Double Sparsity, 1/8 of channels"),
    "bounds 16": ("#d55e00", "X", "Quest, bounds of 16 tokens"),
    "mean 16": ("#8c6bb1", "<", "mean keys of 16 tokens"),
    "mean 64": ("#a6761d", ">", "mean keys of 64 tokens"),
}
MOST_COLUMNS = 4
_ROWS = (("mass_ratio", "mean of all heads"), ("mass_ratio_min", "the worst head"))


def points(
    rows: Sequence[dict[str, Any]], what: str
) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """Per kind of keys and sketch: (overselect, bytes share, ``what``) of scope "kv_head".

    ``what``: "mass_ratio", its mean over layers, tasks or seeds; or "mass_ratio_min", the lowest.
    """
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    over = statistics.fmean if what == "mass_ratio" else min
    mine = [row for row in rows if row["scope"] == "kv_head"]
    for row in mine:
        found.setdefault(kind_of(row["keys"]), {}).setdefault(row["sketch"], [])
    for kind, lines in found.items():
        for sketch, line in lines.items():
            same = [r for r in mine if kind_of(r["keys"]) == kind and r["sketch"] == sketch]
            for factor in sorted({row["overselect"] for row in same}):
                at = [row for row in same if row["overselect"] == factor]
                share = statistics.fmean(row["bytes_share"] for row in at)
                line.append((factor, share, over(row[what] for row in at)))
    return found


def kind_of(keys: str) -> str:
    """Tasks of one model share a panel: "embedded vt, rotated" is "embedded, rotated"."""
    if ", " not in keys:
        return f"{keys} keys (drawn)"
    name, told = keys.rsplit(", ", 1)
    return f"{name.split(' ')[0]} model, {told} keys"


def fidelity_chart(rows: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure: a column per kind of keys, the mean of heads above the worst head."""
    kinds = list(points(rows, "mass_ratio"))[:MOST_COLUMNS]
    figure = _figure(1.0 + 3.9 * len(kinds), 8.4)
    grid = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey=True)
    factors = sorted({row["overselect"] for row in rows})
    for line, (what, told) in zip(grid, _ROWS):
        found = points(rows, what)
        for axes, kind in zip(line, kinds):
            _panel(axes, kind if what == "mass_ratio" else "", found[kind])
        line[0].set_ylabel(f"mass kept / exact top-k's: {told}", color=INK, fontsize=9.5)
    for axes in grid[-1]:
        axes.set_xlabel("bytes read, % of dense attention", color=INK, fontsize=9.5)
    handles: dict[str, Any] = {}
    for axes in grid.ravel():
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center",
        ncols=min(5, 1 + len(kinds)), frameon=False, fontsize=9.5, labelcolor=INK,
    )  # fmt: skip
    figure.suptitle(
        "Attention mass kept against bytes read, to rank and to attend; points from left to right: "
        f"{', '.join(f'{factor:g}' for factor in factors)} times topk attended, "
        "equal for all; one list per KV head",
        x=0.01, ha="left", fontsize=11, color=INK, wrap=True,
    )  # fmt: skip
    return figure


def _panel(axes: Any, kind: str, lines: dict[str, list[tuple[float, float, float]]]) -> None:
    axes.axhline(1.0, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    for sketch, line in lines.items():
        colour, marker, label = _STYLES[sketch]
        _, share, ratio = zip(*line)
        axes.plot(
            [100 * x for x in share], ratio, label=label, color=colour, marker=marker,
            linewidth=2.4 if sketch == "int4" else 1.5, markersize=6, markeredgecolor="white",
            markeredgewidth=0.7, zorder=5 if sketch == "int4" else 3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([5, 10, 20, 40, 70], ["5", "10", "20", "40", "70"])
    axes.minorticks_off()
    axes.set_xlim(5, 75)
    axes.set_ylim(bottom=0)
    _dress(axes, kind, large=True)
