"""The page of a run: it needs nothing else, shows every number, and opens in a browser."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image as matplotlib_image

from kvselect.eval.charts import (
    DEPTH_BINS,
    MOST_PANELS,
    SERIES,
    charts,
    depth_scores,
    layer_masses,
    save_pngs,
    svg,
)
from kvselect.eval.page import page
from kvselect.eval.results import Cell, Length, Results

POLICIES = ("dense", "streaming_llm 227", "token_select 227", "token_select 455 & more")


def results_of(
    tasks: tuple[str, ...] = ("niah_single", "vt"),
    lengths: tuple[int, ...] = (512, 2048, 700),
    seed: int = 0,
) -> Results:
    """Made-up numbers, none like another."""
    rng = np.random.default_rng(seed)
    made = Results(
        model="A <model> & co",
        window_tokens=512,
        tasks=tasks,
        lengths=tuple(Length(label=f"{n}", tokens=n) for n in sorted(lengths)),
        policies={policy: {"policy": policy, "topk": 64} for policy in POLICIES},
        baseline="dense",
        config={"seed": 3, "template": "dialect-1", "dtype": "float32", "code": {"torch": "2"}},
        environment={"machine": {"cpu": "a CPU"}, "commit": "abc", "begun": "2026-01-01"},
        layers=(0, 2),
        notes=["a <note>"],
        complete=True,
    )
    for length in made.lengths:
        for task in tasks:
            for policy in POLICIES:
                made.cells.append(
                    Cell(
                        task=task,
                        length=length,
                        policy=policy,
                        outcomes=tuple(rng.integers(0, 5, 8) / 4),
                        depths=tuple(rng.random(8)),
                        kept_mass=rng.random(),
                        mass_by_head=tuple(tuple(rng.random(2)) for _ in range(2)),
                        tokens_attended=100 * rng.random(),
                        bytes_ratio=rng.random(),
                        hit_rate=rng.random() if "455" in policy else None,
                        decode_ms=5 * rng.random(),
                        prefill_s=rng.random(),
                        cache_bytes=int(rng.integers(10**6, 10**8)),
                        context_tokens=float(length.tokens - 3),
                        samples=("digest",),
                    )
                )
    return made


VOID = {"meta", "br", "link", "img", "input", "hr"}


class Structure(HTMLParser):
    """Elements that nest properly, with their attributes; the rows of all tables; the script."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[float]] = []
        self.script = ""
        self.style = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag == "data":
            self.rows[-1].append(float(dict(attributes)["value"] or "nan"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.script += data
        if self.open[-1:] == ["style"]:
            self.style += data


@pytest.fixture(scope="module")
def results() -> Results:
    return results_of()


@pytest.fixture(scope="module")
def html(results: Results) -> str:
    return page(results, charts(results))


def numbers(row: dict[str, Any]) -> list[float]:
    """Every number of a cell of the JSON but the answers one by one."""
    found: list[float] = []
    for name, value in row.items():
        if name in ("outcomes", "depths", "kept_mass_by_layer_and_head"):
            continue
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, (int, float)):
                found.append(float(entry))
    return found


def test_every_number_of_the_json_is_in_the_tables(results: Results, html: str) -> None:
    structure = Structure(html)
    told = json.loads(json.dumps(results.to_dict()))
    rows = [set(row) for row in structure.rows]
    assert len(told["means"]) == 12 and len(told["cells"]) == 24
    for row in (*told["means"], *told["cells"]):
        # The length stands in the first row of its group.
        wanted = set(numbers(row)) - {float(row["length_tokens"])}
        assert any(wanted <= shown for shown in rows), row
    for cell in told["cells"]:
        heads = {mass for layer in cell["kept_mass_by_layer_and_head"] for mass in layer}
        assert heads in rows
    shown = set().union(*rows)
    assert {float(length.tokens) for length in results.lengths} <= shown


def test_the_whole_result_file_is_in_the_page(results: Results, html: str) -> None:
    assert json.loads(Structure(html).script) == json.loads(json.dumps(results.to_dict()))


def test_the_page_needs_nothing_else(html: str) -> None:
    structure = Structure(html)
    tags = {tag for tag, _ in structure.found}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "image"}
    scripts = [attributes for tag, attributes in structure.found if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "results"}]
    for _, attributes in structure.found:
        for name, value in attributes.items():
            assert "//" not in (value or ""), (name, value)
            if name in ("href", "xlink:href", "src"):
                assert (value or "").startswith("#")
            assert not name.startswith("on")
    assert "@import" not in structure.style and "url(" not in structure.style
    assert "http:" not in html and "https:" not in html


def test_ids_are_unique_and_references_lead_somewhere(html: str) -> None:
    structure = Structure(html)
    ids = [attributes["id"] for _, attributes in structure.found if "id" in attributes]
    assert len(set(ids)) == len(ids)
    wanted = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert wanted and set(wanted) <= set(ids)


def test_text_from_outside_is_escaped(html: str) -> None:
    assert "A &lt;model&gt; &amp; co: what is found" in html
    assert "a &lt;note&gt;" in html and "<note>" not in html and "<model>" not in html


def test_pictures_take_their_colours_from_the_page(results: Results, html: str) -> None:
    drawn = "".join(svg(chart) for chart in charts(results))
    for index in range(len(POLICIES)):
        assert f"var(--series-{index})" in drawn and SERIES[index] not in drawn
    assert "var(--ink)" in drawn and "#1f2328" not in drawn and "<text" in drawn
    style = Structure(html).style
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    light, dark = style.split("prefers-color-scheme: dark")
    assert all(f"{name}:" in light for name in used)
    assert "--page:" in dark and "--ink:" in dark and "@media print" in dark


def test_effective_lengths() -> None:
    results = results_of(("vt",), (512, 1024, 2048))
    scores = {"dense": (1.0, 0.75, 0.0), "streaming_llm 227": (0.5, 1.0, 1.0)}
    results.cells = [
        dataclasses.replace(cell, outcomes=(scores[cell.policy][place],))
        for cell in results.cells
        if cell.policy in scores
        for place, length in enumerate(results.lengths)
        if cell.length == length
    ]
    assert results.effective_tokens("vt", "dense") == 1024
    assert results.effective_tokens(None, "dense") == 1024
    assert results.effective_tokens("vt", "streaming_llm 227") is None
    assert results.to_dict()["effective_tokens"]["dense"] == {"mean": 1024, "vt": 1024}
    assert [1024.0, 1024.0] in Structure(page(results, charts(results))).rows


@pytest.mark.filterwarnings("error")
def test_a_run_that_is_not_complete_says_so(results: Results, html: str) -> None:
    partial = dataclasses.replace(results, cells=results.cells[:5], complete=False)
    assert "This run is not complete." in page(partial, charts(partial))
    assert "This run is not complete." not in html


def test_pngs_of_every_chart(results: Results, tmp_path: Path) -> None:
    made = charts(results)
    paths = save_pngs(made, tmp_path / "new")
    assert [path.name for path in paths] == [
        *("score.png", "depth.png", "pareto.png", "cost.png", "layers.png")
    ]
    for path in paths:
        picture = matplotlib_image.imread(path)
        assert picture.shape[0] > 200 and picture.shape[1] > 400
        assert picture[..., :3].std() > 0.02  # something is drawn


@pytest.mark.parametrize("tasks", [("vt",), ("a", "b", "c", "d", "e", "f", "g", "h")])
def test_charts_of_few_and_many(tasks: tuple[str, ...], tmp_path: Path) -> None:
    many = results_of(tasks, tuple(512 * 2**n for n in range(7)))
    made = charts(many)
    assert len(made) == 5
    pareto = next(chart for chart in made if chart.name == "pareto")
    assert len(pareto.figure.axes) == 2 * MOST_PANELS
    single = results_of(tasks, (512,))
    for results in (many, single):
        Structure(page(results, charts(results)))


def test_charts_without_depth_or_mass(results: Results) -> None:
    bare = dataclasses.replace(
        results,
        cells=[
            dataclasses.replace(cell, depths=(None,) * 8, mass_by_head=(), kept_mass=None)
            for cell in results.cells
        ],
    )
    made = charts(bare)
    assert [chart.name for chart in made] == ["score", "pareto", "cost"]
    Structure(page(bare, made))


def test_depth_scores_are_means_by_place() -> None:
    results = results_of(("vt",), (512,))
    results.cells = [
        dataclasses.replace(
            results.cells[0], outcomes=(1.0, 0.5, 0.0, 1.0), depths=(0.0, 0.19, 0.999, None)
        )
    ]
    values, counts = depth_scores(results, "dense")
    assert values.shape == (DEPTH_BINS, 1)
    assert values[0, 0] == 0.75 and values[-1, 0] == 0.0 and math.isnan(values[2, 0])
    assert counts[:, 0].tolist() == [2, 0, 0, 0, 1]


def test_masses_of_layers_are_means_over_tasks_at_the_longest_length(results: Results) -> None:
    length, masses = layer_masses(results, "dense")
    assert length == results.lengths[-1]
    expected = np.mean([cell.mass_by_head for cell in results.cells_of(length, "dense")], axis=0)
    assert np.allclose(masses, expected)


# ---- in a browser


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
    return next((path for name in names if (path := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def opened(html: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that runs the browser on the page, with no network, and gives its stdout."""
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")

    def run(*options: str) -> tuple[str, str]:
        command = [
            str(browser()),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"),
            *("--enable-logging=stderr", "--window-size=1280,2400"),
            *options,
            path.as_uri(),
        ]
        environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True, env=environment
        )
        return done.stdout, done.stderr

    yield run


@needs_browser
def test_a_browser_reads_it_without_complaint(html: str, opened: Any) -> None:
    dom, log = opened("--dump-dom")
    assert "CONSOLE" not in log
    ours, theirs = Structure(html), Structure(dom)
    for tag in ("svg", "table", "tr", "td", "data", "figure"):
        count = sum(1 for name, _ in ours.found if name == tag)
        assert count > 3 and count == sum(1 for name, _ in theirs.found if name == tag), tag
    assert ours.rows == theirs.rows


@needs_browser
def test_light_and_dark_in_a_browser(opened: Any, tmp_path: Path) -> None:
    pictures = {}
    for name, scheme in (("light", "1"), ("dark", "0")):
        path = tmp_path / f"{name}.png"
        opened(f"--screenshot={path}", f"--blink-settings=preferredColorScheme={scheme}")
        pictures[name] = matplotlib_image.imread(path)[..., :3].mean(axis=2)
    light, dark = pictures["light"], pictures["dark"]
    assert light[:5].mean() > 0.95 and dark[:5].mean() < 0.15
    assert light.min() < 0.3 and dark.max() > 0.8  # text can be read on it
    # Nothing sticks out on the right: the margin is empty.
    assert light[:, -15:].min() > 0.95 and dark[:, -15:].max() < 0.15


@needs_browser
def test_print_in_a_browser(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.pdf"
    opened("--no-pdf-header-footer", f"--print-to-pdf={path}")
    data = path.read_bytes()
    assert data.startswith(b"%PDF") and data.count(b"/Type /Page\n") in range(2, 12)
