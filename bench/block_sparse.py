"""Is block-sparse attention's time proportional to the kept blocks, and never slower than SDPA?

A prefill of 2048 queries over a longer context, no causal mask: random kept blocks per query head
from 5 % to all of them, beside torch's SDPA over everything. Expected: time over (kept share x time
of the full mask) at most 1.1, and the full mask at most 1.1 times SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvselect import block_sparse_attention
from kvselect.bench import measure, results
from kvselect.bench.request import (
    add_sizes,
    one_count,
    parse,
    parse_counts,
    script_parser,
    shape_of,
)
from kvselect.testing import TOLERANCE, make_qkv, rel_err

SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
SDPA = "torch SDPA"
EXPECTED_OVER_PROPORTIONAL = 1.1
EXPECTED_OVER_SDPA = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One mask, or SDPA. ``over_proportional``: time over kept share x time of the full mask."""

    contender: str
    block_size: int
    tokens: int
    queries: int
    kept_share: float
    output_error: float
    gflop_per_s: float
    over_proportional: float
    over_sdpa: float
    threads: int
    clock: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples_ms: list[float]


def random_mask(shape: tuple[int, int, int, int], share: float) -> Tensor:
    """The same number of kept blocks in every row of the mask, others per head and row."""
    kept = max(1, round(share * shape[3]))
    order = torch.rand(shape, generator=torch.Generator().manual_seed(kept)).argsort(-1)
    return torch.zeros(shape, dtype=torch.bool).scatter(3, order[..., :kept], True)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def error_on_one_group(q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor) -> float:
    """Against float32 SDPA under the mask of tokens, on the query heads of the first KV head."""
    group, size = q.shape[2] // k.shape[2], -(-k.shape[1] // mask.shape[3])
    tokens = mask[:, :group].repeat_interleave(size, 3)[..., : k.shape[1]]
    expected = torch.empty(out[:, :, :group].shape)
    rows = -(-q.shape[1] // mask.shape[2])
    for block in range(mask.shape[2]):
        span = slice(block * rows, (block + 1) * rows)
        inputs = (q[:, span, :group].float(), k[:, :, :1].float(), v[:, :, :1].float())
        expected[:, span] = sdpa(*inputs, tokens[:, :, block : block + 1])
    return rel_err(out[:, :, :group], expected)


def run(q: Tensor, k: Tensor, v: Tensor, block_size: int, number: int, rounds: int) -> list[Row]:
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // block_size), -(-k.shape[1] // block_size))
    contenders, errors, shares = {}, {}, {}
    for share in SHARES:
        mask = random_mask(shape, share)
        call = partial(
            block_sparse_attention,
            q,
            k,
            v,
            mask,
            q_block_size=block_size,
            kv_block_size=block_size,
            causal=False,
        )
        name = f"{share:.0%} of blocks"
        shares[name] = float(mask.float().mean())
        errors[name] = error_on_one_group(q, k, v, call()[0], mask)
        contenders[name] = measure.Contender(call=call)
    full, everything = name, torch.ones(shape, dtype=torch.bool)
    shares[SDPA], errors[SDPA] = 1.0, error_on_one_group(q, k, v, sdpa(q, k, v), everything)
    contenders[SDPA] = measure.Contender(call=partial(sdpa, q, k, v))
    wrong = {name: error for name, error in errors.items() if error > TOLERANCE[q.dtype]}
    if wrong:
        raise SystemExit(f"outputs disagree with float32 SDPA, nothing timed: {wrong}")
    with measure.threads(number):
        samples = measure.interleaved_ms(contenders, rounds, num_threads=number)
    medians = {name: measure.quantiles(times) for name, times in samples.items()}
    flops = 4 * q.shape[1] * k.shape[1] * q.shape[0] * q.shape[2] * q.shape[3]
    return [
        Row(
            contender=name,
            block_size=block_size,
            tokens=k.shape[1],
            queries=q.shape[1],
            kept_share=shares[name],
            output_error=errors[name],
            gflop_per_s=flops * shares[name] / found.median / 1e6,
            over_proportional=found.median / (shares[name] * medians[full].median),
            over_sdpa=found.median / medians[SDPA].median,
            threads=number,
            clock=measure.clock_name(number),
            median_ms=found.median,
            p20_ms=found.p20,
            p80_ms=found.p80,
            samples_ms=samples[name],
        )
        for name, found in medians.items()
    ]


def show(rows: Sequence[Row]) -> None:
    first = rows[0]
    title = (
        f"{first.queries} queries, {first.tokens} tokens, blocks of {first.block_size}, "
        f"{first.threads} threads ({first.clock} time); expected: over proportional <= "
        f"{EXPECTED_OVER_PROPORTIONAL}, full mask over SDPA <= {EXPECTED_OVER_SDPA}"
    )
    columns = ("mask", "kept", "ms", "p20", "p80", "GFLOP/s", "over prop.", "over SDPA", "error")
    results.print_table(
        title,
        columns,
        [
            (
                row.contender,
                f"{row.kept_share:.1%}",
                f"{row.median_ms:.1f}",
                f"{row.p20_ms:.1f}",
                f"{row.p80_ms:.1f}",
                f"{row.gflop_per_s:.0f}",
                "" if row.contender == SDPA else f"{row.over_proportional:.2f}",
                f"{row.over_sdpa:.2f}",
                f"{row.output_error:.1e}",
            )
            for row in rows
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="8k", rounds=5)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--block-sizes", default="128,64", help="of queries and keys alike")
    quick = {"tokens": "512", "rounds": 1, "queries": 64, "block_sizes": "64,16"}
    options = parse(parser, arguments, quick=quick)
    shape, tokens = shape_of(options), one_count(options.tokens, "tokens")
    dtype = getattr(torch, shape.dtype)
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
    q, k, v = make_qkv(1, options.queries, tokens, *heads, dtype=dtype)
    rows = []
    for number in parse_counts(options.threads, "threads"):
        for block_size in parse_counts(options.block_sizes, "block_sizes"):
            found = run(q, k, v, block_size, number, options.rounds)
            show(found)
            rows += found
    print("written:", results.save(options.out, parser.description or "", vars(options), rows))


if __name__ == "__main__":
    main()
