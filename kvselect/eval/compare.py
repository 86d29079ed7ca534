"""Several runs of the same questions as one: refused unless model, template, seed and every sample
agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvselect.eval.results import Length, Results

# Of `Results.config`: what has to be equal for a difference between two runs to mean anything.
SAME = (
    "model_fingerprint",
    "dtype",
    "template",
    "seed",
    "samples",
    "questions_per_context",
    "max_contexts",
    "prefill",
    "data",
    "prompts",
)


class IncomparableError(ValueError):
    """Runs that asked different things."""


def combine(runs: Sequence[tuple[str, Results]]) -> Results:
    """One table out of several runs; policies of one name get the run's name too.

    Parameters
    ----------
    runs : list of (name, results)
        At least one. The first gives the baseline, the order of tasks and the environment.

    Raises
    ------
    IncomparableError
        Naming everything that differs from the first run.
    """
    first_name, first = runs[0]
    for name, other in runs[1:]:
        differing = _differences(first, other)
        if differing:
            raise IncomparableError(
                f"runs: got {first_name!r} and {name!r}, which differ in {'; '.join(differing)}, "
                "allowed: runs of one model, template, seed and samples"
            )
    if len(runs) == 1:
        return first
    counts: dict[str, int] = {}
    for _, results in runs:
        for policy in results.policies:
            counts[policy] = counts.get(policy, 0) + 1
    combined = dataclasses.replace(first, policies={}, cells=[], notes=[])
    for name, results in runs:
        combined.notes += [f"{name}: {note}" for note in results.notes]
        if not results.complete:
            combined.notes.append(f"{name}: not complete")
        if results.environment.get("commit") != first.environment.get("commit"):
            combined.notes.append(f"{name}: commit {results.environment.get('commit')}")
        if results.environment.get("machine") != first.environment.get("machine"):
            combined.notes.append(f"{name}: another machine; times do not compare")
        labels = {
            policy: policy if counts[policy] == 1 else f"{policy} ({name})"
            for policy in results.policies
        }
        combined.policies |= {labels[policy]: told for policy, told in results.policies.items()}
        combined.cells += [
            dataclasses.replace(cell, policy=labels[cell.policy]) for cell in results.cells
        ]
        if results is first and first.baseline is not None:
            combined.baseline = labels[first.baseline]
    combined.notes.append("times of different runs were not interleaved")
    combined.complete = all(results.complete for _, results in runs)
    return combined


def _differences(first: Results, other: Results) -> list[str]:
    found = [
        f"{name} ({first.config.get(name)!r} and {other.config.get(name)!r})"
        for name in SAME
        if first.config.get(name) != other.config.get(name)
    ]
    for what in ("tasks", "lengths"):
        ours, theirs = getattr(first, what), getattr(other, what)
        if set(ours) != set(theirs):
            found.append(f"{what} ({_names(ours)} and {_names(theirs)})")
    if not found:
        samples = _samples(first)
        found = [
            f"the samples of {task} at {tokens}"
            for (task, tokens), theirs in _samples(other).items()
            if samples.get((task, tokens), theirs) != theirs
        ]
    return found


def _names(listed: Sequence[str | Length]) -> str:
    return ", ".join(entry if isinstance(entry, str) else entry.label for entry in listed)


def _samples(results: Results) -> dict[tuple[str, int], tuple[str, ...]]:
    return {(cell.task, cell.length.tokens): cell.samples for cell in results.cells}
