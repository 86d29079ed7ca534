"""Which method keeps the most attention, answers best, and is fastest, at equal tokens attended?

Every registered method that has a budget, at several, in two places. On a layer with drawn keys
(simulated): time of a decode step and of a prompt's last chunk over our dense attention's in the
same run, attention mass kept, output error, bytes, memory. On the embedded model, inside and beyond
its trained window: scores of all tasks under context *and* question processed by the method, with
the difference to Dense on the same questions. There methods take part in all their forms: those
that renumber positions ("compact"; beyond the window only these can answer), and evictions that act
before they see the question ("next_call").

Methods that no budget of tokens sizes are named with their settings by ``--also``. Those that flow
through the layers of a model take part in the second place only. Each place has a file of its own;
the second one's questions go on where a run was killed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rich.console import Console
from rich.progress import Progress

from kvselect.bench import policies
from kvselect.bench.request import (
    add_sizes,
    one_count,
    parse,
    parse_counts,
    progress_bar,
    script_parser,
    shape_of,
)
from kvselect.bench.results import Skipped, as_row, print_table, save
from kvselect.bench.resumed import resumed
from kvselect.checks import require
from kvselect.eval import runner
from kvselect.eval.checkpoint import EMBEDDED, Checkpoint, load_checkpoint
from kvselect.eval.request import parse_lengths, parse_policies, split_list
from kvselect.eval.results import Results
from kvselect.eval.tasks import TASKS
from kvselect.policies.base import Policy

FORMS = {"positions": "original", "evict_at": "decode"}  # setting -> the value that is not named
ALSO = "ada_spa:sparsity=0.8,sp_atten:mean_pruned=0.5,sp_atten:mean_pruned=0.5,cascade=hard"
PARTS = ("layer", "model")
MASSES = (0.5, 0.7, 0.8, 0.9)
LAYER_COLUMNS = [
    "policy",
    "attended",
    "kept\nmass",
    "output\nerror",
    "bytes,\nof dense",
    "memory\nMB",
    "decode\nms",
    "faster\nthan dense",
    "chunk\nms",
    "faster\nthan dense",
]


def layer_table(rows: Sequence[policies.PolicyRow], tokens: int) -> None:
    print_table(
        f"{tokens} tokens, drawn keys (simulated)",
        LAYER_COLUMNS,
        [
            [
                row.policy,
                f"{row.attended_tokens:.0f}",
                "" if row.kept_mass is None else f"{row.kept_mass:.3f}",
                f"{row.output_error:.3f}",
                f"{row.bytes_ratio:.3f}",
                f"{row.memory_bytes / 1e6:.0f}",
                f"{row.decode_ms:.2f}",
                f"{row.over_dense_decode:.2f}x",
                f"{row.prefill_ms:.1f}",
                f"{row.over_dense_prefill:.2f}x",
            ]
            for row in rows
            if row.tokens == tokens
        ],
    )


def in_all_forms(found: Mapping[str, Policy]) -> dict[str, Policy]:
    """The policies, and those that have a setting of `FORMS` with every value of it."""
    every: dict[str, Policy] = {}
    for label, policy in found.items():
        every[label] = policy
        fields = {setting.name for setting in dataclasses.fields(policy)}
        for name, unnamed in FORMS.items():
            for form in get_args(get_type_hints(type(policy))[name]) if name in fields else ():
                settings: Any = {name: form}
                labelled = label if form == unnamed else f"{label} {form}"
                every[labelled] = dataclasses.replace(policy, **settings)
    return every


def fitting(
    checkpoint: Checkpoint, found: Mapping[str, Policy]
) -> tuple[dict[str, Policy], list[Skipped]]:
    """Every form that the model takes; the others, and why not."""
    taken, refused = {}, []
    for label, policy in in_all_forms(found).items():
        try:
            runner.require_policies(checkpoint, {label: policy})
        except ValueError as error:
            tokens = checkpoint.window_tokens
            refused.append(Skipped(tokens=tokens, contender=label, reason=str(error)))
        else:
            taken[label] = policy
    return taken, refused


def answers(
    options: Any, checkpoint: Checkpoint, found: Mapping[str, Policy], path: Path
) -> Results:
    """All tasks of the dialect at every length, every policy on the same questions."""
    request = runner.Request(
        tasks=tuple(task for task in TASKS.values() if task.draw is not None),
        lengths=parse_lengths(options.windows, checkpoint.window_tokens),
        policies=found,
        samples=options.samples,
        max_contexts=options.max_contexts,
        timed_steps=1,
        seed=options.seed,
    )
    header = runner.describe_request(checkpoint, request)
    with (
        resumed(path, header) as journal,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        bar = progress.add_task("", total=runner.total_progress(request))
        return runner.run(
            checkpoint,
            request,
            journal=journal,
            on_progress=lambda what, amount: progress.update(bar, description=what, advance=amount),
        )


def answer_rows(results: Results) -> list[dict[str, Any]]:
    """The mean over tasks of every policy at every length."""
    found = []
    for length in results.lengths:
        for label in results.policies:
            macro = results.macro(length, label)
            assert macro is not None
            scores = {cell.task: cell.score for cell in results.cells_of(length, label)}
            told = {"policy": label, "tasks": scores}
            found.append(told | {"verdict": macro.verdict} | macro.to_dict())
    return found


def answer_table(results: Results) -> None:
    for length in results.lengths:
        rows = []
        for label in results.policies:
            macro = results.macro(length, label)
            assert macro is not None
            against = ""
            if macro.difference is not None:
                against = "{:+.1f} ({:+.1f} to {:+.1f})".format(
                    *(100 * part for part in macro.difference)
                )
            rows.append(
                [
                    label,
                    f"{100 * macro.score:.1f}",
                    against,
                    macro.verdict or "",
                    f"{macro.tokens_attended:.0f}",
                    "" if macro.kept_mass is None else f"{macro.kept_mass:.3f}",
                    f"{macro.bytes_ratio:.2f}",
                ]
            )
        columns = ["policy", "score %", "points against Dense (95 %)", "verdict", "attended"]
        print_table(
            f"embedded model, {length.tokens} tokens, {len(results.tasks)} tasks",
            [*columns, "kept mass", "bytes, of dense"],
            rows,
        )


def draw(rows: Sequence[policies.PolicyRow], path: Path, about: str) -> None:
    """Curves over budgets: decode time over dense's against the attention mass kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({row.tokens for row in rows})
    figure = Figure(figsize=(1.5 + 4.8 * len(lengths), 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    methods = list(dict.fromkeys(row.method for row in rows if row.policy != policies.DENSE))
    markers = "osD^vPX<>dhp"
    colours = [*(f"C{number}" for number in range(10)), "black", "navy"]
    for axes, tokens in zip(panels, lengths):
        for number, method in enumerate(methods):
            points = sorted(
                (row.kept_mass, 1 / row.over_dense_decode)
                for row in rows
                if row.tokens == tokens and row.method == method and row.kept_mass is not None
            )
            if points:
                style = {"marker": markers[number % len(markers)], "color": colours[number % 12]}
                axes.plot(*zip(*points), label=method, markeredgecolor="white", **style)
        axes.axhline(1.0, color="#4d4d4d", linewidth=1)
        axes.text(0.01, 1.03, "dense", fontsize=8, color="#4d4d4d")
        axes.set_yscale("log")
        axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.set_xlim(0, 1)
        axes.set_title(f"{tokens} tokens", loc="left", fontsize=11)
        axes.set_xlabel("attention mass kept")
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time of a decode step, of dense")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(
        f"Time against attention mass kept, every method over its budgets\n{about}, simulated keys",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def on_layer(options: Any, also: Mapping[str, Policy], question: str) -> None:
    """Measure, print, draw and save the first part."""
    sized = policies.budgeted(options.policies, parse_counts(options.budgets, "budgets"))
    # One layer knows no other.
    sized |= {label: policy for label, policy in also.items() if not policy.flows_between_layers}
    request = policies.PoliciesRequest(
        tokens=parse_counts(options.tokens, "tokens"),
        policies=sized,
        shape=shape_of(options),
        chunk_tokens=options.chunk_tokens,
        rounds=options.rounds,
        threads=one_count(options.threads, "threads"),
        seed=options.seed,
    )
    skipped: list[Skipped] = []
    with progress_bar() as on_progress:
        rows = policies.run(request, on_progress, skipped.append)
    for tokens in request.tokens:
        layer_table(rows, tokens)
    tell_left_out(skipped)
    wins = policies.fastest(rows, MASSES)
    columns = ["tokens", *(f"mass >= {mass}" for mass in MASSES)]
    by_length = [
        [str(tokens), *(label for at, _, label in wins if at == tokens)]
        for tokens in request.tokens
    ]
    print_table("Quickest decode step that keeps so much", columns, by_length)
    about = f"{request.shape}, {request.threads} thread{'s' if request.threads > 1 else ''}"
    draw(rows, options.out.with_suffix(".png"), about)
    told = [as_row(row) for row in rows]
    print("written:", save(options.out, question, vars(options), told, skipped))


def on_model(options: Any, also: Mapping[str, Policy], question: str) -> None:
    """Ask, print and save the second part."""
    budgets = parse_counts(options.model_budgets, "model-budgets")
    checkpoint = load_checkpoint(options.model)
    taken, refused = fitting(checkpoint, policies.budgeted(options.policies, budgets) | also)
    tell_left_out(refused)
    out = options.out.with_stem(options.out.stem + "_on_model")
    journal = out.with_suffix(".samples.jsonl")
    results = answers(options, checkpoint, taken, journal)
    answer_table(results)
    config = vars(options) | {"tasks": list(results.tasks), "model_config": results.config}
    print("written:", save(out, question, config, answer_rows(results), refused))
    journal.unlink()


def tell_left_out(skipped: Sequence[Skipped]) -> None:
    for skip in skipped:
        print(f"left out, of {skip.tokens} tokens: {skip.reason}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="8k,32k", rounds=9, topk=None)
    parser.add_argument(
        "--policies", nargs="+", metavar="CLASS", help="classes, such as Quest (default: all)"
    )
    parser.add_argument(
        "--also",
        default=ALSO,
        metavar="POLICIES",
        help=f"with settings, as kvselect eval reads them ({ALSO})",
    )
    parser.add_argument("--budgets", default="512,1k,2k,4k", help="of the layer (512,1k,2k,4k)")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--model", default=EMBEDDED, help="of the second part")
    parser.add_argument(
        "--model-budgets", default="160,228,320", help="of the embedded model (160,228,320)"
    )
    parser.add_argument("--windows", default="1x,4x", help="lengths of the second part (1x,4x)")
    parser.add_argument("--samples", type=int, default=100, help="questions per cell (100)")
    parser.add_argument("--max-contexts", type=int, default=16, help="contexts per cell (16)")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS), help="layer, model, or both (both)")
    quick = {
        "tokens": "3k",
        "rounds": 2,
        "budgets": "512,1k",
        "chunk_tokens": 64,
        "model_budgets": "228",
        "windows": "1x",
        "samples": 2,
        "max_contexts": 1,
    }
    options = parse(parser, arguments, quick=quick)
    for part in split_list(options.parts):
        require(part in PARTS, "parts", part, " or ".join(PARTS))
    also = parse_policies([options.also]) if options.also else {}
    if "layer" in split_list(options.parts):
        on_layer(options, also, parser.description or "")
    if "model" in split_list(options.parts):
        on_model(options, also, parser.description or "")


if __name__ == "__main__":
    main()
