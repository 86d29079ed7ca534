"""With keep="cpu", how many bytes move per decode step, and what does that save and cost?

The same decode steps on a KVCache and on a TieredKVCache of several sizes, given in longest lists
(`resident_tokens`): the embedded model's own queries while it answers questions on 16 trained
windows, and queries that drift over drawn keys in the shape of a 7-8B model's layer. Every output
must have the bits of the KVCache's. Host and device are both this machine's memory, so bytes are
what a link would carry; milliseconds hold the book-keeping and a copy in memory, but no link.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvselect.bench.measure import kept_heap, quantiles, threads
from kvselect.bench.request import parse, script_parser
from kvselect.bench.results import print_table, save
from kvselect.cache import KVCache
from kvselect.decode import decode_step
from kvselect.eval.checkpoint import EMBEDDED, load_checkpoint
from kvselect.eval.demo import demo_policies
from kvselect.eval.step_streams import Steps, drifting_steps, trained_steps
from kvselect.policies.token_select import TokenSelect
from kvselect.tiered_cache import TieredKVCache

COLUMNS = [
    "resident\ntokens",
    "of the\ncontext",
    "device MB",
    "of a\nKVCache",
    "rows\nfound",
    "KB to the\ndevice a step",
    "of what\nlists read",
    "first step\nKB",
    "CPU ms\na step",
    "KVCache",
]


@dataclass(slots=True)
class Outcome:
    """One size, all layers; bytes and milliseconds are summed over layers, per step."""

    resident_tokens: int
    device_bytes: int
    resident_device_bytes: int  # of KVCaches
    num_found: int
    num_fetched: int
    fetched_bytes: float
    listed_bytes: float
    first_step_bytes: int
    step_ms: list[float]
    resident_step_ms: list[float]


def replay(layers: list[Steps], policy: TokenSelect, resident_tokens: int) -> Outcome:
    """Every step on both kinds of cache; the first one fills the slots and is counted apart."""
    num_steps = layers[0].q.shape[0]
    out = Outcome(resident_tokens, 0, 0, 0, 0, 0.0, 0.0, 0, [0.0] * num_steps, [0.0] * num_steps)
    for layer in layers:
        n, (_, num_heads, head_dim), dtype = layer.num_context, layer.k.shape, layer.k.dtype
        window = policy.num_sink_tokens, policy.num_recent_tokens
        sizes: dict[str, Any] = {"dtype": dtype, "sketch": policy.sketch}
        plain = KVCache(1, num_heads, head_dim, **sizes)
        tiered = TieredKVCache(
            1,
            num_heads,
            head_dim,
            num_sink_tokens=window[0],
            num_recent_tokens=window[1],
            resident_tokens=resident_tokens,
            **sizes,
        )
        caches = plain, tiered
        for cache in caches:
            cache.append(layer.k[None, :n], layer.v[None, :n])
        tiered.drop_whole_rows()
        states = [policy.new_state(cache) for cache in caches]
        for t, q in enumerate(layer.q):
            outs = []
            for cache, state, taken in zip(caches, states, (out.resident_step_ms, out.step_ms)):
                before = time.process_time()
                cache.append(layer.k[None, n + t : n + t + 1], layer.v[None, n + t : n + t + 1])
                outs.append(decode_step(q[None, None], cache, policy, state, rope=layer.rope)[0])
                taken[t] += 1e3 * (time.process_time() - before)
            if not torch.equal(*outs):
                raise SystemExit(f"step {t}: got other bits than a KVCache, allowed: the same")
            if t == 0:
                out.first_step_bytes += tiered.residency.fetched_bytes
                first = dataclasses.replace(tiered.residency)
        counts = tiered.residency
        out.num_found += counts.num_found - first.num_found
        out.num_fetched += counts.num_fetched - first.num_fetched
        out.fetched_bytes += (counts.fetched_bytes - first.fetched_bytes) / (num_steps - 1)
        attended = states[0].decode.tokens_attended / num_steps
        out.listed_bytes += attended * 2 * head_dim * dtype.itemsize
        out.device_bytes += tiered.nbytes
        out.resident_device_bytes += plain.nbytes
    return out


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table per stream; everything that is in them."""
    results: list[dict[str, Any]] = []

    def report(title: str, what: dict[str, Any], layers: list[Steps], policy: TokenSelect) -> None:
        rows = []
        for lists in args.lists:
            outcome = replay(layers, policy, int(lists * policy.capacity))
            listed = outcome.num_found + outcome.num_fetched
            rows.append(
                [
                    f"{outcome.resident_tokens} ({lists:g} lists)",
                    f"{outcome.resident_tokens / layers[0].k.shape[0]:.0%}",
                    f"{outcome.device_bytes / 1e6:.1f}",
                    f"{outcome.device_bytes / outcome.resident_device_bytes:.2f}",
                    f"{outcome.num_found / listed:.1%}",
                    f"{outcome.fetched_bytes / 1e3:.1f}",
                    f"{outcome.fetched_bytes / outcome.listed_bytes:.3f}",
                    f"{outcome.first_step_bytes / 1e3:.0f}",
                    f"{quantiles(outcome.step_ms).median:.2f}",
                    f"{quantiles(outcome.resident_step_ms).median:.2f}",
                ]
            )
            results.append(what | {"lists": lists} | dataclasses.asdict(outcome))
        print_table(title, COLUMNS, rows)

    if args.tasks:
        checkpoint = load_checkpoint(EMBEDDED)
    for task in args.tasks:
        layers = trained_steps(checkpoint, args.trained_tokens, task, args.trained_steps)
        title = f"embedded model, {task}, {args.trained_tokens} tokens, {len(layers)} layers"
        policy: Any = demo_policies()["TokenSelect compact"]
        report(f"{title} (trained)", {"keys": task}, layers, policy)
    for rho in args.rho:
        sizes = args.q_heads, args.kv_heads, args.head_dim
        layer = drifting_steps(*sizes, args.tokens, args.drift_steps, rho)
        shape = f"{args.q_heads}/{args.kv_heads} heads of {args.head_dim}, bfloat16"
        title = f"{args.tokens} tokens, {shape}, topk {args.topk}, drift {rho} (simulated)"
        policy = TokenSelect(topk=args.topk, dense_below_tokens=0)
        report(title, {"keys": f"drift {rho}"}, [layer], policy)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--lists", type=float, nargs="+", default=[1.0, 1.5, 2.0, 4.0, 8.0])
    parser.add_argument("--tasks", nargs="*", default=["niah_multikey", "vt"])
    parser.add_argument("--trained-tokens", type=int, default=8192)
    parser.add_argument("--trained-steps", type=int, default=80)
    parser.add_argument("--rho", type=float, nargs="*", default=[0.99, 0.9])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--drift-steps", type=int, default=48)
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--topk", type=int, default=2048)
    quick = {"trained_tokens": 2048, "trained_steps": 12, "tokens": 4096, "drift_steps": 12}
    quick_lists = {"topk": 256, "rho": [0.9], "tasks": ["vt"], "lists": [1.0, 2.0]}
    args = parse(parser, arguments, quick | quick_lists)
    with threads(1), kept_heap():
        results = measure(args)
    print("written:", save(args.out, parser.description or "", vars(args), results))


if __name__ == "__main__":
    main()
