"""Whether a bench fits in memory, asked before it allocates."""

from __future__ import annotations

from pathlib import Path

import torch

from kvselect.machine import free_bytes

__all__ = [
    "free_device_bytes",
    "require_cuda",
    "require_memory",
    "resident_bytes",
]

HEADROOM = 0.9  # of what is free: allocators, torch's own scratch and other programs need the rest


def free_device_bytes(device: str) -> int:
    """Memory of a GPU that this process may still take."""
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def require_cuda(device: str) -> None:
    """ValueError if there is no such GPU, or if torch cannot use one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = torch.device(device).index or 0
    if index >= count:
        raise ValueError(
            f"device: got {device!r}, allowed: cpu, or one of the {count} GPUs that torch "
            f"{torch.__version__} sees here"
        )


def require_memory(what: str, got: object, needed_bytes: int, free: int | None = None) -> None:
    """ValueError if so many bytes do not fit into what is free; None: of the host's memory."""
    if free is None:
        free = free_bytes()
    if free is not None and needed_bytes > HEADROOM * free:
        raise ValueError(
            f"{what}: got {got}, which needs {needed_bytes / 1e9:.1f} GB, "
            f"allowed: {HEADROOM * free / 1e9:.1f} GB (of the memory that is free)"
        )


def resident_bytes() -> int:
    """Memory of this process that is in RAM (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status: got no VmRSS, allowed: Linux")
