"""``kvselect perplexity``: a text's likelihood against context length, per policy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvselect.cli_eval import (
    Job,
    on_one_thread,
    progress_shown,
    require_folder,
    resumed,
    wide_console,
    written_to,
)

# transformers takes seconds to import: what needs it is imported where it is used.
if TYPE_CHECKING:
    from rich.table import Table

    from kvselect.eval.checkpoint import Checkpoint
    from kvselect.eval.perplexity import PerplexityRequest, Text

JOURNAL_NAME, RESULTS_NAME = "perplexity.jsonl", "perplexity.json"


def add_perplexity(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "perplexity",
        help="perplexity against context length, on source text of Python's standard library",
    )
    command.add_argument("--model", required=True, help="a checkpoint's folder, or embedded:code")
    command.add_argument(
        "--lengths", default="1x,4x,16x", help="as in kvselect eval (default 1x,4x,16x)"
    )
    command.add_argument("--policies", nargs="+", metavar="POLICY", help="as in kvselect eval")
    command.add_argument("--budget", help="as in kvselect eval")
    command.add_argument(
        "--segments", type=int, default=16, help="places of the text that are scored (default 16)"
    )
    command.add_argument(
        "--scored-tokens", type=int, default=256, help="at the end of each (default 256)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the places (default 0)")
    command.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16")
    )
    command.add_argument("--device", default="cpu", help="as torch spells it (default cpu)")
    command.add_argument(
        "--restart", action="store_true", help="move what the folder holds aside and begin anew"
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("kvselect-perplexity"),
        help="folder for perplexity.json and perplexity.png (default kvselect-perplexity)",
    )
    command.set_defaults(prepare=_prepare)


def _prepare(options: argparse.Namespace) -> Job:
    from kvselect.checks import require_int
    from kvselect.eval import perplexity
    from kvselect.eval.checkpoint import is_embedded, load_checkpoint
    from kvselect.eval.journal import move_aside, require_same_request
    from kvselect.eval.request import (
        default_policies,
        parse_budgets,
        parse_lengths,
        parse_policies,
    )
    from kvselect.eval.runner import require_memory, require_policies

    budgets = None if options.budget is None else parse_budgets(options.budget)
    require_int(options.segments, "segments", 1)
    require_int(options.scored_tokens, "scored_tokens", 1)
    require_int(options.seed, "seed", 0)
    parse_lengths(options.lengths, 1)
    if options.policies is not None:
        parse_policies(options.policies, budgets)
    require_folder(options.out)
    checkpoint = load_checkpoint(options.model, dtype=options.dtype, device=options.device)
    if checkpoint.speaks_dialect:
        raise ValueError(
            f"model: got {options.model!r}, whose 512 words cannot spell a text, allowed: a "
            "checkpoint that reads text, such as embedded:code"
        )
    request = perplexity.PerplexityRequest(
        lengths=parse_lengths(options.lengths, checkpoint.window_tokens),
        policies=default_policies(checkpoint.window_tokens, budgets)
        if options.policies is None
        else parse_policies(options.policies, budgets),
        segments=options.segments,
        scored_tokens=options.scored_tokens,
        seed=options.seed,
    )
    require_policies(checkpoint, request.policies)
    require_memory(checkpoint, request.policies, request.lengths, at_once=1)
    text = perplexity.read_text(checkpoint.tokenizer, perplexity.library_text())
    perplexity.segment_ends(request, text)
    header = perplexity.describe_request(checkpoint, request, text)
    if options.restart:
        move_aside(options.out / JOURNAL_NAME, options.out / RESULTS_NAME)
    require_same_request(options.out / JOURNAL_NAME, header)
    notes = _make_way(options.out)

    def job() -> int:
        return _run(checkpoint, request, text, header, options.out, notes)

    return on_one_thread(job) if is_embedded(options.model) else job


def _make_way(out: Path) -> list[str]:
    """Nothing that this run did not write is overwritten; what was found damaged, for the user."""
    from kvselect.eval.journal import keep_aside

    found = out / RESULTS_NAME
    if not found.exists():
        return []
    try:
        json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        aside = keep_aside(found)
        return [f"{found} is damaged ({type(error).__name__}: {error}); kept as {aside.name}"]
    if not (out / JOURNAL_NAME).exists():
        raise ValueError(
            f"out: got {str(out)!r}, which holds a {RESULTS_NAME} without the {JOURNAL_NAME} it "
            "was made from, allowed: another folder, or --restart"
        )
    return []


def _run(
    checkpoint: Checkpoint,
    request: PerplexityRequest,
    text: Text,
    header: dict[str, Any],
    out: Path,
    notes: list[str],
) -> int:
    from rich.console import Console

    from kvselect.eval import perplexity
    from kvselect.eval.charts import perplexity_chart, save_pngs

    def job() -> int:
        out.mkdir(parents=True, exist_ok=True)
        errors = Console(stderr=True)
        for note in notes:
            errors.print(note, highlight=False, markup=False, soft_wrap=True)
        with (
            resumed(out / JOURNAL_NAME, header, errors) as journal,
            progress_shown(errors, perplexity.total_progress(request)) as advance,
        ):
            cells = perplexity.measure(
                checkpoint, request, text, journal=journal, on_progress=advance
            )
        found = perplexity.to_dict(checkpoint, request, text, cells)
        perplexity.save(out / RESULTS_NAME, found)
        save_pngs([perplexity_chart(found)], out)
        console = wide_console()
        console.print(_table(found))
        console.print(
            f"written to {out}: perplexity.json, perplexity.png", highlight=False, soft_wrap=True
        )
        return 0

    return written_to(out, job)


def _table(found: dict[str, Any]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    request = found["request"]
    shown = Table(
        title=f"{escape(found['model'])}, trained on {found['window_tokens']} tokens",
        caption=f"{request['segments']} places of {request['scored_tokens']} tokens each, the same "
        "at every length. Ratio: perplexity over dense, paired bootstrap over places, 95 %.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("context", "policy"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("perplexity", "bits/byte", "ratio to dense", "mass kept"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for cell in found["cells"]:
        ratio, interval = cell["ratio_to_baseline"], cell["ratio_interval_95"]
        told = "–" if ratio is None else f"{ratio:.4f} ({interval[0]:.4f}–{interval[1]:.4f})"
        mass = cell["kept_mass"]
        shown.add_row(
            str(cell["length_tokens"]),
            escape(cell["policy"]),
            f"{cell['perplexity']:.3f}",
            f"{cell['bits_per_byte']:.3f}",
            told,
            "–" if mass is None else f"{mass:.3f}",
        )
    return shown
