"""From which group size and prefix length on does attending a shared prefix once pay?

A decode step of a group of requests with a common prefix and 128 tokens each of their own: the
prefix read once for up to 16 query rows per KV head (`SharedPrefix.attend`) against
`sparse_attention` over every request's whole row. Bytes are counted from caches and passes.
Expected: the prefix's bytes per
step divided by the group size; time in the same direction as soon as the prefix is long. With
``--model`` the same through `attach`: decode steps of a whole model on a cache of
`Handle.share_prefixes` against an ordinary one, `Dense` on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvselect import Dense, KVCache, attach, sparse_attention
from kvselect.bench import measure, results
from kvselect.bench.request import (
    add_sizes,
    parse,
    parse_counts,
    script_parser,
    shape_of,
)
from kvselect.eval.checkpoint import embedded_model_path, is_embedded, load_checkpoint
from kvselect.prefix_plan import PrefixGroup, PrefixPlan
from kvselect.shared_prefix import SharedPrefix, num_prefix_passes, select_shared
from kvselect.testing import TOLERANCE, make_qkv, rel_err

PRIVATE_TOKENS = 128
TOPK = 256  # of each request, for the size of the union


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One group. ``*_bytes_ratio``: keys and values per step, or stored, separate over shared."""

    members: int
    prefix_passes: int
    prefix_tokens: int
    private_tokens: int
    shared_kv_bytes: int
    separate_kv_bytes: int
    bytes_ratio: float
    prefix_bytes_ratio: float
    stored_bytes_ratio: float
    union_over_topk: float
    output_error: float
    speed_up: float
    threads: int
    clock: str
    shared_ms: float
    separate_ms: float
    samples_ms: dict[str, list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One group through `attach`: a step of the whole model, bytes of its caches."""

    members: int
    prefix_tokens: int
    private_tokens: int
    shared_bytes: int
    separate_bytes: int
    stored_bytes_ratio: float
    logit_error: float
    speed_up: float
    threads: int
    clock: str
    shared_ms: float
    separate_ms: float
    samples_ms: dict[str, list[float]]


def bytes_of(cache: KVCache) -> int:
    """Keys and values of the stored tokens."""
    heads = cache.num_kv_heads * cache.head_dim
    return 2 * sum(cache.lengths) * heads * torch.empty((), dtype=cache.dtype).element_size()


def run(
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    members: int,
    tokens: int,
    number: int,
    rounds: int,
) -> Row:
    num_q_heads, num_kv_heads, head_dim = sizes
    q, _, _ = make_qkv(members, 1, 1, *sizes, dtype=dtype)
    _, k, v = make_qkv(1, 1, tokens, *sizes, dtype=dtype, seed=1)
    _, own_k, own_v = make_qkv(members, 1, PRIVATE_TOKENS, *sizes, dtype=dtype, seed=2)
    prefix_cache, own, whole = (
        KVCache(rows, num_kv_heads, head_dim, dtype=dtype, sketch=None, capacity=capacity)
        for rows, capacity in (
            (1, tokens),
            (members, PRIVATE_TOKENS),
            (members, tokens + PRIVATE_TOKENS),
        )
    )
    prefix_cache.append(k, v)
    own.append(own_k, own_v)
    whole.append(k.expand(members, -1, -1, -1), v.expand(members, -1, -1, -1))
    whole.append(own_k, own_v)
    prefix = SharedPrefix(prefix_cache, members)
    calls = {
        "shared": partial(prefix.attend, q, own),
        "separate": partial(sparse_attention, q, whole),
    }
    error = rel_err(calls["shared"]()[0].float(), calls["separate"]()[0].float())
    if error > 2 * TOLERANCE[dtype]:
        raise SystemExit(f"outputs differ, nothing timed: {members} x {tokens}: {error}")
    union = select_shared(q, prefix, topk=min(TOPK, tokens))
    contenders = {name: measure.Contender(call=call) for name, call in calls.items()}
    with measure.threads(number):
        samples = measure.interleaved_ms(contenders, rounds, num_threads=number)
    median = {name: measure.quantiles(times).median for name, times in samples.items()}
    passes = num_prefix_passes(members * num_q_heads // num_kv_heads)
    prefix_bytes, separate = passes * bytes_of(prefix_cache), bytes_of(whole)
    shared = prefix_bytes + bytes_of(own)
    return Row(
        members=members,
        prefix_passes=passes,
        prefix_tokens=tokens,
        private_tokens=PRIVATE_TOKENS,
        shared_kv_bytes=shared,
        separate_kv_bytes=separate,
        bytes_ratio=separate / shared,
        prefix_bytes_ratio=(separate - bytes_of(own)) / prefix_bytes,
        stored_bytes_ratio=whole.nbytes / (prefix_cache.nbytes + own.nbytes),
        union_over_topk=float(union.union_size.float().mean()) / min(TOPK, tokens),
        output_error=error,
        speed_up=median["separate"] / median["shared"],
        threads=number,
        clock=measure.clock_name(number),
        shared_ms=median["shared"],
        separate_ms=median["separate"],
        samples_ms=samples,
    )


def run_model(
    model: PreTrainedModel, members: int, tokens: int, number: int, rounds: int
) -> ModelRow:
    """A decode step of a whole model; every call is undone by a crop."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)

    def random_ids(count: int) -> list[int]:
        return torch.randint(3, config.vocab_size, (count,), generator=generator).tolist()

    prefix = random_ids(tokens)
    prompts = [prefix + random_ids(PRIVATE_TOKENS) for _ in range(members)]
    ids = torch.tensor(prompts)
    with attach(model, Dense()) as handle, torch.no_grad(), measure.threads(number):
        plan = PrefixPlan((PrefixGroup(tuple(range(members)), tokens),), ids.numel(), 0)
        caches = {
            "shared": handle.share_prefixes(prompts, plan=plan).past_key_values,
            "separate": DynamicCache(config=config),
        }
        for name, cache in caches.items():
            rest = ids[:, cache.get_seq_length() : -1]
            model.model(rest, past_key_values=cache)
            assert cache.get_seq_length() == ids.shape[1] - 1, name

        def step(cache: Cache) -> Tensor:
            logits: Tensor = model(ids[:, -1:], past_key_values=cache).logits
            cache.crop(-1)
            return logits

        logits = {name: step(cache) for name, cache in caches.items()}
        error = rel_err(logits["shared"].float(), logits["separate"].float())
        if error > 1e-4:
            raise SystemExit(f"logits differ, nothing timed: {members} x {tokens}: {error}")
        contenders = {
            name: measure.Contender(call=partial(step, cache)) for name, cache in caches.items()
        }
        samples = measure.interleaved_ms(contenders, rounds, num_threads=number)
        held = {
            name: sum(
                layer.cache.nbytes + (layer.groups.nbytes if name == "shared" else 0)
                for layer in cache.layers
            )
            for name, cache in caches.items()
        }
    median = {name: measure.quantiles(times).median for name, times in samples.items()}
    return ModelRow(
        members=members,
        prefix_tokens=tokens,
        private_tokens=PRIVATE_TOKENS,
        shared_bytes=held["shared"],
        separate_bytes=held["separate"],
        stored_bytes_ratio=held["separate"] / held["shared"],
        logit_error=error,
        speed_up=median["separate"] / median["shared"],
        threads=number,
        clock=measure.clock_name(number),
        shared_ms=median["shared"],
        separate_ms=median["separate"],
        samples_ms=samples,
    )


def show_model(rows: Sequence[ModelRow]) -> None:
    results.print_table(
        f"decode steps of a model through attach, {PRIVATE_TOKENS} tokens per request behind the "
        f"prefix, {rows[0].threads} threads ({rows[0].clock} time)",
        ("members", "prefix", "shared ms", "separate ms", "speed-up", "stored", "logit error"),
        [
            (
                str(row.members),
                str(row.prefix_tokens),
                f"{row.shared_ms:.2f}",
                f"{row.separate_ms:.2f}",
                f"{row.speed_up:.2f}",
                f"1/{row.stored_bytes_ratio:.2f}",
                f"{row.logit_error:.1e}",
            )
            for row in rows
        ],
    )


def show(rows: Sequence[Row]) -> None:
    results.print_table(
        f"decode steps, {PRIVATE_TOKENS} tokens per request behind the prefix, "
        f"{rows[0].threads} threads ({rows[0].clock} time); speed-up above 1: sharing is faster",
        (
            "members",
            "prefix",
            "shared ms",
            "separate ms",
            "speed-up",
            "bytes",
            "prefix bytes",
            "stored",
            f"union / topk {TOPK}",
            "error",
        ),
        [
            (
                str(row.members),
                str(row.prefix_tokens),
                f"{row.shared_ms:.2f}",
                f"{row.separate_ms:.2f}",
                f"{row.speed_up:.2f}",
                f"1/{row.bytes_ratio:.2f}",
                f"1/{row.prefix_bytes_ratio:.2f}",
                f"1/{row.stored_bytes_ratio:.2f}",
                f"{row.union_over_topk:.2f}",
                f"{row.output_error:.1e}",
            )
            for row in rows
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="256,1k,4k,16k", rounds=7)
    parser.add_argument("--members", default="1,2,4,8,16", help="requests of a group")
    parser.add_argument(
        "--model", help="a checkpoint's folder, or embedded[:NAME]: its decode steps through attach"
    )
    quick = {"tokens": "64,256", "rounds": 1, "members": "1,3"}
    options = parse(parser, arguments, quick=quick)
    if options.model is not None:
        path = (
            embedded_model_path(options.model)
            if is_embedded(options.model)
            else Path(options.model)
        )
        model = load_checkpoint(path, dtype="float32").model
        found = []
        for number in parse_counts(options.threads, "threads"):
            found += [
                run_model(model, members, tokens, number, options.rounds)
                for tokens in parse_counts(options.tokens, "tokens")
                for members in parse_counts(options.members, "members")
            ]
            show_model([row for row in found if row.threads == number])
        print("written:", results.save(options.out, parser.description or "", vars(options), found))
        return
    shape = shape_of(options)
    sizes = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
    dtype = getattr(torch, shape.dtype)
    rows = []
    for number in parse_counts(options.threads, "threads"):
        rows += [
            run(sizes, dtype, members, tokens, number, options.rounds)
            for tokens in parse_counts(options.tokens, "tokens")
            for members in parse_counts(options.members, "members")
        ]
        show([row for row in rows if row.threads == number])
    print("written:", results.save(options.out, parser.description or "", vars(options), rows))


if __name__ == "__main__":
    main()
