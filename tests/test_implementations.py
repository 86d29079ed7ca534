"""CPU implementations that differ in the sketch's integer dot products alone give the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_calls import int32, make_case, score
from torch import Tensor

from kvselect import ops
from kvselect.reference import QueryBlocks
from kvselect.testing import make_qkv

SEQLENS = int32(1000, 0, 257, 640)
TWINS = {"avx2_vnni": "avx2", "amx": "avx512_bf16"}


@pytest.fixture(autouse=True)
def implementation_in_use() -> Iterator[None]:
    before = ops.cpu_implementation()
    yield
    ops.set_cpu_implementation(before)


@pytest.mark.parametrize("num_queries", [1, 5])  # 8 and 40 columns: half a tile, two and a half
@pytest.mark.parametrize("sketch", ["int4", "int8"])
@pytest.mark.parametrize("head_dim", [32, 80, 128, 256])
@pytest.mark.parametrize("name", TWINS)
def test_twins_differ_in_speed_only(
    name: str, head_dim: int, sketch: str, num_queries: int
) -> None:
    if name not in ops.cpu_implementations():
        pytest.skip(f"{name} does not run here (make cpp-test runs what it can of it)")
    q, k, v = make_qkv(4, num_queries, 1000, 16, 2, head_dim)
    case = make_case(k, v, SEQLENS, sketch=sketch)
    blocks = QueryBlocks(
        cache_seqlens=SEQLENS, seqlen_q=1, num_sink_tokens=16, num_recent_tokens=128
    )

    def call(implementation: str) -> tuple[Tensor, ...]:
        ops.set_cpu_implementation(implementation)
        return score(case, q[:, None], blocks, sketch=True)

    for got, expected in zip(call(name), call(TWINS[name]), strict=True):
        assert torch.equal(got, expected)
