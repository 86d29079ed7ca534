"""What do local values and bit planes leave unread in a decode step, and at which output error?

One layer of drawn keys whose neighbours resemble each other (simulated), every step with a query of
its own. "values": the values of the heaviest tokens are read, until they hold ``setting`` of the
attention. "bits": tokens are weighed by the int4 sketch, and by the keys where the heaviest gets
less than ``setting`` (tau); the overlap is that of the heaviest tenth by high bits and by the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvselect.attention import sparse_attention
from kvselect.bench import results
from kvselect.bench.layer import Shape, StructuredLayer
from kvselect.bench.memory import require_memory
from kvselect.bench.request import (
    add_sizes,
    check_sizes,
    parse,
    parse_counts,
    script_parser,
    shape_of,
)
from kvselect.cache import KVCache
from kvselect.decode import decode_step
from kvselect.policies.spatten import SpAtten, SpAttenState
from kvselect.testing import rel_err

MASSES = (0.5, 0.8, 0.9, 0.95, 0.99)
TAUS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting, over all steps.

    Attributes
    ----------
    setting : float
        Attention that the values read must hold, or tau.
    value_share, refine_rate : float
        Values read, of all listed; lists (rows times KV heads) whose keys were read in full.
    overlap : float or None
        Of the heaviest tenth by high bits with that by the keys.
    output_error : float
        Against exact attention.
    """

    part: str
    tokens: int
    setting: float
    value_share: float
    refine_rate: float
    overlap: float | None
    output_error: float


def heaviest(policy: SpAtten, q: Tensor, cache: KVCache) -> list[set[int]]:
    """Tokens of each KV head whose values a step reads."""
    found: Any = decode_step(q, cache, policy, policy.new_state(cache))[1].selection
    return [
        set(values[chosen].tolist()) for values, chosen in zip(found.values[0], found.chosen[0])
    ]


def measure(shape: Shape, tokens: int, rounds: int) -> list[Row]:
    """All settings on the same queries."""
    layer = StructuredLayer(shape)
    cache = shape.new_cache(tokens, "int4")
    layer.fill([cache], tokens)
    queries = [layer.query(layer.draw_query(), cache)[0] for _ in range(rounds)]
    settings: dict[str, Any] = {"mean_pruned": 0.0}
    sweep = [("values", mass, SpAtten(**settings, value_mass=mass)) for mass in MASSES]
    sweep += [("bits", tau, SpAtten(**settings, refine_below=tau)) for tau in TAUS]
    rows = []
    for part, setting, policy in sweep:
        state = policy.new_state(cache)
        assert isinstance(state, SpAttenState)
        errors, overlaps = [], []
        for q in queries:
            out, _ = decode_step(q, cache, policy, state)
            errors.append(rel_err(out, sparse_attention(q, cache)[0]))
            if part == "bits":
                coarse = SpAtten(**settings, refine_below=setting, value_fraction=0.1)
                fine = SpAtten(**settings, value_fraction=0.1)
                pairs = zip(heaviest(coarse, q, cache), heaviest(fine, q, cache))
                overlaps += [len(high & exact) / len(exact) for high, exact in pairs]
        share, rate = state.counts.value_share, state.counts.refine_rate
        assert share is not None and rate is not None
        rows.append(
            Row(
                part=part,
                tokens=tokens,
                setting=setting,
                value_share=share,
                refine_rate=rate,
                overlap=sum(overlaps) / len(overlaps) if overlaps else None,
                output_error=sum(errors) / len(errors),
            )
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="8k", rounds=4, topk=None)
    options = parse(parser, arguments, quick={"tokens": "2k", "rounds": 2})
    tokens, shape = parse_counts(options.tokens, "tokens"), shape_of(options)
    check_sizes(tokens, (1,), topk=1, rounds=options.rounds, shortest=128)
    rows: list[Row] = []
    with torch.inference_mode():
        for count in tokens:
            # Weights and the sketch's keys are float32, of all heads.
            require_memory("tokens", count, 6 * shape.cache_bytes(count, "int4") + (1 << 28))
            rows += measure(shape, count, options.rounds)
    columns = ["part", "tokens", "mass / tau", "values read", "refined", "overlap", "output error"]
    cells = [
        [
            row.part,
            str(row.tokens),
            f"{row.setting:g}",
            f"{100 * row.value_share:.1f} %",
            f"{100 * row.refine_rate:.0f} %",
            "" if row.overlap is None else f"{row.overlap:.3f}",
            f"{row.output_error:.4f}",
        ]
        for row in rows
    ]
    results.print_table(f"decode steps, {shape} (simulated)", columns, cells)
    print("written:", results.save(options.out, parser.description or "", vars(options), rows))


if __name__ == "__main__":
    main()
