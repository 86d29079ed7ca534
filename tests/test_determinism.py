"""Same inputs, same bits: run twice, on 1, 2, 3 and 7 threads, in a worker of a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from op_calls import attend, int32, make_case, mass, score, select
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kvselect import KVCache, TokenSelect, decode_step, ops
from kvselect.reference import QueryBlocks
from kvselect.testing import make_qkv

pytestmark = pytest.mark.usefixtures("implementation")

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
    others = [second]
    for count in (2, 3, 7):
        with threads(count):
            others.append(call())
    for results in others:
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


@pytest.mark.parametrize("sketch", [None, "int4", "int8"])
def test_one_long_row_is_cut_into_parts(sketch: str | None) -> None:
    """Three KV heads leave 2 and 7 threads idle: scores and attention are then cut along tokens."""
    seqlens = int32(13001)
    q, k, v = make_qkv(1, 1, 13001, 12, 3, 64, dtype=torch.bfloat16)
    case = make_case(k, v, seqlens, sketch=sketch)
    blocks = QueryBlocks(
        cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=16, num_recent_tokens=128
    )

    def call() -> tuple[Tensor, ...]:
        scored = score(case, q[:, None].float(), blocks, sketch=sketch is not None)
        indices, lengths, kept = select(scored[0], blocks, keep=2000, width=2400)
        return (*scored, indices, lengths, kept, *attend(case, q, indices, lengths))

    assert_same_bits(call)


class DecodeSteps(Dataset[tuple[Tensor, Tensor]]):
    """Item: the output of a decode step over its own cache, and the lists that it attended to."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        q, k, v = make_qkv(1, 1, 5000, 12, 3, 64, dtype=torch.bfloat16, seed=number)
        cache = KVCache(1, 3, 64, dtype=torch.bfloat16, capacity=5000)
        cache.append(k, v)
        policy = TokenSelect(topk=256, num_recent_tokens=128, dense_below_tokens=0)
        out, info = decode_step(q, cache, policy, policy.new_state(cache))
        assert info.selection is not None
        return out, info.selection.indices


def test_workers_of_a_data_loader() -> None:
    """Processes forked while this one has threads and memory of its own."""
    with threads(2):
        here = [DecodeSteps()[number] for number in range(4)]
        loader = DataLoader(
            DecodeSteps(), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
        there = list(loader)
    assert len(there) == 4
    for (out, indices), (expected, expected_indices) in zip(there, here, strict=True):
        assert torch.equal(out, expected)
        assert torch.equal(indices, expected_indices)


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


def test_a_row_does_not_depend_on_its_batch(implementation: str) -> None:
    """Batched equals one by one, to the bit: scores, lists and attention of every row."""
    assert implementation in (ops.cpu_implementation(), "cuda")
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
