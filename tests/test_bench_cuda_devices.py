"""Benches on CUDA tensors that are fake: all on one device, nothing that waits for the host.

What a CUDA graph cannot capture (numbers read back, copies from the host) shows here, by contender.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda
from test_bench_scripts import script

import kvselect
from kvselect.bench import decode, entrants, prefill, single_ops
from kvselect.bench.contenders import TORCH_TOKEN_SELECT
from kvselect.bench.decode import DecodeRequest
from kvselect.bench.dense_peers import PACKAGES
from kvselect.bench.entrants import (
    DENSE_KERNEL,
    OUR_DENSE,
    QUEST,
    SELECT_EXACT,
    SELECT_INT4,
    STREAMING,
)
from kvselect.bench.layer import Shape
from kvselect.bench.prefill import PrefillRequest

SHAPE = Shape(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16", device="cuda")
TOKENS = 4096


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """torch without CUDA has no generator for it; fake tensors need no numbers."""
    real = torch.Generator

    class OfAnyDevice:
        def __new__(cls, device: str = "cpu") -> Any:
            return real()

    monkeypatch.setattr(torch, "Generator", OfAnyDevice)
    monkeypatch.setenv("KVSELECT_BREAK_EVEN", "off")
    with fake_cuda() as noted:
        yield noted


def waits(noted: FakeCuda, call: Any) -> list[str]:
    """What a call would wait for; its output lies on the device."""
    noted.forget()
    out = call()
    assert out.device.type == "cuda"
    return noted.reads + noted.copies


@pytest.mark.parametrize("batch", [1, 3])
def test_decode_contenders(noted: FakeCuda, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(entrants, "require", lambda *_: None)  # hits read as 0 here
    request = DecodeRequest(
        tokens=(TOKENS,),
        shape=dataclasses.replace(SHAPE, batch=batch),
        topk=64,
        policies=entrants.gpu_policies(64),
        curves=(),
        layers=2,
        hit_shares=(0.5, 1.0),
        gpu_peers=True,
    )
    skipped: dict[str, str] = {}
    for index in range(2):
        layer = decode._new_layer(request, TOKENS, index, skipped.__setitem__)
        ours = {SELECT_INT4, SELECT_EXACT, STREAMING, OUR_DENSE, TORCH_TOKEN_SELECT}
        ours |= {f"{SELECT_INT4}, {share} hits" for share in ("50 %", "all")}
        if batch == 1:
            ours |= {f"{name}, equal kept mass" for name in QUEST.values()}
        assert ours <= layer.everybody.keys()
        assert {name for name in skipped if not name.startswith("Quest")} == set(PACKAGES)
        for name, entrant in layer.everybody.items():
            if entrant.prepare is not None:
                entrant.prepare()
            assert not waits(noted, entrant.call), name


def test_ops_alone(noted: FakeCuda) -> None:
    found = single_ops.gpu_ops(SHAPE, 20_000, 64, 0)
    assert "attention, random list of 16384 tokens" in found
    for name, op in found.items():
        op.error()
        assert not waits(noted, op.contender.call), name


def test_prefill_contenders(noted: FakeCuda) -> None:
    request = PrefillRequest(
        tokens=(TOKENS,), shape=SHAPE, chunk_tokens=256, topk=64, gpu_peers=True
    )
    bench = prefill._Bench(request, TOKENS, lambda *_: None, lambda _: None, 1.0)
    chunks = bench.chunks()
    assert {OUR_DENSE, SELECT_INT4, DENSE_KERNEL} <= chunks.keys()
    for name, one in chunks.items():
        if one.prepare is not None:
            one.prepare()
        one.call()  # tables that are kept
        assert not waits(noted, one.call), name


def test_a_whole_models_step(noted: FakeCuda) -> None:
    module = script("model_step")
    options = module.argparse.Namespace(
        q_heads=8, kv_heads=2, head_dim=64, layers=2, intermediate=256, vocabulary=512
    )
    model = module.random_model(module.config_of(options, 600), SHAPE)
    assert {weight.device.type for weight in model.parameters()} == {"cuda"}
    module.AttentionInterface.register(module.HOOK, module.fused_attention)
    for implementation in ("sdpa", module.HOOK):
        stock = module.twin(model)
        stock.set_attn_implementation(implementation)
        step = module.Step(stock, SHAPE, 512, ours=False)
        step.rewind()
        step()
        assert not waits(noted, step), implementation
    with kvselect.attach(module.twin(model), kvselect.TokenSelect(topk=64)) as handle:
        ours = module.Step(handle.model, SHAPE, 512, ours=True)
        ours.count()
        ours.rewind()
        ours()
        assert not waits(noted, ours)
