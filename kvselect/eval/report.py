"""The terminal's table of a run."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from kvselect.eval.results import CLAIM_SAMPLES, Results

_HEADINGS = {  # two lines each: with five tasks the table fits a terminal
    "niah_single": "single",
    "niah_multikey": "multi\nkey",
    "niah_pairkey": "pair\nkey",
    "niah_multivalue": "multi\nvalue",
}


MOST_COLUMNS = 5  # tasks beside each other; more have a table of their own


def _percent(score: float, interval: tuple[float, float]) -> str:
    return f"{100 * score:.0f}\n[dim]{100 * interval[0]:.0f}–{100 * interval[1]:.0f}[/dim]"


def _caption(results: Results) -> str:
    counts = {len(cell.outcomes) for cell in results.cells}
    samples = f"{min(counts)}–{max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
    caption = "Score in %, below it the 95 % interval (Wilson). "
    caption += f"{samples} questions per task and length"
    if min(counts, default=0) < CLAIM_SAMPLES:
        caption += f": a demonstration; a claim needs {CLAIM_SAMPLES}"
    caption += (
        ".\nMass, tokens and bytes: per decode step, mean over layers, heads and tasks; "
        "bytes read from cache and sketch, against dense. ms: wall time of one decode step, median."
    )
    if len(results.tasks) > MOST_COLUMNS and results.baseline is not None:
        caption += (
            f"\nAgainst {escape(results.baseline)}: points on the same questions, 95 % interval "
            "(paired bootstrap)."
        )
    return caption


def _empty(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def table(results: Results) -> RenderableType:
    """One row per length and policy: the score of every task, then quality and cost of a decode
    step. With many tasks their mean, and a second table of a row per task."""
    title = f"{escape(results.model)}, trained on {results.window_tokens} tokens"
    shown = _empty(title, _caption(results))
    shown.add_column("context", no_wrap=True)
    # Wraps into the two lines that a row has anyway.
    shown.add_column("policy", min_width=12, max_width=16)
    by_task = len(results.tasks) <= MOST_COLUMNS
    if by_task:
        for task in results.tasks:
            heading = _HEADINGS.get(task, task.replace("_", "\n", 1))
            shown.add_column(heading, justify="right", no_wrap=True)
    else:
        for heading in (f"mean of\n{len(results.tasks)} tasks", "against\nbaseline", "verdict"):
            shown.add_column(heading, justify="right", no_wrap=True)
    for heading in ("mass\nkept", "tokens\nread", "bytes\nread", "ms per\ntoken", "cache\nMB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for length in results.lengths:
        for policy in results.policies:
            mean = results.macro(length, policy)
            if mean is None:
                continue
            if by_task:
                cells = [results.cell(task, length, policy) for task in results.tasks]
                scores = ["" if c is None else _percent(c.score, c.interval) for c in cells]
            else:
                scores = [_percent(mean.score, mean.interval), "–", mean.verdict or "–"]
                if mean.difference is not None:
                    points, low, high = (100 * part for part in mean.difference)
                    scores[1] = f"{points:+.1f}\n[dim]{low:+.1f} to {high:+.1f}[/dim]"
            first = policy == next(iter(results.policies))
            shown.add_row(
                f"{length.tokens}\n[dim]{escape(length.label)}[/dim]" if first else "",
                escape(policy),
                *scores,
                "–" if mean.kept_mass is None else f"{mean.kept_mass:.2f}",
                f"{mean.tokens_attended:.0f}",
                f"{100 * mean.bytes_ratio:.0f} %",
                f"{mean.decode_ms:.1f}",
                f"{mean.cache_bytes / 1e6:.1f}",
            )
        shown.add_section()
    return shown if by_task else Group(shown, _task_table(results))


def _task_table(results: Results) -> Table:
    shown = _empty("Score by task", "Score in %, below it the 95 % interval (Wilson).")
    shown.add_column("context", no_wrap=True)
    shown.add_column("task", no_wrap=True)
    for policy in results.policies:
        shown.add_column(escape(policy), justify="right", max_width=14)
    for length in results.lengths:
        for task in results.tasks:
            cells = [results.cell(task, length, policy) for policy in results.policies]
            if any(cell is not None for cell in cells):
                first = task == results.tasks[0]
                shown.add_row(
                    f"{length.tokens}\n[dim]{escape(length.label)}[/dim]" if first else "",
                    escape(task),
                    *("" if c is None else _percent(c.score, c.interval) for c in cells),
                )
        shown.add_section()
    return shown
