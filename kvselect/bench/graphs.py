"""Timing on a GPU: CUDA graphs replayed between events, contenders interleaved, L2 cold.

A contender that cannot be captured is timed as it is, launched from Python between the same events,
and says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.bench.layer import Shape
from kvselect.bench.measure import Contender
from kvselect.checks import require_int
from kvselect.testing import rel_err

__all__ = [
    "ColdL2",
    "DeviceSamples",
    "Replay",
    "as_reason",
    "capture",
    "copy_gb_per_s",
    "interleaved_replays",
    "layers_beyond_l2",
]

COPY_BYTES = 1 << 30
COPIES = 20
MIN_LAYERS, MAX_LAYERS = 8, 32
WARM_UPS = 2  # of what is captured: workspaces, compiled kernels and handles are there then


def as_reason(error: BaseException) -> str:
    """An error in one line of a table or a JSON file."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class ColdL2:
    """Calling it drives everything else out of L2, by reads: written lines would be on their way to
    memory while the next call is timed."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._words = torch.ones(4 * l2_bytes // 8, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        self._words.sum()


@dataclass(slots=True)
class Replay:
    """A contender, captured or not.

    Attributes
    ----------
    call : callable
        Replays the graph, or runs the contender.
    not_captured : str
        Why there is no graph; empty if there is one.
    graph, out : object
        Kept alive: the graph reads and writes their memory.
    """

    call: Callable[[], object]
    not_captured: str = ""
    graph: torch.cuda.CUDAGraph | None = None
    out: object = field(default=None, repr=False)


def capture(contender: Contender, bound: float) -> Replay:
    """The contender as a CUDA graph, whose replay gives what its eager call gives.

    Parameters
    ----------
    contender : Contender
        Its call returns the outputs, a Tensor or a list of them.
    bound : float
        Relative distance of a replay's outputs from the eager ones beyond which the graph is not
        used.
    """

    def run() -> object:
        if contender.prepare is not None:
            contender.prepare()
        return contender.call()

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            expected = [out.clone() for out in _tensors(run())]
    torch.cuda.current_stream().wait_stream(side)
    if contender.prepare is not None:
        contender.prepare()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = contender.call()
    except Exception as error:  # whoever cannot be captured is timed as it is, and says so
        torch.cuda.synchronize()
        first: BaseException = error  # ending a broken capture raises once more
        while first.__context__ is not None:
            first = first.__context__
        return Replay(contender.call, not_captured=as_reason(first))
    if contender.prepare is not None:
        contender.prepare()
    graph.replay()
    torch.cuda.synchronize()
    errors = [rel_err(got, wanted) for got, wanted in zip(_tensors(out), expected)]
    if not all(error <= bound for error in errors):
        worst = max(errors)
        return Replay(contender.call, not_captured=f"its replay is {worst:.1e} from its eager call")
    return Replay(graph.replay, graph=graph, out=out)


def _tensors(out: object) -> Sequence[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)  # type: ignore[call-overload]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class DeviceSamples(NamedTuple):
    """Milliseconds of every call, by events and by the clock; and why it was no graph, if it was
    none."""

    event_ms: list[float]
    wall_ms: list[float]
    not_captured: str


def interleaved_replays(
    contenders: Mapping[str, Contender],
    rounds: int,
    *,
    cold: Callable[[], object],
    bound: float,
    max_seconds: float = 5.0,
    on_call: Callable[[str], object] | None = None,
    on_fail: Callable[[str, Exception], object] | None = None,
) -> dict[str, DeviceSamples]:
    """Samples of every contender, round by round; see `kvselect.bench.measure.interleaved_ms`.

    Each round first measures between two events: the flush before them keeps the GPU busy while the
    call is enqueued, so that the host's pace does not count. Then by the clock, from an idle GPU to
    an idle GPU, launch included.

    Parameters
    ----------
    bound : float
        See `capture`.
    max_seconds : float
        A contender whose samples took so long gets no more (always one at least).
    on_fail : callable or None
        Told of a contender that raises while it is captured or its graph made, such as for want of
        memory; the others go on without it. None: such an error ends the bench.
    """
    require_int(rounds, "rounds", 1)
    replays: dict[str, Replay] = {}
    for name, contender in contenders.items():
        try:
            replays[name] = capture(contender, bound)
        except Exception as error:
            if on_fail is None:
                raise
            on_fail(name, error)
    contenders = {name: contenders[name] for name in replays}
    events: dict[str, list[float]] = {name: [] for name in contenders}
    walls: dict[str, list[float]] = {name: [] for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    begin, end = _event(), _event()
    for _ in range(rounds):
        for name, contender in contenders.items():
            if on_call is not None:
                on_call(name)
            if events[name] and spent[name] >= max_seconds:
                continue
            began, call = time.perf_counter(), replays[name].call
            for by_events in (True, False):
                if contender.prepare is not None:
                    contender.prepare()
                cold()
                if by_events:
                    begin.record()
                    call()
                    end.record()
                    end.synchronize()
                    events[name].append(begin.elapsed_time(end))
                    continue
                torch.cuda.synchronize()
                before = time.perf_counter()
                call()
                torch.cuda.synchronize()
                walls[name].append(1e3 * (time.perf_counter() - before))
            spent[name] += time.perf_counter() - began
    return {
        name: DeviceSamples(events[name], walls[name], replays[name].not_captured)
        for name in contenders
    }


def layers_beyond_l2(shape: Shape, tokens: int) -> int:
    """So many layers that their sketches alone are twice what L2 holds; 8 to 32.

    Without a GPU, 2: enough to see that several layers work.
    """
    if not shape.on_cuda:
        return 2
    l2_bytes = torch.cuda.get_device_properties(shape.device).L2_cache_size
    per_layer = shape.batch * shape.sketch_bytes("int4") * tokens
    return min(max(MIN_LAYERS, ceil(2 * l2_bytes / per_layer)), MAX_LAYERS)


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read plus bytes written per second of a copy on the device, the median of 20: what a
    byte floor is computed with."""
    source = torch.ones(COPY_BYTES // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    begin, end = _event(), _event()
    ms: list[float] = []
    for _ in range(COPIES):
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        ms.append(begin.elapsed_time(end))
    return 2 * source.nbytes / sorted(ms)[COPIES // 2] / 1e6
