"""How every bench here measures: contenders interleaved in one process, medians, JSON.

CPU time of the process on a fixed number of threads: the machines are shared, so ratios count, not
seconds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvselect.eval import machine

RESULTS = Path(__file__).parent / "results"


def interleaved_ms(
    contenders: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """CPU milliseconds of every call: rounds over all contenders, after one to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, call in contenders.items():
            before = time.process_time()
            call()
            elapsed = 1e3 * (time.process_time() - before)
            if round_number:
                samples[name].append(elapsed)
    return samples


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[3]


def read_gb_per_s(num_bytes: int = 1 << 29) -> float:
    """Best of five streaming reads on torch's threads: what a byte floor is computed with."""
    words = torch.ones(num_bytes // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(5):
        before = time.perf_counter()
        words.sum()
        best = min(best, time.perf_counter() - before)
    return num_bytes / best / 1e9


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def write_results(question: str, config: dict[str, Any], results: Any) -> Path:
    """JSON with machine, versions, commit, config and raw samples."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{question}.json"
    content = {**machine.describe(), "config": config, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
