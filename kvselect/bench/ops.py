"""Each op of a step alone: append, scan, select, attention over a list, dense attention, a hit.

Every output is compared with float32 (stored bits where bits must agree) before anything is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvselect.bench.contenders import require_agreement
from kvselect.bench.layer import Shape
from kvselect.bench.measure import (
    ColdCaches,
    int8_gmac_per_s,
    interleaved_ms,
    read_gb_per_s,
    threads,
)
from kvselect.bench.memory import require_memory
from kvselect.bench.request import OnProgress, check_sizes, no_progress
from kvselect.bench.results import Timing, print_table, timing
from kvselect.bench.single_ops import listed_tokens, single_ops
from kvselect.sketch import BLOCK_TOKENS

__all__ = ["QUESTION", "OpRow", "OpsRequest", "check", "run", "show"]

QUESTION = "How long does each op of a step take alone, and what limits it?"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsRequest:
    """What to measure; see `kvselect.bench.decode.DecodeRequest`."""

    tokens: tuple[int, ...]
    shape: Shape = field(default_factory=Shape)
    topk: int = 2048
    threads: tuple[int, ...] = (1,)
    rounds: int = 15
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRow:
    """One op at one length on one number of threads.

    Attributes
    ----------
    gmac_per_s : float or None
        Billions of multiply-adds per second, where the op is made of them.
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
    int8_gmac_per_s: float
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
    for tokens in request.tokens:
        require_memory("tokens", tokens, needed_bytes(request, tokens))


def needed_bytes(request: OpsRequest, tokens: int) -> int:
    """Memory at one length: four caches, and float32 votes to compare with."""
    shape = request.shape
    caches = sum(shape.cache_bytes(tokens, sketch) for sketch in ("int4", "int4", "int8", None))
    return caches + tokens * (8 * shape.head_dim + 16 * shape.num_q_heads) + (1 << 30)


def run(request: OpsRequest, on_progress: OnProgress = no_progress) -> list[OpRow]:
    """Measure every op at every length on every number of threads.

    Raises
    ------
    DisagreementError
        If an output is further from float32 than its dtype explains; nothing is timed then.
    """
    check(request)
    rows: list[OpRow] = []
    for tokens in request.tokens:
        rows += _run_length(request, tokens, on_progress, tokens / sum(request.tokens))
    return rows


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
            first = chosen[0]
            clock = "CPU time" if number == 1 else "wall time"
            title = (
                f"ops, {tokens} tokens, {request.shape}, {number} thread(s), {clock}; streaming "
                f"reads {first.timing.streaming_gb_per_s:.1f} GB/s, int8 products "
                f"{first.int8_gmac_per_s:.0f} GMAC/s"
            )
            print_table(title, COLUMNS, [_cells(row) for row in chosen])


def _cells(row: OpRow) -> list[str]:
    found = row.timing
    return [
        row.op,
        f"{found.median_ms:.3f}",
        f"{found.p20_ms:.3f}-{found.p80_ms:.3f}",
        f"{found.bytes_must_read / 1e6:.1f}",
        f"{found.gb_per_s:.1f}",
        f"{found.times_floor:.1f}",
        "–" if row.gmac_per_s is None else f"{row.gmac_per_s:.0f}",
        f"{100 * row.share_of_limit:.0f} %",
        row.limit,
        f"{row.output_error:.1e}",
    ]
