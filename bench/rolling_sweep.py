"""Is a rolling sweep faster than a scan of the whole sketch, and does it keep the attention mass?

The same decode steps under every contender in turn: a full scan at every step, the cosine selection
cache, and rolling sweeps (number of segments, pool_factor). Twice: the embedded model's own
queries, keys and values, captured while it answers questions token by token on 16 trained windows;
and structured random keys in the shape of a 7-8B model's layer, whose queries drift
(q' = rho q + sqrt(1 - rho^2) noise). Kept mass is measured from outside on the exact keys, in a
second pass that is not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import kvselect
from kvselect.bench.measure import kept_heap, quantiles, threads
from kvselect.bench.request import parse, script_parser
from kvselect.bench.results import print_table, save
from kvselect.bench.step_replay import Outcome, run
from kvselect.eval.checkpoint import EMBEDDED, load_checkpoint
from kvselect.eval.demo import demo_policies
from kvselect.eval.step_streams import Steps, drifting_steps, trained_steps
from kvselect.policies.base import Policy

COLUMNS = [
    "",
    "CPU ms\na step",
    "p20-p80",
    "mean",
    "x full\nscan",
    "bytes of\nfull scan",
    "lists\nreused",
    "stopped",
    "kept mass",
    "of full\nscan's",
    "by layer",
]


def contenders(base: Policy, args: argparse.Namespace) -> dict[str, Policy]:
    """Every way to make the lists, of the same budget."""

    def changed(**settings: Any) -> Policy:
        return dataclasses.replace(base, **settings)

    found = {"full scan": base}
    for threshold in args.thresholds:
        found[f"cosine cache {threshold}"] = changed(similarity_threshold=threshold)
    for factor in args.pool_factors:
        for segments in args.segments:
            found[f"rolling {segments}, {factor:g}x"] = changed(
                num_segments=segments, pool_factor=factor, rolling_audit_interval=None
            )
    found["rolling 8, 2x, audited"] = changed(num_segments=8)
    return found


def table(title: str, layers: list[Steps], outcomes: dict[str, Outcome]) -> None:
    full = outcomes["full scan"]
    full_ms = quantiles(full.step_ms)[0]
    num_lists = sum(layer.q.shape[0] * layer.k.shape[1] for layer in layers)
    rows = []
    for name, outcome in outcomes.items():
        median, low, high = quantiles(outcome.step_ms)
        rows.append(
            [
                name,
                f"{median:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{statistics.fmean(outcome.step_ms):.2f}",
                f"{full_ms / median:.2f}",
                f"{outcome.bytes_read / full.bytes_read:.2f}",
                f"{outcome.num_hits / num_lists:.2f}",
                str(outcome.num_stopped),
                f"{outcome.kept_mass:.3f}",
                f"{outcome.kept_mass / full.kept_mass:.3f}",
                " ".join(f"{mass:.3f}"[1:] for mass in outcome.mass_by_layer),
            ]
        )
    print_table(title, COLUMNS, rows)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table per stream; everything that is in them."""
    results: list[dict[str, Any]] = []

    def report(title: str, what: dict[str, Any], layers: list[Steps], base: Policy) -> None:
        outcomes = run(layers, contenders(base, args))
        cosine = statistics.fmean(layer.cosines() for layer in layers)
        table(f"{title}; consecutive queries' cosine {cosine:.2f}; one thread", layers, outcomes)
        for name, outcome in outcomes.items():
            record = dataclasses.asdict(outcome)
            results.append(what | {"contender": name, "cosine": cosine} | record)

    if args.tasks:
        checkpoint = load_checkpoint(EMBEDDED)
    for task in args.tasks:
        layers = trained_steps(checkpoint, args.trained_tokens, task, args.trained_steps)
        title = f"embedded model, {task}, {args.trained_tokens} tokens, all layers (trained)"
        report(title, {"keys": task}, layers, demo_policies()["TokenSelect compact"])
    for rho in args.rho:
        sizes = args.q_heads, args.kv_heads, args.head_dim
        layer = drifting_steps(*sizes, args.tokens, args.drift_steps, rho)
        for topk in args.topk:
            shape = f"{args.q_heads}/{args.kv_heads} heads of {args.head_dim}, bfloat16"
            title = f"{args.tokens} tokens, {shape}, topk {topk}, drift {rho} (simulated)"
            base = kvselect.TokenSelect(topk=topk, dense_below_tokens=0)
            report(title, {"keys": f"drift {rho}", "topk": topk}, [layer], base)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--pool-factors", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.7])
    parser.add_argument("--tasks", nargs="*", default=["niah_multikey", "vt"])
    parser.add_argument("--trained-tokens", type=int, default=8192)
    parser.add_argument("--trained-steps", type=int, default=80)
    parser.add_argument("--rho", type=float, nargs="*", default=[0.99, 0.9])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--drift-steps", type=int, default=72)
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--topk", type=int, nargs="+", default=[2048, 512])
    quick = {"trained_tokens": 2048, "trained_steps": 12, "tokens": 4096, "drift_steps": 12}
    args = parse(parser, arguments, quick | {"topk": [256], "rho": [0.9], "tasks": ["vt"]})
    with threads(1), kept_heap():
        results = measure(args)
    print("written:", save(args.out, parser.description or "", vars(args), results))


if __name__ == "__main__":
    main()
