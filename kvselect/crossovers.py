"""Measured crossovers, kept on disk: from which length a workload selects on this machine.

One small JSON file for each machine and workload in ``<cache folder>/crossovers/``, replaced as a
whole: processes that write at the same time need no lock, and a damaged file costs its own entry.
`kvselect.break_even` measures; this module keeps and finds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from kvselect import ops
from kvselect.checks import require_choice
from kvselect.machine import cpu_identity, usable_cores

__all__ = [
    "Crossover",
    "Mode",
    "Point",
    "Workload",
    "break_even_mode",
    "cache_folder",
    "find",
    "find_all",
    "find_by_q_heads",
    "forget",
    "machine_identity",
    "save",
    "shape_of",
    "this_machine",
    "verdict_of",
]

FORMAT = 1
"""Of the files. Those of another format are somebody else's: neither read nor removed."""

LARGEST_NOISE = 0.3
"""Of a point that means something."""

UNREADABLE = (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError)
"""What reading a damaged file raises; OverflowError: a number beyond the range of floats."""

Mode = Literal["auto", "stored", "off"]
MODES: tuple[Mode, ...] = ("auto", "stored", "off")

# Settings on which the time of a decode step does not depend. What is not named here does, so that
# a setting of tomorrow is not overlooked.
NOT_IN_DECODE = frozenset(
    {
        "average_queries",
        "chunk_size",
        "dense_below_tokens",
        "dense_layers",
        "dense_prefill",
        "num_tail_tokens",
        "prefill_attention",
        "q_block_size",
        "query_groups",
        "tail_q_block_size",
        "window_anchor",
    }
)


@dataclass(frozen=True, slots=True)
class Workload:
    """What a decode step of one layer computes, as far as its time depends on it; batch 1.

    Attributes
    ----------
    num_q_heads, num_kv_heads, head_dim : int
    dtype : str
        Of queries, keys and values: "bfloat16".
    page_block_size : int or None
        Tokens per page; None: contiguous.
    settings : dict
        ``policy.to_dict()`` without what decode steps do not depend on.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    page_block_size: int | None
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        page_block_size: int | None = None,
    ) -> Workload:
        """``settings``: ``policy.to_dict()``."""
        relevant = {name: value for name, value in settings.items() if name not in NOT_IN_DECODE}
        name = str(dtype).removeprefix("torch.")
        return cls(num_q_heads, num_kv_heads, head_dim, name, page_block_size, relevant)


@dataclass(frozen=True, slots=True)
class Point:
    """Time of one decode step at one length, the least of some repeats [us].

    ``noise``: by how much the second least is longer, or the share of the time that was spent
    waiting; the worst of both steps.
    """

    tokens: int
    dense_us: float
    selecting_us: float
    noise: float = 0.0

    @property
    def ratio(self) -> float:
        """Selecting over dense: below 1, selecting wins."""
        return self.selecting_us / self.dense_us

    @property
    def steady(self) -> bool:
        """Whether the times mean something: if not, the machine was too busy to measure on."""
        return self.noise <= LARGEST_NOISE


@dataclass(frozen=True, slots=True)
class Crossover:
    """What was measured for one workload on one machine.

    Attributes
    ----------
    machine : dict
        `machine_identity` when it was measured.
    workload : Workload
    tokens : int or None
        Rows of at most so many tokens are faster dense, longer ones selecting; None: selecting won
        nowhere, and nothing says where it would.
    extrapolated : bool
        Whether ``tokens`` lies beyond the longest point, where the two lines meet.
    points : tuple of Point, ascending
    measured_at : str
        UTC, ISO 8601.
    seconds : float
        That the measurement took.
    """

    machine: Mapping[str, str | int]
    workload: Workload
    tokens: int | None
    extrapolated: bool
    points: tuple[Point, ...]
    measured_at: str
    seconds: float

    @property
    def dense_below_tokens(self) -> int:
        """Rows of at most so many tokens are dense: where selecting never won, all that were
        measured."""
        return self.points[-1].tokens if self.tokens is None else self.tokens

    @property
    def steady(self) -> bool:
        """Whether all its points are."""
        return all(point.steady for point in self.points)

    @property
    def file_name(self) -> str:
        """By machine and workload, so that a new measurement replaces the old one."""
        key = [dict(self.machine), dataclasses.asdict(self.workload)]
        text = json.dumps(key, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24] + ".json"

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Crossover:
        """What `to_dict` gave.

        Raises
        ------
        ValueError, TypeError, KeyError, OverflowError
            If it is anything else.
        """
        workload = Workload(**content["workload"])
        points = tuple(Point(**point) for point in content["points"])
        made = cls(
            machine=dict(content["machine"]),
            workload=workload,
            tokens=content["tokens"],
            extrapolated=bool(content["extrapolated"]),
            points=points,
            measured_at=str(content["measured_at"]),
            seconds=float(content["seconds"]),
        )
        lengths = [point.tokens for point in points]
        if made.tokens is not None:
            lengths.append(made.tokens)
        times = [t for point in points for t in (point.dense_us, point.selecting_us)]
        noises = [point.noise for point in points]
        ints = all(type(n) is int and 0 <= n < 2**31 for n in lengths)
        finite = all(map(math.isfinite, (*times, *noises)))
        positive = min(times, default=0) > 0 and min(noises, default=-1) >= 0
        if not (ints and finite and positive):
            raise ValueError("tokens or points out of bounds")
        if not isinstance(workload.settings, dict):
            raise TypeError("settings is no object")
        return made


def break_even_mode(given: str | None = None, default: Mode = "stored") -> Mode:
    """What to do about crossovers: ``given``, else ``KVSELECT_BREAK_EVEN``, else ``default``.

    "auto": measure what is not stored. "stored": use what is stored. "off": the selection budget
    alone decides, which depends on no machine.

    Raises
    ------
    ValueError
        If the argument or the environment variable is anything else.
    """
    if given is not None:
        require_choice(given, "break_even", MODES)
        return given  # type: ignore[return-value]
    value = os.environ.get("KVSELECT_BREAK_EVEN") or default
    require_choice(value, "KVSELECT_BREAK_EVEN", MODES)
    return value  # type: ignore[return-value]


def cache_folder() -> Path:
    """``$KVSELECT_CACHE_DIR``, else ``$XDG_CACHE_HOME/kvselect``, else ``~/.cache/kvselect``.

    Raises
    ------
    RuntimeError
        If none of the variables is set and there is no home folder.
    """
    if own := os.environ.get("KVSELECT_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification has relative paths ignored.
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return folder / "kvselect"


def this_machine() -> dict[str, str | int]:
    """The part of `machine_identity` that stays while software and settings change."""
    return {"cpu": cpu_identity(), "cores": usable_cores()}


def machine_identity(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Everything but the workload that a decode step's time depends on; no host name.

    Asks anew each time: threads and implementation can change.
    """
    device = torch.device(device)
    name = device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        **this_machine(),
        "threads": torch.get_num_threads(),
        "device": name,
        "cpu_implementation": ops.cpu_implementation(),
        "torch": str(torch.__version__),
        "kvselect": str(ops.build_info()["version"]),
        "build": _build_digest(),
    }


@cache
def _build_digest() -> str:
    """Of the compiled module: kernels change more often than the version."""
    module = Path(ops.__file__).with_name("_C.abi3.so")
    return hashlib.sha256(module.read_bytes()).hexdigest()[:12]


def shape_of(crossover: Crossover, defaults: Mapping[str, Any]) -> str:
    """The workload in words: sizes, and the settings that differ from ``defaults``."""
    work = crossover.workload
    words = [f"{work.num_q_heads}/{work.num_kv_heads} heads of {work.head_dim}", work.dtype]
    if work.page_block_size is not None:
        words.append(f"pages of {work.page_block_size}")
    other = [
        f"{name}={value}"
        for name, value in work.settings.items()
        if name != "policy" and defaults.get(name, None) != value
    ]
    words.append(f"{work.settings.get('policy')}({', '.join(other)})")
    return ", ".join(words)


def verdict_of(crossover: Crossover) -> str:
    """The result in words."""
    if crossover.tokens is None:
        longest = crossover.points[-1].tokens
        return f"selecting is slower at every length tried; dense up to {longest} tokens, the last"
    how = " (extrapolated)" if crossover.extrapolated else ""
    return f"dense up to {crossover.tokens} tokens{how}"


# --- finding --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Known:
    """What this process has read, by file name, and the state of the folder that it read."""

    folder: Path | None = None
    modified_ns: int = -1
    stored: dict[str, Crossover] = dataclasses.field(default_factory=dict)
    unsaved: dict[str, Crossover] = dataclasses.field(default_factory=dict)  # could not be written


_known = _Known()
_said: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warnings.warn(f"kvselect: {text}", stacklevel=4)


def find_all() -> list[Crossover]:
    """Every crossover that is stored, or known to this process only, of any machine.

    Reads the folder once and again after it changed. Files that cannot be read are named in a
    warning, once, and left alone.
    """
    try:
        folder = cache_folder() / "crossovers"
    except RuntimeError:  # no home: `save` says so
        return list(_known.unsaved.values())
    try:
        modified_ns = folder.stat().st_mtime_ns
    except OSError:
        modified_ns = -1
    if folder != _known.folder or modified_ns != _known.modified_ns:
        _known.stored = _read_folder(folder)
        _known.folder, _known.modified_ns = folder, modified_ns
    return list((_known.stored | _known.unsaved).values())


def find(workload: Workload, device: torch.device | str = "cpu") -> Crossover | None:
    """The crossover of a workload on this machine as it is set up; None: not measured."""
    return find_by_q_heads(workload, device).get(workload.num_q_heads)


def find_by_q_heads(workload: Workload, device: torch.device | str = "cpu") -> dict[int, Crossover]:
    """`find` for every number of query heads: a cache does not know its own."""
    machine = machine_identity(device)
    return {
        found.workload.num_q_heads: found
        for found in find_all()
        if found.machine == machine
        and dataclasses.replace(found.workload, num_q_heads=workload.num_q_heads) == workload
    }


def _read_folder(folder: Path) -> dict[str, Crossover]:
    found: dict[str, Crossover] = {}
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError as error:
        _warn_once(f"break-even: {folder} cannot be read ({error})")
        return found
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
            if content["format"] == FORMAT:
                found[path.name] = Crossover.from_dict(content)
        except FileNotFoundError:
            continue  # forgotten by another process just now
        except UNREADABLE as error:
            _warn_once(
                f"break-even: {path} cannot be read ({type(error).__name__}: {error}) and is left "
                "out; `kvselect break-even forget` removes it"
            )
    return found


# --- keeping --------------------------------------------------------------------------------------


def save(crossover: Crossover) -> Path | None:
    """Keep a crossover for this process and on disk; the path, or None if it cannot be written.

    The file appears as a whole or not at all. A failure is a warning that says why.
    """
    name = crossover.file_name
    try:
        folder = cache_folder() / "crossovers"
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(crossover.to_dict(), indent=1) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            try:
                file.write(text)
                file.close()
                os.replace(file.name, folder / name)
            except BaseException:
                os.unlink(file.name)
                raise
    except (OSError, RuntimeError) as error:
        _known.unsaved[name] = crossover
        _warn_once(
            f"break-even: measured, but not stored ({error}), so that every process measures "
            "again; set KVSELECT_CACHE_DIR to a folder that can be written"
        )
        return None
    _known.unsaved.pop(name, None)
    _known.modified_ns = -1  # two changes within one tick of the clock look like one
    return folder / name


def forget(every_machine: bool = False) -> int:
    """Remove this machine's crossovers, of all builds and settings, or all; how many files went.

    Files that cannot be read go too: nobody knows whose they were.

    Raises
    ------
    OSError
        If a file cannot be removed.
    """
    machine = this_machine()
    removed = 0
    try:
        folder = cache_folder() / "crossovers"
    except RuntimeError:
        _known.unsaved.clear()
        return 0
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                continue
            own = Crossover.from_dict(content).machine
            kept = not every_machine and any(own.get(k) != v for k, v in machine.items())
        except FileNotFoundError:
            continue
        except UNREADABLE:
            kept = False
        if not kept:
            path.unlink(missing_ok=True)
            removed += 1
    _known.unsaved.clear()
    _known.modified_ns = -1
    return removed
