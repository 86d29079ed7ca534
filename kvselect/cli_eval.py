"""``kvselect demo``, ``kvselect eval`` and ``kvselect report``: run tasks, and show what was
found."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

# transformers takes seconds to import: what needs it is imported where it is used.
if TYPE_CHECKING:
    from rich.console import Console

    from kvselect.eval.checkpoint import Checkpoint
    from kvselect.eval.journal import Journal
    from kvselect.eval.results import Results
    from kvselect.eval.runner import Request

TABLE_COLUMNS = 100  # at least: what the table of the demo needs
DEFAULT_SAMPLES, DEFAULT_CONTEXTS = 50, 25
SECONDS_PER_LINE = 20.0  # of progress, where no terminal shows a bar

# What is left to do once the input is known to be good; returns the exit code.
Job = Callable[[], int]


def add_eval(commands: Any) -> None:
    """Add the three commands."""
    demo = commands.add_parser(
        "demo",
        help="the main job on the embedded model: what is found at 1, 4 and 16 trained windows",
    )
    demo.add_argument("--samples", type=int, help="questions per cell (default 24)")
    demo.add_argument("--seed", type=int, default=0, help="of the contexts (default 0)")
    _add_out(demo, "kvselect-demo")
    demo.set_defaults(prepare=_demo)

    evaluate = commands.add_parser(
        "eval",
        help="tasks x lengths x policies on a local Hugging Face checkpoint",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A run that was killed goes on where it was, with the same command. docs/eval.md\n"
        "describes tasks, files and every number.\n\n"
        "example:\n"
        "  kvselect eval --model ~/models/llama --tasks niah_multikey,vt --lengths 4k,16k"
        " \\\n      --policies dense token_select:topk=2048 token_select:topk=2048,scope=layer",
    )
    evaluate.add_argument(
        "--model",
        default="embedded",
        help="a checkpoint's folder, or embedded:NAME (default: embedded)",
    )
    evaluate.add_argument(
        "--tasks",
        help="names, with commas; also nt, ruler, minimal (default: minimal; embedded: five tasks "
        "in its own words)",
    )
    evaluate.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="files of InfiniteBench, LongBench or RULER; each is a task (default: all of them, in "
        "full, as long as they are)",
    )
    evaluate.add_argument(
        "--lengths",
        help="tokens, 16k (x 1024) or 4x (trained windows), with commas (default 4k,16k; embedded: "
        "1x,4x,16x)",
    )
    evaluate.add_argument(
        "--policies",
        nargs="+",
        metavar="POLICY",
        help="name or name:setting=value,setting=value (default: dense, streaming_llm and "
        "token_select with original and compact positions, all of --budget)",
    )
    evaluate.add_argument(
        "--budget",
        help="tokens that a decode step attends to, with commas for several: of policies named "
        "without settings (default 3712, or 4/9 of a shorter trained window)",
    )
    evaluate.add_argument(
        "--samples", type=int, help="questions per cell (default 50; with --data all)"
    )
    evaluate.add_argument(
        "--max-contexts",
        type=int,
        help="contexts per cell at most, even if they hold fewer questions (default 25; with "
        "--samples: as many as it takes)",
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of the contexts (default 0)")
    evaluate.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16")
    )
    evaluate.add_argument("--device", default="cpu", help="as torch spells it (default cpu)")
    evaluate.add_argument(
        "--restart", action="store_true", help="move what the folder holds aside and begin anew"
    )
    _add_out(evaluate, "kvselect-eval")
    evaluate.set_defaults(prepare=_eval)

    report = commands.add_parser(
        "report", help="table, page and pictures of one run, or of several of the same questions"
    )
    report.add_argument("runs", nargs="+", type=Path, help="folders of kvselect eval")
    _add_out(report, "kvselect-report")
    report.set_defaults(prepare=_report)


def _add_out(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        help=f"folder for results.json, report.html and pictures (default {default})",
    )


def _demo(options: argparse.Namespace) -> Job:
    from kvselect.checks import require_int
    from kvselect.eval.checkpoint import EMBEDDED, load_checkpoint
    from kvselect.eval.demo import SAMPLES, demo_request

    samples = SAMPLES if options.samples is None else options.samples
    require_int(samples, "samples", 1)
    require_int(options.seed, "seed", 0)
    require_folder(options.out)
    checkpoint = load_checkpoint(EMBEDDED)
    request = demo_request(checkpoint.window_tokens, samples, options.seed)
    return on_one_thread(_run(checkpoint, request, options.out, restart="unless interrupted"))


def on_one_thread(job: Job) -> Job:
    """A model as small as the embedded one loses more by waiting for threads than it gains."""

    def run() -> int:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return job()
        finally:
            torch.set_num_threads(threads)

    return run


def _eval(options: argparse.Namespace) -> Job:
    from kvselect.checks import require_int
    from kvselect.eval.checkpoint import is_embedded, load_checkpoint
    from kvselect.eval.request import (
        default_lengths,
        default_policies,
        parse_budgets,
        parse_lengths,
        parse_policies,
        split_list,
    )
    from kvselect.eval.results import Length
    from kvselect.eval.runner import Request
    from kvselect.eval.tasks import data_tasks, default_tasks, find_tasks

    # Everything that can be checked without the model is checked before it loads.
    files = {} if options.data is None else data_tasks(options.data)
    tasks = list(files.values()) or None
    if options.tasks is not None:
        tasks = find_tasks(split_list(options.tasks), files)
    rows = [len(task.file.rows) for task in tasks or () if task.file is not None]
    samples = options.samples
    if samples is None:
        samples = max(rows, default=DEFAULT_SAMPLES)
    require_int(samples, "samples", 1)
    max_contexts = options.max_contexts
    if max_contexts is None and options.samples is None:
        max_contexts = DEFAULT_CONTEXTS
    if max_contexts is not None:
        require_int(max_contexts, "max_contexts", 1)
    require_int(options.seed, "seed", 0)
    budgets = None if options.budget is None else parse_budgets(options.budget)
    if options.policies is not None:
        parse_policies(options.policies, budgets or [512])
    if options.lengths is not None:
        parse_lengths(options.lengths, 1)
    require_folder(options.out)
    checkpoint = load_checkpoint(options.model, dtype=options.dtype, device=options.device)
    window = checkpoint.window_tokens
    tasks = tasks or default_tasks(checkpoint.speaks_dialect)
    if options.lengths is None and rows and not checkpoint.speaks_dialect:
        files_only = [task.file for task in tasks if task.file is not None]
        longest = max(file.total_tokens(checkpoint.tokenizer) for file in files_only)
        lengths: tuple[Length, ...] = (Length(label="full", tokens=longest),)
    else:
        asked = options.lengths or default_lengths(checkpoint.speaks_dialect)
        lengths = parse_lengths(asked, window)
    request = Request(
        tasks=tuple(tasks),
        lengths=lengths,
        policies=default_policies(window, budgets)
        if options.policies is None
        else parse_policies(options.policies, budgets),
        samples=samples,
        max_contexts=max_contexts,
        seed=options.seed,
    )
    restart = "always" if options.restart else "never"
    job = _run(checkpoint, request, options.out, restart=restart)
    return on_one_thread(job) if is_embedded(options.model) else job


def require_folder(out: Path) -> None:
    """ValueError unless files can be written there; makes nothing."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: got {str(out)!r}, which is a file, allowed: a folder, there or not")
    nearest = out.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise _no_permission(out, "no write permission")


def _no_permission(out: Path, reason: str) -> ValueError:
    return ValueError(
        f"out: got {str(out)!r}, which cannot be written ({reason}), allowed: a folder that can"
    )


def _run(checkpoint: Checkpoint, request: Request, out: Path, *, restart: str) -> Job:
    """Check that the request can run on this model, and that the folder is free or holds the same
    request."""
    from kvselect.eval import runner

    runner.check(checkpoint, request)
    header = runner.describe_request(checkpoint, request)
    notes = _make_way(out, header, restart)
    return lambda: _run_and_show(checkpoint, request, header, out, notes)


def _make_way(out: Path, header: dict[str, Any], restart: str) -> list[str]:
    """Refuse a folder that holds another run; what was found damaged, for the user.

    `restart`: "always", "never", or "unless interrupted", which begins anew where the folder holds
    a complete run or one of another request.
    """
    from kvselect.eval import runner
    from kvselect.eval.journal import keep_aside, move_aside, require_same_request
    from kvselect.eval.results import ResultsFileError, load_results

    journal, found = out / runner.JOURNAL_NAME, out / runner.RESULTS_NAME
    if restart == "always":
        move_aside(journal, found)
        return []
    try:
        require_same_request(journal, header)
        if not found.exists():
            return []
        complete = load_results(found).complete
        if not journal.exists():
            raise ValueError(
                f"out: got {str(out)!r}, which holds a results.json without the "
                f"{runner.JOURNAL_NAME} it was made from, allowed: another folder, or --restart"
            )
    except ResultsFileError as error:
        return [f"{error}; kept as {keep_aside(found).name}"]
    except ValueError:
        if restart == "never":
            raise
        move_aside(journal, found)
        return []
    if complete and restart == "unless interrupted":
        journal.unlink()
        found.unlink()
    return []


def _run_and_show(
    checkpoint: Checkpoint, request: Request, header: dict[str, Any], out: Path, notes: list[str]
) -> int:
    """Run with a progress bar, then show the table; the journal grows with every context."""
    from rich.console import Console

    from kvselect.eval import runner

    errors = Console(stderr=True)
    for note in notes:
        errors.print(note, highlight=False, soft_wrap=True, markup=False)

    def job() -> int:
        out.mkdir(parents=True, exist_ok=True)
        with (
            resumed(out / runner.JOURNAL_NAME, header, errors) as journal,
            progress_shown(errors, runner.total_progress(request)) as advance,
        ):
            results = runner.run(
                checkpoint,
                request,
                journal=journal,
                on_progress=advance,
                on_cells=lambda partial: partial.save(out / runner.RESULTS_NAME),
            )
        return _show(results, out)

    return written_to(out, job)


def written_to(out: Path, job: Job) -> int:
    """Do a job that writes there; what keeps it from that is one line and exit code 2."""
    try:
        return job()
    except (OSError, ValueError) as error:
        told: Exception = error
        if isinstance(error, OSError):
            told = _no_permission(out, error.strerror or str(error))
        print(f"kvselect: error: {told}", file=sys.stderr)
        return 2


@contextmanager
def resumed(path: Path, header: dict[str, Any], console: Console) -> Iterator[Journal]:
    """The journal of a request; says what it holds already, and what of it was damaged."""
    from kvselect.eval.journal import Journal, notes_of

    with Journal(path, header) as journal:
        for note in notes_of(journal):
            console.print(note, highlight=False, soft_wrap=True, markup=False)
        known = sum(1 for record in journal.records if record.get("kind", "answers") == "answers")
        if known:
            found = f"{known} answered contexts are there already (--restart measures anew)"
            console.print(found, highlight=False, soft_wrap=True)
        yield journal


@contextmanager
def progress_shown(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """A function ``(what, amount)`` that shows how far a job is and how long it still takes: as a
    bar on a terminal, elsewhere as a line every now and then."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not console.is_terminal:
        yield _Lines(console, total).advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=120) as progress:
        bar = progress.add_task("starting", total=total)
        yield lambda what, amount: progress.update(bar, description=what, advance=amount)


class _Lines:
    """Progress as lines of text."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._begin = self._last = time.monotonic()

    def advance(self, what: str, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last >= SECONDS_PER_LINE and 0 < self._done < self._total:
            self._last = now
            left = (now - self._begin) * (self._total - self._done) / self._done
            share = 100 * self._done / self._total
            text = f"{what}: {share:.0f} %, about {_minutes(left)} left"
            self._console.print(text, highlight=False, soft_wrap=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def wide_console() -> Console:
    """Of at least the width that tables need; a pipe, where rich takes 80 columns, included."""
    from rich.console import Console

    console = Console()
    return console if console.width >= TABLE_COLUMNS else Console(width=TABLE_COLUMNS)


def _show(results: Results, out: Path) -> int:
    """Table on screen, files in the folder."""
    from kvselect.eval import report
    from kvselect.eval.charts import charts, save_pngs
    from kvselect.eval.lm_eval_results import save_lm_eval
    from kvselect.eval.page import page
    from kvselect.eval.results import write_whole

    made = charts(results)
    save_pngs(made, out)
    save_lm_eval(results, out / "lm_eval")
    write_whole(out / "report.html", page(results, made))
    console = wide_console()
    console.print(report.table(results))
    names = ["report.html", "results.json", "lm_eval/", *(f"{chart.name}.png" for chart in made)]
    console.print(f"written to {out}: {', '.join(names)}", highlight=False, soft_wrap=True)
    return 0


def _report(options: argparse.Namespace) -> Job:
    from kvselect.eval.compare import combine
    from kvselect.eval.results import load_results

    require_folder(options.out)
    runs = [(path.name, load_results(path)) for path in options.runs]
    results = combine(runs)

    def show() -> int:
        results.save(options.out / "results.json")
        return _show(results, options.out)

    return lambda: written_to(options.out, show)
