"""What the machine says of itself, also where it says nothing."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvselect import machine
from kvselect.eval import machine as eval_machine
from kvselect.eval.machine import describe


@pytest.fixture(autouse=True)
def read_anew() -> Iterator[None]:
    machine._cpu_fields.cache_clear()
    yield
    machine._cpu_fields.cache_clear()


def cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None) -> None:
    """Make ``text`` what /proc/cpuinfo says; None: there is none."""
    real = builtins.open
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)

    def opened(name: Any, *rest: Any, **options: Any) -> Any:
        return real(path if name == "/proc/cpuinfo" else name, *rest, **options)

    monkeypatch.setattr(builtins, "open", opened)


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe()["gpu"] is None
    properties = SimpleNamespace(
        name="Some GPU",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=1 << 37,
        L2_cache_size=60 << 20,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    asked: list[list[str]] = []

    def answer(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout="580.1, 345 MHz, 1980 MHz, 3201 MHz, 30\n")

    monkeypatch.setattr(eval_machine.subprocess, "run", answer)
    found = eval_machine.gpu()
    assert found is not None and asked[0][0] == "nvidia-smi"
    assert (found["name"], found["capability"], found["multiprocessors"]) == (
        "Some GPU",
        "9.0",
        132,
    )
    assert (found["driver_version"], found["clocks.sm"]) == ("580.1", "345 MHz")

    def missing(*_: object, **__: object) -> object:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(eval_machine.subprocess, "run", missing)
    without = eval_machine.gpu()
    assert without is not None and "driver_version" not in without


def test_the_first_processor_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = "processor\t: 0\nmodel name\t: Fast CPU: 9000\ncpu family\t: 26\nmodel\t: 2\n"
    cpuinfo(monkeypatch, tmp_path, f"{one}stepping\t: 1\n\nprocessor\t: 1\nmodel\t: 77\n")
    assert machine.cpu_name() == "Fast CPU: 9000"
    assert machine.cpu_identity() == "Fast CPU: 9000 (cpu family 26, model 2, stepping 1)"


@pytest.mark.parametrize("text", [None, "", "nothing of the kind\n"])
def test_a_machine_that_says_nothing_has_a_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    cpuinfo(monkeypatch, tmp_path, text)
    assert machine.cpu_name() == machine.cpu_identity() != ""


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.usable_cores() >= 1
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert machine.usable_cores() == 3
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: None)
    assert machine.usable_cores() == 1


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (["48K", "1024K", "32768K"], 32 << 20),
        (["2M"], 2 << 20),
        (["1G"], 1 << 30),
        (["", "lots", "5X", "64K"], 64 << 10),
        ([], machine.UNKNOWN_CACHE_BYTES),
    ],
)
def test_the_largest_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sizes: list[str], expected: int
) -> None:
    for number, size in enumerate(sizes):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        (folder / "size").write_text(f"{size}\n")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path)
    assert machine.last_level_cache_bytes() == expected


def test_results_say_where_they_were_made() -> None:
    about = describe()["machine"]
    assert about["cpu"] == machine.cpu_name() and about["cores"] == machine.usable_cores()


def test_free_memory_is_known_here() -> None:
    free = machine.free_bytes()
    assert free is not None and 1e8 < free < 1e14


def test_a_container_limit_counts(tmp_path: Path) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    assert machine._group_left(tmp_path, *names) is None
    for name, text in zip(
        (*names[:2], "memory.stat"), ("1000\n", "700\n", "anon 5\ninactive_file 20\n")
    ):
        (tmp_path / name).write_text(text)
    assert machine._group_left(tmp_path, *names) == 320
    (tmp_path / "memory.max").write_text("500\n")
    assert machine._group_left(tmp_path, *names) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._group_left(tmp_path, *names) is None


def test_what_the_system_does_not_say_is_unknown(tmp_path: Path) -> None:
    assert machine._available_bytes(tmp_path / "none") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\n")
    assert machine._available_bytes(tmp_path / "meminfo") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   7 kB\n")
    assert machine._available_bytes(tmp_path / "meminfo") == 7 << 10
