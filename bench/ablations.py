"""Do TokenSelect's defaults stand, each changed alone on the same samples?

Variable tracking and chains on the embedded retrieval model at a budget so small that ranking
matters (4 picked, 4 sinks, 32 recent tokens), inside the trained window and at four of them; and
text of Python's standard library on the embedded language model. Exact scores, so that no sketch
blurs what is compared. Differences are paired: questions, contexts, segments.

Expected before it ran: the wrong head map and unscaled votes lose clearly on variable tracking (.84
and .66 against .985 on a prototype of the model, with 16 picked), pooling loses there, one list
per layer loses mass but few answers, one mean query loses perplexity, the number of groups matters
little; tail blocks matter where a question would otherwise be averaged with its context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from kvselect.bench.measure import threads
from kvselect.bench.request import parse, script_parser
from kvselect.bench.results import Skipped, print_table, save
from kvselect.bench.resumed import resumed
from kvselect.checks import require_int
from kvselect.cli_eval import progress_shown
from kvselect.eval import ablation, perplexity, runner
from kvselect.eval.ablation import Effect, mass_effects, score_effects, text_effects
from kvselect.eval.checkpoint import CheckpointError, load_checkpoint
from kvselect.eval.perplexity import PerplexityRequest
from kvselect.eval.request import parse_lengths
from kvselect.eval.runner import Request
from kvselect.eval.tasks import find_tasks
from kvselect.policies.token_select import TokenSelect

LANGUAGE_MODEL = "embedded:code"
QUESTIONS_PER_CONTEXT = 10  # so that kept mass is of many contexts


def small_budget() -> TokenSelect:
    """For tasks: too few tokens for a bad ranking."""
    return TokenSelect(
        topk=4,
        num_sink_tokens=4,
        num_recent_tokens=32,
        q_block_size=32,
        positions="compact",
        sketch=None,
        overselect=1.0,
        dense_below_tokens=0,
    )


def text_budget() -> TokenSelect:
    """For text: 320 of a window of 512 tokens."""
    return dataclasses.replace(small_budget(), topk=128, num_recent_tokens=188, q_block_size=64)


def on_tasks(args: Any, errors: Console) -> list[Effect]:
    checkpoint = load_checkpoint(args.model)
    request = Request(
        tasks=tuple(find_tasks(args.tasks)),
        lengths=parse_lengths(args.lengths, checkpoint.window_tokens),
        policies=ablation.variants(small_budget()),
        samples=args.samples,
        questions_per_context=QUESTIONS_PER_CONTEXT,
        timed_steps=1,
        seed=args.seed,
    )
    header = runner.describe_request(checkpoint, request)
    total = runner.total_progress(request)
    with (
        resumed(args.out.with_suffix(".tasks.jsonl"), header) as journal,
        progress_shown(errors, total) as advance,
    ):
        results = runner.run(checkpoint, request, journal=journal, on_progress=advance)
        return score_effects(results) + mass_effects(journal.records)


def on_text(args: Any, errors: Console) -> list[Effect]:
    checkpoint = load_checkpoint(args.language_model)
    request = PerplexityRequest(
        lengths=parse_lengths(args.text_lengths, checkpoint.window_tokens),
        policies=ablation.variants(text_budget()),
        segments=args.segments,
        scored_tokens=args.scored_tokens,
        seed=args.seed,
    )
    text = perplexity.read_text(checkpoint.tokenizer, perplexity.library_text())
    header = perplexity.describe_request(checkpoint, request, text)
    total = perplexity.total_progress(request)
    with (
        resumed(args.out.with_suffix(".text.jsonl"), header) as journal,
        progress_shown(errors, total) as advance,
    ):
        cells = perplexity.measure(checkpoint, request, text, journal=journal, on_progress=advance)
        return text_effects(cells)


def table(effects: Sequence[Effect]) -> None:
    """A line per variant; a column per measure, task and length."""
    places = list(dict.fromkeys((e.measure, e.what, e.length_tokens) for e in effects))
    columns = ["changed"] + [f"{measure}\n{what} {tokens}" for measure, what, tokens in places]
    rows = []
    for variant in dict.fromkeys(e.variant for e in effects):
        cells = [variant]
        for place in places:
            one = next(
                (
                    e
                    for e in effects
                    if e.variant == variant and (e.measure, e.what, e.length_tokens) == place
                ),
                None,
            )
            cells.append("" if one is None else told(one))
        rows.append(cells)
    for begin in range(1, len(columns), 4):  # as many as a terminal shows
        some = [0, *range(begin, min(begin + 4, len(columns)))]
        title = "Every change alone, against the defaults on the same samples (paired, 95 %)"
        print_table(title, [columns[i] for i in some], [[row[i] for i in some] for row in rows])
    print(
        "scores and masses: points (difference, interval); perplexity: percent, less is better.\n"
        "+ better, - worse than the defaults, where the interval excludes 0."
    )


def told(one: Effect) -> str:
    """Value, difference and interval; a sign where it excludes 0."""
    digits = 1 if one.measure == "score" else 2
    sign = {"better": " +", "worse": " -", "": ""}[one.verdict]
    if one.variant == "defaults":
        return (
            f"{one.value:.3f}" if one.measure == "perplexity" else f"{100 * one.value:.{digits}f}"
        )
    parts = [f"{100 * x:+.{digits}f}" for x in (one.effect, one.low, one.high)]
    return f"{parts[0]} ({parts[1]} to {parts[2]}){sign}"


def better_than_defaults(effects: Sequence[Effect]) -> str:
    """Which changes are better somewhere and worse nowhere."""
    by_variant: dict[str, list[str]] = {}
    for one in effects:
        by_variant.setdefault(one.variant, []).append(one.verdict)
    found = [
        variant
        for variant, verdicts in by_variant.items()
        if variant != ablation.DENSE and "better" in verdicts and "worse" not in verdicts
    ]
    if not found:
        return "no change is better somewhere and worse nowhere: the defaults stand"
    return f"better somewhere and worse nowhere: {', '.join(found)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--model", default="embedded", help="that answers tasks")
    parser.add_argument("--language-model", help=f"that reads text (default: {LANGUAGE_MODEL})")
    parser.add_argument("--tasks", nargs="+", default=["vt", "chain"])
    parser.add_argument("--lengths", default="1x,4x")
    parser.add_argument("--samples", type=int, default=150, help="questions per task and length")
    parser.add_argument("--text-lengths", default="1x,4x")
    parser.add_argument("--segments", type=int, default=12)
    parser.add_argument("--scored-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    quick = {"tasks": ["vt"], "lengths": "256", "samples": 4, "text_lengths": "1x"}
    quick |= {"segments": 2, "scored_tokens": 32}
    args = parse(parser, arguments, quick)
    for name in ("samples", "segments", "scored_tokens"):
        require_int(getattr(args, name), name.replace("_", "-"), 1)
    errors, skipped = Console(stderr=True), []
    given, args.language_model = args.language_model, args.language_model or LANGUAGE_MODEL
    with threads(1):
        effects = on_tasks(args, errors)
        try:
            effects += on_text(args, errors)
        except CheckpointError as error:
            if given is not None:
                raise
            skipped.append(Skipped(tokens=0, contender="text", reason=str(error)))
    table(effects)
    for one in skipped:
        print(f"left out: {one.contender}: {one.reason}")
    print(better_than_defaults(effects))
    rows = [dataclasses.asdict(one) | {"verdict": one.verdict} for one in effects]
    print("written:", save(args.out, parser.description or "", vars(args), rows, skipped))
    for name in (".tasks.jsonl", ".text.jsonl"):
        args.out.with_suffix(name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
