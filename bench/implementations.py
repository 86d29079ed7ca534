"""How fast is a decode step with every CPU implementation that runs on this machine?

The implementations are forced in turn on the same cache and query; the scalar one, which nobody
runs by choice, on a short context only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kvselect import ops
from kvselect.attention import recovered_mass
from kvselect.bench import results
from kvselect.bench.contenders import BOUND, attention_over, require_agreement
from kvselect.bench.layer import Shape, StructuredLayer
from kvselect.bench.measure import ColdCaches, Contender, interleaved_ms, read_gb_per_s, threads
from kvselect.bench.memory import require_memory
from kvselect.bench.request import (
    add_sizes,
    check_sizes,
    parse,
    parse_counts,
    script_parser,
    shape_of,
)
from kvselect.decode import decode_step
from kvselect.policies.token_select import TokenSelect
from kvselect.testing import rel_err

SCALAR_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One implementation at one length; ``over_fastest``: speed relative to the fastest one."""

    tokens: int
    implementation: str
    over_fastest: float
    kept_mass: float
    output_error: float
    timing: results.Timing


def measure(shape: Shape, tokens: int, topk: int, number: int, rounds: int) -> list[Row]:
    layer, cache = StructuredLayer(shape), shape.new_cache(tokens, "int4")
    layer.fill([cache], tokens)
    q = layer.query(layer.draw_query(), cache)[0]
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    policy = TokenSelect(topk=topk, dense_below_tokens=0)
    names = [name for name in ops.cpu_implementations() if name != "scalar"]
    if tokens <= SCALAR_TOKENS:
        names.insert(0, "scalar")
    contenders, errors, masses, read = {}, {}, {}, {}
    in_use = ops.cpu_implementation()
    try:
        for name in names:
            ops.set_cpu_implementation(name)
            state = policy.new_state(cache)
            out, info = decode_step(q, cache, policy, state)
            expected = attention_over(q, k, v, info.selection)
            errors[name] = rel_err(out.reshape(expected.shape), expected)
            require_agreement(name, tokens, errors[name], BOUND[cache.dtype])
            masses[name] = 1.0
            if info.selection is not None:
                masses[name] = float(recovered_mass(q, cache, info.selection).mean())
            read[name] = int(state.decode.bytes_read(shape.head_dim, cache.dtype.itemsize, "int4"))
            contenders[name] = Contender(
                call=partial(decode_step, q, cache, policy, state),
                prepare=partial(ops.set_cpu_implementation, name),
            )
        with threads(number):
            bandwidth = read_gb_per_s(number)
            samples = interleaved_ms(contenders, rounds, num_threads=number, cold=ColdCaches())
    finally:
        ops.set_cpu_implementation(in_use)
    timed = {name: results.timing(samples[name], read[name], bandwidth, number) for name in names}
    fastest = min(found.median_ms for found in timed.values())
    return [
        Row(
            tokens=tokens,
            implementation=name,
            over_fastest=fastest / timed[name].median_ms,
            kept_mass=masses[name],
            output_error=errors[name],
            timing=timed[name],
        )
        for name in names
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="8k,128k", rounds=7)
    options = parse(parser, arguments, quick={"tokens": "4k", "rounds": 2, "topk": 256})
    tokens = parse_counts(options.tokens, "tokens")
    numbers, shape = parse_counts(options.threads, "threads"), shape_of(options)
    check_sizes(tokens, numbers, topk=options.topk, rounds=options.rounds, shortest=128)
    rows: list[Row] = []
    for count in tokens:
        require_memory("tokens", count, shape.cache_bytes(count, "int4") + (1 << 30))
        for number in numbers:
            rows += measure(shape, count, options.topk, number, options.rounds)
    columns = ["", "tokens", "threads", "ms", "p20-p80", "x floor", "of the fastest", "kept mass"]
    cells = [
        [
            row.implementation,
            str(row.tokens),
            str(row.timing.threads),
            f"{row.timing.median_ms:.2f}",
            f"{row.timing.p20_ms:.2f}-{row.timing.p80_ms:.2f}",
            f"{row.timing.times_floor:.1f}",
            f"{row.over_fastest:.2f}",
            f"{row.kept_mass:.3f}",
        ]
        for row in rows
    ]
    results.print_table(f"decode step, {shape}, TokenSelect int4", columns, cells)
    question = parser.description or ""
    print("written:", results.save(options.out, question, vars(options), rows))


if __name__ == "__main__":
    main()
