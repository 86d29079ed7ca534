"""Does the time of a decode step grow linearly to a million tokens, and what is saved at 512K?

One layer, batch 1. Linear means: time per token, relative to the shortest length. SDPA with
enable_gqa is left out: it takes seconds per call here.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvselect.bench import decode, results
from kvselect.bench.entrants import OUR_DENSE, SELECT_INT4, default_policies
from kvselect.bench.request import (
    add_sizes,
    parse,
    parse_counts,
    progress_bar,
    script_parser,
    shape_of,
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="256k,512k,1m", rounds=5)
    options = parse(parser, arguments, quick={"tokens": "2k,4k", "rounds": 2, "topk": 256})
    policies = default_policies(options.topk)
    request = decode.DecodeRequest(
        tokens=parse_counts(options.tokens, "tokens"),
        shape=shape_of(options),
        topk=options.topk,
        policies={name: policies[name] for name in (SELECT_INT4, OUR_DENSE)},
        threads=parse_counts(options.threads, "threads"),
        rounds=options.rounds,
        curves=(),
        slow_tokens=0,
    )
    with progress_bar() as on_progress:
        rows = decode.run(request, on_progress)
    decode.show(request, rows)
    for number in request.threads:
        steps = [
            row for row in rows if row.contender == SELECT_INT4 and row.timing.threads == number
        ]
        first = steps[0].timing.median_ms / steps[0].tokens
        growth = (f"{row.tokens}: {row.timing.median_ms / row.tokens / first:.3f}" for row in steps)
        print(f"time per token relative to the first, {number} thread(s): {', '.join(growth)}")
    question = parser.description or ""
    print("written:", results.save(options.out, question, decode.config(request), rows))


if __name__ == "__main__":
    main()
