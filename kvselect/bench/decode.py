"""One decode step: every contender on the same layers, the same queries, the same cold caches.

The order is fixed: build, compare every output with float32 (on a GPU: float64), measure what each
list keeps, and only then time. On a CPU one layer is timed; on a GPU a CUDA graph of several, each
with keys and values of its own, and times are those of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from statistics import mean

import torch
from torch import Tensor

from kvselect.bench.contenders import (
    BOUND,
    TORCH_TOKEN_SELECT,
    attention_over,
    require_agreement,
)
from kvselect.bench.decode_request import (
    BUDGETS,
    QUESTION,
    QUICK_BUDGETS,
    DecodeRequest,
    DecodeRow,
    check,
    config,
    needed_bytes,
)
from kvselect.bench.decode_table import show
from kvselect.bench.entrants import (
    Entrant,
    Guard,
    build_or_raise,
    entrants,
    kept,
    reused_entrants,
)
from kvselect.bench.expected import expected_us
from kvselect.bench.graphs import (
    ColdL2,
    DeviceSamples,
    as_reason,
    copy_gb_per_s,
    interleaved_replays,
)
from kvselect.bench.layer import StructuredLayer
from kvselect.bench.measure import ColdCaches, Contender, interleaved_ms, read_gb_per_s, threads
from kvselect.bench.request import OnProgress, OnSkip, no_progress
from kvselect.bench.results import Skipped, Timing, timing
from kvselect.bench.reuse import RepeatedStep
from kvselect.cache import KVCache
from kvselect.policies.token_select import TokenSelect
from kvselect.testing import rel_err

__all__ = [
    "BUDGETS",
    "QUESTION",
    "QUICK_BUDGETS",
    "DecodeRequest",
    "DecodeRow",
    "check",
    "config",
    "needed_bytes",
    "run",
    "show",
]

SIMILARITY = 0.9  # of the selection caches of steps with hits: these query the same or the opposite
PERFECT_DENSE = "a perfect dense kernel (modelled)"


def run(
    request: DecodeRequest,
    on_progress: OnProgress = no_progress,
    on_skip: OnSkip | None = None,
) -> list[DecodeRow]:
    """Measure every length on every number of threads.

    Parameters
    ----------
    on_progress : callable
        Told what is going on, and how much of all work (1.0) was just finished.
    on_skip : callable or None
        Told who does not take part, and why: whoever cannot be built, or disagrees with exact
        attention. None: such an error ends the bench.

    Raises
    ------
    DisagreementError
        Without ``on_skip``: if an output is further from float32 than its dtype explains; nothing
        is timed then.
    """
    check(request)
    rows: list[DecodeRow] = []
    for tokens in request.tokens:
        weight = tokens / sum(request.tokens)
        rows += _run_length(request, tokens, on_progress, on_skip, weight)
    return rows


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of the stack that is timed: who takes part on it, compared and weighed."""

    everybody: dict[str, Entrant]
    errors: dict[str, tuple[float, float]]
    keeps: dict[str, tuple[float, float]]


def _run_length(
    request: DecodeRequest,
    tokens: int,
    on_progress: OnProgress,
    on_skip: OnSkip | None,
    weight: float,
) -> list[DecodeRow]:
    shape, skipped = request.shape, set[str]()

    def skip(name: str, reason: str) -> None:
        assert on_skip is not None
        if name not in skipped:  # once, not per layer
            on_skip(Skipped(tokens=tokens, contender=name, reason=reason))
        skipped.add(name)

    stack: list[_Layer] = []
    for index in range(request.layers):
        on_progress(f"{tokens} tokens: layer {index + 1} of {request.layers}", 0.0)
        stack.append(_new_layer(request, tokens, index, None if on_skip is None else skip))
        on_progress(f"{tokens} tokens: outputs", 0.4 * weight / request.layers)
    names = [name for name in stack[0].everybody if all(name in layer.everybody for layer in stack)]
    if not names:
        return []  # everybody was left out
    by_name = {name: [layer.everybody[name] for layer in stack] for name in names}
    contenders = {name: _in_turn(entrants) for name, entrants in by_name.items()}
    errors = {
        name: (
            max(layer.errors[name][0] for layer in stack),
            max(layer.errors[name][1] for layer in stack),
        )
        for name in names
    }
    keeps = {
        name: (
            mean(layer.keeps[name][0] for layer in stack),
            mean(layer.keeps[name][1] for layer in stack),
        )
        for name in names
    }
    everybody = {name: entrants[0] for name, entrants in by_name.items()}
    num_bytes = {
        name: int(mean(entrant.bytes_must_read for entrant in entrants))
        for name, entrants in by_name.items()
    }

    rows: list[DecodeRow] = []
    part = 0.6 * weight / (len(request.threads) * request.rounds * len(contenders))
    for number in request.threads:
        with threads(number):
            bandwidth, samples = _measure(
                request,
                contenders,
                number,
                lambda name: on_progress(f"{tokens}: {name}", part),
                None if on_skip is None else lambda name, error: skip(name, as_reason(error)),
            )
        timed = {
            name: timing(
                [ms / request.layers for ms in found.event_ms],
                num_bytes[name],
                bandwidth,
                number,
                wall_ms=[ms / request.layers for ms in found.wall_ms] if shape.on_cuda else None,
                not_captured=found.not_captured if shape.on_cuda else None,
            )
            for name, found in samples.items()
        }
        everybody = {name: entrant for name, entrant in everybody.items() if name in timed}
        rows += _rows(request, tokens, everybody, timed, errors, keeps, bandwidth)
        dense_bytes = 2 * shape.batch * shape.row_bytes * tokens
        if not timed:
            continue
        rows.append(_perfect_dense(tokens, dense_bytes, bandwidth, number, rows))
    return rows


def _in_turn(entrants: Sequence[Entrant]) -> Contender:
    """All layers of a contender, one after the other."""
    prepares = [entrant.prepare for entrant in entrants if entrant.prepare is not None]

    def prepare() -> None:
        for one in prepares:
            one()

    return Contender(
        call=lambda: [entrant.call() for entrant in entrants],
        prepare=prepare if prepares else None,
    )


def _measure(
    request: DecodeRequest,
    contenders: Mapping[str, Contender],
    number: int,
    on_call: Callable[[str], object],
    on_fail: Callable[[str, Exception], object] | None,
) -> tuple[float, dict[str, DeviceSamples]]:
    """Bandwidth of the machine, and milliseconds of all layers of every contender."""
    shape = request.shape
    if shape.on_cuda:
        device = torch.device(shape.device)
        bandwidth = copy_gb_per_s(device)
        samples = interleaved_replays(
            contenders,
            request.rounds,
            cold=ColdL2(device),
            bound=BOUND[shape.torch_dtype],
            on_call=on_call,
            on_fail=on_fail,
        )
        return bandwidth, samples
    bandwidth = read_gb_per_s(number)
    found = interleaved_ms(
        contenders, request.rounds, num_threads=number, cold=ColdCaches(), on_call=on_call
    )
    return bandwidth, {name: DeviceSamples(ms, [], "") for name, ms in found.items()}


def _new_layer(
    request: DecodeRequest, tokens: int, index: int, skip: Callable[[str, str], None] | None
) -> _Layer:
    """Draw a layer, let everybody build on it, compare outputs and measure what lists keep."""
    shape = request.shape

    def guarded(name: str, build: Callable[[], Entrant]) -> Entrant | None:
        assert skip is not None
        try:
            return build()
        except Exception as error:  # whoever cannot take part is reported; the others go on
            skip(name, as_reason(error))
            return None

    guard: Guard = build_or_raise if skip is None else guarded
    layer = StructuredLayer(shape, request.seed + index)
    caches = {sketch: shape.new_cache(tokens, sketch) for sketch in request.sketches}
    base = next(iter(caches.values()))
    drawn, steps = layer.draw_query() if request.hit_shares else None, {}
    layer.fill(list(caches.values()), tokens if drawn is None else tokens - 1)
    if drawn is not None:
        anchor = layer.query(drawn, base)[0]
        for name, policy in request.contestants.items():
            if not isinstance(policy, TokenSelect) or policy.required_sketch is None:
                continue
            try:
                reusing = replace(policy, similarity_threshold=SIMILARITY)
                steps[name] = RepeatedStep(reusing, anchor, caches[policy.required_sketch])
            except Exception as error:
                if skip is None:
                    raise
                skip(f"{name}, hits", as_reason(error))
        layer.fill(list(caches.values()), 1)
        for step in steps.values():
            step.arm()
    q = layer.query(layer.draw_query() if drawn is None else drawn, base)[0]
    everybody = entrants(
        q,
        caches,
        shape,
        request.contestants,
        topk=request.topk,
        curves=request.curves,
        with_enable_gqa=shape.batch * tokens <= request.slow_tokens,
        gpu_peers=request.gpu_peers,
        guard=guard,
    )
    everybody |= reused_entrants(steps, q, base, shape, request.hit_shares, index, guard)
    errors = compare(q, base, everybody, skip)
    everybody = {name: everybody[name] for name in errors}
    keeps = {name: kept(q, base, entrant.selection) for name, entrant in everybody.items()}
    return _Layer(everybody, errors, keeps)


def compare(
    q: Tensor,
    cache: KVCache,
    everybody: Mapping[str, Entrant],
    skip: Callable[[str, str], None] | None = None,
) -> dict[str, tuple[float, float]]:
    """Errors of every output against exact attention: over the same list, and over everything.

    With ``skip`` a contender whose output its list does not explain is reported and left out.

    Raises
    ------
    DisagreementError
        Without ``skip``: naming the first such contender.
    """
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    dense = attention_over(q, k, v, None)
    bound, errors = BOUND[cache.dtype], {}
    for name, entrant in everybody.items():
        try:
            if entrant.prepare is not None:
                entrant.prepare()
            out, expected = entrant.call().reshape(dense.shape), dense
            if entrant.selection is not None:
                expected = attention_over(q, k, v, entrant.selection)
            error = rel_err(out, expected)
            require_agreement(name, cache.max_seqlen, error, bound)
            errors[name] = (error, rel_err(out, dense))
        except Exception as failure:
            if skip is None:
                raise
            skip(name, as_reason(failure))
    return errors


def _rows(
    request: DecodeRequest,
    tokens: int,
    everybody: Mapping[str, Entrant],
    timed: Mapping[str, Timing],
    errors: Mapping[str, tuple[float, float]],
    keeps: Mapping[str, tuple[float, float]],
    bandwidth: float,
) -> list[DecodeRow]:
    shape = request.shape
    dense = [name for name, entrant in everybody.items() if entrant.dense_peer]
    names = [*dense, *(name for name in (TORCH_TOKEN_SELECT,) if name in timed)]
    peers = {name: timed[name].median_ms for name in names}
    best = min((peers[name] for name in dense), default=nan)
    dense_ms = 2 * shape.batch * shape.row_bytes * tokens / bandwidth / 1e6

    def expected(name: str) -> float | None:
        entrant = everybody[name]
        if entrant.design is None or not request.gpu_peers:
            return None
        share = 0.0 if entrant.design == "hit" else entrant.hit_share
        return expected_us(entrant.design, shape, tokens, keeps[name][1], bandwidth, share)

    def over_expected(name: str) -> float | None:
        us = expected(name)
        return None if us is None else 1e3 * timed[name].median_ms / us

    return [
        DecodeRow(
            tokens=tokens,
            contender=name,
            method=entrant.method,
            budget_tokens=entrant.budget_tokens,
            main=entrant.main,
            note=entrant.note,
            over={peer: ms / timed[name].median_ms for peer, ms in peers.items()},
            over_best_torch=best / timed[name].median_ms,
            over_perfect_dense=dense_ms / timed[name].median_ms,
            attended_tokens=keeps[name][1],
            kept_mass=keeps[name][0],
            output_error=errors[name][0],
            output_error_vs_dense=errors[name][1],
            sketch_over_kv=entrant.sketch_over_kv,
            timing=timed[name],
            layers=request.layers,
            batch=shape.batch,
            hit_share=entrant.hit_share,
            expected_us=expected(name),
            over_expected=over_expected(name),
        )
        for name, entrant in everybody.items()
    ]


def _perfect_dense(
    tokens: int, num_bytes: int, bandwidth: float, number: int, rows: Sequence[DecodeRow]
) -> DecodeRow:
    """Keys and values of everything at the measured bandwidth: what no dense kernel can beat."""
    found = timing([num_bytes / bandwidth / 1e6], num_bytes, bandwidth, number)
    measured = rows[-1]  # of the same length and threads: its ratios give the peers' times
    scale = measured.timing.median_ms / found.median_ms
    return DecodeRow(
        tokens=tokens,
        contender=PERFECT_DENSE,
        method=PERFECT_DENSE,
        budget_tokens=None,
        main=True,
        note="modelled: bytes over bandwidth",
        over={peer: ratio * scale for peer, ratio in measured.over.items()},
        over_best_torch=measured.over_best_torch * scale,
        over_perfect_dense=1.0,
        attended_tokens=float(tokens),
        kept_mass=1.0,
        output_error=None,
        output_error_vs_dense=None,
        sketch_over_kv=None,
        timing=found,
        layers=measured.layers,
        batch=measured.batch,
    )
