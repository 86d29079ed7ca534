"""Two ranks on one machine give what one gives: heads are split, votes of scope "layer" added."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from vllm_engine import SMALL, attached, engine, prompts

import kvselect


@pytest.mark.parametrize("scope", ["kv_head", "layer"])
def test_two_ranks_equal_one(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    policy = kvselect.TokenSelect(**SMALL, scope=scope, positions="compact")
    asked = prompts()
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(policy, **options) as running:
        got = running.generate(asked)
    assert got == attached(policy, asked)
