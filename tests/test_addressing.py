"""Addresses beyond 2^31 elements: products of pages, tokens and strides that int32 cannot hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_calls import attend, int32, make_case, mass, score, select
from torch import Tensor

from kvselect.reference import QueryBlocks
from kvselect.testing import StoredKV, make_qkv

pytestmark = pytest.mark.usefixtures("implementation")

FAR = 2**31  # elements; the memory between is reserved by the system but never touched


def far_views(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Two bfloat16 views over one untouched buffer, a little apart."""
    try:
        buffer = torch.empty(FAR + 2**16, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this system does not reserve 4 GiB of memory that is never touched")
    return buffer.as_strided(shape, strides), buffer.as_strided(shape, strides, 2**15)


@pytest.mark.parametrize("form", ["row", "page", "token", "head"])
def test_far_apart_equals_side_by_side(form: str) -> None:
    seqlens = int32(3, 2) if form in ("row", "page") else int32(3)
    batch = len(seqlens)
    q, k, v = make_qkv(batch, 1, 3, 4, 2, 64, dtype=torch.bfloat16)
    near = make_case(k, v, seqlens)
    strides = {
        "row": (FAR, 128, 64, 1),
        "page": (FAR, 128, 64, 1),
        "token": (1, FAR // 2, 64, 1),
        "head": (1, 64, FAR, 1),
    }[form]
    table = int32(1, 0).view(2, 1) if form == "page" else None
    far_k, far_v = far_views((batch, 3, 2, 64), strides)
    lengths, bad = torch.zeros_like(seqlens), torch.zeros(batch, 2, dtype=torch.int64)
    torch.ops.kvselect.kv_append(k, v, seqlens, far_k, far_v, table, lengths, None, "none", bad)
    far = make_case(k, v, seqlens)
    far.stored = StoredKV(far_k, far_v, table)

    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    indices, counts, _ = select(score(near, q[:, None].float(), blocks)[0], blocks, keep=2)
    calls: list[Callable[[object], tuple[Tensor, ...]]] = [
        lambda case: score(case, q[:, None].float(), blocks),
        lambda case: attend(case, q),
        lambda case: attend(case, q, indices, counts),
        lambda case: (mass(case, q, indices, counts),),
    ]
    for call in calls:
        for got, expected in zip(call(far), call(near), strict=True):
            assert torch.equal(got, expected)
