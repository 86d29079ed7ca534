"""How much faster is one decode step with selection than dense attention, selection included?

One layer, batch 1. Dense contenders are torch's own in the three arrangements that people use,
kvselect's dense kernel, and Quest with ideal kernels; all must agree with float32 before anything
is timed. Beside each time stands the bytes it must read over the machine's streaming bandwidth in
the same run, and the attention mass that it kept, measured exactly on the same queries. The picture
beside the JSON shows time against kept mass over every method's budget.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvselect.bench import decode, picture, results
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
    add_sizes(parser, tokens="8k,32k,128k", threads=default_threads())
    options = parse(parser, arguments, quick={"tokens": "2k,4k", "rounds": 2, "topk": 256})
    request = decode.DecodeRequest(
        tokens=parse_counts(options.tokens, "tokens"),
        shape=shape_of(options),
        topk=options.topk,
        threads=parse_counts(options.threads, "threads"),
        rounds=options.rounds,
    )
    with progress_bar() as on_progress:
        rows = decode.run(request, on_progress)
    decode.show(request, rows)
    picture.draw(rows, options.out.with_suffix(".png"), picture.subtitle(request))
    question = parser.description or ""
    print("written:", results.save(options.out, question, decode.config(request), rows))


if __name__ == "__main__":
    main()
