"""How much faster is a prefill chunk on a long context than dense SDPA, selection included?

A chunk of 2048 queries: append, sketch, scores, lists and attention. Dense contenders are timed on
some of the KV heads and scaled (--dense-kv-heads 8 times all of them): heads are independent, and a
whole chunk takes torch about a minute of one core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvselect.bench import prefill, results
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
    add_sizes(parser, tokens="128k", rounds=3)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--dense-kv-heads", type=int, default=1)
    quick = {"tokens": "4k", "rounds": 1, "chunk_tokens": 256, "topk": 256}
    options = parse(parser, arguments, quick=quick)
    request = prefill.PrefillRequest(
        tokens=parse_counts(options.tokens, "tokens"),
        shape=shape_of(options),
        chunk_tokens=options.chunk_tokens,
        topk=options.topk,
        threads=parse_counts(options.threads, "threads"),
        rounds=options.rounds,
        dense_kv_heads=options.dense_kv_heads,
    )
    with progress_bar() as on_progress:
        rows = prefill.run(request, on_progress)
    prefill.show(request, rows)
    question, config = parser.description or "", dataclasses.asdict(request)
    print("written:", results.save(options.out, question, config, rows))


if __name__ == "__main__":
    main()
