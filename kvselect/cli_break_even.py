"""The command ``kvselect break-even``: measure a crossover, show what is stored, forget it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

# torch takes a second to import: what needs it is imported where it is used.
if TYPE_CHECKING:
    from kvselect.crossovers import Crossover

Job = Callable[[], int]
TABLE_COLUMNS = 120
DTYPES = ("float32", "float16", "bfloat16")


def add_break_even(commands: Any) -> None:
    """Add the command and its actions to the parser of ``kvselect``."""
    command = commands.add_parser(
        "break-even", help="from which length selecting beats dense decode steps on this machine"
    )
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    measure = actions.add_parser("measure", help="time both at some lengths, and store the result")
    measure.add_argument("--q-heads", type=int, default=32, help="query heads (default 32)")
    measure.add_argument("--kv-heads", type=int, default=8, help="KV heads (default 8)")
    measure.add_argument("--head-dim", type=int, default=128, help="channels (default 128)")
    measure.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    measure.add_argument(
        "--page-block-size", type=int, help="tokens per page of a paged cache (default: contiguous)"
    )
    measure.add_argument(
        "--policy",
        default="token_select",
        help="as in `kvselect eval`: token_select:topk=1024,sketch=int8 (default token_select)",
    )
    measure.add_argument("--threads", type=int, help="torch's threads (default: as it is set)")
    measure.add_argument("--seconds", type=float, default=2.0, help="about how long (default 2)")
    measure.set_defaults(prepare=_measure)
    show = actions.add_parser("show", help="what is stored for this machine")
    show.add_argument("--all", action="store_true", help="for other machines too")
    show.set_defaults(prepare=_show)
    forget = actions.add_parser("forget", help="remove what is stored for this machine")
    forget.add_argument("--all", action="store_true", help="for other machines too")
    forget.set_defaults(prepare=_forget)


def _measure(options: argparse.Namespace) -> Job:
    import torch

    from kvselect.break_even import check_workload
    from kvselect.checks import require_int
    from kvselect.eval.request import parse_policy

    if options.threads is not None:
        require_int(options.threads, "threads", 1)
    policy = parse_policy(options.policy)
    workload: dict[str, Any] = {
        "num_q_heads": options.q_heads,
        "num_kv_heads": options.kv_heads,
        "head_dim": options.head_dim,
        "dtype": getattr(torch, options.dtype),
        "page_block_size": options.page_block_size,
        "max_seconds": options.seconds,
    }
    check_workload(policy, **workload)
    return lambda: _measure_and_show(policy, workload, options.threads)


def _measure_and_show(policy: Any, workload: dict[str, Any], threads: int | None) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from kvselect import break_even, crossovers

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        found = break_even.measure(policy, **workload)
    finally:
        torch.set_num_threads(before)
    console = Console()
    print(f"{_shape_of(found)}; {_machine_in_use(found)}")
    table = Table()
    for name in ("tokens", "dense us", "selecting us", "selecting / dense", "noise"):
        table.add_column(name, justify="right")
    for point in found.points:
        times = f"{point.dense_us:.0f}", f"{point.selecting_us:.0f}"
        table.add_row(str(point.tokens), *times, f"{point.ratio:.2f}", f"{point.noise:.0%}")
    console.print(table)
    if not found.steady:
        print(
            f"no result: other processes took more than {crossovers.LARGEST_NOISE:.0%} of a "
            "step's time; try again on a quiet machine"
        )
        return 1
    print(f"{crossovers.verdict_of(found)}; measured in {found.seconds:.1f} s")
    path = crossovers.save(found)
    if path is None:
        return 1
    print(f"stored: {path}")
    if (mode := crossovers.break_even_mode(default="auto")) == "off":
        print(f"KVSELECT_BREAK_EVEN={mode}: it will not be used")
    return 0


def _show(options: argparse.Namespace) -> Job:
    return lambda: _show_stored(options.all)


def _show_stored(every_machine: bool) -> int:
    from rich.console import Console
    from rich.table import Table

    from kvselect import crossovers

    here, exactly_here = crossovers.this_machine(), crossovers.machine_identity()
    found = [
        one
        for one in crossovers.find_all()
        if every_machine or here.items() <= dict(one.machine).items()
    ]
    title = f"{len(found)} crossover{'' if len(found) == 1 else 's'}"
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in ("workload", "result", "kernels", "build", "counts here", "measured"):
        table.add_column(name, overflow="fold")
    for one in sorted(found, key=lambda one: (_shape_of(one), one.measured_at)):
        machine = one.machine
        table.add_row(
            _shape_of(one),
            crossovers.verdict_of(one),
            _machine_in_use(one) + (f", {machine['cpu']}" if every_machine else ""),
            f"{machine['kvselect']}, {machine['build']}, torch {machine['torch']}",
            "yes" if machine == exactly_here else "no",
            one.measured_at,
        )
    console = Console()
    if console.width < TABLE_COLUMNS:  # also in a pipe, where rich takes 80
        console = Console(width=TABLE_COLUMNS)
    console.print(table)
    return 0


def _shape_of(crossover: Crossover) -> str:
    from kvselect.crossovers import shape_of
    from kvselect.policies.token_select import TokenSelect

    return shape_of(crossover, TokenSelect().to_dict())


def _machine_in_use(crossover: Crossover) -> str:
    threads = crossover.machine["threads"]
    plural = "" if threads == 1 else "s"
    return f"{crossover.machine['cpu_implementation']}, {threads} thread{plural}"


def _forget(options: argparse.Namespace) -> Job:
    def run() -> int:
        from kvselect import crossovers

        removed = crossovers.forget(every_machine=options.all)
        print(f"removed {removed} crossover{'' if removed == 1 else 's'}")
        return 0

    return run
