"""Crossovers on disk: what is found where, damaged files, folders that cannot be written, races."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvselect import TokenSelect, crossovers, ops
from kvselect.crossovers import Crossover, Point, Workload

SIZES = (8, 2, 32, torch.bfloat16)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; everything that this process knew is forgotten."""
    monkeypatch.setenv("KVSELECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KVSELECT_BREAK_EVEN")
    forget_what_is_known(monkeypatch)
    return tmp_path / "cache" / "crossovers"


def forget_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were another process."""
    monkeypatch.setattr(crossovers, "_known", crossovers._Known())
    monkeypatch.setattr(crossovers, "_said", set())


def workload(**changes: Any) -> Workload:
    return dataclasses.replace(Workload.of(TokenSelect().to_dict(), *SIZES), **changes)


def crossover(tokens: int | None = 9000, **changes: Any) -> Crossover:
    points = (Point(4000, 100.0, 150.0, 0.01), Point(16000, 400.5, 200.25, 0.02))
    made = Crossover(
        machine=crossovers.machine_identity(),
        workload=workload(),
        tokens=tokens,
        extrapolated=False,
        points=points,
        measured_at="2026-01-02T03:04:05+00:00",
        seconds=1.5,
    )
    return dataclasses.replace(made, **changes)


# --- finding and keeping --------------------------------------------------------------------------


def test_what_was_saved_is_found_by_this_process_and_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert crossovers.find(workload()) is None and not folder.exists()
    saved = crossover()
    path = crossovers.save(saved)
    assert path == folder / saved.file_name and path is not None
    assert [entry.name for entry in folder.iterdir()] == [path.name]  # nothing temporary stays
    assert crossovers.find(workload()) == saved
    forget_what_is_known(monkeypatch)
    assert crossovers.find(workload()) == saved
    assert crossovers.find(workload(num_q_heads=4)) is None


@pytest.mark.parametrize("tokens", [0, None, 2**31 - 1])
def test_a_new_measurement_replaces_the_old_one(folder: Path, tokens: int | None) -> None:
    crossovers.save(crossover())
    crossovers.save(crossover(tokens, extrapolated=True))
    found = crossovers.find(workload())
    assert found is not None and found.tokens == tokens and found.extrapolated
    assert len(list(folder.iterdir())) == 1
    assert found.dense_below_tokens == (16000 if tokens is None else tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "Another CPU"},
        {"cores": 999},
        {"threads": 77},
        {"device": "NVIDIA H100"},
        {"cpu_implementation": "quantum"},
        {"torch": "1.0"},
        {"kvselect": "0.0.1"},
        {"build": "0123456789ab"},
    ],
    ids=str,
)
def test_another_machine_or_setup_has_its_own(change: dict[str, Any]) -> None:
    assert change.keys() <= crossovers.machine_identity().keys()
    other = crossover(machine=crossovers.machine_identity() | change)
    crossovers.save(other)
    assert crossovers.find(workload()) is None and crossovers.find_all() == [other]
    crossovers.save(crossover(5))
    found = crossovers.find(workload())
    assert found is not None and found.tokens == 5 and len(crossovers.find_all()) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"num_q_heads": 16},
        {"num_kv_heads": 4},
        {"head_dim": 64},
        {"dtype": "float32"},
        {"page_block_size": 16},
    ],
    ids=str,
)
def test_another_workload_has_its_own(change: dict[str, Any]) -> None:
    crossovers.save(crossover(workload=workload(**change)))
    assert crossovers.find(workload()) is None
    crossovers.save(crossover(5))
    assert len(crossovers.find_all()) == 2


def test_all_query_heads_of_a_cache_are_found_at_once() -> None:
    for heads, tokens in ((2, 20), (8, 80)):
        crossovers.save(crossover(tokens, workload=workload(num_q_heads=heads)))
    crossovers.save(crossover(99, workload=workload(num_q_heads=8, head_dim=64)))
    found = crossovers.find_by_q_heads(workload(num_q_heads=0))
    assert {heads: one.tokens for heads, one in found.items()} == {2: 20, 8: 80}


def test_every_setting_counts_or_is_known_not_to() -> None:
    """A setting that nobody thought about here makes its own key."""
    names = {field.name for field in dataclasses.fields(TokenSelect)}
    kept = Workload.of(TokenSelect().to_dict(), *SIZES).settings.keys()
    assert kept == {"policy", *names} - crossovers.NOT_IN_DECODE
    assert names > crossovers.NOT_IN_DECODE
    prefill_only = TokenSelect(
        chunk_size=64,
        q_block_size=64,
        num_tail_tokens=1,
        tail_q_block_size=3,
        query_groups=2,
        prefill_attention="dense_kernel",
    )
    assert Workload.of(prefill_only.to_dict(), *SIZES) == workload()
    for settings in ({"topk": 7}, {"sketch": "int8"}, {"similarity_threshold": 0.9}):
        assert Workload.of(TokenSelect(**settings).to_dict(), *SIZES) != workload()


def test_threads_and_kernels_are_read_anew() -> None:
    before = crossovers.machine_identity()
    threads, kernel = torch.get_num_threads(), ops.cpu_implementation()
    try:
        torch.set_num_threads(threads + 1)
        ops.set_cpu_implementation("scalar")
        after = crossovers.machine_identity()
    finally:
        torch.set_num_threads(threads)
        ops.set_cpu_implementation(kernel)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"threads", "cpu_implementation"} and "threads" in changed
    assert after["cpu_implementation"] == "scalar"
    assert not any(os.uname().nodename == value for value in before.values())


def test_what_another_process_stored_is_seen(folder: Path) -> None:
    assert crossovers.find(workload()) is None
    crossovers.save(crossover(workload=workload(head_dim=64)))
    assert crossovers.find(workload()) is None  # the folder has been read
    stored = crossover()
    (folder / stored.file_name).write_text(json.dumps(stored.to_dict()))
    os.utime(folder, ns=(1, 1))  # as a later change of the folder does, whatever its clock's tick
    assert crossovers.find(workload()) == stored


# --- damage ---------------------------------------------------------------------------------------


def without(*path: str) -> Callable[[dict[str, Any]], bytes]:
    def damage(content: dict[str, Any]) -> bytes:
        inner = content
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        return json.dumps(content).encode()

    return damage


def with_values(**values: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda content: json.dumps(content | values).encode()


POINT = {"tokens": 4000, "dense_us": 1.0, "selecting_us": 2.0, "noise": 0.0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"[1, 2]",
        lambda _: b'"text"',
        lambda _: b"\x00\xff\xfe",
        lambda _: b"[" * 100_000,
        lambda content: json.dumps(content).encode()[:-20],
        without("format"),
        without("tokens"),
        without("points"),
        without("workload"),
        without("workload", "head_dim"),
        without("machine"),
        with_values(tokens=-1),
        with_values(tokens=2**31),
        with_values(tokens=1.5),
        with_values(tokens="many"),
        with_values(points=[]),
        with_values(points=[POINT | {"tokens": True}]),
        with_values(points=[POINT | {"dense_us": 0.0}]),
        with_values(points=[POINT | {"selecting_us": math.nan}]),
        with_values(points=[POINT | {"noise": -1.0}]),
        with_values(points=[POINT | {"more": 1}]),
        with_values(points=[POINT | {"dense_us": 10**400}]),
        with_values(points=[POINT | {"noise": 10**400}]),
        with_values(points=[POINT, POINT | {"noise": math.nan}]),
        with_values(seconds=10**400),
        with_values(points=7),
        with_values(machine=3),
        with_values(workload=dataclasses.asdict(workload()) | {"settings": 5}),
    ],
)
def test_a_damaged_file_costs_its_own_entry_and_one_warning(
    folder: Path, damage: Callable[[dict[str, Any]], bytes]
) -> None:
    healthy = crossover(7, workload=workload(head_dim=64))
    crossovers.save(healthy)
    path = folder / crossover().file_name
    broken = damage(crossover().to_dict())
    path.write_bytes(broken)
    os.utime(folder, ns=(1, 1))
    with pytest.warns(UserWarning, match=re.escape(f"break-even: {path} cannot be read (")) as seen:
        assert crossovers.find(workload()) is None
    assert len(seen) == 1
    assert crossovers.find(workload(head_dim=64)) == healthy
    assert path.read_bytes() == broken  # nothing was lost
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        os.utime(folder, ns=(2, 2))
        assert crossovers.find(workload()) is None  # said once
        crossovers.save(crossover())  # what is measured again replaces it
        assert crossovers.find(workload()) == crossover()


def test_files_of_another_format_are_somebody_elses(folder: Path) -> None:
    crossovers.save(crossover())
    path = folder / "from-the-future.json"
    path.write_text(json.dumps({"format": 2, "everything": "else"}))
    os.utime(folder, ns=(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert crossovers.find_all() == [crossover()]
        assert crossovers.forget(every_machine=True) == 1
    assert path.exists()


def not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("KVSELECT_CACHE_DIR", str(tmp_path / "file"))


def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root may write anywhere, the system call is what refuses."""

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(crossovers.os, "replace", refuse)


def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KVSELECT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(crossovers.Path, "home", refuse)


@pytest.mark.parametrize("obstacle", [not_a_folder, read_only, no_home])
def test_what_cannot_be_written_is_kept_by_the_process(
    obstacle: Callable[..., None], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstacle(tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match=r"measured, but not stored \(.*set KVSELECT_CACHE_DIR"):
        assert crossovers.save(crossover()) is None
    assert crossovers.find(workload()) == crossover()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crossovers.save(crossover(12))  # said once
        found = crossovers.find(workload())
    assert found is not None and found.tokens == 12
    assert not folder.exists() or not list(folder.iterdir())  # nothing half written
    crossovers.forget()
    assert crossovers.find(workload()) is None


def test_a_folder_that_cannot_be_read_is_empty(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crossovers.save(crossover())

    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(crossovers.Path, "glob", refuse)
    forget_what_is_known(monkeypatch)
    with pytest.warns(UserWarning, match=re.escape(f"break-even: {folder} cannot be read")):
        assert crossovers.find(workload()) is None


# --- several processes ----------------------------------------------------------------------------


def write_many(number: int) -> None:
    for index in range(25):
        crossovers.save(crossover(number * 100 + index, workload=workload(num_q_heads=8 + number)))
        crossovers.save(crossover(number, workload=workload(head_dim=64)))  # everybody's


def test_processes_that_write_at_the_same_time_lose_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=write_many, args=(number,))
        for number in range(4)
    ]
    for process in processes:
        process.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a reader never meets half a file
        while any(process.is_alive() for process in processes):
            forget_what_is_known(monkeypatch)
            crossovers.find_all()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    forget_what_is_known(monkeypatch)
    assert len(list(folder.iterdir())) == 5 == len(crossovers.find_all())
    for number in range(4):
        found = crossovers.find(workload(num_q_heads=8 + number))
        assert found is not None and found.tokens == number * 100 + 24
    shared = crossovers.find(workload(head_dim=64))
    assert shared is not None and shared.tokens in range(4)


# --- settings, folders, words ---------------------------------------------------------------------


def test_mode_by_argument_then_environment_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert crossovers.break_even_mode() == "stored"
    assert crossovers.break_even_mode(default="auto") == "auto"
    monkeypatch.setenv("KVSELECT_BREAK_EVEN", "")
    assert crossovers.break_even_mode(default="auto") == "auto"
    for mode in ("off", "stored", "auto"):
        monkeypatch.setenv("KVSELECT_BREAK_EVEN", mode)
        assert crossovers.break_even_mode(default="auto") == mode
        assert crossovers.break_even_mode("off", default="auto") == "off"


def test_bad_modes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = "allowed: 'auto' or 'stored' or 'off'"
    with pytest.raises(ValueError, match=f"break_even: got 'on', {allowed}"):
        crossovers.break_even_mode("on")
    monkeypatch.setenv("KVSELECT_BREAK_EVEN", "yes")
    with pytest.raises(ValueError, match=f"KVSELECT_BREAK_EVEN: got 'yes', {allowed}"):
        crossovers.break_even_mode()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("KVSELECT_CACHE_DIR", "/own")
    assert crossovers.cache_folder() == Path("/own")
    monkeypatch.delenv("KVSELECT_CACHE_DIR")
    assert crossovers.cache_folder() == Path("/xdg/kvselect")
    for useless in ("", "relative/path"):  # the XDG specification ignores both
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        assert crossovers.cache_folder() == Path("/home/somebody/.cache/kvselect")


def test_forget_this_machine_or_all(folder: Path) -> None:
    here = crossovers.machine_identity()
    elsewhere = crossover(machine=here | {"cpu": "Another CPU"})
    crossovers.save(crossover(machine=here | {"threads": 77, "build": "old"}))
    crossovers.save(crossover())
    crossovers.save(elsewhere)
    (folder / "broken.json").write_text("{")
    huge = with_values(points=[POINT | {"dense_us": 10**400}])(elsewhere.to_dict())
    (folder / "huge.json").write_bytes(huge)
    assert crossovers.forget() == 4  # two of this machine, and what nobody can read
    assert crossovers.find_all() == [elsewhere]
    assert crossovers.forget() == 0
    assert crossovers.forget(every_machine=True) == 1
    assert crossovers.find_all() == [] and list(folder.iterdir()) == []


def test_words() -> None:
    defaults = TokenSelect().to_dict()
    assert crossovers.shape_of(crossover(), defaults) == (
        "8/2 heads of 32, bfloat16, TokenSelect()"
    )
    settings = TokenSelect(topk=64, sketch=None, q_block_size=16).to_dict()
    other = Workload.of(settings, *SIZES, page_block_size=16)
    assert crossovers.shape_of(crossover(workload=other), defaults) == (
        "8/2 heads of 32, bfloat16, pages of 16, TokenSelect(topk=64, sketch=None)"
    )
    assert crossovers.verdict_of(crossover()) == "dense up to 9000 tokens"
    assert crossovers.verdict_of(crossover(extrapolated=True)) == (
        "dense up to 9000 tokens (extrapolated)"
    )
    assert crossovers.verdict_of(crossover(None)) == (
        "selecting is slower at every length tried; dense up to 16000 tokens, the last"
    )


def test_points_know_who_won_and_whether_they_mean_something() -> None:
    assert Point(1, 2.0, 1.0).ratio == 0.5
    assert crossover().steady
    busy = (*crossover().points, Point(32000, 900.0, 300.0, noise=0.8))
    assert not crossover(points=busy).steady


def test_import_and_steps_touch_no_cache_folder(tmp_path: Path) -> None:
    """In a process of its own, where every file and folder that is opened is seen."""
    code = """
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event in (
    "open", "os.mkdir", "os.listdir", "os.scandir", "pathlib.Path.glob") and args else None)
import torch, kvselect
own = lambda: [path for path in seen if "kvselect-own-cache" in path]
assert not own(), own()
cache = kvselect.KVCache(1, 2, 32)
cache.append(torch.ones(1, 3000, 2, 32), torch.ones(1, 3000, 2, 32))
policy = kvselect.TokenSelect()
state = policy.new_state(cache)
assert own()  # looked up here
del seen[:]
for _ in range(3):
    kvselect.decode_step(torch.ones(1, 1, 4, 32), cache, policy, state)
assert not seen, seen
"""
    folder = tmp_path / "kvselect-own-cache"
    (folder / "crossovers").mkdir(parents=True)
    environment = os.environ | {"KVSELECT_CACHE_DIR": str(folder), "KVSELECT_BREAK_EVEN": "auto"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not list((folder / "crossovers").iterdir())  # and nothing was measured
