"""Stages of a step: every op belongs to one, and what ops do not explain is the rest."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from bench_sizes import SHAPE

from kvselect import KVCache, TokenSelect, decode_step
from kvselect.bench import watch as watch_module
from kvselect.bench.layer import StructuredLayer
from kvselect.bench.measure import can_keep_heap, kept_heap
from kvselect.bench.watch import KVSELECT_STAGES, REST, OpWatch, WriteWatch, stage_ms

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


def test_bytes_written_are_those_of_memory_that_ops_fill() -> None:
    a, kilobyte = torch.ones(16, 16), 1024
    with WriteWatch() as watch:
        room = torch.empty(16, 16)
        room.narrow(0, 0, 8).copy_(a[:8])
    assert watch.written_bytes == kilobyte // 2  # views and allocations write nothing
    with WriteWatch() as watch:
        both = torch.cat([a, a])
        both.zero_()
    assert watch.written_bytes == 4 * kilobyte


@pytest.mark.parametrize(("sketch", "record_bytes"), [(None, 0), ("int8", 128 * 32)])
def test_an_append_writes_its_tokens_and_the_records_it_completes(
    sketch: str | None, record_bytes: int
) -> None:
    cache = KVCache(2, 3, 32, capacity=512, sketch=sketch)
    k = torch.randn(2, 127, 3, 32)
    with WriteWatch() as watch:
        cache.append(k, k)
    assert watch.written_bytes == 2 * k.nbytes
    with WriteWatch() as watch:
        cache.append(k[:, :1], k[:, :1])
    records = 0 if cache.sketch_data is None else 2 * 3 * cache.sketch_data.shape[3]
    assert watch.written_bytes == 2 * k[:, :1].nbytes + records
    assert records >= 2 * 3 * record_bytes


@pytest.mark.skipif(not can_keep_heap(), reason="needs glibc")
@pytest.mark.parametrize("kept", [False, True])
def test_the_peak_of_memory_is_what_was_held_at_once(kept: bool) -> None:
    size = 48 << 20
    with kept_heap() if kept else nullcontext(), WriteWatch() as watch:
        torch.zeros(size // 2, dtype=torch.uint8).fill_(1)  # given up before the next
        torch.zeros(size, dtype=torch.uint8).fill_(1)
        torch.zeros(size, dtype=torch.uint8).fill_(1)
    assert 0.95 * size <= watch.peak_bytes < 1.25 * size


def test_what_ops_do_not_explain_is_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    a, clock = torch.ones(64, 64), [0.0]

    def ticking() -> float:
        clock[0] += 1.0  # a second passes whenever somebody looks
        return clock[0]

    monkeypatch.setattr(watch_module, "clock_of", lambda number: ticking)

    def call() -> None:
        torch.mm(a, a)
        torch.mm(a, a)
        clock[0] += 7.0

    # Both products take a second; between them, before and after them one more each, and the seven.
    product = {"aten.mm": "product"}
    assert stage_ms(call, 1e6, product) == {"product": 2000.0, REST: 10_000.0}
    assert stage_ms(call, 5000.0, product) == {"product": 2000.0, REST: 3000.0}
    assert stage_ms(call, 1000.0, product) == {"product": 2000.0, REST: 0.0}
    assert stage_ms(call, 1e6) == {REST: 8000.0}
