"""The command ``kvselect``: its subcommands. Bad input: one paragraph and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvselect.bench import command as bench_command
from kvselect.cli_break_even import add_break_even

# transformers takes seconds to import: what needs it is imported where it is used, so that --help
# and doctor do not wait.
if TYPE_CHECKING:
    from kvselect.eval.checkpoint import Checkpoint
    from kvselect.eval.runner import Request

TABLE_COLUMNS = 100  # at least: what the table of the demo needs

# What is left to do once the input is known to be good; returns the exit code.
Job = Callable[[], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 fine, 1 something is wrong here, 2 bad input."""
    options = _parser().parse_args(arguments)
    prepare: Callable[[argparse.Namespace], Job] = options.prepare
    try:
        job = prepare(options)
    except (ValueError, TypeError, ImportError) as error:
        print(f"kvselect {options.command}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ImportError) else 2
    try:
        return job()
    except KeyboardInterrupt:
        print(f"kvselect {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvselect",
        description="Token-level KV cache selection for long-context language models.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor", help="what is built, what runs here, a one-second self-check"
    )
    doctor.set_defaults(prepare=_doctor)

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
        epilog="example:\n"
        "  kvselect eval --model ~/models/llama --tasks niah_multikey,vt --lengths 4k,16k"
        " \\\n      --policies dense token_select:topk=2048 token_select:topk=2048,scope=layer",
    )
    evaluate.add_argument("--model", required=True, help="a checkpoint's folder, or: embedded")
    evaluate.add_argument("--tasks", default="niah_single,niah_multikey", help="names, with commas")
    evaluate.add_argument(
        "--lengths", default="4k", help="tokens, 16k (x 1024) or 4x (trained windows), with commas"
    )
    evaluate.add_argument(
        "--policies",
        nargs="+",
        default=["dense", "streaming_llm", "token_select"],
        metavar="POLICY",
        help="name or name:setting=value,setting=value (default: dense streaming_llm token_select)",
    )
    evaluate.add_argument("--samples", type=int, default=50, help="questions per cell (default 50)")
    evaluate.add_argument("--seed", type=int, default=0, help="of the contexts (default 0)")
    evaluate.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16")
    )
    evaluate.add_argument("--device", default="cpu", help="as torch spells it (default cpu)")
    _add_out(evaluate, "kvselect-eval")
    evaluate.set_defaults(prepare=_eval)

    add_break_even(commands)

    bench = commands.add_parser(
        "bench",
        help="time of a decode step, a prefill chunk or each op, beside torch and Quest",
        epilog="Outputs are compared with float32 before anything is timed. README questions have "
        "scripts of their own in a checkout's bench/.",
    )
    bench_command.add_options(bench)
    bench.set_defaults(prepare=_bench)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object, **more: object) -> None:
        from kvselect.ops import build_info

        print(f"kvselect {build_info()['version']}")
        parser.exit()


def _add_out(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        help=f"folder for results.json and score.png (default {default})",
    )


def _doctor(options: argparse.Namespace) -> Job:
    from kvselect import doctor  # noqa: F401  raises if the extension is not built

    return _show_health


def _show_health() -> int:
    from rich.console import Console
    from rich.table import Table

    from kvselect import doctor

    console = Console()
    about = Table(show_header=False, box=None)
    for name, value in doctor.describe():
        about.add_row(f"[bold]{name}[/bold]", value)
    console.print(about)
    checks = doctor.check_ops()
    found = Table(title="self-check: relative error against float64", title_justify="left")
    found.add_column("op")
    implementations = list(dict.fromkeys(check.implementation for check in checks))
    for name in implementations:
        found.add_column(name, justify="right")
    errors = {(check.op, check.implementation): check for check in checks}
    for op in dict.fromkeys(check.op for check in checks):
        row = [errors[op, name] for name in implementations]
        found.add_row(
            op,
            *(
                f"{check.error:.0e}" + ("" if check.passed else " [red]WRONG[/red]")
                for check in row
            ),
        )
    console.print(found)
    failed = [check for check in checks if not check.passed]
    for check in failed:
        console.print(
            f"[red]{check.op}, {check.implementation}: got error {check.error:.2e}, "
            f"allowed: {check.allowed}[/red]"
        )
    console.print("[red]not healthy[/red]" if failed else "[green]all well[/green]")
    return 1 if failed else 0


def _demo(options: argparse.Namespace) -> Job:
    from kvselect.checks import require_int
    from kvselect.eval.checkpoint import EMBEDDED, load_checkpoint
    from kvselect.eval.demo import SAMPLES, demo_request

    samples = SAMPLES if options.samples is None else options.samples
    require_int(samples, "samples", 1)
    require_int(options.seed, "seed", 0)
    checkpoint = load_checkpoint(EMBEDDED)
    request = demo_request(checkpoint.window_tokens, samples, options.seed)
    return _on_one_thread(_run(checkpoint, request, options.out))


def _on_one_thread(job: Job) -> Job:
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
    from kvselect.eval.checkpoint import load_checkpoint
    from kvselect.eval.request import parse_lengths, parse_policies, split_list
    from kvselect.eval.runner import Request
    from kvselect.eval.tasks import find_tasks

    # Everything that can be checked without the model is checked before it loads.
    tasks = find_tasks(split_list(options.tasks))
    policies = parse_policies(options.policies)
    require_int(options.samples, "samples", 1)
    require_int(options.seed, "seed", 0)
    parse_lengths(options.lengths, 1)
    checkpoint = load_checkpoint(options.model, dtype=options.dtype, device=options.device)
    request = Request(
        tasks=tuple(tasks),
        lengths=parse_lengths(options.lengths, checkpoint.window_tokens),
        policies=policies,
        samples=options.samples,
        seed=options.seed,
    )
    return _run(checkpoint, request, options.out)


def _run(checkpoint: Checkpoint, request: Request, out: Path) -> Job:
    """Check that the request can run on this model."""
    from kvselect.eval import runner

    if out.exists() and not out.is_dir():
        raise ValueError(f"out: got {str(out)!r}, which is a file, allowed: a folder, there or not")
    runner.check(checkpoint, request)
    return lambda: _run_and_show(checkpoint, request, out)


def _run_and_show(checkpoint: Checkpoint, request: Request, out: Path) -> int:
    """Run with a progress bar, then show the table; the JSON grows with every finished cell."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from kvselect.eval import picture, report, runner

    out.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("starting", total=runner.total_progress(request))
        results = runner.run(
            checkpoint,
            request,
            on_progress=lambda what, amount: progress.update(bar, description=what, advance=amount),
            on_cells=lambda partial: partial.save(out / "results.json"),
        )
    picture.draw(results, out / "score.png")
    console = Console()
    if console.width < TABLE_COLUMNS:  # also in a pipe, where rich takes 80
        console = Console(width=TABLE_COLUMNS)
    console.print(report.table(results))
    written = f"written: {out / 'results.json'}, {out / 'score.png'}"
    console.print(written, highlight=False, soft_wrap=True)
    return 0


def _bench(options: argparse.Namespace) -> Job:
    return bench_command.prepare(options)
