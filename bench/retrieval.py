"""Does an embedded model retrieve from 16 times its window, and what is lost inside the window?

The demo's policies on all seven tasks at 1 and 16 trained windows, with as many questions as a
claim needs. Some 30 minutes on two cores; a run that was killed goes on with the same command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from kvselect.bench.request import script_parser
from kvselect.bench.results import print_table
from kvselect.bench.resumed import resumed
from kvselect.eval import report, runner
from kvselect.eval.checkpoint import EMBEDDED, load_checkpoint
from kvselect.eval.demo import demo_request
from kvselect.eval.request import parse_lengths, split_list
from kvselect.eval.tasks import TASKS, find_tasks


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--samples", type=int, default=500, help="questions per cell (500)")
    parser.add_argument(
        "--max-contexts", type=int, default=84, help="contexts per cell at most (84)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the contexts (1)")
    parser.add_argument(
        "--model", default=EMBEDDED, help=f"embedded:NAME of a retrieval model ({EMBEDDED})"
    )
    parser.add_argument(
        "--lengths", default="1x,16x", help="trained windows or tokens, with commas (1x,16x)"
    )
    parser.add_argument("--tasks", help="names, with commas (all that the model can read)")
    options = parser.parse_args(arguments)

    checkpoint = load_checkpoint(options.model)
    if not checkpoint.speaks_dialect:
        parser.error(f"model: got {options.model!r}, allowed: one that reads the tasks' dialect")
    request = demo_request(checkpoint.window_tokens, options.samples, options.seed)
    request = dataclasses.replace(
        request,
        tasks=tuple(task for task in TASKS.values() if task.draw is not None)
        if options.tasks is None
        else tuple(find_tasks(split_list(options.tasks))),
        lengths=parse_lengths(options.lengths, checkpoint.window_tokens),
        max_contexts=options.max_contexts,
        timed_steps=30,
    )
    header = runner.describe_request(checkpoint, request)
    with (
        resumed(options.out.with_suffix(".samples.jsonl"), header) as journal,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        bar = progress.add_task("", total=runner.total_progress(request))
        results = runner.run(
            checkpoint,
            request,
            journal=journal,
            on_progress=lambda what, amount: progress.update(bar, description=what, advance=amount),
            on_cells=lambda partial: partial.save(options.out),
        )
    options.out.with_suffix(".samples.jsonl").unlink()
    Console(width=120).print(report.table(results))
    rows = []
    for cell in results.cells:
        difference = results.difference(cell)
        if difference is not None:
            points = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * part for part in difference))
            right = f"{sum(cell.outcomes)} of {len(cell.outcomes)}"
            rows.append([cell.task, str(cell.length.tokens), cell.policy, right, points])
    columns = ["task", "context", "policy", "right", "points against Dense (paired, 95 %)"]
    print_table("Difference to dense attention on the same questions", columns, rows)


if __name__ == "__main__":
    main()
