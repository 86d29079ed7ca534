"""Do 100,000 decode steps in a row leave memory and time where they were?

A layer small enough for minutes: each step appends a token, drifts the query and decodes with a
selection cache, so that hits, misses and forced misses all occur; whenever the band is full the
cache is cropped back. Memory is the process's resident size; time is compared between the first and
the last tenth of the steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from kvselect.bench import results
from kvselect.bench.layer import StructuredLayer
from kvselect.bench.measure import clock_of, threads
from kvselect.bench.memory import resident_bytes
from kvselect.bench.request import (
    add_sizes,
    check_sizes,
    one_count,
    parse,
    progress_bar,
    script_parser,
    shape_of,
)
from kvselect.decode import decode_step
from kvselect.policies.token_select import TokenSelect

BAND_TOKENS = 1024  # the length moves from --tokens up to so many more, and back
NUM_INPUTS = 256  # tokens and queries drawn beforehand, used in turn
SAMPLE_EVERY = 500  # steps between two looks at the memory


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="4k", rounds=100_000, topk=256, heads=(8, 2, 64))
    options = parse(parser, arguments, quick={"rounds": 2000})
    tokens = one_count(options.tokens, "tokens")
    number, shape = one_count(options.threads, "threads"), shape_of(options)
    steps = options.rounds
    check_sizes((tokens,), (number,), topk=options.topk, rounds=steps, shortest=1024)
    layer = StructuredLayer(shape)
    cache = shape.new_cache(tokens + BAND_TOKENS, "int4")
    layer.fill([cache], tokens)
    new = [next(layer.tokens(1)) for _ in range(NUM_INPUTS)]
    drawn = [layer.draw_query()]
    while len(drawn) < NUM_INPUTS:
        drawn.append(layer.drifted(drawn[-1], 0.99))
    queries = [layer.query(one, cache) for one in drawn]
    policy = TokenSelect(
        topk=options.topk,
        num_recent_tokens=128,
        num_sink_tokens=16,
        dense_below_tokens=0,
        similarity_threshold=0.95,
    )
    state = policy.new_state(cache)
    now = clock_of(number)
    ms, memory = torch.empty(steps, dtype=torch.float64), []
    began = time.perf_counter()
    with threads(number), torch.inference_mode(), progress_bar() as on_progress:
        for step in range(steps):
            if cache.max_seqlen == tokens + BAND_TOKENS:
                cache.crop(BAND_TOKENS)
            k, v = new[step % NUM_INPUTS]
            q, q_unrotated = queries[step % NUM_INPUTS]
            before = now()
            cache.append(k, v)
            decode_step(q, cache, policy, state, q_unrotated=q_unrotated)
            ms[step] = 1e3 * (now() - before)
            if step % SAMPLE_EVERY == 0:
                memory.append(resident_bytes())
                on_progress(f"{step} steps", SAMPLE_EVERY / steps)
    memory.append(resident_bytes())

    tenth = max(steps // 10, 1)
    first, last = (statistics.median(part.tolist()) for part in (ms[:tenth], ms[-tenth:]))
    settled = memory[max(len(memory) // 10, 1) - 1]  # allocators fill their pools at first
    row = {
        "tokens": tokens,
        "threads": number,
        "steps": steps,
        "hit_rate": state.decode.hit_rate,
        "first_tenth_ms": first,
        "last_tenth_ms": last,
        "last_over_first": last / first,
        "resident_bytes": memory,
        "grown_bytes": memory[-1] - settled,
        "bytes_per_step": (memory[-1] - settled) / steps,
        "cache_bytes": cache.nbytes,
        "seconds": time.perf_counter() - began,
    }
    results.print_table(
        f"{steps} decode steps, {tokens} tokens and up to {BAND_TOKENS} more, {shape}",
        ["", ""],
        [
            ["median ms, first tenth", f"{first:.4f}"],
            ["median ms, last tenth", f"{last:.4f}"],
            ["last over first", f"{last / first:.3f}"],
            ["resident memory after the first tenth", f"{settled / 1e6:.1f} MB"],
            ["at the end", f"{memory[-1] / 1e6:.1f} MB"],
            ["lists reused", f"{100 * (state.decode.hit_rate or 0):.0f} %"],
        ],
    )
    question = parser.description or ""
    print("written:", results.save(options.out, question, vars(options), [row]))


if __name__ == "__main__":
    main()
