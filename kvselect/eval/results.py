"""What a run found, as numbers: cells, differences to dense, a verdict; and the JSON of it."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvselect.eval.intervals import macro_difference, paired_difference, wilson
from kvselect.eval.session import Traffic

FORMAT = "kvselect-eval-2"
CLAIM_SAMPLES = 500  # +-2.6 points at a score of .9; with fewer the reports say so
EFFECTIVE_SCORE = 0.75
FAILS_BELOW = 0.1  # a score
NO_LOSS_POINTS = 1.0  # "no loss": the interval of the difference ends above minus this


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
    outcomes : tuple of float
        Scores in [0, 1], question by question; the same questions in the same order for every
        policy.
    depths : tuple of (float or None)
        Where in its context the evidence of each question begins, 0 to 1.
    kept_mass : float or None
        Share of the attention mass that the attended tokens hold, mean over layers, heads and
        decode steps.
    mass_by_head : tuple of tuple of float
        The same, [selecting layers][KV heads].
    tokens_attended : float
        Tokens attended per decode step, mean over layers and KV heads.
    bytes_ratio : float
        Bytes of cache and sketch read per decode step over those dense attention reads.
    hit_rate : float or None
        Share of lists that the selection cache reused; None: the policy reuses none.
    decode_ms : float
        Wall time of one decode step, median, all policies interleaved [ms].
    prefill_s : float
        Wall time of reading one context, median [s].
    cache_bytes : int
        Memory of keys, values and sketch, room to grow included: the most of all contexts.
    context_tokens : float
        Mean tokens of the contexts themselves.
    """

    task: str
    length: Length
    policy: str
    outcomes: tuple[float, ...]
    depths: tuple[float | None, ...] = ()
    kept_mass: float | None
    mass_by_head: tuple[tuple[float, ...], ...] = ()
    tokens_attended: float
    bytes_ratio: float
    hit_rate: float | None = None
    decode_ms: float
    prefill_s: float
    cache_bytes: int
    context_tokens: float = 0.0
    samples: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        return sum(self.outcomes) / len(self.outcomes)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson, 95 %."""
        return wilson(sum(self.outcomes), len(self.outcomes))


def cell_of(
    task: str,
    length: Length,
    policy: str,
    records: Sequence[Mapping[str, Any]],
    decode_seconds: Sequence[float],
) -> Cell:
    """The cell that a journal's records of one policy, task and length make, in their order.

    Parameters
    ----------
    records : list of dict
        What `runner` wrote for each context.
    decode_seconds : list of float
        Timed decode steps.
    """
    traffic = Traffic.total(Traffic(**record["traffic"]) for record in records)
    audited = [record for record in records if record["mass"]]
    weights = [len(record["scores"]) for record in audited]
    mass_by_head: tuple[tuple[float, ...], ...] = ()
    if audited:
        mass_by_head = tuple(
            tuple(
                sum(w * record["mass"][layer][head] for w, record in zip(weights, audited))
                / sum(weights)
                for head in range(len(audited[0]["mass"][layer]))
            )
            for layer in range(len(audited[0]["mass"]))
        )
    by_layer = [sum(heads) / len(heads) for heads in mass_by_head]
    return Cell(
        task=task,
        length=length,
        policy=policy,
        outcomes=tuple(score for record in records for score in record["scores"]),
        depths=tuple(depth for record in records for depth in record["depths"]),
        kept_mass=sum(by_layer) / len(by_layer) if by_layer else None,
        mass_by_head=mass_by_head,
        tokens_attended=traffic.tokens_per_step,
        bytes_ratio=traffic.bytes_ratio,
        hit_rate=traffic.hit_rate,
        decode_ms=1000 * statistics.median(decode_seconds),
        prefill_s=statistics.median(record["prefill_s"] for record in records),
        cache_bytes=max(record["cache_bytes"] for record in records),
        context_tokens=sum(record["context_tokens"] for record in records) / len(records),
        samples=tuple(record["sample"] for record in records),
    )


@dataclass(slots=True, kw_only=True)
class Results:
    """Everything one run found, or several runs of the same questions.

    Attributes
    ----------
    model : str
    window_tokens : int
        The length the model was trained for.
    policies : dict, label -> settings of the policy
        In the order of the table; differences are taken to the one named by `baseline`.
    config : dict
        What was asked for, for the JSON.
    notes : list of str
        What a reader must know of this run: files kept aside and the like.
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
    layers: tuple[int, ...] = ()
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False

    def cell(self, task: str, length: Length, policy: str) -> Cell | None:
        for cell in self.cells:
            if (cell.task, cell.length, cell.policy) == (task, length, policy):
                return cell
        return None

    def cells_of(self, length: Length, policy: str) -> list[Cell]:
        """Those of all tasks that ran."""
        found = [self.cell(task, length, policy) for task in self.tasks]
        return [cell for cell in found if cell is not None]

    def difference(self, cell: Cell) -> tuple[float, float, float] | None:
        """Score minus the baseline's on the same questions, with its paired bootstrap interval."""
        if self.baseline is None or cell.policy == self.baseline:
            return None
        dense = self.cell(cell.task, cell.length, self.baseline)
        return None if dense is None else paired_difference(cell.outcomes, dense.outcomes)

    def macro(self, length: Length, policy: str) -> Macro | None:
        """The mean over tasks; None before any of them ran."""
        cells = self.cells_of(length, policy)
        if not cells:
            return None
        pairs = []
        if self.baseline is not None and policy != self.baseline:
            dense = [self.cell(cell.task, length, self.baseline) for cell in cells]
            pairs = [(c.outcomes, d.outcomes) for c, d in zip(cells, dense) if d is not None]
        masses = [cell.kept_mass for cell in cells if cell.kept_mass is not None]
        rates = [cell.hit_rate for cell in cells if cell.hit_rate is not None]
        score = sum(cell.score for cell in cells) / len(cells)
        num_samples = sum(len(cell.outcomes) for cell in cells)
        return Macro(
            length=length,
            policy=policy,
            score=score,
            interval=wilson(score * num_samples, num_samples),
            num_samples=num_samples,
            difference=macro_difference(pairs) if pairs else None,
            kept_mass=sum(masses) / len(masses) if masses else None,
            tokens_attended=sum(cell.tokens_attended for cell in cells) / len(cells),
            bytes_ratio=sum(cell.bytes_ratio for cell in cells) / len(cells),
            hit_rate=sum(rates) / len(rates) if rates else None,
            decode_ms=statistics.median(cell.decode_ms for cell in cells),
            prefill_s=statistics.median(cell.prefill_s for cell in cells),
            cache_bytes=max(cell.cache_bytes for cell in cells),
        )

    def effective_tokens(self, task: str | None, policy: str) -> int | None:
        """Largest length up to which every score is at least `EFFECTIVE_SCORE`; None: not even the
        first. Of one task, or of the mean over tasks.

        Source: the 75 % contour of Needle Threading, arXiv:2411.05000.
        """
        reached = None
        for length in sorted(self.lengths, key=lambda length: length.tokens):
            found = self.macro(length, policy) if task is None else self.cell(task, length, policy)
            if found is None or found.score < EFFECTIVE_SCORE:
                break
            reached = length.tokens
        return reached

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        macros = [self.macro(length, policy) for length in self.lengths for policy in self.policies]
        return {
            "format": FORMAT,
            "model": self.model,
            "window_tokens": self.window_tokens,
            "complete": self.complete,
            "baseline": self.baseline,
            "tasks": list(self.tasks),
            "lengths": {length.label: length.tokens for length in self.lengths},
            "policies": self.policies,
            "config": self.config,
            "notes": self.notes,
            **self.environment,
            "layers": list(self.layers),
            "effective_tokens": {
                policy: {
                    "mean": self.effective_tokens(None, policy),
                    **{task: self.effective_tokens(task, policy) for task in self.tasks},
                }
                for policy in self.policies
            },
            "means": [macro.to_dict() for macro in macros if macro is not None],
            "cells": [self._cell_dict(cell) for cell in self.cells],
        }

    def _cell_dict(self, cell: Cell) -> dict[str, Any]:
        difference = self.difference(cell)
        return {
            "task": cell.task,
            "length": cell.length.label,
            "length_tokens": cell.length.tokens,
            "policy": cell.policy,
            "num_samples": len(cell.outcomes),
            "num_correct": sum(cell.outcomes),
            "score": cell.score,
            "interval_95": list(cell.interval),
            "difference_to_baseline": None if difference is None else difference[0],
            "difference_interval_95": None if difference is None else list(difference[1:]),
            "kept_mass": cell.kept_mass,
            "kept_mass_by_layer_and_head": [list(heads) for heads in cell.mass_by_head],
            "tokens_attended": cell.tokens_attended,
            "bytes_read_over_dense": cell.bytes_ratio,
            "hit_rate": cell.hit_rate,
            "decode_ms": cell.decode_ms,
            "prefill_s": cell.prefill_s,
            "cache_bytes": cell.cache_bytes,
            "context_tokens": cell.context_tokens,
            "outcomes": list(cell.outcomes),
            "depths": list(cell.depths),
            "samples": list(cell.samples),
        }

    def save(self, path: Path) -> None:
        """Write the JSON; a reader never sees half a file."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Macro:
    """A policy at a length, over tasks: means, but the median of times and the most memory."""

    length: Length
    policy: str
    score: float
    interval: tuple[float, float]
    num_samples: int
    difference: tuple[float, float, float] | None
    kept_mass: float | None
    tokens_attended: float
    bytes_ratio: float
    hit_rate: float | None
    decode_ms: float
    prefill_s: float
    cache_bytes: int

    @property
    def verdict(self) -> str | None:
        """Against the baseline: "better", "no loss", "loss", "undecided" or "both fail"; None:
        nothing to compare with.

        "no loss": the 95 % interval of the difference lies above -1 point; "better": above 0;
        "loss": below -1 point; "both fail": neither score reaches 10 %, so a difference says
        nothing about what selection loses.
        """
        if self.difference is None:
            return None
        mean, low, high = self.difference
        if max(self.score, self.score - mean) < FAILS_BELOW:
            return "both fail"
        if low > 0:
            return "better"
        if 100 * low >= -NO_LOSS_POINTS:
            return "no loss"
        return "loss" if 100 * high < -NO_LOSS_POINTS else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        difference = self.difference
        return {
            "length": self.length.label,
            "length_tokens": self.length.tokens,
            "policy": self.policy,
            "num_samples": self.num_samples,
            "score": self.score,
            "interval_95": list(self.interval),
            "difference_to_baseline": None if difference is None else difference[0],
            "difference_interval_95": None if difference is None else list(difference[1:]),
            "verdict": self.verdict,
            "kept_mass": self.kept_mass,
            "tokens_attended": self.tokens_attended,
            "bytes_read_over_dense": self.bytes_ratio,
            "hit_rate": self.hit_rate,
            "decode_ms": self.decode_ms,
            "prefill_s": self.prefill_s,
            "cache_bytes": self.cache_bytes,
        }


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name and rename it: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class ResultsFileError(ValueError):
    """A results file is missing, damaged, or of another program."""


def load_results(path: Path) -> Results:
    """What `Results.save` wrote.

    Raises
    ------
    ResultsFileError
        Naming the file and what is wrong with it.
    """
    path = path / "results.json" if path.is_dir() else path
    allowed = "a results.json of kvselect eval, or its folder"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ResultsFileError(
            f"results: got {str(path)!r}, which cannot be read ({reason}), allowed: {allowed}"
        ) from error
    try:
        told = json.loads(text)
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        return _results_of(told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsFileError(
            f"results: got {str(path)!r}, which is damaged or of another program "
            f"({type(error).__name__}: {error}), allowed: {allowed}"
        ) from error


# What `Results.to_dict` writes itself; the rest of a file says where it was made.
_OWN = {
    *("format", "model", "window_tokens", "complete", "baseline", "tasks", "lengths", "policies"),
    *("config", "notes", "layers", "effective_tokens", "means", "cells"),
}


def _results_of(told: dict[str, Any]) -> Results:
    lengths = tuple(Length(label=k, tokens=int(v)) for k, v in told["lengths"].items())
    by_label = {length.label: length for length in lengths}
    cells = [
        Cell(
            task=cell["task"],
            length=by_label[cell["length"]],
            policy=cell["policy"],
            outcomes=tuple(map(float, cell["outcomes"])),
            depths=tuple(cell["depths"]),
            kept_mass=cell["kept_mass"],
            mass_by_head=tuple(map(tuple, cell["kept_mass_by_layer_and_head"])),
            tokens_attended=cell["tokens_attended"],
            bytes_ratio=cell["bytes_read_over_dense"],
            hit_rate=cell["hit_rate"],
            decode_ms=cell["decode_ms"],
            prefill_s=cell["prefill_s"],
            cache_bytes=cell["cache_bytes"],
            context_tokens=cell["context_tokens"],
            samples=tuple(cell["samples"]),
        )
        for cell in told["cells"]
    ]
    return Results(
        model=told["model"],
        window_tokens=told["window_tokens"],
        tasks=tuple(told["tasks"]),
        lengths=lengths,
        policies=told["policies"],
        baseline=told["baseline"],
        config=told["config"],
        environment={name: value for name, value in told.items() if name not in _OWN},
        layers=tuple(told["layers"]),
        cells=cells,
        notes=list(told["notes"]),
        complete=told["complete"],
    )
