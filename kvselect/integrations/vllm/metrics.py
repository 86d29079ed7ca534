"""What selection does, for the server's Prometheus endpoint.

Workers count, the API server is scraped: they meet in prometheus_client's multiprocess folder
(``PROMETHEUS_MULTIPROC_DIR``), which vLLM's endpoint reads where the variable is set. Without it
nothing is counted here, since nobody could read it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from kvselect.integrations.vllm import shim
from kvselect.policies.base import PolicyState

__all__ = ["METER", "Meter"]

_SECONDS = 1.0  # between two looks at the counts, which add up what layers recorded
_PHASES = ("prefill", "decode")
_COUNTERS = {  # by instrument: the count of `PhaseStatistics`
    "tokens_visible": "tokens_visible",
    "tokens_attended": "tokens_attended",
    "lists_reused": "num_hits",
    "lists_selected": "num_misses",
}


class Meter:
    """The layers of one process, and the counters that it exports for them.

    Parameters
    ----------
    clock : callable
        Seconds, from anywhere.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: list[PolicyState] = []
        self._told: dict[tuple[str, str], int] = {}
        self._instruments: dict[str, Any] = {}
        self._next = 0.0

    def add(self, state: PolicyState) -> None:
        """Count this layer from now on."""
        self._states.append(state)

    def publish(self) -> None:
        """Bring the counters up to date, once a second at most; called at every engine step."""
        if not self._states or not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            return
        if self._clock() < self._next:
            return
        self._next = self._clock() + _SECONDS
        if not self._instruments:
            self._instruments = shim.prometheus_instruments()
        for phase in _PHASES:
            counts = [getattr(state, phase) for state in self._states]
            for name, count_name in _COUNTERS.items():
                total = sum(getattr(count, count_name) for count in counts)
                told = self._told.get((phase, name), 0)
                self._instruments[name].labels(phase=phase).inc(total - told)
                self._told[phase, name] = total
            masses = [count.kept_mass for count in counts]
            known = [mass for mass in masses if mass is not None]
            if known:
                self._instruments["kept_mass"].labels(phase=phase).set(sum(known) / len(known))


METER = Meter()
