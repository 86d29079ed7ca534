"""`kvselect bench`: decode step, prefill chunk, each op; tables, JSON and a picture."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kvselect.bench import decode, ops, picture, prefill, results
from kvselect.bench.contenders import DisagreementError
from kvselect.bench.request import OnProgress, add_sizes, parse_counts, progress_bar, shape_of
from kvselect.checks import require
from kvselect.eval.request import parse_policies

__all__ = ["KINDS", "add_options", "prepare"]

KINDS = ("decode", "prefill", "ops")
QUICK_TOKENS, TOKENS = "8k,32k", "8k,32k,128k"
QUICK_ROUNDS, ROUNDS = 3, 7

Job = Callable[[], int]
# What a bench still has to do once its rows are there; gives the files written.
Finish = Callable[[], list[Path]]
Bench = Callable[[OnProgress], Finish]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("kind", nargs="?", default="decode", choices=(*KINDS, "all"))
    add_sizes(parser, tokens=None, rounds=None)
    parser.add_argument(
        "--policies",
        nargs="+",
        metavar="POLICY",
        help="decode: name or name:setting=value,setting=value instead of kvselect's own "
        "(StreamingLLM: streaming_llm:positions=original)",
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
    text, rounds = (QUICK_TOKENS, QUICK_ROUNDS) if options.quick else (TOKENS, ROUNDS)
    if options.tokens is not None:
        text = options.tokens
    if options.rounds is not None:
        rounds = options.rounds
    sizes: dict[str, Any] = {
        "tokens": parse_counts(text, "tokens"),
        "shape": shape_of(options),
        "topk": options.topk,
        "threads": parse_counts(options.threads, "threads"),
        "rounds": rounds,
    }
    benches: list[Bench] = []
    if "decode" in kinds:
        curves = decode.QUICK_BUDGETS if options.quick else decode.BUDGETS
        request = decode.DecodeRequest(policies=policies, curves=curves, **sizes)
        decode.check(request)
        benches.append(partial(_decode, request, out))
    if "prefill" in kinds:
        chunk = prefill.PrefillRequest(**sizes)
        prefill.check(chunk)
        benches.append(partial(_prefill, chunk, out))
    if "ops" in kinds:
        each = ops.OpsRequest(**sizes)
        ops.check(each)
        benches.append(partial(_ops, each, out))
    return lambda: _run(benches)


def _run(benches: list[Bench]) -> int:
    written: list[Path] = []
    for bench in benches:
        try:
            with progress_bar() as on_progress:
                finish = bench(on_progress)
        except DisagreementError as error:
            print(f"kvselect bench: {error}", file=sys.stderr)
            return 1
        written += finish()
    print("written:", ", ".join(map(str, written)))
    return 0


def _decode(request: decode.DecodeRequest, out: Path, on_progress: OnProgress) -> Finish:
    rows = decode.run(request, on_progress)

    def finish() -> list[Path]:
        decode.show(request, rows)
        path = results.save(out / "decode.json", decode.QUESTION, decode.config(request), rows)
        image = out / "time_against_mass.png"
        picture.draw(rows, image, picture.subtitle(request))
        return [path, image]

    return finish


def _prefill(request: prefill.PrefillRequest, out: Path, on_progress: OnProgress) -> Finish:
    rows = prefill.run(request, on_progress)

    def finish() -> list[Path]:
        prefill.show(request, rows)
        path = out / "prefill.json"
        return [results.save(path, prefill.QUESTION, dataclasses.asdict(request), rows)]

    return finish


def _ops(request: ops.OpsRequest, out: Path, on_progress: OnProgress) -> Finish:
    rows = ops.run(request, on_progress)

    def finish() -> list[Path]:
        ops.show(request, rows)
        path = out / "ops.json"
        return [results.save(path, ops.QUESTION, dataclasses.asdict(request), rows)]

    return finish
