"""How every bench here measures: contenders interleaved in one process, cold caches, medians.

One thread is measured in CPU time: the machines are shared, and what other processes do must not
count. Several threads are measured by the clock, since CPU time would count their waiting. CPU time
includes the system's: freed memory is kept while contenders run (`kept_heap`), so that nobody pays
for mapping its buffers anew. Ratios count, not seconds.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvselect.checks import require_int
from kvselect.machine import last_level_cache_bytes

__all__ = [
    "ColdCaches",
    "Contender",
    "Quantiles",
    "can_keep_heap",
    "clock_name",
    "clock_of",
    "int8_gmac_per_s",
    "interleaved_ms",
    "kept_heap",
    "quantiles",
    "read_gb_per_s",
    "return_freed_memory",
    "threads",
]

READ_BYTES = 1 << 29  # far beyond any cache
PRODUCT_SIZE = 2048  # rows and columns of int8 matrices


@contextmanager
def threads(number: int) -> Iterator[None]:
    """torch's (and so kvselect's) threads inside the block."""
    require_int(number, "threads", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Options of glibc's mallopt, and the largest values that glibc itself would come to by adapting.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_ADAPTED = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20))
_kept_depth = 0


def can_keep_heap() -> bool:
    """Whether `kept_heap` does anything here: the C library is glibc."""
    return platform.libc_ver()[0] == "glibc"


@contextmanager
def kept_heap() -> Iterator[None]:
    """Freed memory stays mapped inside the block: warm buffers for everybody alike.

    glibc returns large blocks to the system, and whoever allocates its output anew at each call
    then pays for its page faults, or does not, depending on what others freed before: at 32K
    torch's matmul form took 22.6 ms or 13.9 ms, TokenSelect as torch ops 22.6 ms or 12.3 ms. Result
    files say whether this was possible (`can_keep_heap`).
    """
    global _kept_depth
    if not can_keep_heap():
        yield
        return
    libc = ctypes.CDLL(None)
    _kept_depth += 1
    if _kept_depth == 1:
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _kept_depth -= 1
        if _kept_depth == 0:
            for option, value in _ADAPTED:
                libc.mallopt(option, value)
            libc.malloc_trim(0)


def return_freed_memory() -> None:
    """Give freed memory back to the system (glibc), so that what is resident is what is held."""
    if can_keep_heap():
        ctypes.CDLL(None).malloc_trim(0)


def clock_name(num_threads: int) -> str:
    """ "cpu" for one thread, "wall" for several."""
    return "cpu" if num_threads == 1 else "wall"


def clock_of(num_threads: int) -> Callable[[], float]:
    """Seconds of the clock that so many threads are measured by."""
    return time.process_time if num_threads == 1 else time.perf_counter


class Quantiles(NamedTuple):
    """Of samples, in their unit."""

    median: float
    p20: float
    p80: float


def quantiles(samples: list[float]) -> Quantiles:
    """Median, 20 % and 80 % quantile (linear between samples); one sample is all three."""
    if len(samples) < 2:
        return Quantiles(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Quantiles(statistics.median(samples), fifths[0], fifths[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One thing to time.

    Parameters
    ----------
    call : callable without arguments
        What is timed.
    prepare : callable or None
        Runs before each call and is not timed.
    repeats : int
        Calls per sample; the sample is their mean.
    """

    call: Callable[[], object]
    prepare: Callable[[], object] | None = None
    repeats: int = 1


class ColdCaches:
    """Calling it drives everything else out of the CPU's caches: the next step starts cold.

    A decode step of one layer never finds its keys in cache, since the other layers and the weights
    were read in between; a bench that repeats one layer would.
    """

    def __init__(self, num_bytes: int | None = None) -> None:
        size = 2 * last_level_cache_bytes() if num_bytes is None else num_bytes
        self._words = torch.ones(max(size // 8, 1), dtype=torch.int64)

    def __call__(self) -> None:
        self._words.sum()


def interleaved_ms(
    contenders: Mapping[str, Contender],
    rounds: int,
    *,
    num_threads: int = 1,
    cold: Callable[[], object] | None = None,
    max_seconds: float = 20.0,
    on_call: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every call, round by round over all contenders, on a `kept_heap`.

    Parameters
    ----------
    contenders : mapping of name to Contender
        Each runs once before anything is timed.
    rounds : int
        Samples of each; fewer for a contender whose samples took ``max_seconds`` together (always
        one at least).
    num_threads : int
        Decides the clock, see `clock_of`; does not set threads.
    cold : callable or None
        Runs before each sample and is not timed, such as a `ColdCaches`.
    on_call : callable or None
        Told each contender's name, for progress: ``rounds`` times each, left out or not.
    """
    require_int(rounds, "rounds", 1)
    now = clock_of(num_threads)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    with kept_heap():
        for contender in contenders.values():
            if contender.prepare is not None:
                contender.prepare()
            for _ in range(contender.repeats):
                contender.call()
        for _ in range(rounds):
            for name, contender in contenders.items():
                if on_call is not None:
                    on_call(name)
                if samples[name] and spent[name] >= max_seconds:
                    continue
                if contender.prepare is not None:
                    contender.prepare()
                if cold is not None:
                    cold()
                began, before = time.perf_counter(), now()
                for _ in range(contender.repeats):
                    contender.call()
                elapsed = now() - before
                spent[name] += time.perf_counter() - began
                samples[name].append(1e3 * elapsed / contender.repeats)
    return samples


def read_gb_per_s(num_threads: int = 1) -> float:
    """Streaming reads of torch's threads, the best of five: what a byte floor is computed with.

    On ordinary and on huge pages, whichever is faster: a cache may lie on either.
    """
    now, best, num_bytes = clock_of(num_threads), float("inf"), READ_BYTES
    for words in (torch.empty(num_bytes // 8, dtype=torch.int64), _on_huge_pages(num_bytes)):
        words.fill_(1)
        for _ in range(5):
            before = now()
            words.sum()
            best = min(best, now() - before)
    return num_bytes / best / 1e9


def _on_huge_pages(num_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int64)


def int8_gmac_per_s(num_threads: int = 1) -> float:
    """Billions of int8 multiply-adds per second of torch's matrix product, the best of three.

    As near to the peak of the CPU's dot-product instructions (VNNI) as somebody else's tuned kernel
    comes.
    """
    now, size, best = clock_of(num_threads), PRODUCT_SIZE, float("inf")
    codes = torch.randint(-127, 127, (size, size), dtype=torch.int8)
    product: Any = torch._int_mm
    product(codes, codes)
    for _ in range(3):
        before = now()
        product(codes, codes)
        best = min(best, now() - before)
    return size**3 / best / 1e9
