"""From what a user types (``--tokens 8k,1m --threads 1,2``) to checked sizes; progress."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvselect.bench.layer import DTYPES, Shape
from kvselect.bench.results import Skipped
from kvselect.checks import require, require_int
from kvselect.machine import usable_cores

__all__ = [
    "OnProgress",
    "OnSkip",
    "add_device",
    "add_sizes",
    "check_sizes",
    "default_threads",
    "no_progress",
    "one_count",
    "parse",
    "parse_counts",
    "progress_bar",
    "script_parser",
    "shape_of",
]

# Told what is going on, and how much of all work (1.0) was just finished.
OnProgress = Callable[[str, float], object]
# Told who does not take part, and why.
OnSkip = Callable[[Skipped], object]

_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_counts(text: str, name: str) -> tuple[int, ...]:
    """Counts such as "8192,32k,1m" (k: 1024, m: 1024 k), in the order given.

    Raises
    ------
    ValueError
        Naming the first entry that is none.
    """
    counts = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\d+)([km]?)", entry.lower())
        count = int(found[1]) * _FACTORS[found[2]] if found else 0
        require(count >= 1, name, entry, "counts >= 1 such as 8192, 32k or 1m, with commas")
        require(count not in counts, name, f"{entry} twice", "each once")
        counts.append(count)
    require(bool(counts), name, text, "at least one, such as 8k,32k")
    return tuple(counts)


def one_count(text: str, name: str) -> int:
    """A single count as `parse_counts` reads it.

    Raises
    ------
    ValueError
        If it is none, or if there are several.
    """
    counts = parse_counts(text, name)
    require(len(counts) == 1, name, text, "one count: this bench measures one at a time")
    return counts[0]


def check_sizes(
    tokens: Sequence[int], threads: Sequence[int], *, topk: int, rounds: int, shortest: int
) -> None:
    """What every bench asks of its sizes.

    Raises
    ------
    ValueError, TypeError
        Naming what is too small.
    """
    require(bool(tokens), "tokens", tokens, "at least one length")
    require(bool(threads), "threads", threads, "at least one number")
    for number in threads:
        require_int(number, "threads", 1)
    require_int(topk, "topk", 1)
    require_int(rounds, "rounds", 1)
    for count in tokens:
        require_int(count, "tokens", shortest)


def add_sizes(
    parser: argparse.ArgumentParser,
    *,
    tokens: str | None,
    threads: str = "1",
    rounds: int | None = 7,
    topk: int | None = 2048,
    heads: tuple[int, int, int] = (32, 8, 128),
) -> None:
    """The options that every bench has; None as a default is settled by the caller.

    Benches that set budgets otherwise have no ``topk`` (None).
    """
    q_heads, kv_heads, head_dim = heads
    parser.add_argument(
        "--tokens", default=tokens, help="context lengths with commas: 8k, 131072, 1m"
    )
    parser.add_argument("--q-heads", type=int, default=q_heads)
    parser.add_argument("--kv-heads", type=int, default=kv_heads)
    parser.add_argument("--head-dim", type=int, default=head_dim)
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    if topk is not None:
        parser.add_argument("--topk", type=int, default=topk, help="tokens kept by score")
    parser.add_argument(
        "--threads",
        default=threads,
        help="numbers of threads with commas; 1 is measured in CPU time, more by the clock",
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="samples of each contender")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The options of benches that run on a GPU as well."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--batch", type=int, default=1, help="rows, all of one length")
    parser.add_argument(
        "--layers",
        type=int,
        help="timed together, each with keys of its own (1; on a GPU 8, more for short contexts)",
    )
    parser.add_argument(
        "--as-on-gpu",
        action="store_true",
        help="a GPU's contenders, tables and rules on whatever device; implied by --device cuda",
    )


def default_threads() -> str:
    """One thread, and two where the process may use two cores."""
    return "1,2" if usable_cores() >= 2 else "1"


def shape_of(options: argparse.Namespace) -> Shape:
    """The layer that ``options`` of `add_sizes` describe."""
    return Shape(
        num_q_heads=options.q_heads,
        num_kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        dtype=options.dtype,
        batch=getattr(options, "batch", 1),
        device=getattr(options, "device", "cpu"),
    )


def script_parser(doc: str | None, script: str) -> argparse.ArgumentParser:
    """Of a script in bench/: its question as description, and where its JSON goes.

    Parameters
    ----------
    doc, script : str
        The script's ``__doc__`` and ``__file__``.
    """
    path = Path(script)
    parser = argparse.ArgumentParser(description=(doc or "").strip().split("\n", 1)[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=path.parent / "results" / f"{path.stem}.json",
        help=f"the JSON file (default: bench/results/{path.stem}.json)",
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, quick: Mapping[str, object]
) -> argparse.Namespace:
    """Options of a script; ``--quick`` stands for the defaults ``quick``.

    Whoever names a size gets that size, quick or not. Results of a quick run go to a folder of
    their own: they answer no question and must not replace those that do. An ``--out`` that cannot
    be written is refused here, before anything is measured.
    """
    parser.add_argument(
        "--quick",
        action="store_true",
        help="seconds instead of minutes: sizes too small to mean anything",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        out: Path = parser.get_default("out")
        parser.set_defaults(**quick, out=out.parent / "quick" / out.name)
        options = parser.parse_args(arguments)
    if options.out.is_dir():
        parser.error(f"out: got {str(options.out)!r}, which is a folder, allowed: a file")
    return options


def no_progress(what: str, amount: float) -> None:
    """Nobody watches."""


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A bar on stderr while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("starting", total=1.0)
        yield lambda what, amount: progress.update(bar, description=what, advance=amount)
