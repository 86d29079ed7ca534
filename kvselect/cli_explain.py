"""``kvselect explain``: what each head chose, for a prompt of one's own or a task's sample."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvselect.cli_eval import Job, require_folder, wide_console, written_to

# transformers takes seconds to import: what needs it is imported where it is used.
if TYPE_CHECKING:
    from kvselect.eval.checkpoint import Checkpoint
    from kvselect.eval.tasks.sample import Question, Sample

MAX_STEPS = 64


def add_explain(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "explain",
        help="which tokens each head of each layer chose: coloured text, a page, a heat map",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  kvselect explain --model embedded --task chain --length 4x\n"
        "  kvselect explain --model ~/models/llama --file long.txt --steps 4",
    )
    command.add_argument("--model", required=True, help="a checkpoint's folder, or embedded:NAME")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text")
    source.add_argument("--file", type=Path, help="a file with the prompt, UTF-8")
    source.add_argument("--task", help="a sample of this task, as in kvselect eval")
    command.add_argument("--length", default="4x", help="of the sample (default 4x)")
    command.add_argument("--sample", type=int, default=0, help="which sample (default 0)")
    command.add_argument("--question", type=int, default=0, help="which question (default 0)")
    command.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    command.add_argument(
        "--position", type=int, help="cut the prompt behind this token (default: its last)"
    )
    command.add_argument(
        "--steps", type=int, help="decode steps (default: a task's answer, else 1)"
    )
    command.add_argument("--policy", help="as in kvselect eval (default: TokenSelect, compact)")
    command.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16")
    )
    command.add_argument("--device", default="cpu", help="as torch spells it (default cpu)")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("kvselect-explain"),
        help="folder for explain.html, explain.json and heat.png (default kvselect-explain)",
    )
    command.set_defaults(prepare=_prepare)


def _prepare(options: argparse.Namespace) -> Job:
    import numpy as np

    from kvselect.checks import require, require_int
    from kvselect.eval.checkpoint import load_checkpoint
    from kvselect.eval.request import default_policies, parse_policy

    for name in ("sample", "question", "seed"):
        require_int(getattr(options, name), name, 0)
    allowed = f"1..{MAX_STEPS}"
    if options.steps is not None:
        require(1 <= options.steps <= MAX_STEPS, "steps", options.steps, allowed)
    policy = None if options.policy is None else parse_policy(options.policy)
    prompt = options.prompt if options.file is None else _read(options.file)
    require_folder(options.out)
    checkpoint = load_checkpoint(options.model, dtype=options.dtype, device=options.device)
    if policy is None:
        policies = default_policies(checkpoint.window_tokens)
        policy = next(p for p in reversed(list(policies.values())) if p.positions == "compact")

    evidence: tuple[tuple[int, int], ...] = ()
    steps = 1 if options.steps is None else options.steps
    if options.task is None:
        ids = np.array(checkpoint.tokenizer.encode(prompt), np.int64)
        title = f"{checkpoint.name}: {'the prompt' if options.file is None else options.file.name}"
    else:
        sample, question = _sample(checkpoint, options)
        ids = np.concatenate([sample.context, question.tokens])
        evidence = question.evidence
        steps = min(question.max_new_tokens, 8) if options.steps is None else options.steps
        title = f"{checkpoint.name}: {options.task}, answer “{' '.join(question.answer)}”"
    require(len(ids) >= 2, "prompt", f"{len(ids)} tokens", "at least 2 tokens")
    if options.position is not None:
        allowed = f"1..{len(ids) - 1} (tokens of the prompt, from 0)"
        require(1 <= options.position < len(ids), "position", options.position, allowed)
        ids = ids[: options.position + 1]
    return lambda: _run(checkpoint, policy, ids, steps, evidence, title, options.out)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file: got {str(file)!r} ({error}), allowed: a text file in UTF-8") from (
            error
        )


def _sample(checkpoint: Checkpoint, options: argparse.Namespace) -> tuple[Sample, Question]:
    from kvselect.checks import require
    from kvselect.eval.request import parse_lengths
    from kvselect.eval.tasks import dialect_sample, find_tasks, prose_sample

    task = find_tasks([options.task])[0]
    length = parse_lengths(options.length, checkpoint.window_tokens)[0].tokens
    places: dict[str, int] = {"seed": options.seed, "index": options.sample}
    if checkpoint.speaks_dialect:
        sample = dialect_sample(task, length, **places)
    else:
        sample = prose_sample(task, length, checkpoint.tokenizer, **places)
    allowed = f"0..{len(sample.questions) - 1} (questions of the sample)"
    require(options.question < len(sample.questions), "question", options.question, allowed)
    return sample, sample.questions[options.question]


def _run(
    checkpoint: Checkpoint,
    policy: Any,
    ids: Any,
    steps: int,
    evidence: tuple[tuple[int, int], ...],
    title: str,
    out: Path,
) -> int:
    import torch

    from kvselect.eval import explain_page
    from kvselect.eval.charts import save_pngs
    from kvselect.explain import explain

    def words(tokens: Any) -> tuple[str, ...]:
        space = " " if checkpoint.speaks_dialect else ""
        return tuple(checkpoint.tokenizer.decode([int(token)]) + space for token in tokens)

    def job() -> int:
        found = explain(checkpoint.model, policy, torch.from_numpy(ids), num_steps=steps)
        told = explain_page.Told(
            explanation=found,
            words=words(found.tokens),
            next_words=words(step.next_token for step in found.steps),
            evidence=evidence,
            title=title,
        )
        out.mkdir(parents=True, exist_ok=True)
        (out / "explain.json").write_text(json.dumps(found.to_dict()) + "\n", encoding="utf-8")
        console = wide_console()
        explain_page.print_steps(told, console)
        (out / "explain.html").write_text(explain_page.page(told), encoding="utf-8")
        save_pngs([explain_page.chart(told)], out)
        console.print(
            f"written to {out}: explain.html, explain.json, heat.png",
            highlight=False,
            soft_wrap=True,
        )
        return 0

    return written_to(out, job)
