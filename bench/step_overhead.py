"""What does a decode step cost besides its kernels: our Python, torch's dispatch, the HF layer?

Tiny shapes on one thread: kernels are short and the rest shows. Three tables:

- dense: torch's SDPA, the bare op, and `decode_step` with `Dense`, at lengths from 16 to 512;
- select: the ops of one `TokenSelect` step called alone with the arguments that the step gave them,
  and the step itself: without a selection cache, with lists that hit until they are too old, with
  lists that always miss;
- transformers: one token of a two-layer Llama with random weights, stock and attached.

Every sample is a run of calls in one process, contenders interleaved; the lowest fifth of samples
is what counts, since everything else that runs on the machine only adds. Calls in a row are the
best case: between the layers of a large model caches are cold, and the same code takes about twice
as long.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvselect
from kvselect.bench.measure import Contender, interleaved_ms, quantiles
from kvselect.bench.request import parse, script_parser
from kvselect.bench.results import print_table, save
from kvselect.testing import rel_err

Call = Callable[[], object]
SELECTING = {"topk": 64, "num_sink_tokens": 4, "num_recent_tokens": 128}
STEP_OPS = ("score_tokens", "select_tokens", "sparse_attention")
BOUND = 1.6e-2  # of dense contenders against each other, bfloat16


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--dense-tokens", type=int, nargs="+", default=[16, 64, 128, 512])
    parser.add_argument("--select-tokens", type=int, default=4096)
    parser.add_argument("--q-heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=10, help="calls per sample")
    parser.add_argument("--hf-tokens", type=int, default=1000, help="0: no transformers table")
    quick = {"dense_tokens": [16], "select_tokens": 1024, "hf_tokens": 300, "rounds": 3}
    return parse(parser, arguments, quick)


def filled(args: argparse.Namespace, num_tokens: int, sketch: str | None) -> kvselect.KVCache:
    cache = kvselect.KVCache(
        1,
        args.kv_heads,
        args.head_dim,
        dtype=torch.bfloat16,
        capacity=num_tokens + (args.rounds + 1) * args.calls + 8,
        sketch=sketch,
    )
    k, v = torch.randn(2, 1, num_tokens, args.kv_heads, args.head_dim).bfloat16()
    cache.append(k, v)
    return cache


def measure(contenders: dict[str, Call], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """CPU microseconds per call: the lowest fifth, the median, and all samples."""
    repeated = {n: Contender(call=call, repeats=args.calls) for n, call in contenders.items()}
    samples = interleaved_ms(repeated, args.rounds)
    results: dict[str, dict[str, Any]] = {}
    for name, milliseconds in samples.items():
        microseconds = [1e3 * sample for sample in milliseconds]
        median, low, _ = quantiles(microseconds)
        results[name] = {"p20_us": low, "median_us": median, "samples_us": microseconds}
    return results


def measure_dense(args: argparse.Namespace, num_tokens: int) -> dict[str, dict[str, Any]]:
    cache = filled(args, num_tokens, None)
    q = torch.randn(1, 1, args.q_heads, args.head_dim).bfloat16()
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    sdpa = partial(
        scaled_dot_product_attention,
        q.transpose(1, 2),
        k,
        v,
        enable_gqa=args.q_heads != args.kv_heads,
    )
    policy = kvselect.Dense()
    step = partial(kvselect.decode_step, q, cache, policy, policy.new_state(cache))
    error = rel_err(step()[0], sdpa().transpose(1, 2))
    if error > BOUND:
        raise SystemExit(f"dense: off by {error:.1e}, allowed: {BOUND:.1e}")
    ops = recorded_ops(step)
    contenders: dict[str, Call] = {"torch SDPA": sdpa, "bare op": ops["sparse_attention"]}
    contenders["decode_step"] = step
    return measure(contenders, args)


def recorded_ops(step: Call) -> dict[str, Call]:
    """The ops that a step called, with the arguments that it called them with.

    Run again they find what the step left: an op that changes its arguments gets copies that it
    may spoil.
    """
    seen: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    class Recording:
        def __init__(self, name: str, op: Any) -> None:
            self.name, self.op = name, op

        def __call__(self, *arguments: Any) -> Any:
            copies = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
            seen[self.name] = (self.op, copies)
            return self.op(*arguments)

    packets = {name: getattr(torch.ops.kvselect, name) for name in STEP_OPS}
    for name, packet in packets.items():
        packet.default = Recording(name, packet.default)
    try:
        step()
    finally:
        for packet in packets.values():
            packet.default = packet.default.op
    return {name: partial(op, *arguments) for name, (op, arguments) in seen.items()}


def measure_select(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Steps with a selection cache follow an append each, which is measured alone and taken off."""
    n = args.select_tokens
    shape = (1, 1, args.kv_heads, args.head_dim)
    new = torch.randn(shape).bfloat16()
    queries = torch.randn(7, 1, 1, args.q_heads, args.head_dim).bfloat16()
    fresh = kvselect.TokenSelect(**SELECTING)
    reusing = kvselect.TokenSelect(**SELECTING, similarity_threshold=0.9)

    def growing(policy: kvselect.Policy, num_queries: int) -> Call:
        cache = filled(args, n, "int4")
        state, turn = policy.new_state(cache), 0

        def step() -> object:
            nonlocal turn
            turn += 1
            cache.append(new, new)
            return kvselect.decode_step(queries[turn % num_queries], cache, policy, state)

        step()
        return step

    cache = filled(args, n, "int4")
    step = partial(kvselect.decode_step, queries[0], cache, fresh, fresh.new_state(cache))
    step()
    appended = filled(args, n, "int4")
    contenders: dict[str, Call] = {f"op {name}": op for name, op in recorded_ops(step).items()}
    contenders["step"] = step
    contenders["append"] = lambda: appended.append(new, new)
    contenders["append + step, 64 of 65 hit"] = growing(reusing, 1)
    contenders["append + step, all miss"] = growing(reusing, 7)
    return measure(contenders, args)


def measure_transformers(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    ids = torch.randint(3, 128, (1, args.hf_tokens))
    policies: dict[str, kvselect.Policy | None] = {
        "stock sdpa": None,
        "Dense": kvselect.Dense(),
        "TokenSelect": kvselect.TokenSelect(**SELECTING),
        "TokenSelect, selection cache": kvselect.TokenSelect(**SELECTING, similarity_threshold=0.9),
        "TokenSelect, compact": kvselect.TokenSelect(**SELECTING, positions="compact"),
    }

    def token(policy: kvselect.Policy | None) -> Call:
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1 << 17,
        )
        model = LlamaForCausalLM._from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        ).eval()
        if policy is not None:
            kvselect.attach(model, policy)
        cache = DynamicCache(config=config)
        model(ids, past_key_values=cache)
        return lambda: model(ids[:, :1], past_key_values=cache)

    contenders = {name: token(policy) for name, policy in policies.items()}
    return measure(contenders, args)


def show(title: str, results: dict[str, dict[str, Any]], bare: str | None = None) -> None:
    """``bare``: the row that others are compared with."""
    rows = []
    for name, times in results.items():
        row = [name, f"{times['p20_us']:.1f}", f"{times['median_us']:.1f}"]
        if bare is not None:
            row.append(f"{times['p20_us'] - results[bare]['p20_us']:+.1f}")
        rows.append(row)
    columns = ["", "CPU us, p20", "median"] + ([] if bare is None else [f"less {bare}"])
    print_table(title, columns, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    args = options_of(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = f"{args.q_heads}/{args.kv_heads} heads of {args.head_dim}, bfloat16, one thread"
    results: dict[str, Any] = {}
    with torch.no_grad():
        for n in args.dense_tokens:
            results[f"dense {n}"] = measure_dense(args, n)
            show(f"dense step, {n} tokens, {shape}", results[f"dense {n}"], "bare op")
        select = measure_select(args)
        select_ops = sum(t["p20_us"] for n, t in select.items() if n.startswith("op "))
        results["select"] = select
        show(f"TokenSelect step, {args.select_tokens} tokens, topk 64, {shape}", select)
        append = select["append"]["p20_us"]
        print(f"step: {select['step']['p20_us']:.1f}, its bare ops {select_ops:.1f}")
        for name in ("64 of 65 hit", "all miss"):
            print(f"step, {name}: {select[f'append + step, {name}']['p20_us'] - append:.1f}")
        if args.hf_tokens:
            results["transformers"] = measure_transformers(args)
            title = f"one token of a 2-layer Llama after {args.hf_tokens}, one thread"
            show(title, results["transformers"], "stock sdpa")
    question = (__doc__ or "").splitlines()[0]
    print("written:", save(args.out, question, vars(args), [results]))


if __name__ == "__main__":
    main()
