"""How long does each op of a step take alone, and what limits it?

Append, scan of an int4 or int8 sketch or of exact keys, selection, attention over lists of good and
bad locality, dense attention, a hit of the selection cache. The limit is the streaming bandwidth of
the same run or, for scans of a sketch, the rate of torch's int8 matrix product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvselect.bench import ops, results
from kvselect.bench.request import (
    add_sizes,
    default_threads,
    parse,
    parse_counts,
    progress_bar,
    script_parser,
    shape_of,
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="32k,128k", threads=default_threads(), rounds=15)
    options = parse(parser, arguments, quick={"tokens": "4k", "rounds": 2, "topk": 256})
    request = ops.OpsRequest(
        tokens=parse_counts(options.tokens, "tokens"),
        shape=shape_of(options),
        topk=options.topk,
        threads=parse_counts(options.threads, "threads"),
        rounds=options.rounds,
    )
    with progress_bar() as on_progress:
        rows = ops.run(request, on_progress)
    ops.show(request, rows)
    question, config = parser.description or "", dataclasses.asdict(request)
    print("written:", results.save(options.out, question, config, rows))


if __name__ == "__main__":
    main()
