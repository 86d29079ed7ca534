"""Which targets of the CPU engine are met, by the result files of the other benches?

Reads bench/results, runs nothing; a claim whose bench has not run here, or ran at another shape,
says so. Every number comes from the file that the command beside it writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvselect.bench.contenders import ENABLE_GQA, FOLDED, TORCH_TOKEN_SELECT
from kvselect.bench.entrants import OUR_DENSE, SELECT_INT4
from kvselect.bench.results import load, print_table
from kvselect.bench.single_ops import SCAN

Rows = list[dict[str, Any]]
K, M = 1 << 10, 1 << 20
# What the issue names: q heads, KV heads, head_dim, dtype, topk.
LAYER = (32, 8, 128, "bfloat16", 2048)
MODEL_1B = (32, 8, 64, "bfloat16", 2048)
SMALL = (8, 2, 64, "bfloat16", 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One row of the issue's table.

    Attributes
    ----------
    script : str
        Whose result file holds the figure.
    measure : callable
        From the rows of that file; KeyError where they do not hold it.
    at_least : bool
        False: the bound is the most allowed.
    settings : tuple
        q heads, KV heads, head_dim, dtype, topk that the file must have been measured with.
    """

    claim: str
    bound: float
    shown: str
    script: str
    measure: Callable[[Rows], float]
    at_least: bool = True
    settings: tuple[int, int, int, str, int] = LAYER

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def the_row(rows: Rows, **criteria: object) -> dict[str, Any]:
    """The first row with all these values.

    Raises
    ------
    KeyError
        If there is none.
    """
    for row in rows:
        if all(row.get(name) == value for name, value in criteria.items()):
            return row
    raise KeyError(str(criteria))


def step(tokens: int, threads: int, read: Callable[[dict[str, Any]], float]) -> Any:
    """A figure of the int4 step; its row at this length."""
    return lambda rows: read(the_row(rows, contender=SELECT_INT4, tokens=tokens, threads=threads))


def over(peer: str) -> Callable[[dict[str, Any]], float]:
    return lambda row: float(row["over"][peer])


def over_best(row: dict[str, Any]) -> float:
    return float(row["over_best_torch"])


def dense_gain(rows: Rows) -> float:
    """The least of the lengths up to 128K."""
    gains = [
        over_best(row)
        for row in rows
        if row["contender"] == OUR_DENSE and row["threads"] == 1 and row["tokens"] <= 128 * K
    ]
    if not gains:
        raise KeyError(OUR_DENSE)
    return min(gains)


def avx2_share(rows: Rows) -> float:
    tokens = max(row["tokens"] for row in rows)
    here = [row for row in rows if row["tokens"] == tokens and row["threads"] == 1]
    wide = [row["median_ms"] for row in here if row["implementation"].startswith("avx512")]
    if not wide:
        raise KeyError("avx512")
    return float(min(wide) / the_row(here, implementation="avx2")["median_ms"])


def excess_over_linear(rows: Rows) -> float:
    one, quarter = (
        the_row(rows, contender=SELECT_INT4, tokens=tokens, threads=1) for tokens in (M, M // 4)
    )
    return float(one["median_ms"] / quarter["median_ms"] / 4 - 1)


def cache_row(field: str) -> Callable[[Rows], float]:
    return lambda rows: float(the_row(rows, rho=0.99, moving=False, threads=1)[field])


def decode_targets(threads: int, best: float, folded: float, gqa: float) -> list[Target]:
    counted = {1: "one thread", 2: "two threads"}[threads]
    pairs = (("torch's best", best, over_best), ("SDPA folded", folded, over(FOLDED)))
    return [
        Target(
            claim=f"decode step 128K over {peer}, {counted}",
            bound=bound,
            shown="{:.1f}x",
            script="decode_step",
            measure=step(128 * K, threads, read),
        )
        for peer, bound, read in (*pairs, ("SDPA enable_gqa", gqa, over(ENABLE_GQA)))
    ]


TARGETS = [
    *decode_targets(1, 12, 22, 180),
    *decode_targets(2, 10, 16, 150),
    Target(
        claim="decode step 128K over a perfect dense kernel, cold",
        bound=3,
        shown="{:.2f}x",
        script="decode_step",
        measure=step(128 * K, 1, lambda row: float(row["over_perfect_dense"])),
    ),
    Target(
        claim="decode step 32K over torch's best",
        bound=6,
        shown="{:.1f}x",
        script="decode_step",
        measure=step(32 * K, 1, over_best),
    ),
    Target(
        claim="decode step 512K over torch's best",
        bound=14,
        shown="{:.1f}x",
        script="scaling",
        measure=step(512 * K, 1, over_best),
    ),
    Target(
        claim="decode step 128K over TokenSelect as torch ops",
        bound=9,
        shown="{:.1f}x",
        script="decode_step",
        measure=step(128 * K, 1, over(TORCH_TOKEN_SELECT)),
    ),
    Target(
        claim="kvselect dense over torch's best, worst of 8K to 128K",
        bound=2,
        shown="{:.2f}x",
        script="decode_step",
        measure=dense_gain,
    ),
    Target(
        claim="int4 scan 128K, share of what limits it",
        bound=0.8,
        shown="{:.0%}",
        script="ops",
        measure=lambda rows: float(
            the_row(rows, op=SCAN["int4"], tokens=128 * K, threads=1)["share_of_limit"]
        ),
    ),
    Target(
        claim="80 % selection-cache hits over no cache",
        bound=2.2,
        shown="{:.2f}x",
        script="selection_cache",
        measure=cache_row("speed_up"),
    ),
    Target(
        claim="kept mass lost by them [points]",
        bound=0.5,
        shown="{:.2f}",
        script="selection_cache",
        measure=cache_row("kept_mass_loss_points"),
        at_least=False,
    ),
    Target(
        claim="prefill chunk of 2048 at 128K over SDPA",
        bound=20,
        shown="{:.1f}x",
        script="prefill_chunk",
        measure=step(128 * K, 1, lambda row: float(row["over_best_sdpa"])),
    ),
    Target(
        claim="generate() after 64K over transformers' sdpa",
        bound=25,
        shown="{:.1f}x",
        script="generate",
        measure=step(64 * K, 1, lambda row: float(row["over_sdpa"])),
        settings=MODEL_1B,
    ),
    Target(
        claim="int4 sketch over bfloat16 keys and values",
        bound=0.133,
        shown="{:.1%}",
        script="decode_step",
        measure=step(128 * K, 1, lambda row: float(row["sketch_over_kv"])),
        at_least=False,
    ),
    Target(
        claim="speed of AVX2 over AVX-512",
        bound=0.35,
        shown="{:.2f}x",
        script="implementations",
        measure=avx2_share,
    ),
    Target(
        claim="1M tokens: time over linear from 256K",
        bound=0.15,
        shown="{:+.0%}",
        script="scaling",
        measure=excess_over_linear,
        at_least=False,
    ),
    Target(
        claim="100,000 steps: last tenth's time over the first's",
        bound=1.05,
        shown="{:.3f}",
        script="steady_state",
        measure=lambda rows: float(the_row(rows, steps=100_000)["last_over_first"]),
        at_least=False,
        settings=SMALL,
    ),
    Target(
        claim="100,000 steps: memory grown per step [bytes]",
        bound=10,
        shown="{:.1f}",
        script="steady_state",
        measure=lambda rows: float(the_row(rows, steps=100_000)["bytes_per_step"]),
        at_least=False,
        settings=SMALL,
    ),
]


def settings_of(config: dict[str, Any]) -> tuple[object, ...]:
    """Shape and topk of a result file: scripts store the shape as such or as its options."""
    shape = config.get("shape")
    if shape is None:
        shape = {
            "num_q_heads": config.get("q_heads"),
            "num_kv_heads": config.get("kv_heads"),
            "head_dim": config.get("head_dim"),
            "dtype": config.get("dtype"),
        }
    names = ("num_q_heads", "num_kv_heads", "head_dim", "dtype")
    return (*(shape[name] for name in names), config.get("topk"))


def read(folder: Path, target: Target) -> tuple[float | None, str]:
    """The figure, None where it was not measured, and the commit that it was measured at."""
    path = folder / f"{target.script}.json"
    if not path.is_file():
        return None, ""
    content = load(path)
    if settings_of(content["config"]) != target.settings:
        return None, ""
    try:
        return target.measure(content["results"]), str(content.get("commit") or "")
    except KeyError:
        return None, ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    folder = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=folder, help="folder of the JSON files")
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    options = parser.parse_args(arguments)
    rows, commits, num_met, num_measured = [], set(), 0, 0
    for target in TARGETS:
        value, commit = read(options.results, target)
        commits |= {commit} - {""}
        bound = target.shown.format(target.bound).lstrip("+")
        measured, verdict = "not measured", ""
        if value is not None:
            measured = target.shown.format(value)
            met = target.met(value)
            verdict = "met" if met else "missed"
            num_met, num_measured = num_met + met, num_measured + 1
        sign = ">=" if target.at_least else "<="
        command = f"python bench/{target.script}.py"
        rows.append([target.claim, f"{sign} {bound}", measured, verdict, command])
    if options.markdown:
        print("| | target | measured | met? | command |\n|---|---|---|---|---|")
        for *cells, command in rows:
            print(f"| {' | '.join(cells)} | `{command}` |")
    else:
        print_table("targets of the CPU engine", ["", "target", "measured", "", "command"], rows)
    print(f"{num_met} of {num_measured} measured are met; {len(TARGETS)} in all")
    if len(commits) > 1:
        short = sorted(f"{commit[:10]}{'+' if commit.endswith('+') else ''}" for commit in commits)
        print("measured at several commits:", ", ".join(short))


if __name__ == "__main__":
    main()
