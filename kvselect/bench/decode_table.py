"""The tables of a decode bench."""

from __future__ import annotations

from collections.abc import Sequence

from kvselect.bench.contenders import ENABLE_GQA, FOLDED, MATMUL, TORCH_TOKEN_SELECT
from kvselect.bench.decode_request import DecodeRequest, DecodeRow
from kvselect.bench.results import print_table

__all__ = ["show"]

COLUMNS = (
    "",
    "ms",
    "p20-p80",
    "MB",
    "GB/s",
    "x\nfloor",
    "x\ngqa",
    "x\nfolded",
    "x\nmatmul",
    "x torch\nops",
    "x best\ntorch",
    "tokens\nattended",
    "kept\nmass",
    "output\nerror",
)


def show(request: DecodeRequest, rows: Sequence[DecodeRow]) -> None:
    """One table per length and number of threads: the main rows."""
    if request.gpu_peers:
        _show_layers(request, rows)
        return
    for tokens in request.tokens:
        for number in request.threads:
            chosen = [
                row
                for row in rows
                if row.main and row.tokens == tokens and row.timing.threads == number
            ]
            bandwidth = chosen[0].timing.streaming_gb_per_s
            clock = "CPU time" if number == 1 else "wall time"
            title = (
                f"decode step, {tokens} tokens, {request.shape}, {number} thread(s), {clock}; "
                f"streaming reads {bandwidth:.1f} GB/s; structured random keys (simulated)"
            )
            print_table(title, COLUMNS, [_cells(row) for row in chosen])


def _cells(row: DecodeRow) -> list[str]:
    found = row.timing
    ratios = [
        f"{row.over[peer]:.1f}" if peer in row.over else "–"
        for peer in (ENABLE_GQA, FOLDED, MATMUL, TORCH_TOKEN_SELECT)
    ]
    return [
        row.contender,
        f"{found.median_ms:.2f}",
        f"{found.p20_ms:.2f}-{found.p80_ms:.2f}",
        f"{found.bytes_must_read / 1e6:.1f}",
        f"{found.gb_per_s:.1f}",
        f"{found.times_floor:.1f}",
        *ratios,
        f"{row.over_best_torch:.1f}",
        f"{row.attended_tokens:.0f}",
        f"{row.kept_mass:.3f}",
        "–" if row.output_error is None else f"{row.output_error:.3f}",
    ]


LAYER_COLUMNS = (
    "",
    "us per\nlayer",
    "p20-p80",
    "expected",
    "over\nexpected",
    "by the\nclock",
    "MB",
    "GB/s",
    "x\nfloor",
    "x best\ndense",
    "tokens\nattended",
    "kept\nmass",
    "output\nerror",
    "graph",
)


def _show_layers(request: DecodeRequest, rows: Sequence[DecodeRow]) -> None:
    for tokens in request.tokens:
        chosen = [row for row in rows if row.main and row.tokens == tokens]
        if not chosen:
            continue  # everybody was left out
        title = (
            f"decode step, {tokens} tokens, {request.shape}, {request.layers} layers; bandwidth "
            f"{chosen[0].timing.streaming_gb_per_s:.0f} GB/s; structured random keys (simulated)"
        )
        print_table(title, LAYER_COLUMNS, [_layer_cells(row) for row in chosen])


def _layer_cells(row: DecodeRow) -> list[str]:
    found = row.timing
    graph = {None: "–", "": "yes"}.get(found.not_captured, "no")
    return [
        row.contender,
        f"{1e3 * found.median_ms:.1f}",
        f"{1e3 * found.p20_ms:.1f}-{1e3 * found.p80_ms:.1f}",
        "–" if row.expected_us is None else f"{row.expected_us:.1f}",
        "–" if row.over_expected is None else f"{row.over_expected:.2f}",
        "–" if found.wall_ms is None else f"{1e3 * found.wall_ms:.1f}",
        f"{found.bytes_must_read / 1e6:.1f}",
        f"{found.gb_per_s:.0f}",
        f"{found.times_floor:.2f}",
        f"{row.over_best_torch:.2f}",
        f"{row.attended_tokens:.0f}",
        f"{row.kept_mass:.3f}",
        "–" if row.output_error is None else f"{row.output_error:.3f}",
        graph,
    ]
