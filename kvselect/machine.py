"""Which machine this is, as far as speed depends on it; nothing names a person or a network."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

__all__ = ["cpu_identity", "cpu_name", "free_bytes", "last_level_cache_bytes", "usable_cores"]

UNKNOWN_CACHE_BYTES = 64 << 20


@cache
def _cpu_fields() -> dict[str, str]:
    """Name and value of the lines of the first processor in /proc/cpuinfo; {} off Linux."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if not name.strip():
                    break  # the next processor
                fields[name.strip()] = value.strip()
    except OSError:
        pass  # not Linux
    return fields


def cpu_name() -> str:
    """The processor's marketing name, which hypervisors may shorten to the family's."""
    return _cpu_fields().get("model name") or platform.processor() or platform.machine()


def cpu_identity() -> str:
    """`cpu_name` and the numbers that tell apart what a hypervisor gives one name."""
    names = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    numbers = [f"{name} {_cpu_fields()[name]}" for name in names if name in _cpu_fields()]
    return f"{cpu_name()} ({', '.join(numbers)})" if numbers else cpu_name()


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first core can use; 64 MiB where the system does not say.

    On a shared machine others use it too: a bound from above.
    """
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text(encoding="utf-8").strip()
            found.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue  # a form that we do not know
    return max(found, default=UNKNOWN_CACHE_BYTES)


def free_bytes() -> int | None:
    """Memory that this process may still take: the system's, or what its control group leaves.

    Page cache that can be dropped counts as free. None where the system does not say.
    """
    group = Path("/sys/fs/cgroup")
    found = [
        _available_bytes(Path("/proc/meminfo")),
        _group_left(group, "memory.max", "memory.current", "inactive_file"),
        _group_left(
            group / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ]
    return min((left for left in found if left is not None), default=None)


def _available_bytes(path: Path) -> int | None:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) << 10
    except (OSError, ValueError):
        pass  # not Linux
    return None


def _group_left(folder: Path, limit: str, usage: str, droppable: str) -> int | None:
    """What a container's limit leaves; None without one ("max", or no such group)."""
    try:
        allowed = int((folder / limit).read_text(encoding="ascii"))
        used = int((folder / usage).read_text(encoding="ascii"))
        told = (folder / "memory.stat").read_text(encoding="ascii").split()
        dropped = int(told[told.index(droppable) + 1])
    except (OSError, ValueError):
        return None
    return max(0, allowed - used + dropped)
