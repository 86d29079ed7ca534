"""Is a decode step with the measured break-even ever slower than the best dense one, at any length?

One layer, batch 1, bfloat16, one thread by default, CPU time. TokenSelect runs with the crossover
that is stored for this machine (measured first, if there is none); against it stand our own dense
step and torch's three arrangements. "cold": the CPU's caches are emptied before every step, as a
model's other layers do; "hot": the same call ran just before. A second table says what a short step
spends besides its kernel; a third what the decode crossover would do to prefill. Every round runs
all contenders in another order; "/ best" is the median over rounds of one round's ratio, since the
machine is shared, and "of least" the ratio of the least times.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kvselect
from kvselect import break_even, crossovers
from kvselect.attention import attend_queries
from kvselect.bench.contenders import BOUND as BOUNDS
from kvselect.bench.contenders import matmul_attention
from kvselect.bench.measure import kept_heap, quantiles
from kvselect.bench.request import parse, script_parser
from kvselect.bench.results import print_table, save
from kvselect.decode import require_step
from kvselect.machine import last_level_cache_bytes
from kvselect.queries import Queries
from kvselect.testing import rel_err

LENGTHS = [1, 16, 128, 512, 1024, 2048, 4096, 8192, 12288, 16384]
LENGTHS += [20480, 24576, 32768, 65536, 131072]
OURS = "TokenSelect, break-even"
ALWAYS = "TokenSelect, always selecting"
DENSE = "kvselect dense step"
OP = "kvselect dense op alone"
BOUND = BOUNDS[torch.bfloat16]


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--states", nargs="+", default=["cold", "hot"], choices=("cold", "hot"))
    parser.add_argument("--seconds", type=float, default=3.0, help="per length and state (3)")
    parser.add_argument("--measure", action="store_true", help="measure the crossover anew")
    parser.add_argument("--prefill-rounds", type=int, default=5, help="0: no prefill table (5)")
    quick = {"tokens": [16, 1024], "seconds": 0.1, "prefill_rounds": 0, "topk": 256}
    return parse(parser, arguments, quick)


def clock(threads: int) -> Callable[[], float]:
    return time.thread_time if threads == 1 else time.perf_counter


@kept_heap()
def sample_us(
    contenders: dict[str, Callable[[], object]], seconds: float, flush: Tensor | None, threads: int
) -> dict[str, list[float]]:
    """Microseconds of each call; at least 9 rounds, then until the time is up.

    Without ``flush`` each call runs twice, and the second counts.
    """
    now, order = clock(threads), list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    shuffle = random.Random(0).shuffle
    for call in contenders.values():
        call()
    begin = time.perf_counter()
    for number in range(100_000):
        if number >= 9 and time.perf_counter() - begin > seconds:
            break
        shuffle(order)
        for name in order:
            call = contenders[name]
            if flush is not None:
                flush.sum()
            else:
                call()
            before = now()
            call()
            samples[name].append(1e6 * (now() - before))
    return samples


def torch_contenders(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """``q`` [1, 1, heads, dim]; ``k``, ``v`` [1, kv_heads, tokens, dim], contiguous."""
    folded = q.view(1, k.shape[1], -1, q.shape[-1])
    per_head = q.transpose(1, 2)
    return {
        "SDPA, enable_gqa": partial(scaled_dot_product_attention, per_head, k, v, enable_gqa=True),
        "SDPA, group folded": partial(scaled_dot_product_attention, folded, k, v),
        "matmul-softmax-matmul": partial(matmul_attention, folded, k, v),
    }


def parts_us(q: Tensor, cache: kvselect.KVCache, seconds: float, threads: int) -> dict[str, float]:
    """Where a short dense step's time goes, hot, each part by itself [us]."""
    policy = kvselect.TokenSelect()
    state = policy.new_state(cache)

    def queries() -> Queries:
        return Queries(
            q=q,
            phase="decode",
            softmax_scale=0.1,
            cache_seqlens=cache.cache_seqlens,
            max_seqlen=cache.max_seqlen,
        )

    made = queries()
    indices = (None,) * 3
    op = partial(
        torch.ops.kvselect.sparse_attention.default,
        *(q, cache.k_pages, cache.v_pages, cache.block_table, cache.cache_seqlens, cache.starts),
        *(*indices, 0.1, None, None, 0, False),
    )
    parts: dict[str, Callable[[], object]] = {
        "the step": partial(kvselect.decode_step, q, cache, policy, state),
        "checks (require_step)": partial(require_step, q, cache, policy, state, None, None),
        "Queries": queries,
        "policy.select (is it dense? counts)": partial(policy.select, state, made, cache),
        "attend_queries, op included": partial(attend_queries, made, cache, None, None),
        "the op": op,
    }
    samples = sample_us(parts, seconds, None, threads)
    return {name: min(times) for name, times in samples.items()}


def prefill_rows(args: argparse.Namespace, tokens: int, rounds: int) -> list[dict[str, object]]:
    """CPU ms of prefill calls: under the budget, under a decode crossover, dense; interleaved."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for what, cached, new, settings in (
        ("one block of 128", 4096, 128, {"num_tail_tokens": 0}),
        ("one block of 128", 16384, 128, {"num_tail_tokens": 0}),
        ("8 tail blocks of 16", 4096, 128, {}),
        ("8 tail blocks of 16", 16384, 128, {}),
        ("a prompt from empty", 4096, 4096, {}),
        ("a prompt from empty", 8192, 8192, {}),
    ):
        shape = (1, cached, args.kv_heads, args.head_dim)
        k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
        q = torch.randn(1, new, args.q_heads, args.head_dim, generator=generator).bfloat16()
        cache = kvselect.KVCache(1, args.kv_heads, args.head_dim, dtype=torch.bfloat16)
        cache.append(k, v)
        policies: dict[str, kvselect.Policy] = {
            "budget": kvselect.TokenSelect(topk=args.topk, **settings),
            "crossover": kvselect.TokenSelect(
                topk=args.topk, dense_below_tokens=tokens, **settings
            ),
            "dense": kvselect.Dense(),
        }
        samples: dict[str, list[float]] = {name: [] for name in policies}
        now = clock(args.threads)
        for number in range(rounds + 1):
            for name, policy in policies.items():
                state = policy.new_state(cache, {})
                before = now()
                kvselect.prefill(q, cache, policy, state)
                if number:
                    samples[name].append(1e3 * (now() - before))
        least = {name: min(times) for name, times in samples.items()}
        found.append({"call": what, "tokens": cached, "samples_ms": samples, "least_ms": least})
    return found


def show_prefill(prefills: list[dict[str, object]], rounds: int) -> None:
    rows = []
    for row in prefills:
        least_ms: dict[str, float] = row["least_ms"]  # type: ignore[assignment]
        times = [f"{ms:.1f}" for ms in least_ms.values()]
        ratios = [f"{least_ms[name] / least_ms['dense']:.2f}" for name in ("budget", "crossover")]
        rows.append([str(row["call"]), str(row["tokens"]), *times, *ratios])
    print_table(
        f"prefill, ms (least of {rounds}): selecting above the budget; dense below the decode "
        "crossover",
        ["call", "tokens", "budget", "crossover", "Dense", "budget / Dense", "crossover / Dense"],
        rows,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    args = options_of(arguments)
    torch.set_num_threads(args.threads)
    policy = kvselect.TokenSelect(topk=args.topk)
    shape = {
        "num_q_heads": args.q_heads,
        "num_kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "dtype": torch.bfloat16,
    }
    if args.measure:
        crossovers.save(break_even.measure(policy, **shape))
    found = break_even.crossover_for(policy, **shape)
    if found is None:
        raise SystemExit("crossover: got a machine too busy to measure on, allowed: a quiet one")
    print(f"{crossovers.verdict_of(found)}, measured {found.measured_at}")

    generator = torch.Generator().manual_seed(0)
    q = 2.0 * torch.randn(1, 1, args.q_heads, args.head_dim, generator=generator)
    q = q.bfloat16()
    longest = max(args.tokens)
    kv_shape = (1, longest, args.kv_heads, args.head_dim)
    k_all, v_all = (torch.randn(kv_shape, generator=generator).bfloat16() for _ in range(2))
    flush = torch.ones(2 * last_level_cache_bytes() // 8, dtype=torch.int64)
    results = []
    for state_name in args.states:
        rows = []
        for n in args.tokens:
            cache = kvselect.KVCache(
                1, args.kv_heads, args.head_dim, dtype=torch.bfloat16, capacity=n
            )
            cache.append(k_all[:, :n], v_all[:, :n])
            k, v = cache.k.transpose(1, 2).contiguous(), cache.v.transpose(1, 2).contiguous()
            policies: dict[str, kvselect.Policy] = {
                OURS: policy,
                ALWAYS: kvselect.TokenSelect(topk=args.topk, dense_below_tokens=0),
                DENSE: kvselect.Dense(),
            }
            states = {
                name: one.new_state(cache, {args.q_heads: found}) for name, one in policies.items()
            }
            torchs = torch_contenders(q, k, v)
            contenders: dict[str, Callable[[], object]] = {
                **{
                    name: partial(kvselect.decode_step, q, cache, one, states[name])
                    for name, one in policies.items()
                },
                OP: partial(
                    torch.ops.kvselect.sparse_attention.default,
                    *(q, cache.k_pages, cache.v_pages, None, cache.cache_seqlens),
                    *(None, None, None, None, args.head_dim**-0.5, None, None, 0, False),
                ),
                **torchs,
            }
            truth = matmul_attention(
                q.view(1, args.kv_heads, -1, args.head_dim).float(), k.float(), v.float()
            ).flatten()
            _, info = kvselect.decode_step(q, cache, policy, states[OURS])
            for name in (DENSE, OP, *torchs):
                out = contenders[name]()
                got = out[0] if isinstance(out, tuple) else out
                assert isinstance(got, Tensor)
                error = rel_err(got.flatten(), truth)
                if error > BOUND:
                    raise SystemExit(f"{name}: off by {error:.1e}, allowed: {BOUND:.1e}")
            samples = sample_us(
                contenders, args.seconds, flush if state_name == "cold" else None, args.threads
            )
            least = {name: min(times) for name, times in samples.items()}
            median = {name: quantiles(times)[0] for name, times in samples.items()}
            torch_best = min(torchs, key=lambda name: median[name])
            best = min((DENSE, torch_best), key=lambda name: median[name])

            def paired(name: str, other: str, samples: dict[str, list[float]] = samples) -> float:
                return statistics.median(a / b for a, b in zip(samples[name], samples[other]))

            rows.append(
                [
                    str(n),
                    "dense" if info.selection is None else "selects",
                    *(f"{median[name]:.0f}" for name in (OURS, ALWAYS, DENSE, OP)),
                    f"{median[torch_best]:.0f}",
                    torch_best,
                    f"{paired(OURS, best):.3f}",
                    f"{least[OURS] / least[best]:.2f}",
                    f"{paired(OURS, DENSE):.3f}",
                    f"{paired(OP, best):.2f}",
                ]
            )
            results.append(
                {
                    "state": state_name,
                    "tokens": n,
                    "selects": info.selection is not None,
                    "least_us": least,
                    "median_us": median,
                    "rounds": len(samples[OURS]),
                    "best_dense": best,
                    "ratio_to_best_dense": paired(OURS, best),
                    "ratio_to_best_dense_of_least": least[OURS] / least[best],
                    "ratio_to_own_dense": paired(OURS, DENSE),
                }
            )
        print_table(
            f"{state_name}: us of one decode step (medians), {args.q_heads}/{args.kv_heads} heads "
            f"of {args.head_dim}, bfloat16, {args.threads} thread(s); best: of our dense step and "
            "torch's",
            [
                *("tokens", "runs", "break-even", "selecting", "dense", "dense op"),
                *("torch", "its best arrangement", "/ best", "of least", "/ dense", "op / best"),
            ],
            rows,
        )
    parts = {}
    for n in (1, 512):
        cache = kvselect.KVCache(1, args.kv_heads, args.head_dim, dtype=torch.bfloat16)
        cache.append(k_all[:, :n], v_all[:, :n])
        parts[n] = parts_us(q, cache, args.seconds, args.threads)
    print_table(
        "hot: parts of a short dense step, each by itself [us]",
        ["tokens", *parts[1]],
        [[str(n), *(f"{us:.1f}" for us in times.values())] for n, times in parts.items()],
    )
    prefills = []
    if args.prefill_rounds:
        prefills = prefill_rows(args, found.dense_below_tokens, args.prefill_rounds)
        show_prefill(prefills, args.prefill_rounds)
    config = {**vars(args), "crossover": found.to_dict()}
    found_here = [{"steps": results, "parts_us": parts, "prefill": prefills}]
    print("written:", save(args.out, (__doc__ or "").splitlines()[0], config, found_here))


if __name__ == "__main__":
    main()
