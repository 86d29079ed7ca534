"""`kvselect bench`: decode step, prefill chunk, each op; tables, JSON and a picture."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvselect.bench import decode, ops, picture, prefill, results
from kvselect.bench.contenders import DisagreementError
from kvselect.bench.entrants import gpu_policies
from kvselect.bench.graphs import layers_beyond_l2
from kvselect.bench.memory import require_cuda
from kvselect.bench.request import (
    OnProgress,
    add_device,
    add_sizes,
    parse_counts,
    progress_bar,
    shape_of,
)
from kvselect.bench.results import Skipped
from kvselect.checks import require
from kvselect.eval.request import parse_policies

__all__ = ["KINDS", "add_options", "prepare"]

KINDS = ("decode", "prefill", "ops")
QUICK_TOKENS, TOKENS = "8k,32k", "8k,32k,128k"
QUICK_ROUNDS, ROUNDS, GPU_ROUNDS = 3, 7, 50
HIT_SHARES = (0.5, 1.0)

Job = Callable[[], int]
# What a bench still has to do once its rows are there; gives the files written, and the contenders
# that something is wrong with.
Finish = Callable[[], tuple[list[Path], list[str]]]
Bench = Callable[[OnProgress], Finish]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("kind", nargs="?", default="decode", choices=(*KINDS, "all"))
    add_sizes(parser, tokens=None, rounds=None)
    add_device(parser)
    parser.add_argument(
        "--policies",
        nargs="+",
        metavar="POLICY",
        help="decode: name or name:setting=value,setting=value instead of kvselect's own "
        "(StreamingLLM: streaming_llm:positions=original)",
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=2048, help="prefill: queries of the chunk (2048)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two lengths, three rounds, short curves"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kvselect-bench"),
        help="folder for the JSON files and time_against_mass.png (default kvselect-bench)",
    )


def prepare(options: argparse.Namespace) -> Job:
    """Check everything that can be checked without measuring; the job measures.

    Raises
    ------
    ValueError, TypeError
        For a size, policy or folder that cannot be used, and for lengths beyond the free memory.
    """
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: got {str(out)!r}, which is a file, allowed: a folder, there or not")
    kinds = KINDS if options.kind == "all" else (options.kind,)
    policies = None
    if options.policies is not None:
        allowed = "decode or all with --policies"
        require("decode" in kinds, "bench", options.kind, allowed)
        policies = parse_policies(options.policies)
    shape = shape_of(options)
    like_gpu = shape.on_cuda or options.as_on_gpu
    text, rounds = (QUICK_TOKENS, QUICK_ROUNDS) if options.quick else (TOKENS, ROUNDS)
    if shape.on_cuda:
        require_cuda(shape.device)
        rounds = GPU_ROUNDS
    if options.tokens is not None:
        text = options.tokens
    if options.rounds is not None:
        rounds = options.rounds
    sizes: dict[str, Any] = {
        "tokens": parse_counts(text, "tokens"),
        "shape": shape,
        "topk": options.topk,
        "threads": parse_counts(options.threads, "threads"),
        "rounds": rounds,
    }
    layers = 1 if options.layers is None else options.layers
    if like_gpu and options.layers is None:
        layers = layers_beyond_l2(shape, min(sizes["tokens"]))
    benches: list[Bench] = []
    if "decode" in kinds:
        curves: tuple[int, ...] = decode.QUICK_BUDGETS if options.quick else decode.BUDGETS
        stack: dict[str, Any] = {"layers": layers}
        if like_gpu:
            curves = ()
            stack |= {"gpu_peers": True, "hit_shares": HIT_SHARES}
            policies = policies or gpu_policies(options.topk)
        request = decode.DecodeRequest(policies=policies, curves=curves, **stack, **sizes)
        decode.check(request)
        benches.append(partial(_decode, request, out))
    if "prefill" in kinds:
        chunk = prefill.PrefillRequest(
            gpu_peers=like_gpu, chunk_tokens=options.chunk_tokens, **sizes
        )
        prefill.check(chunk)
        benches.append(partial(_prefill, chunk, out))
    if "ops" in kinds:
        each = ops.OpsRequest(gpu_ops=like_gpu, layers=layers if like_gpu else 1, **sizes)
        ops.check(each)
        benches.append(partial(_ops, each, out))
    return lambda: _run(benches)


def _run(benches: list[Bench]) -> int:
    written: list[Path] = []
    wrong: list[str] = []
    for bench in benches:
        try:
            with progress_bar() as on_progress:
                finish = bench(on_progress)
        except DisagreementError as error:
            print(f"kvselect bench: {error}", file=sys.stderr)
            return 1
        files, names = finish()
        written += files
        wrong += names
    print("written:", ", ".join(map(str, written)))
    if wrong:
        print(f"kvselect bench: left out, and should not be: {', '.join(wrong)}", file=sys.stderr)
        return 1
    return 0


def _wrong(skipped: Sequence[Skipped]) -> list[str]:
    """Ours that are left out, and whoever disagrees with exact attention."""
    return [
        one.contender
        for one in skipped
        if one.contender.startswith("kvselect") or one.reason.startswith(DisagreementError.__name__)
    ]


def _decode(request: decode.DecodeRequest, out: Path, on_progress: OnProgress) -> Finish:
    skipped: list[Skipped] = []
    rows = decode.run(request, on_progress, skipped.append if request.gpu_peers else None)

    def finish() -> tuple[list[Path], list[str]]:
        decode.show(request, rows)
        results.print_skipped(skipped)
        path = out / "decode.json"
        results.save(path, decode.QUESTION, decode.config(request), rows, skipped)
        if request.gpu_peers:
            return [path], _wrong(skipped)
        image = out / "time_against_mass.png"
        picture.draw(rows, image, picture.subtitle(request))
        return [path, image], []

    return finish


def _prefill(request: prefill.PrefillRequest, out: Path, on_progress: OnProgress) -> Finish:
    skipped: list[Skipped] = []
    rows = prefill.run(request, on_progress, skipped.append if request.gpu_peers else None)

    def finish() -> tuple[list[Path], list[str]]:
        prefill.show(request, rows)
        results.print_skipped(skipped)
        path, config = out / "prefill.json", dataclasses.asdict(request)
        return [results.save(path, prefill.QUESTION, config, rows, skipped)], _wrong(skipped)

    return finish


def _ops(request: ops.OpsRequest, out: Path, on_progress: OnProgress) -> Finish:
    skipped: list[Skipped] = []
    rows = ops.run(request, on_progress, skipped.append if request.gpu_ops else None)

    def finish() -> tuple[list[Path], list[str]]:
        ops.show(request, rows)
        results.print_skipped(skipped)
        path, config = out / "ops.json", dataclasses.asdict(request)
        results.save(path, ops.QUESTION, config, rows, skipped)
        return [path], [one.contender for one in skipped]  # all of them are ours

    return finish
