"""Floors and rates are arithmetic on bytes and samples; JSON gives back what was saved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvselect.bench import measure, results
from kvselect.bench.results import Timing, as_row, load, print_table, save, timing


def test_a_timing_is_its_samples_against_its_bytes() -> None:
    found = timing([4.0, 2.0, 3.0], 50_000_000, 25.0, 1)
    assert (found.median_ms, found.p20_ms, found.p80_ms) == (3.0, pytest.approx(2.4), 3.6)
    assert found.floor_ms == 2.0  # 50 MB at 25 GB/s
    assert found.times_floor == 1.5
    assert found.gb_per_s == pytest.approx(50 / 3.0)
    assert found.samples_ms == [4.0, 2.0, 3.0] and found.bytes_must_read == 50_000_000
    assert (found.threads, found.clock, found.streaming_gb_per_s) == (1, "cpu", 25.0)
    assert timing([1.0], 1, 1.0, 2).clock == "wall"


@given(
    ms=st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=9),
    num_bytes=st.integers(1, 1 << 40),
    bandwidth=st.floats(0.1, 1e4),
)
def test_the_floor_is_reached_at_the_streaming_bandwidth(
    ms: list[float], num_bytes: int, bandwidth: float
) -> None:
    found = timing(ms, num_bytes, bandwidth, 1)
    assert found.gb_per_s * found.times_floor == pytest.approx(bandwidth)
    assert timing([found.floor_ms], num_bytes, bandwidth, 1).times_floor == pytest.approx(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    over: dict[str, float]
    timing: Timing


def test_json_gives_back_what_was_saved(tmp_path: Path) -> None:
    row = Row(name="ä", over={"peer": 2.5}, timing=timing([1.0, 2.0], 1000, 10.0, 2))
    config = {"tokens": (1, 2), "out": tmp_path}
    path = save(tmp_path / "deep" / "one.json", "Why?", config, [row, {"x": None}])
    content = load(path)
    expected = {"name": "ä", "over": {"peer": 2.5}, **dataclasses.asdict(row.timing)}
    assert content["results"] == [expected, {"x": None}]
    assert content["question"] == "Why?" and content["config"] == {"tokens": [1, 2]}
    assert content["freed_memory_kept"] is measure.can_keep_heap()
    assert content["commit"] and content["machine"]["cpu"] and content["versions"]["torch"]
    assert [entry.name for entry in path.parent.iterdir()] == ["one.json"]


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "one.json", "Why?", {}, [{"x": 1}])

    def stop(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save(path, "Why?", {}, [{"x": 2}])
    assert json.loads(path.read_text(encoding="utf-8"))["results"] == [{"x": 1}]


def test_rows_without_a_timing_stay_as_they_are() -> None:
    row = {"a": 1, "nested": {"b": 2}}
    assert as_row(row) == row and as_row(row) is not row


def test_a_table_shows_brackets_and_all_cells(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("a [b] title", ["", "[ms]"], [["kvselect [int4]", "1.5"], ["peer", "20"]])
    text = capsys.readouterr().out
    for part in ("a [b] title", "[ms]", "kvselect [int4]", "1.5", "peer", "20"):
        assert part in text
