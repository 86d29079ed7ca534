"""Results as people read them: one table, a picture, and JSON with everything needed to make them
again."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kvselect.eval.intervals import paired_difference, wilson

_HEADINGS = {  # two lines each: with five tasks the table fits a terminal
    "niah_single": "single",
    "niah_multikey": "multi\nkey",
    "niah_pairkey": "pair\nkey",
    "niah_multivalue": "multi\nvalue",
}

CLAIM_SAMPLES = 500  # +-2.6 points at a score of .9; with fewer the table says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """A context length as asked for ("4x", "16k") and in tokens."""

    label: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One policy on one task at one length.

    Attributes
    ----------
    outcomes : tuple of bool
        Right or wrong, question by question; the same questions in the same order for every policy.
    kept_mass : float or None
        Share of the attention mass that the attended tokens hold, mean over layers, heads and
        decode steps.
    tokens_attended : float
        Tokens attended per decode step, mean over layers and KV heads.
    bytes_ratio : float
        Bytes of cache and sketch read per decode step over those dense attention reads.
    decode_ms : float
        Wall time of one decode step, median, all policies interleaved [ms].
    prefill_s : float
        Wall time of reading one context, median [s].
    cache_bytes : int
        Memory of keys, values and sketch after the last context, room to grow included.
    """

    task: str
    length: Length
    policy: str
    outcomes: tuple[bool, ...]
    kept_mass: float | None
    tokens_attended: float
    bytes_ratio: float
    decode_ms: float
    prefill_s: float
    cache_bytes: int

    @property
    def score(self) -> float:
        return sum(self.outcomes) / len(self.outcomes)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson, 95 %."""
        return wilson(sum(self.outcomes), len(self.outcomes))


@dataclass(slots=True, kw_only=True)
class Results:
    """Everything one run found.

    Attributes
    ----------
    model : str
    window_tokens : int
        The length the model was trained for.
    policies : dict, label -> settings of the policy
        In the order of the table; differences are taken to the one named by `baseline`.
    config : dict
        What was asked for, for the JSON.
    complete : bool
        False in a file that a run wrote before it ended.
    """

    model: str
    window_tokens: int
    tasks: tuple[str, ...]
    lengths: tuple[Length, ...]
    policies: dict[str, dict[str, Any]]
    baseline: str | None
    config: dict[str, Any]
    environment: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    complete: bool = False

    def cell(self, task: str, length: Length, policy: str) -> Cell | None:
        for cell in self.cells:
            if (cell.task, cell.length, cell.policy) == (task, length, policy):
                return cell
        return None

    def difference(self, cell: Cell) -> tuple[float, float, float] | None:
        """Score minus the baseline's on the same questions, with its paired bootstrap interval."""
        if self.baseline is None or cell.policy == self.baseline:
            return None
        dense = self.cell(cell.task, cell.length, self.baseline)
        return None if dense is None else paired_difference(cell.outcomes, dense.outcomes)

    def to_dict(self) -> dict[str, Any]:
        cells = []
        for cell in self.cells:
            low, high = cell.interval
            difference = self.difference(cell)
            cells.append(
                {
                    "task": cell.task,
                    "length": cell.length.label,
                    "length_tokens": cell.length.tokens,
                    "policy": cell.policy,
                    "num_samples": len(cell.outcomes),
                    "num_correct": sum(cell.outcomes),
                    "score": cell.score,
                    "interval_95": [low, high],
                    "difference_to_baseline": None if difference is None else difference[0],
                    "difference_interval_95": None if difference is None else difference[1:],
                    "kept_mass": cell.kept_mass,
                    "tokens_attended": cell.tokens_attended,
                    "bytes_read_over_dense": cell.bytes_ratio,
                    "decode_ms": cell.decode_ms,
                    "prefill_s": cell.prefill_s,
                    "cache_bytes": cell.cache_bytes,
                    "outcomes": [int(right) for right in cell.outcomes],
                }
            )
        return {
            "model": self.model,
            "window_tokens": self.window_tokens,
            "complete": self.complete,
            "baseline": self.baseline,
            "policies": self.policies,
            "config": self.config,
            **self.environment,
            "cells": cells,
        }

    def save(self, path: Path) -> None:
        """Write the JSON; a reader never sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        os.replace(partial, path)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(score: float, interval: tuple[float, float]) -> str:
    return f"{100 * score:.0f}\n[dim]{100 * interval[0]:.0f}–{100 * interval[1]:.0f}[/dim]"


def table(results: Results) -> Table:
    """One row per length and policy: the score of every task, then quality and cost of a decode
    step."""
    counts = {len(cell.outcomes) for cell in results.cells}
    samples = f"{min(counts)}–{max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
    caption = "Score: exact match in %, below it the 95 % interval (Wilson). "
    caption += f"{samples} questions per cell"
    if min(counts, default=0) < CLAIM_SAMPLES:
        caption += f": a demonstration; a claim needs {CLAIM_SAMPLES}"
    caption += (
        ".\nMass, tokens and bytes: per decode step, mean over layers, heads and tasks; "
        "bytes read from cache and sketch, against dense. ms: wall time of one decode step, median."
    )
    shown = Table(
        title=f"{results.model}, trained on {results.window_tokens} tokens",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown.add_column("context", no_wrap=True)
    # Wraps into the two lines that a row has anyway.
    shown.add_column("policy", min_width=12, max_width=16)
    for task in results.tasks:
        shown.add_column(_HEADINGS.get(task, task), justify="right", no_wrap=True)
    for heading in ("mass\nkept", "tokens\nread", "bytes\nread", "ms per\ntoken", "cache\nMB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for length in results.lengths:
        for policy in results.policies:
            cells = [results.cell(task, length, policy) for task in results.tasks]
            present = [cell for cell in cells if cell is not None]
            if not present:
                continue
            kept = _mean([cell.kept_mass for cell in present])
            decode_ms = statistics.median(cell.decode_ms for cell in present)
            tokens = _mean([cell.tokens_attended for cell in present])
            ratio = _mean([cell.bytes_ratio for cell in present])
            first = policy == next(iter(results.policies))
            shown.add_row(
                f"{length.tokens}\n[dim]{length.label}[/dim]" if first else "",
                policy,
                *("" if cell is None else _percent(cell.score, cell.interval) for cell in cells),
                "–" if kept is None else f"{kept:.2f}",
                f"{tokens:.0f}",
                f"{100 * (ratio or 0.0):.0f} %",
                f"{decode_ms:.1f}",
                f"{max(cell.cache_bytes for cell in present) / 1e6:.1f}",
            )
        shown.add_section()
    return shown
