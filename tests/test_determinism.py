"""Same inputs, same bits: run twice, and with one thread and with two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from op_calls import attend, int32, make_case, mass, score, select
from torch import Tensor

from kvselect import ops
from kvselect.reference import QueryBlocks
from kvselect.testing import make_qkv

pytestmark = pytest.mark.usefixtures("cpu_implementation")

SEQLENS = int32(1000, 0, 257, 640)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bits(call: Callable[[], tuple[Tensor, ...]]) -> None:
    with threads(1):
        first, second = call(), call()
    with threads(2):
        parallel = call()
    for results in (second, parallel):
        for got, expected in zip(results, first, strict=True):
            assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("sketch", [None, "int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_and_select(sketch: str | None, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(4, 3, 1000, 8, 2, 64, dtype=dtype)
    case = make_case(k, v, SEQLENS, sketch=sketch)
    blocks = QueryBlocks(
        cache_seqlens=SEQLENS, seqlen_q=1, num_sink_tokens=16, num_recent_tokens=128
    )

    def call() -> tuple[Tensor, ...]:
        scored = score(case, q[:, None].float(), blocks, sketch=sketch is not None)
        lists = select(scored[0], blocks, keep=200, width=400)
        return *scored, *lists

    assert_same_bits(call)


@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_mass(seqlen_q: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(4, seqlen_q, 1000, 8, 2, 64, dtype=dtype)
    case = make_case(k, v, SEQLENS)
    blocks = QueryBlocks(
        cache_seqlens=SEQLENS,
        seqlen_q=seqlen_q,
        window_rule="block_start",
        num_sink_tokens=16,
        num_recent_tokens=60,
    )
    scores = torch.rand(4, 1, 2, 1000, generator=torch.Generator().manual_seed(0))
    indices, lengths, _ = select(scores, blocks, keep=300, width=500)

    def call() -> tuple[Tensor, ...]:
        listed = attend(case, q, indices, lengths)
        return *listed, *attend(case, q), mass(case, q, indices, lengths)

    assert_same_bits(call)


def test_append() -> None:
    _, k, v = make_qkv(4, 1, 300, 2, 2, 64)

    def call() -> tuple[Tensor, ...]:
        k_cache, v_cache = torch.zeros(2, 4, 384, 2, 64)
        sketch = torch.zeros(4, 2, 3, 4 * 64 + 64 * 64, dtype=torch.uint8)
        lengths = torch.zeros(4, dtype=torch.int32)
        bad = torch.zeros(4, 2, dtype=torch.int64)
        torch.ops.kvselect.kv_append(
            k, v, int32(300, 0, 128, 5), k_cache, v_cache, None, lengths, sketch, "int4", bad
        )
        return k_cache, v_cache, sketch, lengths, bad

    assert_same_bits(call)


def test_merge_splits() -> None:
    generator = torch.Generator().manual_seed(1)
    out = torch.randn(5, 4, 8, 64, generator=generator)
    lse = torch.randn(5, 4, 8, generator=generator)
    assert_same_bits(lambda: torch.ops.kvselect.merge_splits(out, lse))


def test_a_row_does_not_depend_on_its_batch(cpu_implementation: str) -> None:
    """Batched equals one by one, to the bit: scores, lists and attention of every row."""
    assert ops.cpu_implementation() == cpu_implementation
    q, k, v = make_qkv(4, 1, 1000, 8, 2, 64, dtype=torch.bfloat16)

    def step(rows: slice) -> tuple[Tensor, ...]:
        seqlens = SEQLENS[rows]
        case = make_case(k[rows], v[rows], seqlens, sketch="int4")
        blocks = QueryBlocks(
            cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=16, num_recent_tokens=128
        )
        scored = score(case, q[rows, None].float(), blocks, sketch=True, max_seqlen_k=1000)
        indices, lengths, _ = select(scored[0], blocks, keep=200, width=400)
        return *scored, indices, *attend(case, q[rows], indices, lengths)

    together = step(slice(0, 4))
    for row in range(4):
        for alone, among in zip(step(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone[0], among[row])
