"""How much faster is one decode step with selection than dense attention, selection included?

One layer, batch 1, bfloat16, one thread by default. Dense contenders are torch's own in the three
arrangements that people use, and kvselect's dense kernel; all must agree with float32 before
anything is timed. Beside each time stands the bytes it must read over the machine's streaming
bandwidth in the same run, and beside each selecting row the attention mass that it kept, measured
exactly on the same queries (recovered_mass).
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from side_by_side import interleaved_ms, print_table, quantiles, read_gb_per_s, write_results
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kvselect
from kvselect.testing import rel_err, structured_keys

DENSE = (
    "torch SDPA, enable_gqa",
    "torch SDPA, group folded",
    "torch matmul-softmax-matmul",
    "kvselect dense",
)
# Against float32. Values are random, so the output is a small mean of large numbers, and
# arrangements that round the weights to bfloat16 lose more than one rounding's 1.6e-2.
BOUND = 3.2e-2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="decode_step", help="name of the file in bench/results")
    return parser.parse_args()


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Group folded into the query length, two batched products: torch's best on CPU at batch 1."""
    weights = torch.softmax((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).float(), -1)
    return weights.to(v.dtype) @ v


def token_select_as_torch_ops(
    q: Tensor, k: Tensor, v: Tensor, policy: kvselect.TokenSelect
) -> Tensor:
    """The same exact selection, step for step, written with torch operators (q folded)."""
    n, w = k.shape[2], k.shape[2] - policy.num_recent_tokens
    weights = torch.softmax((q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5, -1)
    votes = weights.sum(2)[0, :, policy.num_sink_tokens : w]
    picked = votes.topk(policy.topk, -1).indices.sort(-1).values + policy.num_sink_tokens
    heads = k.shape[1]
    ends = torch.cat([torch.arange(policy.num_sink_tokens), torch.arange(w, n)]).expand(heads, -1)
    index = torch.cat([ends, picked], 1)[None, :, :, None].expand(-1, -1, -1, k.shape[-1])
    return scaled_dot_product_attention(q, k.gather(2, index), v.gather(2, index))


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    group = args.q_heads // args.kv_heads
    bandwidth = read_gb_per_s()
    results = []
    for n in args.tokens:
        q_heads, keys = structured_keys(n, args.kv_heads, group, args.head_dim)
        q = q_heads[None, None].bfloat16()
        k_new = keys[None].bfloat16()
        v_new = torch.randn(k_new.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        caches = {}
        for sketch in ("int4", "int8", None):
            cache = kvselect.KVCache(
                1, args.kv_heads, args.head_dim, dtype=torch.bfloat16, capacity=n, sketch=sketch
            )
            cache.append(k_new, v_new)
            caches[sketch] = cache
        k, v = k_new.transpose(1, 2).contiguous(), v_new.transpose(1, 2).contiguous()
        per_head, folded = q.transpose(1, 2), q.view(1, args.kv_heads, group, args.head_dim)

        policies: dict[str, kvselect.Policy] = {
            "kvselect TokenSelect int4, 1.5x": kvselect.TokenSelect(topk=args.topk),
            "kvselect TokenSelect int8, 1.0x": kvselect.TokenSelect(
                topk=args.topk, sketch="int8", overselect=1.0
            ),
            "kvselect TokenSelect exact keys": kvselect.TokenSelect(
                topk=args.topk, sketch=None, overselect=1.0
            ),
            "kvselect StreamingLLM": kvselect.StreamingLLM(
                num_sink_tokens=128, num_recent_tokens=512 + args.topk, positions="original"
            ),
            "kvselect dense": kvselect.Dense(),
        }
        exact_policy = policies["kvselect TokenSelect exact keys"]
        assert isinstance(exact_policy, kvselect.TokenSelect)

        contenders = {
            "torch SDPA, enable_gqa": partial(
                scaled_dot_product_attention, per_head, k, v, enable_gqa=True
            ),
            "torch SDPA, group folded": partial(scaled_dot_product_attention, folded, k, v),
            "torch matmul-softmax-matmul": partial(matmul_attention, folded, k, v),
            "TokenSelect as torch ops": partial(
                token_select_as_torch_ops, folded, k, v, exact_policy
            ),
        }
        kept, attended = {}, {}
        dense = kvselect.sparse_attention(q, caches["int4"])[0]
        outputs = {name: call().reshape(dense.shape) for name, call in contenders.items()}
        for name, policy in policies.items():
            cache = caches[policy.required_sketch]
            state = policy.new_state(cache)
            contenders[name] = partial(kvselect.decode_step, q, cache, policy, state)
            outputs[name], info = kvselect.decode_step(q, cache, policy, policy.new_state(cache))
            if info.selection is not None:
                kept[name] = float(kvselect.recovered_mass(q, cache, info.selection).mean())
                attended[name] = float(info.selection.topk_length.float().mean())
        truth = matmul_attention(folded.float(), k.float(), v.float()).reshape(dense.shape)
        for name in DENSE:
            error = rel_err(outputs[name], truth)
            if error > BOUND:
                raise SystemExit(f"{name}: off by {error:.1e}, allowed: {BOUND:.1e}")

        row_bytes = 2 * args.head_dim * args.kv_heads  # one token's keys (or values), bfloat16
        codes = {"int4": 4.25 / 8, "int8": 8.25 / 8, None: 2.0}
        must_read = dict.fromkeys(contenders, 2 * row_bytes * n)
        must_read["TokenSelect as torch ops"] = row_bytes * (n + 2 * (args.topk + 640))
        for name, tokens in attended.items():
            policy = policies[name]
            scanned = n if isinstance(policy, kvselect.TokenSelect) else 0
            per_token = codes[policy.required_sketch] * args.head_dim * args.kv_heads
            must_read[name] = int(scanned * per_token + 2 * row_bytes * tokens)
        samples = interleaved_ms(contenders, args.rounds)
        best_torch = min(quantiles(samples[name])[0] for name in DENSE if name.startswith("torch"))
        rows = []
        for name in contenders:
            median, low, high = quantiles(samples[name])
            floor_ms = must_read[name] / bandwidth / 1e6
            error = rel_err(outputs[name], truth)
            rows.append(
                [
                    name,
                    f"{median:.2f}",
                    f"{low:.2f}-{high:.2f}",
                    f"{must_read[name] / median / 1e6:.1f}",
                    f"{median / floor_ms:.1f}",
                    f"{quantiles(samples['torch SDPA, enable_gqa'])[0] / median:.1f}",
                    f"{quantiles(samples['torch SDPA, group folded'])[0] / median:.1f}",
                    f"{best_torch / median:.1f}",
                    f"{attended[name]:.0f}" if name in attended else f"{n}",
                    f"{kept[name]:.3f}" if name in kept else "1",
                    f"{error:.3f}",
                ]
            )
            results.append(
                {
                    "tokens": n,
                    "contender": name,
                    "median_ms": median,
                    "samples_ms": samples[name],
                    "bytes_floor": must_read[name],
                    "times_floor": median / floor_ms,
                    "over_best_torch": best_torch / median,
                    "kept_mass": kept.get(name),
                    "attended": attended.get(name),
                    "output_error_vs_dense_float32": error,
                }
            )
        print_table(
            f"decode step, {n} tokens, {args.q_heads}/{args.kv_heads} heads of {args.head_dim}, "
            f"bfloat16, {args.threads} thread(s); streaming reads {bandwidth:.1f} GB/s; "
            "structured random keys (simulated)",
            [
                "",
                "CPU ms",
                "p20-p80",
                "GB/s",
                "x floor",
                "x gqa",
                "x folded",
                "x best torch",
                "attended",
                "kept mass",
                "error",
            ],
            rows,
        )
    config = {**vars(args), "streaming_gb_per_s": bandwidth}
    print("written:", write_results(args.out, config, results))


if __name__ == "__main__":
    main()
