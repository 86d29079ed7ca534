"""The terminal's table of a run."""

from __future__ import annotations

from rich import box
from rich.table import Table

from kvselect.eval.results import CLAIM_SAMPLES, Results

_HEADINGS = {  # two lines each: with five tasks the table fits a terminal
    "niah_single": "single",
    "niah_multikey": "multi\nkey",
    "niah_pairkey": "pair\nkey",
    "niah_multivalue": "multi\nvalue",
}


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
            mean = results.macro(length, policy)
            if mean is None:
                continue
            first = policy == next(iter(results.policies))
            shown.add_row(
                f"{length.tokens}\n[dim]{length.label}[/dim]" if first else "",
                policy,
                *("" if cell is None else _percent(cell.score, cell.interval) for cell in cells),
                "–" if mean.kept_mass is None else f"{mean.kept_mass:.2f}",
                f"{mean.tokens_attended:.0f}",
                f"{100 * mean.bytes_ratio:.0f} %",
                f"{mean.decode_ms:.1f}",
                f"{mean.cache_bytes / 1e6:.1f}",
            )
        shown.add_section()
    return shown
