"""Which sketch, how far over-selected, keeps the exact top-k's attention mass for the fewest bytes?

Every way to rank tokens without reading their keys (`kvselect.eval.key_estimates`), at equal
numbers of tokens attended: on Gaussian and on structured keys, on queries and keys of the embedded
models while they answer questions on 16 trained windows, and on any dump of `kvselect capture`
(--dump FILE). No sinks, no window: every token before the first query competes.

Expected before it ran: int8 is as good as the keys; int4 at 1.25 keeps more mass than the exact
top-k at 1; its high plane alone does not, and misses tokens many times as heavy as the last of the
top-k; pages and channels read less and keep a half or less; one list per layer keeps less than one
per KV head.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvselect.bench.measure import threads
from kvselect.bench.request import parse, script_parser
from kvselect.bench.results import print_table, save
from kvselect.checks import require, require_int
from kvselect.eval.capture import capture, reading_policy, task_text
from kvselect.eval.checkpoint import load_checkpoint
from kvselect.eval.dump import LayerDump, load_dump
from kvselect.eval.fidelity import (
    Case,
    captured_case,
    compare,
    gaussian_case,
    structured_case,
)
from kvselect.eval.fidelity_chart import fidelity_chart
from kvselect.eval.key_estimates import ESTIMATORS, find_estimators
from kvselect.eval.tasks import TASKS

WINDOWS = 16  # trained windows that the embedded models read
WORST_MISS = 2.0  # thresholds
PAGE = 256  # topk is a multiple: so is every over-selection of the largest pages


def drawn(args: argparse.Namespace) -> Iterator[tuple[str, str, str, Case]]:
    """Synthetic cases: keys, context, layer, and what is compared."""
    for name, make in (("Gaussian", gaussian_case), ("structured", structured_case)):
        for seed in range(args.seeds):
            sizes = args.tokens, args.kv_heads, args.group_size, args.head_dim
            yield name, "drawn", f"seed {seed}", make(*sizes, seed=seed)


def of_layers(
    name: str, layers: Sequence[LayerDump], args: argparse.Namespace
) -> Iterator[tuple[str, str, str, Case]]:
    for layer in layers:
        for positions, told in (("original", "rotated"), ("compact", "un-rotated")):
            if positions == "compact" and layer.rope is None:
                continue
            case = captured_case(layer, positions, args.queries)
            yield f"{name}, {told}", f"{layer.num_tokens}", f"layer {layer.index}", case


def trained(args: argparse.Namespace) -> Iterator[tuple[str, str, str, Case]]:
    """The models' own queries: the embedded ones read a task's sample and its questions."""
    for model in args.models:
        checkpoint = load_checkpoint(model)
        tokens = args.trained_tokens or WINDOWS * checkpoint.window_tokens
        for task in args.tasks:
            text = task_text(checkpoint, TASKS[task], tokens, 64, seed=1)
            policy = reading_policy(checkpoint, tokens)
            dump = capture(checkpoint, [text], [policy], 64)
            for layers in dump.contexts.values():
                yield from of_layers(f"{model} {task}", layers, args)


def dumped(args: argparse.Namespace) -> Iterator[tuple[str, str, str, Case]]:
    for path in args.dump:
        for layers in load_dump(path).contexts.values():
            yield from of_layers(path.stem, layers, args)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per keys, context, layer (or seed), scope, sketch and over-selection."""
    estimators = find_estimators(args.sketches)
    rows: list[dict[str, Any]] = []
    for cases in (drawn(args), trained(args), dumped(args)):
        for keys, context, layer, case in cases:
            tokens = case.k.shape[0]
            topk = max(PAGE, round(tokens * args.share / PAGE) * PAGE)
            allowed = f"at least {2 * topk} (topk {topk}, over-selected)"
            require(tokens >= max(args.overselect) * topk, "tokens", tokens, allowed)
            about = {"keys": keys, "context": context, "layer": layer, "tokens": tokens}
            for one in compare(case, topk, estimators, args.overselect):
                rows.append(about | {"topk": topk} | dataclasses.asdict(one))
    return rows


def mean_of(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Over layers or seeds; of misses and of heads the worst."""
    values = [row[name] for row in rows]
    worst = {"heaviest_miss": max, "mass_ratio_min": min, "output_error_max": max}
    return worst.get(name, statistics.fmean)(values)  # type: ignore[operator, no-any-return]


def table(rows: Sequence[dict[str, Any]], factors: Sequence[float]) -> None:
    for keys in dict.fromkeys(row["keys"] for row in rows):
        cells = []
        mine = [row for row in rows if row["keys"] == keys]
        for scope in dict.fromkeys(row["scope"] for row in mine):
            for sketch in dict.fromkeys(row["sketch"] for row in mine):
                at = {
                    factor: [
                        row
                        for row in mine
                        if (row["sketch"], row["scope"], row["overselect"])
                        == (sketch, scope, factor)
                    ]
                    for factor in factors
                }
                best = max(f for f in factors if f <= 1.5)
                one = at[best]
                cells.append(
                    [
                        f"{sketch}, {scope}",
                        f"{100 * mean_of(one, 'bytes_share'):.1f}",
                        *(f"{mean_of(at[f], 'mass_ratio'):.3f}" for f in factors),
                        *(f"{mean_of(at[f], 'mass_ratio_min'):.3f}" for f in factors),
                        f"{mean_of(one, 'recall'):.4f}",
                        f"{mean_of(one, 'heaviest_miss'):.2f}",
                        f"{mean_of(one, 'output_error'):.3f}",
                    ]
                )
        columns = ["sketch, scope", f"% of dense\nbytes {best}x"]
        columns += [f"mass\n{f}x" for f in factors] + [f"worst head\n{f}x" for f in factors]
        columns += [f"recall\n{best}x", f"worst miss\n{best}x", f"output\nerror {best}x"]
        contexts = sorted({(row["tokens"], row["topk"]) for row in mine})
        told = ", ".join(f"top {topk} of {tokens}" for tokens, topk in contexts)
        print_table(f"{keys}: {told}", columns, cells)
    print(
        "mass: kept, over what the exact top-k per KV head keeps at 1x. worst head: lowest of\n"
        "all layers. recall: a token that ties with the last of the top-k counts. worst miss: the\n"
        "heaviest vote missed over the last of the top-k, of all layers, heads and queries."
    )


def verdict(rows: Sequence[dict[str, Any]], worst_miss: float | None = None) -> str:
    """The fewest bytes at which every head of every kind of keys keeps the exact top-k's mass.

    ``worst_miss``: and no vote beyond so many thresholds is missed.
    """
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["scope"] == "kv_head":
            found.setdefault((row["sketch"], row["overselect"]), []).append(row)
    told = "the exact top-k's mass in every head"
    if worst_miss is not None:
        told += f", and miss nothing of {worst_miss:g} thresholds"
    enough = [
        (mean_of(mine, "bytes_share"), sketch, factor)
        for (sketch, factor), mine in found.items()
        if mean_of(mine, "mass_ratio_min") >= 1.0
        and (worst_miss is None or mean_of(mine, "heaviest_miss") < worst_miss)
    ]
    if not enough:
        return f"no sketch keeps {told}"
    share, sketch, factor = min(enough)
    return f"fewest bytes that keep {told}: {sketch} at {factor}x ({100 * share:.1f} % of dense)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--sketches", nargs="+", default=list(ESTIMATORS))
    parser.add_argument("--overselect", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0])
    parser.add_argument("--share", type=float, default=1 / 16, help="topk over tokens (1/16)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the drawn keys")
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--models", nargs="*", default=["embedded"])
    parser.add_argument("--tasks", nargs="+", default=["niah_multikey", "vt"])
    parser.add_argument("--trained-tokens", type=int, help="default: 16 trained windows")
    parser.add_argument("--queries", type=int, default=24, help="of each captured layer")
    parser.add_argument("--dump", type=Path, nargs="*", default=[], help="of kvselect capture")
    quick = {"tokens": 1024, "trained_tokens": 1024, "seeds": 1, "tasks": ["vt"], "queries": 3}
    args = parse(parser, arguments, quick)
    for name in ("tokens", "kv_heads", "group_size", "head_dim", "queries"):
        require_int(getattr(args, name), name.replace("_", "-"), 1)
    require(0.0 < args.share < 1.0, "share", args.share, "between 0 and 1")
    with threads(1):
        rows = measure(args)
    table(rows, args.overselect)
    for worst_miss in (None, WORST_MISS):
        print(verdict(rows, worst_miss))
    print("written:", save(args.out, parser.description or "", vars(args), rows))
    picture = args.out.with_suffix(".png")
    fidelity_chart(rows).savefig(picture, facecolor="white")
    print("written:", picture)


if __name__ == "__main__":
    main()
