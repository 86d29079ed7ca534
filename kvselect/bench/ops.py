"""Each op of a step alone: append, scan, select, attention over a list, dense attention, a hit.

Every output is compared with float32 (stored bits where bits must agree) before anything is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvselect.bench.contenders import BOUND, require_agreement
from kvselect.bench.graphs import (
    ColdL2,
    DeviceSamples,
    as_reason,
    copy_gb_per_s,
    interleaved_replays,
)
from kvselect.bench.layer import Shape
from kvselect.bench.measure import (
    ColdCaches,
    Contender,
    int8_gmac_per_s,
    interleaved_ms,
    read_gb_per_s,
    threads,
)
from kvselect.bench.memory import free_device_bytes, require_cuda, require_memory
from kvselect.bench.request import OnProgress, OnSkip, check_sizes, no_progress
from kvselect.bench.results import Skipped, Timing, print_table, timing
from kvselect.bench.single_ops import gpu_ops, listed_tokens, single_ops
from kvselect.checks import require, require_int
from kvselect.sketch import BLOCK_TOKENS

__all__ = ["QUESTION", "OpRow", "OpsRequest", "check", "run", "show"]

QUESTION = "How long does each op of a step take alone, and what limits it?"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsRequest:
    """What to measure; see `kvselect.bench.decode.DecodeRequest`.

    Parameters
    ----------
    layers : int
        Timed together with ``gpu_ops``, each with keys of its own; times are those of one.
    gpu_ops : bool
        Those of `kvselect.bench.single_ops.gpu_ops`, on whatever device; a GPU runs no others.
    """

    tokens: tuple[int, ...]
    shape: Shape = field(default_factory=Shape)
    topk: int = 2048
    threads: tuple[int, ...] = (1,)
    rounds: int = 15
    layers: int = 1
    gpu_ops: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRow:
    """One op at one length on one number of threads.

    Attributes
    ----------
    gmac_per_s : float or None
        Billions of multiply-adds per second, where the op is made of them.
    int8_gmac_per_s : float or None
        Of torch's matrix product on this machine; None with ``gpu_ops``.
    share_of_limit : float
        Time of the binding limit over the time measured: bytes at the streaming bandwidth or, for
        scans of a sketch, multiply-adds at the int8 rate of torch's matrix product; whichever takes
        longer.
    limit : "bandwidth" or "int8 products"
    output_error : float
        Relative, against float32; 0 where bits agree.
    """

    tokens: int
    op: str
    gmac_per_s: float | None
    int8_gmac_per_s: float | None
    share_of_limit: float
    limit: str
    output_error: float
    timing: Timing


def check(request: OpsRequest) -> None:
    """Refuse what cannot run, before anything is allocated.

    Raises
    ------
    ValueError, TypeError
        For sizes that do not fit each other or the free memory.
    """
    check_sizes(
        request.tokens,
        request.threads,
        topk=request.topk,
        rounds=request.rounds,
        shortest=listed_tokens(request.topk) + BLOCK_TOKENS,
    )
    shape, free = request.shape, None
    require(shape.batch == 1, "batch", shape.batch, "1 (ops alone)")
    require_int(request.layers, "layers", 1)
    if shape.on_cuda:
        require_cuda(shape.device)
        require(request.threads == (1,), "threads", request.threads, "(1,) on a GPU")
        require(request.gpu_ops, "gpu_ops", request.gpu_ops, "True on a GPU")
        free = free_device_bytes(shape.device)
    for tokens in request.tokens:
        require_memory("tokens", tokens, needed_bytes(request, tokens), free)


def needed_bytes(request: OpsRequest, tokens: int) -> int:
    """Memory at one length: four caches, and float32 votes to compare with."""
    shape = request.shape
    if request.gpu_ops:
        scores = tokens * (8 * shape.head_dim + 16 * shape.num_q_heads)
        return request.layers * (shape.cache_bytes(tokens, "int4") + scores) + (1 << 30)
    caches = sum(shape.cache_bytes(tokens, sketch) for sketch in ("int4", "int4", "int8", None))
    return caches + tokens * (8 * shape.head_dim + 16 * shape.num_q_heads) + (1 << 30)


def run(
    request: OpsRequest, on_progress: OnProgress = no_progress, on_skip: OnSkip | None = None
) -> list[OpRow]:
    """Measure every op at every length on every number of threads.

    Parameters
    ----------
    on_skip : callable or None
        With ``gpu_ops``: told which op is left out, since its output is off or it fails, and why.

    Raises
    ------
    DisagreementError
        Without ``on_skip``: if an output is further from float32 than its dtype explains; nothing
        is timed then.
    """
    check(request)
    rows: list[OpRow] = []
    for tokens in request.tokens:
        weight = tokens / sum(request.tokens)
        if request.gpu_ops:
            rows += _run_layers(request, tokens, on_progress, on_skip, weight)
        else:
            rows += _run_length(request, tokens, on_progress, weight)
    return rows


def _run_layers(
    request: OpsRequest,
    tokens: int,
    on_progress: OnProgress,
    on_skip: OnSkip | None,
    weight: float,
) -> list[OpRow]:
    shape, stack = request.shape, []
    for index in range(request.layers):
        on_progress(f"{tokens} tokens: layer {index + 1} of {request.layers}", 0.0)
        stack.append(gpu_ops(shape, tokens, request.topk, request.seed + index))
        on_progress(f"{tokens} tokens: keys", 0.3 * weight / request.layers)
    errors: dict[str, float] = {}
    for name in stack[0]:
        try:
            errors[name] = max(ops[name].error() for ops in stack)
            require_agreement(name, tokens, errors[name], stack[0][name].bound)
        except Exception as error:
            if on_skip is None:
                raise
            errors.pop(name, None)
            on_skip(Skipped(tokens=tokens, contender=name, reason=as_reason(error)))
    contenders = {name: _in_turn([ops[name].contender for ops in stack]) for name in errors}
    part = 0.7 * weight / max(request.rounds * len(contenders), 1)

    def on_call(name: str) -> None:
        on_progress(f"{tokens} tokens: {name}", part)

    def on_fail(name: str, error: Exception) -> None:
        if on_skip is None:
            raise error
        on_skip(Skipped(tokens=tokens, contender=name, reason=as_reason(error)))

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
    else:
        bandwidth = read_gb_per_s(1)
        found = interleaved_ms(contenders, request.rounds, cold=ColdCaches(), on_call=on_call)
        samples = {name: DeviceSamples(ms, [], "") for name, ms in found.items()}
    rows = []
    for name in samples:
        op, sampled = stack[0][name], samples[name]
        time_of_layer = timing(
            [ms / request.layers for ms in sampled.event_ms],
            op.bytes_must_read,
            bandwidth,
            1,
            wall_ms=[ms / request.layers for ms in sampled.wall_ms] if shape.on_cuda else None,
            not_captured=sampled.not_captured if shape.on_cuda else None,
        )
        median = time_of_layer.median_ms
        rows.append(
            OpRow(
                tokens=tokens,
                op=name,
                gmac_per_s=None if op.macs is None else op.macs / median / 1e6,
                int8_gmac_per_s=None,
                share_of_limit=time_of_layer.floor_ms / median,
                limit="bandwidth",
                output_error=errors[name],
                timing=time_of_layer,
            )
        )
    return rows


def _in_turn(contenders: Sequence[Contender]) -> Contender:
    """The same op of all layers, one after the other."""
    return Contender(call=lambda: [one.call() for one in contenders])


def _run_length(
    request: OpsRequest, tokens: int, on_progress: OnProgress, weight: float
) -> list[OpRow]:
    on_progress(f"{tokens} tokens: keys", 0.0)
    # A hit appends one token per sample and before them.
    steps = len(request.threads) * (request.rounds + 1)
    ops = single_ops(request.shape, tokens, request.topk, steps, request.seed)
    on_progress(f"{tokens} tokens: outputs", 0.3 * weight)
    errors = {}
    for name, op in ops.items():
        errors[name] = op.error()
        require_agreement(name, tokens, errors[name], op.bound)
    rows = []
    part = 0.7 * weight / (len(request.threads) * request.rounds * len(ops))
    for number in request.threads:
        with threads(number):
            bandwidth, peak = read_gb_per_s(number), int8_gmac_per_s(number)
            samples = interleaved_ms(
                {name: op.contender for name, op in ops.items()},
                request.rounds,
                num_threads=number,
                cold=ColdCaches(),
                on_call=lambda name: on_progress(f"{tokens} tokens: {name}", part),
            )
        for name, op in ops.items():
            found = timing(samples[name], op.bytes_must_read, bandwidth, number)
            binding, limit = found.floor_ms, "bandwidth"
            if op.int8 and op.macs is not None and op.macs / peak / 1e6 > binding:
                binding, limit = op.macs / peak / 1e6, "int8 products"
            rows.append(
                OpRow(
                    tokens=tokens,
                    op=name,
                    gmac_per_s=None if op.macs is None else op.macs / found.median_ms / 1e6,
                    int8_gmac_per_s=peak,
                    share_of_limit=binding / found.median_ms,
                    limit=limit,
                    output_error=errors[name],
                    timing=found,
                )
            )
    return rows


COLUMNS = ("", "ms", "p20-p80", "MB", "GB/s", "x\nfloor", "GMAC/s", "of the\nlimit", "", "error")


def show(request: OpsRequest, rows: Sequence[OpRow]) -> None:
    """One table per length and number of threads."""
    for tokens in request.tokens:
        for number in request.threads:
            chosen = [row for row in rows if row.tokens == tokens and row.timing.threads == number]
            if not chosen:
                continue  # every op was left out
            first = chosen[0]
            clock = {"cpu": "CPU time", "wall": "wall time"}.get(first.timing.clock, "GPU events")
            title = (
                f"ops, {tokens} tokens, {request.shape}, {number} thread(s), {clock}; bandwidth "
                f"{first.timing.streaming_gb_per_s:.1f} GB/s"
            )
            if first.int8_gmac_per_s is not None:
                title += f", int8 products {first.int8_gmac_per_s:.0f} GMAC/s"
            print_table(title, COLUMNS, [_cells(row) for row in chosen])


def _cells(row: OpRow) -> list[str]:
    found = row.timing
    return [
        row.op,
        f"{found.median_ms:.4f}",
        f"{found.p20_ms:.4f}-{found.p80_ms:.4f}",
        f"{found.bytes_must_read / 1e6:.1f}",
        f"{found.gb_per_s:.1f}",
        f"{found.times_floor:.1f}",
        "–" if row.gmac_per_s is None else f"{row.gmac_per_s:.0f}",
        f"{100 * row.share_of_limit:.0f} %",
        row.limit,
        f"{row.output_error:.1e}",
    ]
