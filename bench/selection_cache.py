"""What does reusing lists while queries are similar gain per step, and what mass does it lose?

Drifting queries, ``q' = rho * q + sqrt(1 - rho^2) * noise``, one token appended per step, a fresh
query every 30 steps; the noise is white and as long as the query. For each rho the similarity
threshold is the one that gives the hit rate asked for (found on the cosines of the same queries),
so that rows differ in how far a reused list may be off. Steps with and without the cache alternate
on one KVCache; kept mass is measured exactly at every step.

The queries drift as attention meets them; in the rows "moving" they are rotated to their new
position at each step as well, in all channels alike: what RoPE alone does to a list that cosines
before RoPE let pass. A trained head lies between the two.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvselect.attention import recovered_mass
from kvselect.bench import results
from kvselect.bench.contenders import BOUND, attention_over, require_agreement
from kvselect.bench.layer import Shape, StructuredLayer
from kvselect.bench.measure import ColdCaches, clock_name, clock_of, kept_heap, threads
from kvselect.bench.memory import require_memory
from kvselect.bench.request import (
    OnProgress,
    add_sizes,
    check_sizes,
    parse,
    parse_counts,
    progress_bar,
    script_parser,
    shape_of,
)
from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.decode import decode_step
from kvselect.policies.token_select import TokenSelect
from kvselect.selection import Selection
from kvselect.testing import rel_err

# (rho, whether RoPE moves the query)
CASES = ((0.99, False), (0.95, False), (0.9, False), (0.8, False), (0.99, True))
SEGMENT_STEPS = 30  # after which a query owes nothing to the one before
WARM_UP = 4  # steps; the first one misses by necessity


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One drift.

    Attributes
    ----------
    moving : bool
        RoPE turns the query to its new position at each step.
    hit_rate : float
        Lists reused, of all lists of all steps counted.
    without_ms, with_ms : float
        Mean time of a step: hits and misses alternate, so a median would show only one of them.
    kept_mass_loss_points : float
        Mean kept mass without the cache minus with it, in percent of the attention mass.
    """

    tokens: int
    threads: int
    clock: str
    rho: float
    moving: bool
    similarity_threshold: float
    hit_rate: float
    without_ms: float
    with_ms: float
    speed_up: float
    kept_mass_without: float
    kept_mass_with: float
    kept_mass_loss_points: float
    samples_without_ms: list[float]
    samples_with_ms: list[float]


def threshold_for(
    queries: Tensor, num_kv_heads: int, hit_rate: float, max_age: int, first: int = 1
) -> float:
    """The similarity threshold at which so many lists are reused.

    Parameters
    ----------
    queries : Tensor, [steps, num_q_heads, head_dim]
        Before RoPE, in the order of the steps.
    first : int, at least 1
        The first step that counts.
    """
    unit = torch.nn.functional.normalize(queries.double(), dim=-1)
    heads = torch.unflatten(unit, 1, (num_kv_heads, -1))
    cosines = torch.einsum("sghd,tghd->gsth", heads, heads).amin(-1).tolist()

    def rate(threshold: float) -> float:
        hits = 0
        for one in cosines:
            anchor = 0
            for step in range(1, len(one)):
                if one[anchor][step] >= threshold and step - anchor <= max_age:
                    hits += step >= first
                else:
                    anchor = step
        return hits / (len(cosines) * (len(cosines[0]) - first))

    low, high = 0.0, 1.0  # a higher threshold hits less
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) >= hit_rate else (low, middle)
    return low


def measure(
    shape: Shape,
    tokens: int,
    topk: int,
    number: int,
    rho: float,
    moving: bool,
    steps: int,
    hit_rate: float,
    on_progress: OnProgress,
    weight: float,
) -> Row:
    layer, total = StructuredLayer(shape), WARM_UP + steps
    cache = shape.new_cache(tokens + total, "int4")
    layer.fill([cache], tokens)
    drawn: list[Tensor] = []
    while len(drawn) < total:
        if len(drawn) % SEGMENT_STEPS == 0:
            drawn.append(layer.draw_query())
        else:
            drawn.append(layer.drifted(drawn[-1], rho, white=True))
    plain = TokenSelect(topk=topk, dense_below_tokens=0)
    threshold = threshold_for(
        torch.stack(drawn), shape.num_kv_heads, hit_rate, plain.max_age, WARM_UP
    )
    reusing = replace(plain, similarity_threshold=max(threshold, 1e-6))
    policies = {"without": plain, "with": reusing}
    states = {name: policy.new_state(cache) for name, policy in policies.items()}
    samples: dict[str, list[float]] = {name: [] for name in policies}
    masses: dict[str, list[float]] = {name: [] for name in policies}
    hits: list[float] = []
    now, cold = clock_of(number), ColdCaches()
    with threads(number), kept_heap():
        for at, one in enumerate(drawn):
            on_progress(f"rho {rho}", weight / total)
            cache.append(*next(layer.tokens(1)))
            position = tokens + at if moving else tokens
            q, q_unrotated = layer.query(one, cache, position)
            for name, policy in policies.items():
                cold()
                before = now()
                out, info = decode_step(q, cache, policy, states[name], q_unrotated=q_unrotated)
                elapsed = 1e3 * (now() - before)
                if at < WARM_UP:
                    compare(name, q, cache, out, info.selection)
                    continue
                samples[name].append(elapsed)
                mass = 1.0
                if info.selection is not None:
                    mass = float(recovered_mass(q, cache, info.selection).mean())
                masses[name].append(mass)
                if name == "with":
                    hits.append(0.0 if info.hit is None else float(info.hit.float().mean()))
    kept = {name: statistics.fmean(values) for name, values in masses.items()}
    mean = {name: statistics.fmean(values) for name, values in samples.items()}
    return Row(
        tokens=tokens,
        threads=number,
        clock=clock_name(number),
        rho=rho,
        moving=moving,
        similarity_threshold=threshold,
        hit_rate=statistics.fmean(hits),
        without_ms=mean["without"],
        with_ms=mean["with"],
        speed_up=mean["without"] / mean["with"],
        kept_mass_without=kept["without"],
        kept_mass_with=kept["with"],
        kept_mass_loss_points=100 * (kept["without"] - kept["with"]),
        samples_without_ms=samples["without"],
        samples_with_ms=samples["with"],
    )


def compare(name: str, q: Tensor, cache: KVCache, out: Tensor, selection: Selection | None) -> None:
    k, v = (x.transpose(1, 2) for x in (cache.k, cache.v))
    expected = attention_over(q, k, v, selection)
    error = rel_err(out.reshape(expected.shape), expected)
    require_agreement(f"{name} the cache", cache.max_seqlen, error, BOUND[cache.dtype])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="128k", rounds=86)
    parser.add_argument("--hit-rate", type=float, default=0.8, help="of the lists (0.8)")
    options = parse(parser, arguments, quick={"tokens": "4k", "rounds": 20, "topk": 256})
    tokens = parse_counts(options.tokens, "tokens")
    numbers, shape = parse_counts(options.threads, "threads"), shape_of(options)
    check_sizes(tokens, numbers, topk=options.topk, rounds=options.rounds, shortest=128)
    require(0 < options.hit_rate < 1, "hit-rate", options.hit_rate, "between 0 and 1")
    rows = []
    weight = 1 / (len(tokens) * len(numbers) * len(CASES))
    with progress_bar() as on_progress:
        for count in tokens:
            require_memory("tokens", count, shape.cache_bytes(count, "int4") + (1 << 30))
            for number in numbers:
                for rho, moving in CASES:
                    rows.append(
                        measure(
                            shape,
                            count,
                            options.topk,
                            number,
                            rho,
                            moving,
                            options.rounds,
                            options.hit_rate,
                            on_progress,
                            weight,
                        )
                    )
    columns = ["rho", "RoPE", "tokens", "threads", "threshold", "hits", "ms\nwithout", "ms\nwith"]
    columns += ["times\nfaster", "mass\nwithout", "mass\nwith", "loss in\npoints"]
    cells = [
        [
            f"{row.rho}",
            "moving" if row.moving else "fixed",
            str(row.tokens),
            str(row.threads),
            f"{row.similarity_threshold:.3f}",
            f"{100 * row.hit_rate:.0f} %",
            f"{row.without_ms:.2f}",
            f"{row.with_ms:.2f}",
            f"{row.speed_up:.2f}",
            f"{row.kept_mass_without:.4f}",
            f"{row.kept_mass_with:.4f}",
            f"{row.kept_mass_loss_points:.2f}",
        ]
        for row in rows
    ]
    results.print_table(f"selection cache, {shape}, mean over steps (simulated)", columns, cells)
    question = parser.description or ""
    print("written:", results.save(options.out, question, vars(options), rows))


if __name__ == "__main__":
    main()
