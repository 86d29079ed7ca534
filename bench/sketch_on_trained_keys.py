"""Does the sketch rank a trained model's keys as it ranks synthetic ones?

The keys and queries of every layer of the embedded model that has read 16 trained windows, and
structured synthetic ones, scored as compact positions do (keys un-rotated) and as original ones do.
The best of the sketch's scan, 1, 1.25 and 1.5 times topk, are compared with the exact top-k.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

import torch

from kvselect.bench.request import script_parser
from kvselect.bench.results import print_table, save
from kvselect.eval.checkpoint import EMBEDDED, load_checkpoint
from kvselect.eval.trained_keys import Layer, Ranking, capture, rank
from kvselect.testing import structured_keys

FACTORS = (1.0, 1.25, 1.5, 2.0)
SYNTHETIC_SEEDS = 8


def synthetic(num_tokens: int, topk: int, sketch: str, positions: str) -> Ranking:
    """Structured keys in the shape of the embedded model's; mean over seeds (misses: the worst)."""
    found = []
    for seed in range(SYNTHETIC_SEEDS):
        rotated = positions == "original"
        q, k = structured_keys(num_tokens, 2, 2, 64, rotated=rotated, seed=seed)
        layer = Layer(q=q[None], k=k, rope=None)
        found.append(rank(layer, topk, positions=None, sketch=sketch, factors=FACTORS))
    mean = {
        field: {f: statistics.fmean(getattr(one, field)[f] for one in found) for f in FACTORS}
        for field in ("set_recall", "recall", "mass_recall", "mass")
    }
    return Ranking(
        **mean,
        heaviest_miss={f: max(one.heaviest_miss[f] for one in found) for f in FACTORS},
        exact_mass=statistics.fmean(one.exact_mass for one in found),
    )


def measure(num_tokens: int, sketch: str) -> Iterator[tuple[str, int, str, Ranking]]:
    """Everything, as (keys, topk, positions, ranking)."""
    checkpoint = load_checkpoint(EMBEDDED)
    captured = {
        task: capture(checkpoint, num_tokens, task=task, seed=1) for task in ("niah_multikey", "vt")
    }
    for topk in (num_tokens // 16, num_tokens // 128):
        for positions in ("compact", "original"):
            for task, layers in captured.items():
                for index, layer in enumerate(layers):
                    ranking = rank(layer, topk, positions=positions, sketch=sketch, factors=FACTORS)
                    yield f"{task} {index}", topk, positions, ranking
            yield "synthetic", topk, positions, synthetic(num_tokens, topk, sketch, positions)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sketch", default="int4", choices=("int4", "int8"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    rows, raw = [], []
    for keys, topk, positions, ranking in measure(options.tokens, options.sketch):
        record = {"keys": keys, "topk": topk, "positions": positions}
        raw.append(record | dataclasses.asdict(ranking))
        gains = [f"{ranking.mass[f] / ranking.exact_mass:.3f}" for f in FACTORS]
        recalls = [f"{ranking.recall[f]:.4f}" for f in FACTORS]
        rows.append(
            [
                keys,
                str(topk),
                positions,
                f"{ranking.exact_mass:.3f}",
                *recalls,
                f"{ranking.set_recall[1.5]:.4f}",
                f"{ranking.mass_recall[1.5]:.4f}",
                *gains[:2],
                f"{ranking.heaviest_miss[1.5]:.2f}",
            ]
        )
    columns = ["keys", "topk", "positions", "exact\nmass", *(f"recall\n{f}x" for f in FACTORS)]
    columns += ["same set\n1.5x", "its mass\n1.5x", "mass\n1x", "mass\n1.25x", "worst miss\n1.5x"]
    title = f"{options.sketch} scan of {options.tokens} tokens against the exact top-k"
    print_table(title, columns, rows)
    print(
        "recall: a token that ties with the last of the top-k counts. mass: what the sketch's picks"
        "\nhold over what the exact top-k holds. worst miss: heaviest missed score over the last of"
        "\nthe exact top-k, of all queries and heads."
    )
    config = {"tokens": options.tokens, "sketch": options.sketch, "factors": FACTORS}
    save(options.out, parser.description or "", config, raw)


if __name__ == "__main__":
    main()
