"""The rest of the model compiled by Inductor, attention left out of it: the same tokens."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from vllm_engine import SMALL, attached, engine, prompts

import kvselect
from kvselect.policies.base import Policy

ASKED = prompts((40, 129, 384, 777, 1500))


@pytest.mark.parametrize(
    "policy", [kvselect.Dense(), kvselect.TokenSelect(**SMALL)], ids=["dense", "tokens"]
)
def test_compiled_equals_attach(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "0")  # else vLLM traces and compiles nothing
    torch._dynamo.utils.counters.clear()
    with engine(policy, enforce_eager=False) as running:
        got = running.generate(ASKED)
        compilation = running.llm.llm_engine.vllm_config.compilation_config
        assert compilation.backend == "inductor" and compilation.mode > 0
        counts = torch._dynamo.utils.counters
        assert counts["stats"]["unique_graphs"] > 0 and not counts["graph_break"]
        assert all(layer._served is not None for layer in running.layers)
    assert got == attached(policy, ASKED)
