"""From which length is a decode step with selection never slower than a dense one, here?

Both steps are `decode_step` as a whole, on one cache that grows, interleaved, each after the CPU's
caches were emptied: in a model all other layers run between two steps of one layer. `measure` takes
a second or two; `kvselect.crossovers` keeps what it found, and `TokenSelect.new_state` uses it.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from statistics import fmean

import torch
from torch import Tensor

from kvselect import crossovers
from kvselect.cache import KVCache
from kvselect.checks import require, require_float, require_int, require_type
from kvselect.crossovers import Crossover, Mode, Point, Workload
from kvselect.decode import decode_step
from kvselect.machine import last_level_cache_bytes
from kvselect.policies.token_select import TokenSelect
from kvselect.rope import Rope

__all__ = ["check_workload", "crossover_for", "find_crossover", "measure"]

MAX_SECONDS = 2.0
"""After this no other length is tried; a length begun is finished."""
LONGEST_TOKENS = 131072
"""Longest cache that is tried."""
MAX_CACHE_BYTES = 1 << 29
"""Keys and values of the longest cache, unless the budget alone needs more."""
CLEAR_WIN = 0.75
"""Selecting over dense: no longer cache is tried once a step is so much faster."""
AROUND = (1.0, 0.85, 1.15, 0.93, 1.07)
"""Lengths that are tried near the crossover, over the best guess so far."""
REPEATS, FEWEST_REPEATS = 48, 3
"""Steps per length: until the least time was met twice, so that no lucky or lonely one decides."""
SAME_TIME, ROUGHLY_SAME_TIME = 0.02, 0.1
"""Two times that differ by less are the same: near the crossover, and far from it."""
LENGTHS = 9
"""Repeats at one length take at most this part of the time: so many lengths are tried or fewer."""
CHUNK_TOKENS = 2048
MAX_FLUSH_BYTES = 1 << 29

TimeSteps = Callable[[int], Point]
Clock = Callable[[], tuple[float, float]]


def crossover_for(
    policy: TokenSelect,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    page_block_size: int | None = None,
    mode: Mode = "auto",
) -> Crossover | None:
    """The stored crossover of a workload; with "auto", measured and stored if there is none.

    None: ``mode`` is "off", or "stored" and nothing is, or the machine is too busy to measure on,
    which a warning says.
    """
    if mode == "off":
        return None
    sizes = (num_q_heads, num_kv_heads, head_dim, dtype, page_block_size)
    found = crossovers.find(Workload.of(policy.to_dict(), *sizes))
    if found is None and mode == "auto":
        found = measure(
            policy,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            page_block_size=page_block_size,
        )
        if not found.steady:
            warnings.warn(
                "kvselect: break-even not measured: other processes leave too little of the "
                "machine to time steps on, so the selection budget decides; `kvselect break-even "
                "measure` at a quiet time, or dense_below_tokens, settles it",
                stacklevel=4,  # the caller of attach
            )
            return None
        crossovers.save(found)
    return found


def measure(
    policy: TokenSelect,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    page_block_size: int | None = None,
    max_seconds: float = MAX_SECONDS,
    time_steps: TimeSteps | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Crossover:
    """Time steps with and without selection at some lengths above the budget, on the CPU.

    Parameters
    ----------
    policy : TokenSelect
        Its ``dense_below_tokens`` does not matter. With a selection cache every step misses: what
        hits save depends on the queries.
    num_q_heads, num_kv_heads, head_dim, dtype, page_block_size
        Of one layer, as `KVCache` takes them. Batch 1, on torch's number of threads.
    max_seconds : float
        No length is begun later.
    time_steps : callable, tokens -> Point, or None
        What times; None: the clock.
    now : callable, () -> seconds

    Returns
    -------
    Crossover
        Not stored: `kvselect.crossovers.save` does that.

    Raises
    ------
    ValueError, TypeError
        If the policy or a size is out of bounds.
    """
    check_workload(
        policy,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        page_block_size=page_block_size,
        max_seconds=max_seconds,
    )
    begin = now()
    # Up to here lists hold every token: selecting is dense attention, and work besides.
    everything = max(policy.budget, policy.num_sink_tokens + policy.keep + policy.num_recent_tokens)
    shortest = everything + 1
    token_bytes = 2 * num_kv_heads * head_dim * dtype.itemsize
    longest = max(min(LONGEST_TOKENS, MAX_CACHE_BYTES // token_bytes), 2 * shortest)
    if time_steps is None:

        def new_cache(capacity: int) -> KVCache:
            return KVCache(
                1,
                num_kv_heads,
                head_dim,
                dtype=dtype,
                capacity=capacity,
                sketch=policy.sketch,
                page_block_size=page_block_size,
            )

        time_steps = StepTimer(policy, new_cache, num_q_heads, max_seconds / LENGTHS, now)
    with torch.no_grad():
        tokens, extrapolated, points = find_crossover(
            time_steps, shortest, longest, lambda: now() - begin > max_seconds
        )
    sizes = (num_q_heads, num_kv_heads, head_dim, dtype, page_block_size)
    return Crossover(
        machine=crossovers.machine_identity(),
        workload=Workload.of(policy.to_dict(), *sizes),
        tokens=tokens,
        extrapolated=extrapolated,
        points=points,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(now() - begin, 3),
    )


def check_workload(
    policy: object,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    page_block_size: int | None,
    max_seconds: float,
) -> None:
    """Raise what `measure` would raise, before anything is timed."""
    require_type(policy, TokenSelect, "policy", "a TokenSelect")
    require_int(num_q_heads, "num_q_heads", 1)
    KVCache(1, num_kv_heads, head_dim, dtype=dtype, page_block_size=page_block_size)
    allowed = f"a multiple of num_kv_heads = {num_kv_heads}"
    require(num_q_heads % num_kv_heads == 0, "num_q_heads", num_q_heads, allowed)
    seconds = require_float(max_seconds, "max_seconds", "a float > 0")
    require(seconds > 0.0, "max_seconds", max_seconds, "a float > 0")


def find_crossover(
    time_steps: TimeSteps, shortest: int, longest: int, is_late: Callable[[], bool]
) -> tuple[int | None, bool, tuple[Point, ...]]:
    """Search for the length from which selecting is never slower.

    Lengths double until selecting wins clearly; then some around the crossover are tried. The
    result is where a line through their ratios, over the logarithm of the length, passes one: each
    single ratio is off by some per cent. Where only two lengths are near, the lines between them
    count. If the longest length loses, the lines through the last two say where they meet; that
    counts if dense grows, faster by a tenth, and within four times the longest length.

    A length that is not `Point.steady` the second time either ends the search: the machine is busy.

    Returns
    -------
    tokens : int or None
        Rows of at most so many are faster dense; at least ``shortest - 1``. None: nowhere.
    extrapolated : bool
    points : tuple of Point, ascending
    """
    points: list[Point] = []

    def add(tokens: int) -> Point:
        point = time_steps(tokens)
        if not point.steady:
            point = time_steps(tokens)
        points.append(point)
        points.sort(key=lambda point: point.tokens)
        return point

    def must_end() -> bool:
        return is_late() or not all(point.steady for point in points)

    tokens = shortest
    while add(tokens).ratio > CLEAR_WIN and tokens < longest and not must_end():
        tokens = min(2 * tokens, longest)
    for factor in AROUND:
        place = _crossing(points)
        if place is None or must_end():
            break
        tokens = min(max(round(factor * place), shortest), longest)
        if tokens not in (point.tokens for point in points):
            add(tokens)

    crossing = _crossing(points)
    if crossing is not None:
        return int(crossing), False, tuple(points)
    if points[-1].ratio <= 1.0:
        return shortest - 1, False, tuple(points)
    meeting = _extrapolate(points)
    return meeting, meeting is not None, tuple(points)


def _crossing(points: list[Point]) -> float | None:
    """Where selecting begins to win for good; None: it won, or lost, at every length."""
    losses = [number for number, point in enumerate(points) if point.ratio > 1.0]
    if not losses or losses[-1] == len(points) - 1:
        return None
    near = [point for point in points if CLEAR_WIN <= point.ratio <= 1.0 / CLEAR_WIN]
    if len(near) > 2:
        x = [math.log(point.tokens) for point in near]
        mean_x, mean_y = fmean(x), fmean(point.ratio for point in near)
        products = sum((a - mean_x) * (b.ratio - mean_y) for a, b in zip(x, near))
        slope = products / sum((a - mean_x) ** 2 for a in x)
        if slope < 0.0:
            crossing = math.exp(mean_x + (1.0 - mean_y) / slope)
            if near[0].tokens <= crossing <= near[-1].tokens:
                return crossing
    loss, win = points[losses[-1]], points[losses[-1] + 1]
    lost_us = loss.selecting_us - loss.dense_us
    won_us = win.dense_us - win.selecting_us
    return loss.tokens + (win.tokens - loss.tokens) * lost_us / (lost_us + won_us)


def _extrapolate(points: list[Point]) -> int | None:
    if len(points) < 2:
        return None
    before, last = points[-2:]
    width = last.tokens - before.tokens
    dense_slope = (last.dense_us - before.dense_us) / width
    selecting_slope = (last.selecting_us - before.selecting_us) / width
    gain = dense_slope - selecting_slope
    if dense_slope <= 0.0 or gain <= 0.1 * dense_slope:  # dense that gets faster is noise
        return None
    meeting = last.tokens + (last.selecting_us - last.dense_us) / gain
    return int(meeting) if meeting <= 4 * last.tokens else None


class StepTimer:
    """Times decode steps with and without selection on one growing cache.

    Parameters
    ----------
    policy : TokenSelect
    new_cache : callable, capacity -> KVCache
        Of batch 1.
    num_q_heads : int
    max_seconds : float
        For one length.
    now : callable, () -> seconds
    clock : callable, () -> (seconds, seconds of CPU), or None
        What steps are timed by. None: CPU time of this thread where torch has one thread; wall time
        otherwise, and the CPU time beside it shows how long this thread waited for others.
    """

    def __init__(
        self,
        policy: TokenSelect,
        new_cache: Callable[[int], KVCache],
        num_q_heads: int,
        max_seconds: float,
        now: Callable[[], float] = time.monotonic,
        clock: Clock | None = None,
    ) -> None:
        # Selection at every length, and the dense path of the same policy: with compact positions
        # it rotates each key.
        self._policies = {
            "dense": dataclasses.replace(policy, dense_below_tokens=2**31 - 1),
            "selecting": dataclasses.replace(policy, dense_below_tokens=0),
        }
        self._new_cache, self._max_seconds, self._now = new_cache, max_seconds, now
        self._renew(0)
        if clock is None:
            clock = _cpu_time if torch.get_num_threads() == 1 else _wall_and_cpu_time
        self._clock = clock
        self._generator = torch.Generator().manual_seed(0)
        dim = self._cache.head_dim
        shape = (1, CHUNK_TOKENS, self._cache.num_kv_heads, dim)
        self._k, self._v = self._random(shape), self._random(shape)
        # Logits with a standard deviation of 2: attention neither flat nor a single spike.
        self._q = 2.0 * self._random((1, 1, num_q_heads, dim))
        flush_bytes = min(2 * last_level_cache_bytes(), MAX_FLUSH_BYTES)
        self._flush = torch.ones(flush_bytes // 8, dtype=torch.int64)
        self._rope: Rope | None = None

    def __call__(self, tokens: int) -> Point:
        """The least time of each of the two steps when the cache holds about ``tokens``."""
        self._hold(tokens - 1)
        rope = self._rope_for(tokens + REPEATS)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in self._policies}
        begin = self._now()
        for number in range(REPEATS):
            if number >= FEWEST_REPEATS and (
                _is_enough(_point(tokens, times)) or self._now() - begin > self._max_seconds
            ):
                break
            # One token more each time and a query turned round: with a selection cache, a miss.
            self._cache.append(self._k[:, number : number + 1], self._v[:, number : number + 1])
            self._q.neg_()
            for name, policy in self._policies.items():
                self._flush.sum()
                before = self._clock()
                decode_step(self._q, self._cache, policy, self._states[name], rope=rope)
                after = self._clock()
                # A clock too coarse to see the step has seen its own tick.
                taken = max(after[0] - before[0], 1e-9)
                times[name].append((taken, after[1] - before[1]))
        return _point(tokens, times)

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._cache.dtype)

    def _renew(self, capacity: int) -> None:
        self._cache = self._new_cache(capacity)
        self._states = {
            name: policy.new_state(self._cache) for name, policy in self._policies.items()
        }

    def _hold(self, tokens: int) -> None:
        """Make the cache hold so many tokens."""
        if tokens + REPEATS > self._cache.capacity:
            # Anew, at its size: growing copies, and room for the longest would take a second.
            self._renew(tokens + REPEATS)
        surplus = self._cache.max_seqlen - tokens
        if surplus > 0:
            self._cache.crop(surplus)
        while (held := self._cache.max_seqlen) < tokens:
            part = slice(0, min(CHUNK_TOKENS - held % CHUNK_TOKENS, tokens - held))
            # Channels move on from chunk to chunk: equal keys would tie in the selection.
            k = self._k.roll(1 + held // CHUNK_TOKENS, dims=-1)
            self._cache.append(k[:, part], self._v[:, part])

    def _rope_for(self, num_positions: int) -> Rope | None:
        """Any rotation: only its cost matters, and that only with compact positions."""
        if self._policies["dense"].positions == "original":
            return None
        num_positions = max(num_positions, self._policies["dense"].capacity)
        if self._rope is None or self._rope.num_positions < num_positions:
            pairs = self._cache.head_dim // 2
            frequencies = 1e4 ** (-torch.arange(pairs) / pairs)
            self._rope = Rope.from_frequencies(frequencies, num_positions)
        return self._rope


def _point(tokens: int, times: dict[str, list[tuple[float, float]]]) -> Point:
    return Point(
        tokens,
        dense_us=round(1e6 * min(times["dense"])[0], 3),
        selecting_us=round(1e6 * min(times["selecting"])[0], 3),
        noise=round(max(map(_noise, times.values())), 3),
    )


def _is_enough(point: Point) -> bool:
    """Far from the crossover a rough time will do."""
    is_near = CLEAR_WIN < point.ratio < 1.0 / CLEAR_WIN
    return point.noise <= (SAME_TIME if is_near else ROUGHLY_SAME_TIME)


def _noise(times: list[tuple[float, float]]) -> float:
    """How far the least time can be trusted: what the second least has more, or the share of it in
    which this thread did nothing; both relative."""
    (least, busy), (second, _) = sorted(times)[:2]
    return max(second / least - 1.0, 1.0 - busy / least)


def _cpu_time() -> tuple[float, float]:
    seconds = time.thread_time()
    return seconds, seconds


def _wall_and_cpu_time() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()
