"""How long, and for how similar a query, is a list of an earlier step still worth its while?

Decode steps of the embedded models on 16 trained windows (and of any `kvselect capture` dump,
--dump FILE): of every pair of steps up to 64 apart the cosine of the queries before RoPE, the
overlap of the lists, and the share of the fresh candidates' mass that the old list still holds, all
from exact scores. Then the selection cache's rule over the same steps, at thresholds and ages; and
rolling sweeps beside it: bytes and CPU time of a step over a full scan's, against kept mass.

Expected before it ran: consecutive queries have cosines of .4 to .9, so a threshold of .9 seldom
hits; lists of queries at .9 and above hold nearly all of the fresh mass whatever their age, since
age works through the cosine; below .8 they lose it fast; sweeps keep more than reuse at the same
bytes, but in heads that follow the previous token.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvselect.bench.measure import kept_heap, quantiles, threads
from kvselect.bench.request import parse, script_parser
from kvselect.bench.results import print_table, save
from kvselect.bench.step_replay import run
from kvselect.checks import require, require_int
from kvselect.eval.capture import Text, capture, reading_policy, task_text
from kvselect.eval.checkpoint import load_checkpoint
from kvselect.eval.dump import LayerDump, load_dump
from kvselect.eval.perplexity import library_text
from kvselect.eval.stability import Budget, Reuse, replay_cache, reuse_of
from kvselect.eval.stability_chart import stability_chart
from kvselect.eval.step_streams import captured_steps
from kvselect.eval.tasks import TASKS
from kvselect.policies.base import Policy
from kvselect.policies.token_select import TokenSelect
from kvselect.selection import num_kept

WINDOWS = 16
AGES = (1, 2, 4, 8, 16, 32, 64)
EDGES = (-1.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.001)  # of cosines
HELD = 0.95  # share of the fresh candidates' mass that a reused list should hold
LEAST_MASS = 0.01
LOSS_POINTS = 0.5  # of kept mass that reuse may cost (METHODS 2.8)


@dataclasses.dataclass(slots=True)
class Stream:
    """The decode steps of some layers, and how lists are made there."""

    name: str
    layers: Sequence[LayerDump]
    positions: str


def streams(args: argparse.Namespace) -> Iterator[Stream]:
    for model in args.models:
        checkpoint = load_checkpoint(model)
        tokens = args.tokens or WINDOWS * checkpoint.window_tokens
        policy = reading_policy(checkpoint, tokens)
        texts = {}
        if checkpoint.speaks_dialect:
            for task in args.tasks:
                texts[task] = task_text(checkpoint, TASKS[task], tokens, args.steps, seed=1)
        else:
            read = checkpoint.tokenizer.encode(library_text()[: 16 * tokens])[:tokens]
            texts["text"] = Text(read, {"text": "Python's standard library, held-out files"})
        for what, text in texts.items():
            dump = capture(checkpoint, [text], [policy], args.steps)
            for layers in dump.contexts.values():
                yield Stream(f"{checkpoint.name} {what}", layers, policy.positions)
    for path in args.dump:
        content = load_dump(path)
        for told, layers in zip(content.about["read"], content.contexts.values()):
            positions = told["policy"].get("positions", "original")
            yield Stream(f"{path.stem} {told['tokens']}", layers, positions)


def base_policy(args: argparse.Namespace, positions: str) -> TokenSelect:
    return TokenSelect(
        topk=args.topk,
        num_sink_tokens=4,
        num_recent_tokens=128,
        positions="compact" if positions == "compact" else "original",
        dense_below_tokens=0,
    )


def pairs(reuse: Sequence[Reuse]) -> dict[str, np.ndarray[Any, Any]]:
    """All (later step, earlier step) pairs of all heads, flat."""
    names = {"overlap": "overlap", "share": "fresh_share", "mass": "fresh_mass"}
    found: dict[str, list[Any]] = {"age": [], "cosine": [], **{name: [] for name in names}}
    for head in reuse:
        later, earlier = torch.tril_indices(*head.kept.shape, offset=-1)
        near = later - earlier <= AGES[-1]
        later, earlier = later[near], earlier[near]
        found["age"].append((later - earlier).numpy())
        found["cosine"].append(head.cosine[later, earlier].numpy())
        for name, field in names.items():
            found[name].append(getattr(head, field)[later, earlier].numpy())
    return {name: np.concatenate(values) for name, values in found.items()}


def bins(flat: dict[str, np.ndarray[Any, Any]]) -> list[dict[str, Any]]:
    """By cosine, at ages of ranges: pairs, mean overlap, share of the fresh mass, 10 % quantile.

    Mass old lists hold over mass fresh picks hold, all pairs together: heads that look nowhere far
    have next to nothing to lose. The quantile is of pairs with at least `LEAST_MASS` to lose.
    """
    rows = []
    ranges = [(1, AGES[-1]), (1, 1), (2, 8), (9, 32), (33, 64)]
    for low_age, high_age in ranges:
        for low, high in itertools.pairwise(EDGES):
            at = (flat["age"] >= low_age) & (flat["age"] <= high_age)
            at &= (flat["cosine"] >= low) & (flat["cosine"] < high)
            told = flat["share"][at & (flat["mass"] >= LEAST_MASS)]
            if not told.size:
                continue
            weights = flat["mass"][at]
            rows.append(
                {
                    "part": "pairs",
                    "ages": [low_age, high_age],
                    "cosine": [max(low, -1.0), min(high, 1.0)],
                    "cosine_mean": float(flat["cosine"][at].mean()),
                    "count": int(at.sum()),
                    "overlap": float(flat["overlap"][at].mean()),
                    "share": float((flat["share"][at] * weights).sum() / weights.sum()),
                    "share_p10": float(np.quantile(told, 0.1)),
                }
            )
    return rows


def cache_rows(
    by_layer: dict[int, list[Reuse]], thresholds: Sequence[float], ages: Sequence[int]
) -> list[dict[str, Any]]:
    """The selection cache's rule at every setting: hits, and points of kept mass lost."""
    rows = []
    for threshold in thresholds:
        for max_age in ages:
            layers = {}
            for index, heads in by_layer.items():
                found = [replay_cache(head, threshold, max_age) for head in heads]
                layers[index] = {
                    "hit_rate": statistics.fmean(one.hit_rate for one in found),
                    "loss_points": 100
                    * statistics.fmean(one.kept_fresh - one.kept for one in found),
                }
            rows.append(
                {
                    "part": "cache",
                    "threshold": threshold,
                    "max_age": max_age,
                    "hit_rate": statistics.fmean(x["hit_rate"] for x in layers.values()),
                    "loss_points": statistics.fmean(x["loss_points"] for x in layers.values()),
                    "worst_loss_points": max(x["loss_points"] for x in layers.values()),
                    "layers": layers,
                }
            )
    return rows


def sweeps(
    stream: Stream, base: TokenSelect, segments: Sequence[int], thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """A full scan, the selection cache and rolling sweeps on every layer's steps."""
    policies: dict[str, Policy] = {"full scan": base}
    for threshold in thresholds:
        name = f"cosine cache {threshold:g}"
        policies[name] = dataclasses.replace(base, similarity_threshold=threshold)
    for count in segments:
        for factor in (1.0, 2.0):
            policies[f"rolling {count}, {factor:g}x"] = dataclasses.replace(
                base, num_segments=count, pool_factor=factor, rolling_audit_interval=None
            )
    rows = []
    for layer in stream.layers:
        outcomes = run([captured_steps(layer, stream.positions)], policies)
        full = outcomes["full scan"]
        full_ms = quantiles(full.step_ms)[0]
        for name, outcome in outcomes.items():
            rows.append(
                {
                    "part": "sweep",
                    "layer": layer.index,
                    "contender": name,
                    "bytes_over_full": outcome.bytes_read / full.bytes_read,
                    "time_over_full": quantiles(outcome.step_ms)[0] / full_ms,
                    "kept_mass": outcome.kept_mass,
                    "mass_over_full": outcome.kept_mass / full.kept_mass,
                    "step_ms": [round(ms, 4) for ms in outcome.step_ms],
                }
            )
    return rows


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stream in streams(args):
        base = base_policy(args, stream.positions)
        budget = Budget(
            keep=num_kept(base.topk, base.overselect),
            num_sink_tokens=base.num_sink_tokens,
            num_recent_tokens=base.num_recent_tokens,
        )
        by_layer = {
            layer.index: reuse_of(layer, stream.positions, budget) for layer in stream.layers
        }
        consecutive = {
            index: statistics.fmean(float(head.cosine.diagonal(-1).mean()) for head in heads)
            for index, heads in by_layer.items()
        }
        found = [{"part": "consecutive", "cosine_by_layer": consecutive}]
        found += bins(pairs([head for heads in by_layer.values() for head in heads]))
        found += cache_rows(by_layer, args.thresholds, args.max_ages)
        found += sweeps(stream, base, args.segments, (0.9, 0.7))
        rows += [{"stream": stream.name} | row for row in found]
        show(stream.name, [row for row in rows if row["stream"] == stream.name], args)
    return rows


def show(name: str, rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """The tables of one stream."""
    cells = [
        [
            f"{row['cosine'][0]:.2f} to {row['cosine'][1]:.2f}",
            str(row["count"]),
            f"{row['overlap']:.3f}",
            f"{row['share']:.3f}",
            f"{row['share_p10']:.3f}",
        ]
        for row in rows
        if row["part"] == "pairs" and row["ages"] == [1, AGES[-1]]
    ]
    columns = ["cosine", "pairs", "overlap", "share of fresh\nmass, mean", "10 %\nquantile"]
    cosines = next(row["cosine_by_layer"] for row in rows if row["part"] == "consecutive")
    told = ", ".join(f"{value:.2f}" for value in cosines.values())
    print_table(f"{name}: pairs of steps; consecutive cosine by layer {told}", columns, cells)
    cells = [
        [
            f"{row['threshold']:g}",
            str(row["max_age"]),
            f"{100 * row['hit_rate']:.0f} %",
            f"{row['loss_points']:.2f}",
            f"{row['worst_loss_points']:.2f}",
        ]
        for row in rows
        if row["part"] == "cache" and row["max_age"] in (args.max_ages[0], args.max_ages[-1])
    ]
    columns = ["threshold", "max_age", "hits", "points of mass\nlost, mean", "worst\nlayer"]
    print_table(f"{name}: the selection cache's rule, exact scores", columns, cells)
    sweep = [row for row in rows if row["part"] == "sweep"]
    cells = []
    for contender in dict.fromkeys(row["contender"] for row in sweep):
        mine = [row for row in sweep if row["contender"] == contender]
        cells.append(
            [
                contender,
                f"{statistics.fmean(row['bytes_over_full'] for row in mine):.2f}",
                f"{statistics.fmean(row['time_over_full'] for row in mine):.2f}",
                *(f"{row['mass_over_full']:.3f}" for row in mine),
            ]
        )
    columns = ["", "bytes of\na full scan", "CPU time"]
    columns += [f"mass over\nfull, layer {row['layer']}" for row in mine]
    print_table(f"{name}: a step, int4 sketch, one thread", columns, cells)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """The setting with most hits that costs no layer of any stream more than `LOSS_POINTS`."""
    found: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == "cache":
            found.setdefault((row["threshold"], row["max_age"]), []).append(row)
    fine = {
        setting: statistics.fmean(row["hit_rate"] for row in mine)
        for setting, mine in found.items()
        if max(row["worst_loss_points"] for row in mine) <= LOSS_POINTS
    }
    if not fine:
        return f"no threshold keeps every layer within {LOSS_POINTS} points of mass"
    threshold, max_age = max(fine, key=lambda setting: (fine[setting], setting))
    return (
        f"most hits within {LOSS_POINTS} points of mass in every layer: threshold {threshold:g}, "
        f"max_age {max_age} ({100 * fine[threshold, max_age]:.0f} % hits)"
    )


def safe_cosine(rows: Sequence[dict[str, Any]]) -> str:
    """From which cosine on old lists of any age hold `HELD` of the fresh mass, in all streams."""
    binned = [row for row in rows if row["part"] == "pairs" and row["ages"] == [1, AGES[-1]]]
    poor = [row["cosine"][1] for row in binned if row["share"] < HELD]
    old = [
        row["share"]
        for row in rows
        if row["part"] == "pairs" and row["ages"] == [33, 64] and row["cosine"][0] >= 0.9
    ]
    told = f"; at 0.9 and ages 33 to 64: at least {min(old):.3f}" if old else ""
    safe = f"from cosine {max(poor):g} on" if poor else "at every cosine"
    return f"old lists hold {HELD} of the fresh candidates' mass {safe}{told}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--models", nargs="*", default=["embedded"])
    parser.add_argument("--tasks", nargs="+", default=["niah_multikey", "vt"])
    parser.add_argument("--dump", type=Path, nargs="*", default=[], help="of kvselect capture")
    parser.add_argument("--tokens", type=int, help="default: 16 trained windows")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--topk", type=int, default=64)
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98]
    )
    parser.add_argument("--max-ages", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 8, 16])
    quick = {"tokens": 1024, "steps": 12, "tasks": ["vt"], "segments": [2]}
    args = parse(parser, arguments, quick)
    for name in ("steps", "topk"):
        require_int(getattr(args, name), name, 1)
    for threshold in args.thresholds:
        require(0.0 < threshold <= 1.0, "thresholds", threshold, "floats in (0, 1]")
    with threads(1), kept_heap():
        rows = measure(args)
    print(safe_cosine(rows))
    print(verdict(rows))
    print("written:", save(args.out, parser.description or "", vars(args), rows))
    picture = args.out.with_suffix(".png")
    stability_chart(rows).savefig(picture, facecolor="white")
    print("written:", picture)


if __name__ == "__main__":
    main()
