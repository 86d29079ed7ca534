"""Is block-sparse attention's time proportional to the kept blocks, and never slower than SDPA?

A prefill of 2048 queries over a longer context, no causal mask: random kept blocks per query head
from 5 % to all of them, beside torch's SDPA over everything. Expected: time over (kept share x time
of the full mask) at most 1.1, and the full mask at most 1.1 times SDPA.

``--device cuda``: beside SDPA's flash and cuDNN backends, by CUDA graphs between events with L2
cold, and the search for masses that masks come from. Expected on an H200 at head_dim 128: 550
TFLOP/s on kept blocks at 10 %, the full mask at 0.85 of the dense rate. ``--implementation sm90a``
times the kernel in Hopper's own instructions, which has not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from kvselect import block_mass, block_sparse_attention
from kvselect.bench import graphs, measure, results
from kvselect.bench.dense_peers import SDPA_BACKENDS
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
GPU_BACKENDS = ("flash", "cuDNN")
EXPECTED_OVER_PROPORTIONAL = 1.1
EXPECTED_OVER_SDPA = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One mask, or SDPA.

    ``over_proportional``: time over kept share x time of the full mask; ``over_sdpa``: over SDPA's,
    the fastest where there are several (nan where none took part).
    """

    contender: str
    implementation: str
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


def sdpa_of(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPA_BACKENDS[backend]):
        return sdpa(q, k, v)


def error_on_one_group(q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor) -> float:
    """Against float32 SDPA under the mask of tokens, on the query heads of the first KV head."""
    group, size = q.shape[2] // k.shape[2], -(-k.shape[1] // mask.shape[3])
    tokens = mask[:, :group].repeat_interleave(size, 3)[..., : k.shape[1]]
    expected = torch.empty(out[:, :, :group].shape, device=q.device)
    rows = -(-q.shape[1] // mask.shape[2])
    for block in range(mask.shape[2]):
        span = slice(block * rows, (block + 1) * rows)
        inputs = (q[:, span, :group].float(), k[:, :, :1].float(), v[:, :, :1].float())
        expected[:, span] = sdpa(*inputs, tokens[:, :, block : block + 1])
    return rel_err(out[:, :, :group], expected)


def error_of_sums(mass: Tensor, queries: int) -> float:
    """Masses of a q block add up to the number of its queries; the first ones are whole."""
    blocks = queries // -(-queries // mass.shape[2])
    counted = mass[:, :, :blocks].sum(-1)
    return rel_err(counted, torch.full_like(counted, -(-queries // mass.shape[2])))


@dataclass(slots=True)
class Entrants:
    """Everything that is timed, by name: its call, kept share, error, and flops of it all."""

    contenders: dict[str, measure.Contender]
    shares: dict[str, float]
    errors: dict[str, float]
    flops: dict[str, float]
    skipped: dict[str, str]

    def add(self, name: str, contender: measure.Contender, share: float, error: float) -> None:
        self.contenders[name], self.shares[name], self.errors[name] = contender, share, error


def entrants(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, implementation: str = "auto"
) -> Entrants:
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // block_size), -(-k.shape[1] // block_size))
    found = Entrants({}, {}, {}, {}, {})
    for share in SHARES:
        mask = random_mask(shape, share).to(q.device)
        call = partial(
            block_sparse_attention,
            q,
            k,
            v,
            mask,
            q_block_size=block_size,
            kv_block_size=block_size,
            causal=False,
            implementation=implementation,
        )
        name, kept = f"{share:.0%} of blocks", float(mask.float().mean())
        error = error_on_one_group(q, k, v, call()[0], mask)
        found.add(name, measure.Contender(call=call), kept, error)
    everything = torch.ones(shape, dtype=torch.bool, device=q.device)
    peers = {SDPA: partial(sdpa, q, k, v)}
    if q.is_cuda:
        peers = {f"{SDPA} {name}": partial(sdpa_of, name, q, k, v) for name in GPU_BACKENDS}
    for name, call in peers.items():
        try:
            error = error_on_one_group(q, k, v, call(), everything)
        except RuntimeError as refusal:  # a backend that has no kernel for these sizes
            found.skipped[name] = graphs.as_reason(refusal)
            continue
        found.add(name, measure.Contender(call=call), 1.0, error)
    flops = 4.0 * q.shape[1] * k.shape[1] * q.shape[0] * q.shape[2] * q.shape[3]
    found.flops = dict.fromkeys(found.contenders, flops)
    if q.is_cuda:
        sizes = {"q_block_size": block_size, "kv_block_size": block_size, "causal": False}
        search = partial(block_mass, q, k, **sizes)  # type: ignore[arg-type]
        name = "block mass"
        found.add(name, measure.Contender(call=search), 1.0, error_of_sums(search(), q.shape[1]))
        found.flops[name] = flops / 2  # of one pass; without an lse there are two
    wrong = {name: error for name, error in found.errors.items() if error > TOLERANCE[q.dtype]}
    if wrong:
        raise SystemExit(f"outputs disagree with float32 SDPA, nothing timed: {wrong}")
    return found


def timed(found: Entrants, q: Tensor, number: int, rounds: int) -> Mapping[str, list[float]]:
    if not q.is_cuda:
        with measure.threads(number):
            return measure.interleaved_ms(found.contenders, rounds, num_threads=number)
    samples = graphs.interleaved_replays(
        found.contenders, rounds, cold=graphs.ColdL2(q.device), bound=TOLERANCE[q.dtype]
    )
    for name, one in samples.items():
        if one.not_captured:
            print(f"{name}: no graph, timed as it is: {one.not_captured}")
    return {name: one.event_ms for name, one in samples.items()}


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    number: int,
    rounds: int,
    implementation: str = "auto",
) -> list[Row]:
    found = entrants(q, k, v, block_size, implementation)
    for name, reason in found.skipped.items():
        print(f"{name}: left out: {reason}")
    samples = timed(found, q, number, rounds)
    medians = {name: measure.quantiles(times) for name, times in samples.items()}
    full = medians[f"{SHARES[-1]:.0%} of blocks"].median
    peers = [one.median for name, one in medians.items() if name.startswith(SDPA)]
    return [
        Row(
            contender=name,
            implementation=implementation,
            block_size=block_size,
            tokens=k.shape[1],
            queries=q.shape[1],
            kept_share=found.shares[name],
            output_error=found.errors[name],
            gflop_per_s=found.flops[name] * found.shares[name] / one.median / 1e6,
            over_proportional=one.median / (found.shares[name] * full),
            over_sdpa=one.median / min(peers, default=float("nan")),
            threads=number,
            clock="events" if q.is_cuda else measure.clock_name(number),
            median_ms=one.median,
            p20_ms=one.p20,
            p80_ms=one.p80,
            samples_ms=samples[name],
        )
        for name, one in medians.items()
    ]


def show(rows: Sequence[Row]) -> None:
    first = rows[0]
    title = (
        f"{first.queries} queries, {first.tokens} tokens, blocks of {first.block_size}, "
        f"{first.threads} threads ({first.clock} time), implementation {first.implementation}; "
        f"expected: over proportional <= "
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
                f"{row.median_ms:.4g}",
                f"{row.p20_ms:.4g}",
                f"{row.p80_ms:.4g}",
                f"{row.gflop_per_s:.0f}",
                f"{row.over_proportional:.2f}" if row.contender.endswith("blocks") else "",
                f"{row.over_sdpa:.2f}",
                f"{row.output_error:.1e}",
            )
            for row in rows
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="8k", rounds=5)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--block-sizes", default="128,64", help="of queries and keys alike")
    parser.add_argument("--implementation", default="auto", help="of our attention; auto or sm90a")
    quick = {"tokens": "512", "rounds": 1, "queries": 64, "block_sizes": "64,16"}
    options = parse(parser, arguments, quick=quick)
    shape, tokens = shape_of(options), one_count(options.tokens, "tokens")
    dtype = getattr(torch, shape.dtype)
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
    made = make_qkv(1, options.queries, tokens, *heads, dtype=dtype)
    q, k, v = (x.to(options.device) for x in made)
    rows = []
    for number in parse_counts(options.threads, "threads"):
        for block_size in parse_counts(options.block_sizes, "block_sizes"):
            found = run(q, k, v, block_size, number, options.rounds, options.implementation)
            show(found)
            rows += found
    print("written:", results.save(options.out, parser.description or "", vars(options), rows))


if __name__ == "__main__":
    main()
