"""The command ``kvselect``: its subcommands. Bad input: one paragraph and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from kvselect.bench import command as bench_command
from kvselect.cli_break_even import add_break_even
from kvselect.cli_capture import add_capture
from kvselect.cli_eval import add_eval
from kvselect.cli_explain import add_explain
from kvselect.cli_perplexity import add_perplexity

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

    add_eval(commands)
    add_perplexity(commands)
    add_explain(commands)
    add_capture(commands)
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


def _bench(options: argparse.Namespace) -> Job:
    return bench_command.prepare(options)
