"""Counters for a server's endpoint: told once, once a second, and only if someone can read."""

from __future__ import annotations

from typing import Any

import pytest

import kvselect
from kvselect.integrations.vllm import shim
from kvselect.integrations.vllm.metrics import Meter
from kvselect.policies.base import PolicyState


class Instrument:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._phase = ""

    def labels(self, phase: str) -> Instrument:
        self._phase = phase
        return self

    def inc(self, amount: float) -> None:
        assert amount >= 0
        self.values[self._phase] = self.values.get(self._phase, 0) + amount

    def set(self, value: float) -> None:
        self.values[self._phase] = value


def counted(state: PolicyState, visible: int, attended: int, mass: float) -> None:
    state.decode.add(
        num_calls=1,
        num_dense_calls=0,
        tokens_visible=visible,
        tokens_attended=attended,
        tokens_scanned=0,
        mass_sum=2 * mass,
        mass_count=2,
        num_nonfinite=0,
        looked_up=10,
        reuse_counts=[4, 400],
    )


def test_totals_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    counters = ("tokens_visible", "tokens_attended", "lists_reused", "lists_selected")
    made: dict[str, Any] = {name: Instrument() for name in (*counters, "kept_mass")}
    monkeypatch.setattr(shim, "prometheus_instruments", lambda: made)
    now = [10.0]
    meter = Meter(lambda: now[0])
    meter.publish()
    assert made["tokens_visible"].values == {}  # no layer yet
    states = [PolicyState(kvselect.Dense()) for _ in range(2)]
    for state in states:
        meter.add(state)
        counted(state, 100, 40, 0.5)
    meter.publish()
    assert made["tokens_visible"].values == {"prefill": 0, "decode": 200}
    assert made["tokens_attended"].values["decode"] == 80
    assert made["lists_reused"].values == {"prefill": 0, "decode": 8}
    assert made["lists_selected"].values == {"prefill": 0, "decode": 12}
    assert made["kept_mass"].values == {"decode": 0.5}
    counted(states[0], 7, 3, 1.0)
    meter.publish()
    assert made["tokens_visible"].values["decode"] == 200  # within the second
    now[0] += 1.0
    meter.publish()
    assert made["tokens_visible"].values["decode"] == 207
    assert made["tokens_attended"].values["decode"] == 83
    assert made["kept_mass"].values == {"decode": (0.75 + 0.5) / 2}


def test_nothing_is_counted_that_nobody_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)

    def never() -> dict[str, Any]:
        raise AssertionError

    monkeypatch.setattr(shim, "prometheus_instruments", never)
    meter = Meter()
    meter.add(PolicyState(kvselect.Dense()))
    meter.publish()
