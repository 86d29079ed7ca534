"""A GPU that is none: what `kvselect.bench` asks of torch.cuda, done by the CPU at once.

Benches for GPUs are run through it, so that everything but the kernels and the times is tested
without one. Capturing runs the call; replaying does nothing, for its outputs are there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvselect.bench import graphs
from kvselect.bench.layer import Shape

__all__ = ["PretendGraph", "install"]


class PretendGraph:
    """Counts replays."""

    replays = 0

    def replay(self) -> None:
        PretendGraph.replays += 1


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return 0.5


def install(monkeypatch: pytest.MonkeyPatch, capturable: Callable[[], bool] = lambda: True) -> None:
    """Replace torch.cuda's functions; layers say that they are on a GPU and stay on the CPU."""

    def graph(graph: PretendGraph) -> Any:
        assert isinstance(graph, PretendGraph)
        if not capturable():
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return nullcontext()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "synchronize": lambda *_: None,
        "Stream": lambda: stream,
        "current_stream": lambda *_: stream,
        "stream": lambda _: nullcontext(),
        "Event": _Event,
        "CUDAGraph": PretendGraph,
        "graph": graph,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: SimpleNamespace(
            name="Pretend GPU",
            major=9,
            minor=0,
            multi_processor_count=1,
            total_memory=16 << 30,
            L2_cache_size=1 << 16,
        ),
        "get_device_name": lambda *_: "Pretend GPU",
        "mem_get_info": lambda *_: (8 << 30, 16 << 30),
        "empty_cache": lambda: None,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(Shape, "on_cuda", True)
    monkeypatch.setattr(graphs, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(PretendGraph, "replays", 0)
