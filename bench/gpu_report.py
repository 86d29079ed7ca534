"""What did the parts of bench/gpu.sh find on this GPU, and which targets are met?

Reads what the parts wrote, runs nothing. Merges everything into one JSON file with all raw samples,
and Markdown tables beside it. Beside every time stands what the step model expects, and beside
every claim what was measured; a part that did not run, or whose contenders were left out, says so.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvselect.bench import results
from kvselect.bench.entrants import OUR_DENSE, SELECT_EXACT, SELECT_INT4
from kvselect.bench.expected import H200_COPY_GB_PER_S, expected_chunk_us, expected_us
from kvselect.bench.layer import Shape
from kvselect.bench.request import script_parser
from kvselect.bench.single_ops import SCAN
from kvselect.checks import require
from kvselect.eval import machine

COLD, HALF, ALL = SELECT_INT4, f"{SELECT_INT4}, 50 % hits", f"{SELECT_INT4}, all hits"
NO_GPU = "no GPU"
OUT_FOLDER = Path(__file__).resolve().parent / "results"
LISTED = 128 + 3072 + 512  # tokens of one list: sinks, 1.5 times topk 2048, window

Part = dict[str, Any]  # a result file
Parts = dict[str, Part]
Row = dict[str, Any]


# ---- targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A claim about an H200.

    Attributes
    ----------
    part : str
        Whose result file decides it.
    measure : callable
        Its figure from the rows of the part; None: no such row.
    bound : float
    at_most : bool
        Instead of at least.
    unit : str
    """

    claim: str
    part: str
    measure: Callable[[Sequence[Row]], float | None]
    bound: float
    at_most: bool = False
    unit: str = "x"


def named(rows: Sequence[Row], name: str) -> Row | None:
    for row in rows:
        if name in (row.get("contender"), row.get("op")):
            return row
    return None


def field(name: str, of: str, factor: float = 1.0) -> Callable[[Sequence[Row]], float | None]:
    """A measure: one field of one row."""

    def measure(rows: Sequence[Row]) -> float | None:
        row = named(rows, of)
        return None if row is None else factor * row[name]

    return measure


def mass_over_exact(rows: Sequence[Row]) -> float | None:
    """Kept mass of the step with a sketch over that of the exact top-k of as many tokens asked."""
    ours, exact = named(rows, COLD), named(rows, SELECT_EXACT)
    return None if ours is None or exact is None else ours["kept_mass"] / exact["kept_mass"]


def better_of_both(rows: Sequence[Row]) -> float | None:
    """Selecting or dense, whichever is faster: what a right break-even gives, over the peers."""
    found = [named(rows, name) for name in (COLD, OUR_DENSE)]
    known = [row["over_best_torch"] for row in found if row is not None]
    return max(known) if known else None


def share_of_dense_rate(rows: Sequence[Row]) -> float | None:
    """Rate of attention over all blocks over that of the fastest dense peer."""
    row = named(rows, "100% of blocks")
    return None if row is None else 1 / row["over_sdpa"]


def _decode_targets() -> Iterator[Target]:
    bounds = {
        "1x32k": {COLD: 2.0, HALF: 2.8},
        "1x128k": {COLD: 4.2, HALF: 6.5, ALL: 13.0},
        "1x1m": {COLD: 7.0, HALF: 12.0, ALL: 90.0},
        "8x128k": {COLD: 5.0},
        "32x32k": {COLD: 4.5},
    }
    words = {COLD: "cold", HALF: "50 % hits", ALL: "all hits"}
    for size, by_name in bounds.items():
        for name, bound in by_name.items():
            yield Target(
                claim=f"decode step {size}, {words[name]}, over the fastest dense peer",
                part=f"decode-{size}",
                measure=field("over_best_torch", name),
                bound=bound,
            )
        yield Target(
            claim=f"decode step {size}, kept mass over the exact top-k's",
            part=f"decode-{size}",
            measure=mass_over_exact,
            bound=1.0,
        )
    for size in ("1x8k", "1x512k", *bounds):
        yield Target(
            claim=f"decode step {size}, selecting or our dense, whichever is faster, over dense",
            part=f"decode-{size}",
            measure=better_of_both,
            bound=0.98,
        )


TARGETS = (
    *_decode_targets(),
    Target(
        claim="attention over 2688 random tokens",
        part="ops-1x128k",
        measure=field("median_ms", "attention, random list of 2688 tokens", 1e3),
        bound=10.0,
        at_most=True,
        unit=" us",
    ),
    Target(
        claim="attention over 16K random tokens, share of copy bandwidth",
        part="ops-1x128k",
        measure=field("share_of_limit", "attention, random list of 16384 tokens", 100),
        bound=85.0,
        unit=" %",
    ),
    Target(
        claim="scan of the int4 sketch at 1M, share of copy bandwidth",
        part="ops-1x1m",
        measure=field("share_of_limit", SCAN["int4"], 100),
        bound=85.0,
        unit=" %",
    ),
    *(
        target
        for size in ("1x32k", "1x128k")
        for kernel, words in (("", ""), ("sm90a-", ", sm90a"))
        for target in (
            Target(
                claim=f"attention over 10 % of the blocks of 128, {size[2:]}{words}",
                part=f"blocks-{kernel}{size}",
                measure=field("gflop_per_s", "10% of blocks", 1e-3),
                bound=550.0,
                unit=" TFLOP/s",
            ),
            Target(
                claim=f"attention over all blocks of 128, {size[2:]}, of the dense rate{words}",
                part=f"blocks-{kernel}{size}",
                measure=share_of_dense_rate,
                bound=0.85,
            ),
        )
    ),
    *(
        Target(
            claim=f"prefill chunk of 512 at {size[2:]}, over the fastest dense peer",
            part=f"prefill-{size}",
            measure=field("over_best_torch", SELECT_INT4),
            bound=bound,
        )
        for size, bound in (("1x128k", 12.0), ("1x512k", 30.0), ("1x1m", 45.0))
    ),
    *(
        Target(
            claim=f"whole model {size}, tokens/s over transformers' best dense attention",
            part=f"model-{size}",
            measure=field("over_best_dense", SELECT_INT4),
            bound=bound,
        )
        for size, bound in (("1x128k", 1.6), ("1x512k", 3.0), ("4x128k", 2.8))
    ),
)


def verdict(target: Target, parts: Parts) -> tuple[str, str]:
    """What was measured, and "met", "missed" or why nobody knows."""
    if gpu_name(parts) == NO_GPU:
        return "–", "no GPU took part"
    part = parts.get(target.part)
    if part is None:
        return "–", f"{target.part} did not run"
    found = target.measure(part["results"])
    if found is None or found != found:
        return "–", "left out (see below)"
    met = found <= target.bound if target.at_most else found >= target.bound
    return f"{found:.2f}{target.unit}", "met" if met else "missed"


# ---- tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """How the rows of one kind of part are shown: head -> cell of a row."""

    cells: dict[str, Callable[[Row], object]]


def number(name: str, digits: int, factor: float = 1.0) -> Callable[[Row], object]:
    """A cell: a field, "–" where there is none."""

    def cell(row: Row) -> str:
        value = row.get(name)
        return "–" if value is None else f"{factor * value:.{digits}f}"

    return cell


def text(name: str) -> Callable[[Row], object]:
    return lambda row: row[name]


def graph(row: Row) -> str:
    """Whether a CUDA graph was timed."""
    reason = row.get("not_captured")
    return "–" if reason is None else "yes" if not reason else f"no: {reason}"


def _milliseconds(row: Row) -> str:
    expected = row.get("expected_us")
    return "–" if expected is None else f"{expected / 1e3:.3f}"


KINDS = {
    "micro": Columns(
        cells={
            "measurement": text("name"),
            "us": number("median_us", 2),
            "expected": number("expected_us", 2),
            "measured / expected": number("over_expected", 2),
            "GB/s": number("gb_per_s", 0),
            "expected from": text("expected_from"),
            "left out": lambda row: row.get("skipped", ""),
        }
    ),
    "decode": Columns(
        cells={
            "contender": text("contender"),
            "us per layer": number("median_ms", 1, 1e3),
            "expected": number("expected_us", 1),
            "measured / expected": number("over_expected", 2),
            "by the clock": number("wall_ms", 1, 1e3),
            "x floor": number("times_floor", 2),
            "x best dense": number("over_best_torch", 2),
            "tokens attended": number("attended_tokens", 0),
            "kept mass": number("kept_mass", 4),
            "output error": number("output_error", 4),
            "graph": graph,
        }
    ),
    "ops": Columns(
        cells={
            "op": text("op"),
            "us": number("median_ms", 1, 1e3),
            "MB": number("bytes_must_read", 1, 1e-6),
            "GB/s": number("gb_per_s", 0),
            "of copy bandwidth, %": number("share_of_limit", 1, 100),
            "output error": number("output_error", 4),
            "graph": graph,
        }
    ),
    "prefill": Columns(
        cells={
            "contender": text("contender"),
            "ms": number("median_ms", 3),
            "expected": _milliseconds,
            "measured / expected": number("over_expected", 2),
            "by the clock": number("wall_ms", 3),
            "x best SDPA": number("over_best_sdpa", 2),
            "x best dense": number("over_best_torch", 2),
            "tokens attended": number("attended_tokens", 0),
            "kept mass": number("kept_mass", 4),
            "output error": number("output_error", 4),
            "lists attended by": lambda row: row.get("attention") or "–",
            "graph": graph,
        }
    ),
    "blocks": Columns(
        cells={
            "contender": text("contender"),
            "blocks of": text("block_size"),
            "kept, %": number("kept_share", 1, 100),
            "ms": number("median_ms", 3),
            "TFLOP/s": number("gflop_per_s", 0, 1e-3),
            "x proportional": number("over_proportional", 2),
            "time x dense": number("over_sdpa", 2),
            "output error": number("output_error", 4),
        }
    ),
    "model": Columns(
        cells={
            "contender": text("contender"),
            "tokens/s": number("tokens_per_s", 1),
            "ms": number("median_ms", 3),
            "expected": number("expected_ms", 3),
            "measured / expected": number("over_expected", 2),
            "x floor": number("times_floor", 2),
            "x best dense": number("over_best_dense", 2),
            "kept mass": number("kept_mass", 4),
            "graph": graph,
        }
    ),
}


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(str(x).replace("|", "/") for x in line) + " |" for line in lines]


def markdown(parts: Parts, gpu: str, date: str, logs: Sequence[str]) -> str:
    """The whole report."""
    lines = [f"# {gpu}, {date}", ""]
    for part in parts.values():
        described = part.get("gpu")
        if described and "machine" in part:
            facts = ", ".join(f"{name} {value}" for name, value in described.items())
            lines += [f"{facts}.", ""]
            break
    commits = sorted({str(part["commit"]) for part in parts.values() if "commit" in part})
    lines += [f"Commit {', '.join(commits) or 'unknown'}; written by `bench/gpu_report.py`.", ""]
    if gpu == NO_GPU:
        lines += ["No GPU took part: sizes and times here answer nothing.", ""]
    lines += ["## Targets", ""]
    heads = ("claim", "target", "measured", "")
    claims = []
    for target in TARGETS:
        measured, word = verdict(target, parts)
        sign = "<=" if target.at_most else ">="
        claims.append((target.claim, f"{sign} {target.bound:g}{target.unit}", measured, word))
    lines += [*table(heads, claims), ""]
    for name, part in parts.items():
        columns = KINDS[name.split("-")[0]].cells
        lines += [f"## {name}", ""]
        bandwidth = part.get("copy_gb_per_s")
        if bandwidth is None and part["results"]:
            bandwidth = part["results"][0].get("streaming_gb_per_s")
        if bandwidth is not None:
            lines += [f"Bandwidth of this run: {bandwidth:.0f} GB/s.", ""]
        chosen = [row for row in part["results"] if row.get("main", True)]
        cells = [[cell(row) for cell in columns.values()] for row in chosen]
        lines += [*table(list(columns), cells), ""]
        for one in part.get("skipped", ()):
            lines.append(f"- left out: {one['contender']}: {one['reason']}")
        lines.append("")
    if logs:
        lines += ["## Parts that did not end well", "", *(f"- {name}" for name in logs), ""]
    return "\n".join(lines)


def show_expected() -> None:
    """What the step model says of every part, at an H200's copy bandwidth."""
    shapes = {"1": Shape(), "8": Shape(batch=8), "32": Shape(batch=32)}
    sizes = [("1", 1 << 13), ("1", 1 << 15), ("1", 1 << 17), ("1", 1 << 19), ("1", 1 << 20)]
    sizes += [("8", 1 << 17), ("32", 1 << 15)]
    cells = []
    for batch, tokens in sizes:
        shape = shapes[batch]
        dense = expected_us("dense", shape, tokens, LISTED)
        found = [
            expected_us("exact", shape, tokens, LISTED),
            expected_us("int4", shape, tokens, LISTED),
            expected_us("int4", shape, tokens, LISTED, hit_share=0.5),
            expected_us("hit", shape, tokens, LISTED),
        ]
        steps = [f"{us:.0f} ({dense / us:.1f}x)" for us in found]
        cells.append([f"{batch} x {tokens}", f"{dense:.0f}", *steps])
    columns = ("rows x tokens", "dense", "exact keys", "int4, cold", "50 % hits", "all hits")
    title = f"decode step of one layer, us, expected at {H200_COPY_GB_PER_S:.0f} GB/s (modelled)"
    results.print_table(title, columns, cells)
    cells = []
    for tokens in (1 << 17, 1 << 19, 1 << 20):
        dense = expected_chunk_us(Shape(), tokens, 512, None)
        ours = expected_chunk_us(Shape(), tokens, 512, LISTED + 256)
        cells.append([str(tokens), f"{dense:.0f}", f"{ours:.0f} ({dense / ours:.1f}x)"])
    columns = ("tokens", "dense", "int4")
    results.print_table("prefill chunk of 512, us, expected (modelled)", columns, cells)


# ---- files


def read_parts(folder: Path) -> Parts:
    """Result files of all parts under ``folder``: ``<part>/<kind>.json``."""
    found: Parts = {}
    for path in sorted(folder.glob("*/*.json")):
        kind = path.parent.name.split("-")[0]
        if kind in KINDS:
            found[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
    order = list(KINDS)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].split("-")[0])))


def unfinished(folder: Path) -> list[str]:
    """Parts with a log and no mark."""
    logs = sorted(path.stem for path in folder.glob("*.log"))
    return [name for name in logs if not (folder / f"{name}.done").exists()]


def gpu_name(parts: Parts) -> str:
    """As the parts that measured say, or `NO_GPU`."""
    names = [part["machine"]["cuda"] for part in parts.values() if "machine" in part]
    names += [part["gpu"]["name"] for part in parts.values() if part.get("measured")]
    return next((name for name in names if name), NO_GPU)


def parser() -> argparse.ArgumentParser:
    made = script_parser(__doc__, __file__)
    made.set_defaults(out=None)
    made.add_argument("--parts", type=Path, default=Path("build/gpu"), help="what gpu.sh wrote")
    made.add_argument("--expect", action="store_true", help="print what is expected, read nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser()
    options = made.parse_args(arguments)
    if options.expect:
        show_expected()
        return
    folder: Path = options.parts
    require(folder.is_dir(), "parts", str(folder), "a folder that bench/gpu.sh wrote to")
    parts = read_parts(folder)
    require(bool(parts), "parts", str(folder), "a folder with the results of one part at least")
    gpu, date = gpu_name(parts), datetime.now(UTC).date().isoformat()
    out: Path | None = options.out
    if out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        out = OUT_FOLDER / f"{slug}-{date}.json"
    report = markdown(parts, gpu, date, unfinished(folder))
    content = {
        "question": made.description,
        **machine.describe(),
        "gpu": gpu,
        "date": date,
        "parts": parts,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(out)
    page = out.with_suffix(".md")
    page.write_text(report, encoding="utf-8")
    for path, name in ((out, "report.json"), (page, "report.md")):
        if path != folder / name:
            shutil.copyfile(path, folder / name)
    print(report)
    print("written:", f"{out}, {page}")


if __name__ == "__main__":
    main()
