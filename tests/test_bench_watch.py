"""Stages of a step: every op belongs to one, and what ops do not explain is the rest."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
from bench_sizes import SHAPE

from kvselect import TokenSelect, decode_step
from kvselect.bench.layer import StructuredLayer
from kvselect.bench.watch import KVSELECT_STAGES, REST, OpWatch, stage_ms

BINDINGS = Path(__file__).resolve().parent.parent / "csrc" / "bindings" / "ops.cpp"


def test_every_op_belongs_to_a_stage() -> None:
    ops = re.findall(r'm\.def\(\s*"(\w+)\(Tensor', BINDINGS.read_text(encoding="utf-8"))
    assert set(KVSELECT_STAGES) == {f"kvselect.{op}" for op in ops}


def test_a_step_is_taken_apart_and_its_lists_are_copies() -> None:
    layer, cache = StructuredLayer(SHAPE), SHAPE.new_cache(1025, "int4")
    layer.fill([cache], 1024)
    q, before_rope = layer.query(layer.draw_query(), cache)
    policy = TokenSelect(topk=32, dense_below_tokens=0, similarity_threshold=0.99)
    state = policy.new_state(cache)

    def step() -> object:
        cache.append(*next(layer.tokens(1)))
        return decode_step(q, cache, policy, state, q_unrotated=before_rope)

    with OpWatch() as watch:
        _, info = step()  # type: ignore[misc]
    assert {"kvselect.kv_append", "kvselect.score_tokens", "kvselect.sparse_attention"} <= set(
        watch.ms
    )
    (attended,) = watch.attended
    assert attended.indices is not None and attended.topk_length is not None
    counts = info.selection.topk_length
    assert torch.equal(attended.topk_length.reshape(counts.shape), counts)
    for head in range(2):
        count = int(counts[0, head])
        listed = attended.indices.reshape(2, -1)[head, :count]
        assert torch.equal(listed, info.selection.indices[0, head, :count])
    attended.indices.zero_()
    assert bool((info.selection.indices != 0).any())


def test_what_ops_do_not_explain_is_the_rest() -> None:
    a = torch.ones(64, 64)

    def call() -> None:
        torch.mm(a, a)
        time.sleep(0.001)

    stages = stage_ms(call, 1000.0, {"aten.mm": "product"})
    assert set(stages) == {"product", REST}
    assert sum(stages.values()) == pytest.approx(1000.0)
    assert set(stage_ms(call, 1000.0)) == {REST}
    assert stage_ms(call, 0.0, {"aten.mm": "product"})[REST] == 0.0
