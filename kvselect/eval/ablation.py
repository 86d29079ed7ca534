"""TokenSelect with one setting changed at a time, and what each change costs on equal samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvselect.cache import KVCache
from kvselect.eval.intervals import paired_difference
from kvselect.eval.perplexity import PerplexityCell, ratio_to
from kvselect.eval.results import Results
from kvselect.policies.base import Policy
from kvselect.policies.dense import Dense
from kvselect.policies.scoring_vectors import BlockVectors
from kvselect.policies.token_select import TokenSelect
from kvselect.queries import Queries

__all__ = [
    "BASE",
    "DENSE",
    "Effect",
    "ModuloHeads",
    "mass_effects",
    "score_effects",
    "text_effects",
    "variants",
]

BASE = "defaults"
DENSE = "dense attention"  # for orientation: no setting of TokenSelect
LEAST_SAMPLES = 8  # fewer say nothing, whatever their interval


class ModuloHeads(TokenSelect):
    """Votes by the head map of the published code: query head ``h`` meets the keys of KV head ``h %
    num_kv_heads``, not those that it reads. For comparison only; no setting leads here."""

    __slots__ = ()

    def _scoring_vectors(self, queries: Queries, cache: KVCache) -> list[BlockVectors]:
        num_q_heads, num_kv_heads = queries.q.shape[2], cache.num_kv_heads
        order = [h for g in range(num_kv_heads) for h in range(g, num_q_heads, num_kv_heads)]
        found = []
        for part in TokenSelect._scoring_vectors(self, queries, cache):
            local = None if part.q_local is None else part.q_local[:, :, :, order].contiguous()
            found.append(part._replace(q=part.q[:, :, :, order].contiguous(), q_local=local))
        return found


CHANGES: Mapping[str, Mapping[str, Any]] = {
    "one list per layer": {"scope": "layer"},
    "normalised over candidates": {"normalise_over": "candidates"},
    "unscaled votes": {"score_scale": 1.0},
    "one mean query": {"aggregate": "mean"},
    "4 groups, summed": {"query_groups": 4},
    "16 groups, summed": {"query_groups": 16},
    "4 groups, maximum": {"query_groups": 4, "aggregate": "max_vote"},
    "8 groups, maximum": {"aggregate": "max_vote"},
    "16 groups, maximum": {"query_groups": 16, "aggregate": "max_vote"},
    "no tail blocks": {"num_tail_tokens": 0},
    "pooled over 3": {"pool_width": 3},
    "pooled over 5": {"pool_width": 5},
}


def variants(base: TokenSelect) -> dict[str, Policy]:
    """The base, dense attention, the wrong head map, and every entry of `CHANGES`."""
    settings = {one.name: getattr(base, one.name) for one in dataclasses.fields(base)}
    changed: dict[str, Policy] = {
        label: dataclasses.replace(base, **change) for label, change in CHANGES.items()
    }
    return {BASE: base, DENSE: Dense(), "modulo head map": ModuloHeads(**settings), **changed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What one change did where.

    Attributes
    ----------
    measure : "score", "kept mass" or "perplexity"
    value, base : float
        Under the change and under the defaults, on the same samples.
    effect, low, high : float
        Difference of scores or masses; of perplexity the ratio minus 1. With its paired bootstrap
        95 % interval.
    """

    variant: str
    what: str
    length_tokens: int
    measure: str
    value: float
    base: float
    effect: float
    low: float
    high: float
    samples: int

    @property
    def verdict(self) -> str:
        """Whether the change is better or worse, as far as the interval tells."""
        low, high = self.low, self.high
        if self.measure == "perplexity":
            low, high = -high, -low
        if self.samples < LEAST_SAMPLES:
            return ""
        return "better" if low > 0 else "worse" if high < 0 else ""


def score_effects(results: Results) -> list[Effect]:
    """Of every variant, task and length: right answers, question by question."""
    found = []
    for length in results.lengths:
        for task in results.tasks:
            base = results.cell(task, length, BASE)
            assert base is not None
            for label in results.policies:
                cell = results.cell(task, length, label)
                assert cell is not None
                effect, low, high = paired_difference(cell.outcomes, base.outcomes)
                found.append(
                    Effect(
                        variant=label,
                        what=task,
                        length_tokens=length.tokens,
                        measure="score",
                        value=cell.score,
                        base=base.score,
                        effect=effect,
                        low=low,
                        high=high,
                        samples=len(cell.outcomes),
                    )
                )
    return found


def mass_effects(records: Sequence[Mapping[str, Any]]) -> list[Effect]:
    """Of every variant, task and length: kept mass of decode queries, context by context.

    Parameters
    ----------
    records : list of dict
        Of the journal of `runner.run`.
    """
    masses: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    for record in records:
        if record["kind"] != "answers" or not record["mass"]:
            continue
        layers = [sum(heads) / len(heads) for heads in record["mass"]]
        cell = masses.setdefault((record["task"], record["length_tokens"]), {})
        cell.setdefault(record["policy"], {})[record["index"]] = sum(layers) / len(layers)
    found = []
    for (task, tokens), by_policy in masses.items():
        base = by_policy[BASE]
        for label, own in by_policy.items():
            ours, theirs = [own[i] for i in base], list(base.values())
            effect, low, high = paired_difference(ours, theirs)
            found.append(
                Effect(
                    variant=label,
                    what=task,
                    length_tokens=tokens,
                    measure="kept mass",
                    value=sum(ours) / len(ours),
                    base=sum(theirs) / len(theirs),
                    effect=effect,
                    low=low,
                    high=high,
                    samples=len(ours),
                )
            )
    return found


def text_effects(cells: Sequence[PerplexityCell]) -> list[Effect]:
    """Of every variant and length: perplexity, segment by segment."""
    bases = {cell.length.tokens: cell for cell in cells if cell.policy == BASE}
    found = []
    for cell in cells:
        base = bases[cell.length.tokens]
        ratio, low, high = ratio_to(cell, base)
        found.append(
            Effect(
                variant=cell.policy,
                what="text",
                length_tokens=cell.length.tokens,
                measure="perplexity",
                value=cell.perplexity,
                base=base.perplexity,
                effect=ratio - 1,
                low=low - 1,
                high=high - 1,
                samples=len(cell.nll),
            )
        )
    return found
