"""block_mass against the float64 reference, and against attention over the same blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_inputs import random_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_calls import int32
from torch import Tensor

from kvselect import block_mass, block_sparse_attention, reference
from kvselect.block_sparse import BLOCK_SIZES
from kvselect.testing import TOLERANCE, make_qkv, rel_err

pytestmark = pytest.mark.usefixtures("implementation")
PROPERTY = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ONE = pytest.mark.parametrize("implementation", ["scalar"], indirect=True)


def check(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    mass, expected = block_mass(q, k, **options), reference.block_mass(q, k, **options)
    assert mass.dtype == torch.float32
    assert rel_err(mass, expected) <= TOLERANCE[torch.float32]
    return mass


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_block_size, kv_block_size", [(16, 128), (128, 16), (64, 64)])
@pytest.mark.parametrize("row_stride", [1, 8, 1000])
def test_equals_reference(
    dtype: torch.dtype, causal: bool, q_block_size: int, kv_block_size: int, row_stride: int
) -> None:
    q, k, _ = make_qkv(2, 70, 150, 4, 2, 64, dtype=dtype)
    blocks = {"q_block_size": q_block_size, "kv_block_size": kv_block_size}
    check(q, k, causal=causal, row_stride=row_stride, **blocks)


@pytest.mark.parametrize("group_size", [1, 4, 7, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_groups_and_head_dims(group_size: int, head_dim: int) -> None:
    q, k, _ = make_qkv(1, 20, 40, 2 * group_size, 2, head_dim)
    check(q, k, q_block_size=16, kv_block_size=16)


@pytest.mark.parametrize("row_stride", [1, 3])
def test_ragged(row_stride: int) -> None:
    q, k, _ = make_qkv(4, 50, 90, 2, 1, 32)
    seqlens_q, seqlens_k = int32(50, 17, 0, 33), int32(90, 40, 30, 0)
    for row in range(4):
        q[row, seqlens_q[row] :] = k[row, seqlens_k[row] :] = torch.nan
    lengths = {"seqlens_q": seqlens_q, "cache_seqlens": seqlens_k, "row_stride": row_stride}
    mass = check(q, k, q_block_size=16, kv_block_size=16, **lengths)
    assert (mass[2:] == 0).all()


@PROPERTY
@given(
    seqlen_q=st.integers(1, 140),
    seqlen_k=st.integers(1, 200),
    q_block_size=st.sampled_from(BLOCK_SIZES),
    kv_block_size=st.sampled_from(BLOCK_SIZES),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_masses_are_what_attention_over_the_blocks_gets(
    seqlen_q: int, seqlen_k: int, q_block_size: int, kv_block_size: int, causal: bool, seed: int
) -> None:
    q, k, v = make_qkv(1, seqlen_q, seqlen_k, 4, 2, 32, seed=seed)
    blocks: dict[str, Any] = {
        "q_block_size": q_block_size,
        "kv_block_size": kv_block_size,
        "causal": causal,
    }
    mass = block_mass(q, k, **blocks)
    _, lse = block_sparse_attention(q, k, v, torch.ones(mass.shape, dtype=torch.bool), **blocks)
    sees = (lse > -torch.inf).float().transpose(1, 2)  # [batch, num_q_heads, seqlen_q]
    pad = mass.shape[2] * q_block_size - seqlen_q
    counted = torch.nn.functional.pad(sees, (0, pad)).unflatten(2, (mass.shape[2], -1)).sum(-1)
    torch.testing.assert_close(mass.sum(-1), counted, rtol=1e-5, atol=1e-5)
    assert rel_err(block_mass(q, k, lse=lse, **blocks), mass) <= 4e-6  # two float32 normalisers

    kept = random_mask(tuple(mass.shape), seed=seed)
    _, part = block_sparse_attention(q, k, v, kept, **blocks)
    share = torch.where(lse > -torch.inf, (part - lse).exp(), 0.0).transpose(1, 2)
    share = torch.nn.functional.pad(share, (0, pad)).unflatten(2, (mass.shape[2], -1)).sum(-1)
    torch.testing.assert_close((mass * kept).sum(-1), share, rtol=1e-4, atol=1e-4)


def test_a_cached_lse_of_other_queries() -> None:
    q, k, _ = make_qkv(1, 64, 128, 4, 2, 64)
    lse = 3.0 + torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    lse[:, 5] = -torch.inf
    blocks = {"q_block_size": 16, "kv_block_size": 32}
    mass = check(q, k, lse=lse, **blocks)
    lower = block_mass(q, k, lse=lse - 1.0, **blocks)
    torch.testing.assert_close(lower, mass * torch.e)
    far = block_mass(q, k, lse=lse - 1e6, **blocks)
    assert (far == torch.where(mass > 0, torch.inf, 0.0)).all()


def test_scale_and_softcap() -> None:
    q, k, _ = make_qkv(1, 40, 70, 2, 1, 64)
    check(q, k, q_block_size=16, kv_block_size=16, softmax_scale=0.3, softcap=2.0)


def test_nan_shows() -> None:
    q, k, _ = make_qkv(1, 16, 64, 1, 1, 32)
    k[:, 20] = torch.nan
    mass = block_mass(q, k, q_block_size=16, kv_block_size=16)
    assert mass.isnan().all()  # the normaliser is not a number
    mass = block_mass(q, k, lse=torch.zeros(1, 16, 1), q_block_size=16, kv_block_size=16)
    assert mass[..., 1].isnan().all() and mass[..., [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 10, 10), (1, 0, 10), (1, 10, 0)])
def test_nothing_to_do(sizes: tuple[int, int, int]) -> None:
    q, k, _ = make_qkv(*sizes, 2, 1, 32)
    assert block_mass(q, k).numel() == 0


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.zeros(2, 3, 4)}, ValueError, r"q: got shape \(2, 3, 4\)"),
    ({"k": torch.zeros(1, 40, 2, 32).half()}, TypeError, "k: got torch.float16, allowed"),
    ({"k": torch.zeros(1, 40, 2, 32, device="meta")}, ValueError, "k: got device meta, allowed"),
    ({"lse": torch.zeros(1, 20, 3)}, ValueError, r"lse: got shape \(1, 20, 3\), allowed: \[1, 20"),
    ({"lse": torch.zeros(1, 20, 4).half()}, TypeError, "lse: got torch.float16, allowed"),
    ({"row_stride": 0}, ValueError, "row_stride: got 0, allowed: an int >= 1"),
    ({"row_stride": 1.5}, TypeError, "row_stride: got float 1.5, allowed: an int >= 1"),
    ({"q_block_size": 8}, ValueError, "q_block_size: got 8, allowed: 16, 32, 64, 128"),
    ({"kv_block_size": 48}, ValueError, "kv_block_size: got 48, allowed: 16, 32, 64, 128"),
    ({"cache_seqlens": int32(41)}, ValueError, r"cache_seqlens: got 41 in row 0, allowed: 0\.\.40"),
]


@ONE
@pytest.mark.parametrize("change, error, message", WRONG)
def test_error_messages(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, _ = make_qkv(1, 20, 40, 4, 2, 32)
    arguments: dict[str, Any] = {"q": q, "k": k}
    with pytest.raises(error, match=message):
        block_mass(**(arguments | change))


def test_the_largest_stride_counts_the_last_query_of_a_block() -> None:
    q, k, _ = make_qkv(1, 20, 40, 4, 2, 32)
    blocks = (None, None, None, 16, 16, True)
    want, got = (
        torch.ops.kvselect.block_mass(q, k, *blocks, stride, 1.0) for stride in (16, 2**63 - 1)
    )
    assert torch.equal(got, want)


@ONE
def test_the_op_itself_checks() -> None:
    q, k, _ = make_qkv(1, 20, 40, 4, 2, 32)
    with pytest.raises(ValueError, match="row_stride: got 0, allowed: an int >= 1"):
        torch.ops.kvselect.block_mass(q, k, None, None, None, 16, 16, True, 0, 1.0)
    with pytest.raises(ValueError, match="lse: got float64"):
        lse = torch.zeros(1, 20, 4).double()
        torch.ops.kvselect.block_mass(q, k, lse, None, None, 16, 16, True, 1, 1.0)
