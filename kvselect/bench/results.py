"""Results of a bench: JSON with everything needed to run it again, and a table on screen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvselect.bench.measure import can_keep_heap, clock_name, quantiles
from kvselect.eval import machine

__all__ = ["Skipped", "Timing", "as_row", "load", "print_skipped", "print_table", "save", "timing"]

TABLE_COLUMNS = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one contender took, against the bytes that it cannot avoid.

    Attributes
    ----------
    median_ms, p20_ms, p80_ms, samples_ms
        Of the clock: "cpu" (one thread), "wall" (several) or "events" (a GPU's).
    bytes_must_read : int
        By the method's own plan; the floor is these bytes at the streaming-read bandwidth that the
        same run measured.
    gb_per_s : float
        ``bytes_must_read`` over the median.
    times_floor : float
        Median over floor; 1 cannot be beaten by this method.
    wall_ms : float or None
        On a GPU: median by the clock, from idle to idle, launch included.
    not_captured : str or None
        On a GPU: why no CUDA graph was timed; empty if one was.
    """

    threads: int
    clock: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples_ms: list[float]
    bytes_must_read: int
    streaming_gb_per_s: float
    gb_per_s: float
    floor_ms: float
    times_floor: float
    wall_ms: float | None = None
    not_captured: str | None = None


def timing(
    samples_ms: list[float],
    bytes_must_read: int,
    streaming_gb_per_s: float,
    threads: int,
    *,
    wall_ms: list[float] | None = None,
    not_captured: str | None = None,
) -> Timing:
    """A `Timing` of these samples; those of a GPU come with ``wall_ms``."""
    median, p20, p80 = quantiles(samples_ms)
    floor_ms = bytes_must_read / streaming_gb_per_s / 1e6
    return Timing(
        threads=threads,
        clock=clock_name(threads) if wall_ms is None else "events",
        median_ms=median,
        p20_ms=p20,
        p80_ms=p80,
        samples_ms=samples_ms,
        bytes_must_read=bytes_must_read,
        streaming_gb_per_s=streaming_gb_per_s,
        gb_per_s=bytes_must_read / median / 1e6,
        floor_ms=floor_ms,
        times_floor=median / floor_ms,
        wall_ms=None if wall_ms is None else quantiles(wall_ms).median,
        not_captured=not_captured,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A contender that did not take part at one length, and why."""

    tokens: int
    contender: str
    reason: str


def as_row(row: Any) -> dict[str, Any]:
    """A dataclass as one flat dict: the fields of its `Timing` stand beside its own."""
    found: dict[str, Any] = asdict(row) if is_dataclass(row) else dict(row)  # type: ignore[arg-type]
    inner = found.pop("timing", None)
    return found | (inner or {})


def save(
    path: Path,
    question: str,
    config: dict[str, Any],
    rows: Iterable[Any],
    skipped: Iterable[Skipped] = (),
) -> Path:
    """Write JSON: question, machine, versions, commit, config, rows; never half a file.

    Who was left out, and why, stands under "skipped", where anybody was. Where the file lies
    (``config["out"]``) is left out: it says nothing about the measurement.
    """
    content = {
        "question": question,
        **machine.describe(),
        "freed_memory_kept": can_keep_heap(),
        "config": {name: value for name, value in config.items() if name != "out"},
        "results": [as_row(row) for row in rows],
    }
    left_out = [asdict(one) for one in skipped]
    if left_out:
        content["skipped"] = left_out
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def print_skipped(skipped: Sequence[Skipped]) -> None:
    """Who did not take part, and why: one line each."""
    for one in skipped:
        print(f"left out at {one.tokens} tokens: {one.contender}: {one.reason}")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table on stdout; the first column is text, the others are numbers."""
    table = Table(
        title=escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=TABLE_COLUMNS).print(table)
