"""block_sparse_attention against the float64 reference, and what must hold for any mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_inputs import as_csr, as_lists, random_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_calls import int32
from torch import Tensor

import kvselect
from kvselect import block_sparse_attention, ops, reference
from kvselect.block_sparse import BLOCK_SIZES
from kvselect.testing import TOLERANCE, make_qkv, non_contiguous, rel_err

pytestmark = pytest.mark.usefixtures("implementation")
PROPERTY = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Blocks of bfloat16 may go another way than those of other dtypes (a tile unit).
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ONE = pytest.mark.parametrize("implementation", ["scalar"], indirect=True)


def grid(q: Tensor, k: Tensor, q_block_size: int, kv_block_size: int) -> tuple[int, int, int, int]:
    batch, seqlen_q, num_q_heads, _ = q.shape
    return batch, num_q_heads, -(-seqlen_q // q_block_size), -(-k.shape[1] // kv_block_size)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = block_sparse_attention(q, k, v, mask, **options)
    expected_out, expected_lse = reference.block_sparse_attention(q, k, v, mask, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert rel_err(out, expected_out) <= TOLERANCE[q.dtype]
    assert rel_err(lse, expected_lse) <= TOLERANCE[torch.float32]
    empty = expected_lse == -torch.inf
    assert (lse[empty] == -torch.inf).all() and (out[empty] == 0).all()
    return out, lse


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_block_size, kv_block_size", [(16, 128), (128, 16), (64, 64), (32, 32)])
def test_equals_reference(
    dtype: torch.dtype, causal: bool, q_block_size: int, kv_block_size: int
) -> None:
    q, k, v = make_qkv(2, 131, 201, 4, 2, 64, dtype=dtype)
    mask = random_mask(grid(q, k, q_block_size, kv_block_size))
    blocks = {"q_block_size": q_block_size, "kv_block_size": kv_block_size}
    check(q, k, v, mask, causal=causal, **blocks)


@BOTH
@pytest.mark.parametrize("group_size", [1, 4, 7, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_groups_and_head_dims(group_size: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, 33, 70, 2 * group_size, 2, head_dim, dtype=dtype)
    check(q, k, v, random_mask(grid(q, k, 16, 16)), q_block_size=16, kv_block_size=16)


@BOTH
@pytest.mark.parametrize("seqlen_q", [1, 15, 16, 17, 127, 128, 129])
@pytest.mark.parametrize("seqlen_k", [1, 63, 64, 65, 130, 257])
def test_ends_that_are_no_multiple_of_a_block(
    seqlen_q: int, seqlen_k: int, dtype: torch.dtype
) -> None:
    q, k, v = make_qkv(1, seqlen_q, seqlen_k, 2, 1, 32, dtype=dtype)
    for causal in (True, False):
        check(q, k, v, random_mask(grid(q, k, 128, 64)), kv_block_size=64, causal=causal)


@BOTH
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_rows_read_nothing_behind_their_ends(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(5, 50, 90, 2, 1, 64, dtype=dtype)
    seqlens_q, seqlens_k = int32(50, 49, 1, 0, 33), int32(90, 17, 64, 30, 0)
    for row in range(5):
        q[row, seqlens_q[row] :] = torch.nan
        k[row, seqlens_k[row] :] = v[row, seqlens_k[row] :] = torch.nan
    mask = random_mask(grid(q, k, 32, 16), density=0.7)
    blocks = {"q_block_size": 32, "kv_block_size": 16, "causal": causal}
    out, lse = check(q, k, v, mask, seqlens_q=seqlens_q, cache_seqlens=seqlens_k, **blocks)
    assert (out[3:] == 0).all() and (lse[3:] == -torch.inf).all()


@BOTH
def test_forms_of_a_mask_have_the_same_bits(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 100, 300, 4, 2, 64, dtype=dtype)
    mask = random_mask(grid(q, k, 32, 32))
    blocks = {"q_block_size": 32, "kv_block_size": 32}
    expected = check(q, k, v, mask, **blocks)
    offsets, indices = as_csr(mask)
    forms: list[Any] = [
        as_lists(mask),
        as_lists(mask, seed=1),
        (offsets, indices),
        [offsets.int(), indices],
        mask.transpose(1, 3).contiguous().transpose(1, 3),
    ]
    for form in forms:
        check(q, k, v, form, **blocks)
        for x, y in zip(block_sparse_attention(q, k, v, form, **blocks), expected, strict=True):
            assert torch.equal(x, y)


def test_shared_masks() -> None:
    q, k, v = make_qkv(2, 40, 100, 4, 2, 32)
    blocks = {"q_block_size": 16, "kv_block_size": 32}
    for shape in ((1, 4, 3, 4), (2, 1, 3, 4), (1, 1, 3, 4), (4, 3, 4), (1, 3, 4)):
        mask = random_mask(shape)
        for form in (mask, as_lists(mask)):
            check(q, k, v, form, **blocks)


def test_strides() -> None:
    q, k, v = make_qkv(2, 40, 70, 4, 2, 64)
    mask = random_mask(grid(q, k, 16, 16))
    expected = block_sparse_attention(q, k, v, mask, q_block_size=16, kv_block_size=16)
    head_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for inputs in (head_major, [non_contiguous(x) for x in (q, k, v)]):
        got = block_sparse_attention(*inputs, mask, q_block_size=16, kv_block_size=16)
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x, y) and x.is_contiguous()


@BOTH
def test_scale_and_softcap(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, 40, 70, 2, 1, 64, dtype=dtype)
    mask = random_mask(grid(q, k, 16, 16))
    blocks = {"q_block_size": 16, "kv_block_size": 16}
    check(q, k, v, mask, softmax_scale=0.3, **blocks)
    check(q, k, v, mask, softcap=2.0, **blocks)


@pytest.mark.parametrize("sizes", [(0, 10, 10), (1, 0, 10), (1, 10, 0)])
def test_nothing_to_do(sizes: tuple[int, int, int]) -> None:
    q, k, v = make_qkv(*sizes, 2, 1, 32)
    out, lse = block_sparse_attention(q, k, v, torch.ones(grid(q, k, 128, 128)).bool())
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()


def test_no_indices_at_all() -> None:
    q, k, v = make_qkv(1, 10, 20, 2, 1, 32)
    for mask in (torch.zeros(1, 2, 1, 0, dtype=torch.int32), (torch.zeros(3).long(), int32())):
        out, lse = block_sparse_attention(q, k, v, mask)
        assert (out == 0).all() and (lse == -torch.inf).all()


@BOTH
def test_nan_in_masked_blocks_has_no_effect(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, 64, 128, 2, 1, 64, dtype=dtype)
    mask = random_mask((1, 1, 4, 8)).expand(1, 2, 4, 8).clone()
    mask[:, :, :, [2, 5]] = False
    blocks = {"q_block_size": 16, "kv_block_size": 16}
    expected = block_sparse_attention(q, k, v, mask, **blocks)
    for bad in (torch.nan, torch.inf):
        k[:, 32:48] = v[:, 80:96] = bad
        for x, y in zip(block_sparse_attention(q, k, v, mask, **blocks), expected, strict=True):
            assert torch.equal(x, y)


@BOTH
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_shows_to_those_who_see_it_and_nobody_else(
    where: str, bad: float, dtype: torch.dtype
) -> None:
    q, k, v = make_qkv(1, 64, 64, 2, 1, 64, dtype=dtype)
    mask = torch.ones(1, 2, 1, 1, dtype=torch.bool)
    expected = block_sparse_attention(q, k, v, mask)
    (k if where == "k" else v)[:, 37] = bad
    out, _ = block_sparse_attention(q, k, v, mask)
    assert rel_err(out[:, :37], expected[0][:, :37]) <= TOLERANCE[dtype]
    # An infinite key may be infinitely unlikely; as a NaN it shows.
    assert bad == torch.inf or not out[:, 37:].isfinite().any(-1).any() or where == "v"
    assert where == "k" or not out[:, 37:].isfinite().any()


@BOTH
def test_all_logits_not_a_number(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, 20, 40, 1, 1, 32, dtype=dtype)
    out, lse = block_sparse_attention(q, k * torch.nan, v, torch.ones(1, 1, 1, 1).bool())
    assert out.isnan().all() and lse.isnan().all()


@PROPERTY
@given(
    seqlen_q=st.integers(1, 150),
    seqlen_k=st.integers(1, 200),
    q_block_size=st.sampled_from(BLOCK_SIZES),
    kv_block_size=st.sampled_from(BLOCK_SIZES),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_properties_of_masks(
    seqlen_q: int, seqlen_k: int, q_block_size: int, kv_block_size: int, causal: bool, seed: int
) -> None:
    """A full mask is dense attention; two halves of a mask merge to the whole."""
    q, k, v = make_qkv(1, seqlen_q, seqlen_k, 4, 2, 32, seed=seed)
    blocks: dict[str, Any] = {
        "q_block_size": q_block_size,
        "kv_block_size": kv_block_size,
        "causal": causal,
    }
    shape = grid(q, k, q_block_size, kv_block_size)
    out, lse = block_sparse_attention(q, k, v, torch.ones(shape, dtype=torch.bool), **blocks)
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)
    heads = [x.transpose(1, 2).double() for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(
        *heads, attn_mask=seen if causal else None, enable_gqa=True
    ).nan_to_num(0.0)
    assert rel_err(out, dense.transpose(1, 2)) <= TOLERANCE[torch.float32]

    whole = random_mask(shape, density=0.8, seed=seed)
    half = random_mask(shape, seed=seed + 1)
    parts = [block_sparse_attention(q, k, v, whole & m, **blocks) for m in (half, ~half)]
    out, lse = block_sparse_attention(q, k, v, whole, **blocks)
    merged = kvselect.merge_splits(*(torch.stack(list(x)) for x in zip(*parts, strict=True)))
    assert rel_err(merged[0], out) <= 2 * TOLERANCE[torch.float32]  # two float32 results
    assert rel_err(merged[1], lse) <= 2 * TOLERANCE[torch.float32]


def test_blocks_of_the_future_do_not_matter() -> None:
    q, k, v = make_qkv(1, 100, 100, 2, 1, 32)
    mask = random_mask((1, 2, 4, 7))
    future = torch.arange(7) * 16 >= (torch.arange(4)[:, None] + 1) * 32
    blocks = {"q_block_size": 32, "kv_block_size": 16}
    for x, y in zip(
        block_sparse_attention(q, k, v, mask | future, **blocks),
        block_sparse_attention(q, k, v, mask & ~future, **blocks),
        strict=True,
    ):
        assert torch.equal(x, y)


def test_same_bits_twice_and_for_any_number_of_threads() -> None:
    q, k, v = make_qkv(2, 200, 300, 4, 2, 64, dtype=torch.bfloat16)
    mask = random_mask(grid(q, k, 64, 64))
    expected = block_sparse_attention(q, k, v, mask, q_block_size=64, kv_block_size=64)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            got = block_sparse_attention(q, k, v, mask, q_block_size=64, kv_block_size=64)
            for x, y in zip(got, expected, strict=True):
                assert torch.equal(x, y)
    finally:
        torch.set_num_threads(1)


def valid() -> dict[str, Any]:
    q, k, v = make_qkv(2, 20, 40, 4, 2, 32)
    mask = torch.ones(2, 4, 2, 3, dtype=torch.bool)
    return {"q": q, "k": k, "v": v, "block_mask": mask, "q_block_size": 16, "kv_block_size": 16}


def csr(first: int = 0, last: int = 2, block: int = 1, length: int = 17) -> Any:
    offsets = torch.zeros(length, dtype=torch.int64)
    offsets[0], offsets[-1] = first, last
    return offsets, int32(0, block)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": 1}, TypeError, "q: got int 1, allowed: a torch.Tensor"),
    ({"q": torch.zeros(2, 20, 4)}, ValueError, r"q: got shape \(2, 20, 4\)"),
    ({"q": torch.zeros(2, 20, 3, 32)}, ValueError, "num_q_heads: got 3, allowed: a multiple of"),
    ({"q": torch.zeros(2, 20, 4, 33)}, ValueError, "head_dim: got 33, allowed: 32, 64, 80, 96"),
    ({"q": torch.zeros(2, 20, 4, 32).double()}, TypeError, "q: got torch.float64, allowed"),
    ({"q": torch.zeros(2, 20, 32, 4).mT}, ValueError, "q: got a last dim of stride 4"),
    ({"q": torch.zeros(2, 20, 4, 32, requires_grad=True)}, ValueError, "q: got 'a tensor that req"),
    ({"v": torch.zeros(2, 40, 2, 32, requires_grad=True)}, ValueError, "v: got 'a tensor that req"),
    ({"k": torch.zeros(2, 40, 2, 64)}, ValueError, r"k: got shape \(2, 40, 2, 64\), allowed"),
    ({"k": torch.zeros(2, 40, 2, 32).half()}, TypeError, "k: got torch.float16, allowed: torch.f"),
    ({"k": torch.zeros(2, 40, 0, 32)}, ValueError, "num_kv_heads: got 0, allowed: an int >= 1"),
    ({"v": torch.zeros(2, 39, 2, 32)}, ValueError, r"v: got shape \(2, 39, 2, 32\), allowed"),
    ({"v": torch.zeros(2, 40, 2, 32).half()}, TypeError, "v: got torch.float16, allowed"),
    ({"v": torch.zeros(2, 40, 2, 32, device="meta")}, ValueError, "v: got device meta, allowed"),
    ({"q_block_size": 24}, ValueError, "q_block_size: got 24, allowed: 16, 32, 64, 128"),
    ({"kv_block_size": 256}, ValueError, "kv_block_size: got 256, allowed: 16, 32, 64, 128"),
    ({"kv_block_size": 16.0}, TypeError, "kv_block_size: got float 16.0, allowed: 16, 32, 64"),
    ({"causal": 1}, TypeError, "causal: got int 1, allowed: True or False"),
    ({"softmax_scale": 0.0}, ValueError, "softmax_scale: got 0.0"),
    ({"softcap": -1.0}, ValueError, "softcap: got -1.0, allowed: None or a float in"),
    ({"seqlens_q": int32(1)}, ValueError, r"seqlens_q: got shape \(1,\), allowed: \[2\]"),
    ({"seqlens_q": int32(1, 21)}, ValueError, r"seqlens_q: got 21 in row 1, allowed: 0\.\.20"),
    ({"cache_seqlens": torch.ones(2)}, TypeError, "cache_seqlens: got torch.float32"),
    ({"cache_seqlens": int32(-1, 4)}, ValueError, r"cache_seqlens: got -1 in row 0, allowed: 0\."),
    (
        {"block_mask": torch.ones(2, 4, 2, 4).bool()},
        ValueError,
        r"block_mask: got \(2, 4, 2, 4\), allowed: \[2 or 1, 4 or 1, 2, 3\], or without the first",
    ),
    ({"block_mask": torch.ones(2, 2, 2, 3).bool()}, ValueError, r"block_mask: got \(2, 2, 2, 3\)"),
    ({"block_mask": torch.ones(3).bool()}, ValueError, r"block_mask: got \(3,\), allowed: \[2 or"),
    ({"block_mask": torch.ones(4, 3, 2).int()}, ValueError, "block_mask: got .* 4 or 1, 2, 'k'|k"),
    ({"block_mask": torch.ones(2, 4, 2, 3)}, TypeError, "block_mask: got torch.float32, allowed"),
    ({"block_mask": "full"}, TypeError, "block_mask: got str, allowed: a torch.Tensor or"),
    (
        {"block_mask": torch.full((2, 4, 2, 1), 3, dtype=torch.int32)},
        ValueError,
        r"block_mask: got block 3, allowed: -1\.\.2 \(-1: none\)",
    ),
    (
        {"block_mask": torch.full((1, 2, 1), -2, dtype=torch.int32)},
        ValueError,
        r"block_mask: got block -2, allowed: -1\.\.2 \(-1: none\)",
    ),
    ({"implementation": 1}, TypeError, "implementation: got int 1, allowed: 'auto', 'sm90a'"),
    ({"implementation": "mma"}, ValueError, "implementation: got 'mma', allowed: 'auto', 'sm90a'"),
    (
        {"implementation": "sm90a"},
        ValueError,
        "implementation: got 'sm90a' with tensors on the CPU, allowed: 'auto'",
    ),
    ({"block_mask": (1, 2, 3)}, ValueError, r"block_mask: got 3, allowed: '?\(row_offsets, ind"),
    ({"block_mask": csr(length=16)}, ValueError, r"row_offsets: got shape \(16,\), allowed: \[17"),
    ({"block_mask": csr(last=3)}, ValueError, r"row_offsets: got 0\.\.3, allowed: 0\.\.2"),
    ({"block_mask": csr(first=1)}, ValueError, r"row_offsets: got 1\.\.2, allowed: 0\.\.2"),
    ({"block_mask": csr(block=3)}, ValueError, r"block_mask: got block 3, allowed: 0\.\.2"),
    ({"block_mask": csr(block=-1)}, ValueError, r"block_mask: got block -1, allowed: 0\.\.2"),
]


@ONE
@pytest.mark.parametrize("change, error, message", WRONG)
def test_error_messages(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        block_sparse_attention(**(valid() | change))


@ONE
def test_offsets_that_descend() -> None:
    offsets, indices = csr()
    offsets[3] = 2
    message = "row_offsets: got 0 after 2 at 4, allowed: offsets that do not descend"
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**(valid() | {"block_mask": (offsets, indices)}))


@ONE
def test_the_op_itself_checks() -> None:
    call = torch.ops.kvselect.block_sparse_attention
    args = [valid()[name] for name in ("q", "k", "v", "block_mask")]
    for sizes, message in (((24, 16), "q_block_size: got 24"), ((16, 0), "kv_block_size: got 0")):
        with pytest.raises(ValueError, match=f"{message}, allowed: 16, 32, 64, 128"):
            call(*args, None, None, None, *sizes, True, 1.0)


@ONE
def test_a_gpu_without_a_kernel_is_refused() -> None:
    refuse = ops._refusal("kvselect::block_sparse_attention", "this op has no CUDA kernel")
    with pytest.raises(ValueError, match="got CUDA tensors, allowed: tensors on the CPU"):
        refuse()
    dispatches = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ("block_sparse_attention", "block_mass"):
        assert dispatches(f"kvselect::{op}", "CUDA")  # a kernel, or the refusal
