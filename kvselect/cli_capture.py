"""``kvselect capture``: queries, keys and values of a model's decode steps, as a file."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from kvselect.cli_eval import Job, progress_shown, wide_console


def add_capture(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "capture",
        help="write queries, keys and values of a model's decode steps to a safetensors file",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="docs/capture.md describes the file. examples:\n"
        "  kvselect capture --model embedded --task vt --lengths 16x --out vt.safetensors\n"
        "  kvselect capture --model ~/models/llama --prompt-file book.txt --lengths 16k,32k \\\n"
        "      --layers 0,15,31 --out book.safetensors",
    )
    command.add_argument("--model", required=True, help="a checkpoint's folder, or embedded:NAME")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt-file", type=Path, help="a text, UTF-8; its first tokens are read")
    source.add_argument(
        "--task", help="a sample of this task and its questions with their answers, as in eval"
    )
    command.add_argument("--lengths", default="1x", help="as in kvselect eval (default 1x)")
    command.add_argument("--layers", default="all", help="indices with commas (default: all)")
    command.add_argument(
        "--queries",
        type=int,
        default=64,
        help="tokens at the end that are read one at a time; theirs are the queries (default 64)",
    )
    command.add_argument(
        "--policy",
        help="under which the text is read, as in kvselect eval (default: dense within the trained "
        "window, beyond it token_select with compact positions)",
    )
    command.add_argument("--seed", type=int, default=0, help="of the task's sample (default 0)")
    command.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16")
    )
    command.add_argument("--device", default="cpu", help="as torch spells it (default cpu)")
    command.add_argument("--out", type=Path, required=True, help="the file, such as x.safetensors")
    command.add_argument("--force", action="store_true", help="replace a file that is there")
    command.set_defaults(prepare=_prepare)


def _prepare(options: argparse.Namespace) -> Job:
    from kvselect.checks import require_int
    from kvselect.eval import capture
    from kvselect.eval.checkpoint import load_checkpoint
    from kvselect.eval.request import parse_lengths, parse_policy
    from kvselect.eval.runner import require_policies
    from kvselect.eval.tasks import find_tasks

    require_int(options.queries, "queries", 1)
    require_int(options.seed, "seed", 0)
    parse_lengths(options.lengths, 1)
    layers = parse_layers(options.layers)
    policy = None if options.policy is None else parse_policy(options.policy)
    task = None if options.task is None else find_tasks([options.task])[0]
    folder = require_new_file(options.out, options.force)
    checkpoint = load_checkpoint(options.model, dtype=options.dtype, device=options.device)
    known = capture.capturable_layers(checkpoint)
    capture.require_layers(known, layers)
    lengths = parse_lengths(options.lengths, checkpoint.window_tokens)
    policies = {
        length.tokens: policy or capture.reading_policy(checkpoint, length.tokens)
        for length in lengths
    }
    require_policies(checkpoint, {type(p).__name__: p for p in policies.values()})
    num_layers = len(known) if layers is None else len(layers)
    size = capture.dump_bytes(checkpoint, list(policies), options.queries, num_layers)
    capture.require_room(checkpoint, policies, size, shutil.disk_usage(folder).free)
    texts = []
    for tokens in policies:
        if task is None:
            texts.append(capture.prompt_text(checkpoint, options.prompt_file, tokens))
        else:
            texts.append(
                capture.task_text(checkpoint, task, tokens, options.queries, seed=options.seed)
            )
    return lambda: _run(options, checkpoint, texts, list(policies.values()), layers)


def parse_layers(text: str) -> list[int] | None:
    """Indices such as "0,3,7", ascending; None for "all".

    Raises
    ------
    ValueError
        Naming the first entry that is none.
    """
    from kvselect.checks import require
    from kvselect.eval.request import split_list

    if text == "all":
        return None
    found: list[int] = []
    for entry in split_list(text):
        allowed = "indices >= 0 with commas, each once, or: all"
        require(entry.isdecimal() and int(entry) not in found, "layers", entry, allowed)
        found.append(int(entry))
    require(bool(found), "layers", text, "at least one index, or: all")
    return sorted(found)


def require_new_file(out: Path, force: bool) -> Path:
    """The existing folder that ``out`` will be written below.

    Raises
    ------
    ValueError
        If there is a file already, or none can be written there.
    """
    from kvselect.checks import require

    require(not out.is_dir(), "out", str(out), "a file, not a folder")
    require(force or not out.exists(), "out", str(out), "a new file (--force replaces this one)")
    folder = next(one for one in out.absolute().parents if one.exists())
    writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    require(writable, "out", str(out), f"a file in a folder that can be written ({folder} cannot)")
    return folder


def _run(
    options: argparse.Namespace, checkpoint: Any, texts: Any, policies: Any, layers: Any
) -> int:
    from rich.console import Console

    from kvselect.eval import capture
    from kvselect.eval.dump import save_dump
    from kvselect.eval.memory import in_units

    total = sum(len(text.tokens) for text in texts)
    try:
        with progress_shown(Console(stderr=True), total) as advance:
            dump = capture.capture(
                checkpoint, texts, policies, options.queries, layers=layers, on_progress=advance
            )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_dump(options.out, dump)
    except (OSError, ValueError) as error:
        told = error.strerror or error if isinstance(error, OSError) else error
        print(f"kvselect capture: error: out: got {str(options.out)!r} ({told})", file=sys.stderr)
        return 2
    console = wide_console()
    for (tokens, found), policy in zip(dump.contexts.items(), policies):
        layer = found[0]
        console.print(
            f"{tokens} tokens, read under {type(policy).__name__} ({policy.positions} positions): "
            f"{len(found)} layers of {layer.q.shape[1]}/{layer.k.shape[1]} heads of "
            f"{layer.q.shape[2]}, {layer.q.shape[0]} queries",
            highlight=False,
            soft_wrap=True,
        )
    size = in_units(options.out.stat().st_size)
    console.print(f"written: {options.out} ({size})", highlight=False, soft_wrap=True)
    return 0
