"""The tables of a prefill bench."""

from __future__ import annotations

from collections.abc import Sequence

from kvselect.bench.prefill_request import TORCH, PrefillRequest, PrefillRow
from kvselect.bench.results import print_table

__all__ = ["show"]

COLUMNS = (
    "",
    "ms",
    "p20-p80",
    "GMAC/s",
    "x SDPA\nmasked",
    "x SDPA\nunmasked",
    "x\nmatmul",
    "x best\ntorch",
    "KV heads\ntimed",
    "tokens\nattended",
    "kept\nmass",
    "output\nerror",
    "lists\nattended by",
)


def show(request: PrefillRequest, rows: Sequence[PrefillRow]) -> None:
    """One table per length and number of threads, and our stages below it."""
    for tokens in request.tokens:
        for number in request.threads:
            chosen = [row for row in rows if row.tokens == tokens and row.timing.threads == number]
            if not chosen:
                continue  # everybody was left out
            clock = "CPU time" if number == 1 else "wall time"
            if chosen[0].timing.clock == "events":
                clock = "GPU events"
            title = (
                f"prefill chunk of {request.chunk_tokens} queries at {tokens} tokens, "
                f"{request.shape}, {number} thread(s), {clock}; structured random keys (simulated)"
            )
            if request.gpu_peers:
                print_table(title, GPU_COLUMNS, [_gpu_cells(row) for row in chosen])
                continue
            print_table(title, COLUMNS, [_cells(row) for row in chosen])
            for row in chosen:
                if row.stages_ms:
                    total = sum(row.stages_ms.values())
                    shares = (
                        f"{stage} {ms:.0f} ms ({100 * ms / total:.0f} %)"
                        for stage, ms in row.stages_ms.items()
                    )
                    print(f"{row.contender}: {', '.join(shares)}")


GPU_COLUMNS = (
    "",
    "ms",
    "p20-p80",
    "expected",
    "over\nexpected",
    "by the\nclock",
    "TFLOP/s",
    "x best\nSDPA",
    "x best\ndense",
    "tokens\nattended",
    "kept\nmass",
    "output\nerror",
    "lists\nattended by",
    "graph",
)


def _gpu_cells(row: PrefillRow) -> list[str]:
    found = row.timing
    return [
        row.contender,
        f"{found.median_ms:.3f}",
        f"{found.p20_ms:.3f}-{found.p80_ms:.3f}",
        "–" if row.expected_us is None else f"{row.expected_us / 1e3:.3f}",
        "–" if row.over_expected is None else f"{row.over_expected:.2f}",
        "–" if found.wall_ms is None else f"{found.wall_ms:.3f}",
        "–" if row.gmac_per_s is None else f"{2 * row.gmac_per_s / 1e3:.1f}",
        f"{row.over_best_sdpa:.2f}",
        f"{row.over_best_torch:.2f}",
        f"{row.attended_tokens:.0f}",
        f"{row.kept_mass:.3f}",
        f"{row.output_error:.3f}",
        row.attention or "–",
        {None: "–", "": "yes"}.get(found.not_captured, "no"),
    ]


def _cells(row: PrefillRow) -> list[str]:
    found = row.timing
    return [
        row.contender,
        f"{found.median_ms:.0f}",
        f"{found.p20_ms:.0f}-{found.p80_ms:.0f}",
        "–" if row.gmac_per_s is None else f"{row.gmac_per_s:.0f}",
        *(f"{row.over[peer]:.2f}" for peer in TORCH),
        f"{row.over_best_torch:.1f}",
        f"{row.timed_kv_heads} of {row.num_kv_heads}",
        f"{row.attended_tokens:.0f}",
        f"{row.kept_mass:.3f}",
        f"{row.output_error:.3f}",
        row.attention or "–",
    ]
