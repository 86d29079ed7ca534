"""Where a result was made: machine, versions, commit; nothing that names a person or a network."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kvselect.machine import cpu_name, usable_cores


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the checkout that kvselect runs from, "+" if it has changes; None without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None  # an installed package, perhaps inside a checkout of something else

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu")


def gpu() -> dict[str, Any] | None:
    """The current GPU, its driver, and its clocks as they are found; None without one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    described: dict[str, Any] = {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cuda_runtime": torch.version.cuda,
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return described  # no such program here
    rows = done.stdout.strip().splitlines()
    if rows:  # one GPU, or the first of several
        described |= dict(zip(GPU_FIELDS, (value.strip() for value in rows[0].split(","))))
    return described


def describe() -> dict[str, Any]:
    """Machine, versions and commit, for a result file."""
    packages = ("kvselect", "torch", "transformers", "numpy")
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": usable_cores(),
            "torch_threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in packages},
        },
        "gpu": gpu(),
        "commit": commit(),
    }
