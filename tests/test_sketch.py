"""The codec: what a block's record says, bit by bit, and how far a key may move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvselect import KVCache
from kvselect.checks import HEAD_DIMS
from kvselect.reference import encode_block
from kvselect.sketch import BLOCK_TOKENS, block_bytes, bytes_per_token, decode, encode

FORMATS = ["int4", "int8"]
LEVELS = {"int4": 15, "int8": 255}


def keys(head_dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-3, 2, head_dim)  # channels of very different ranges
    return torch.randn(BLOCK_TOKENS, head_dim, generator=generator) * spread


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("sketch", FORMATS)
def test_keys_move_by_half_a_step_at_most(sketch: str, head_dim: int) -> None:
    k = keys(head_dim)
    decoded = decode(encode(k, sketch), sketch, head_dim)
    low, high = k.aminmax(dim=0)
    step = (high - low) / LEVELS[sketch]
    # Half a step, and what rounding step and lo to float16 adds at the far end of the range.
    slack = 2.0**-10 * (low.abs().maximum(high.abs()) + (high - low))
    assert ((decoded - k).abs() <= 0.5 * step + slack).all()


@pytest.mark.parametrize("sketch", FORMATS)
def test_both_ends_of_the_range_are_levels(sketch: str) -> None:
    k = torch.zeros(BLOCK_TOKENS, 32)
    k[5], k[77] = -1.5, 2.25 + 15 * 255 / 4096  # a range that float16 holds exactly in both formats
    decoded = decode(encode(k, sketch), sketch, 32)
    assert torch.allclose(decoded[5], k[5], atol=1e-3)
    assert torch.allclose(decoded[77], k[77], rtol=1e-3)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(FORMATS), st.sampled_from(HEAD_DIMS), st.integers(0, 2**31))
def test_reference_and_kernel_write_the_same_bits(sketch: str, head_dim: int, seed: int) -> None:
    k = keys(head_dim, seed)
    record = encode(k, sketch)
    assert record.dtype == torch.uint8 and record.shape == (block_bytes(sketch, head_dim),)
    assert torch.equal(record, encode_block(k, sketch))
    cache = KVCache(1, 1, head_dim, sketch=sketch)
    cache.append(k[None, :, None], k[None, :, None])
    assert cache.sketch_data is not None
    assert torch.equal(cache.sketch_data[0, 0, 0], record)


@pytest.mark.parametrize("sketch", FORMATS)
def test_leading_dims_are_blocks(sketch: str) -> None:
    blocks = torch.stack([keys(64, seed) for seed in range(6)]).view(2, 3, BLOCK_TOKENS, 64)
    records = encode(blocks, sketch)
    assert records.shape == (2, 3, block_bytes(sketch, 64))
    assert torch.equal(records[1, 2], encode(blocks[1, 2], sketch))
    assert torch.equal(decode(records, sketch, 64)[1, 0], decode(records[1, 0], sketch, 64))


@pytest.mark.parametrize("sketch", FORMATS)
def test_equal_keys_give_code_0(sketch: str) -> None:
    record = encode(torch.full((BLOCK_TOKENS, 32), 0.5), sketch)
    assert not record[4 * 32 :].any()
    assert torch.equal(decode(record, sketch, 32), torch.full((BLOCK_TOKENS, 32), 0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e8, -1e8])
@pytest.mark.parametrize("sketch", FORMATS)
def test_blocks_that_float16_cannot_hold_have_no_codes(sketch: str, value: float) -> None:
    k = keys(32)
    k[100, 7] = value
    record = encode(k, sketch)
    assert record[:2].view(torch.float16).isnan().all() and not record[2:].any()
    assert torch.equal(record, encode_block(k, sketch))
    assert decode(record, sketch, 32).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_keys_are_widened_first(dtype: torch.dtype) -> None:
    k = keys(64).to(dtype)
    assert torch.equal(encode(k, "int4"), encode(k.float(), "int4"))


def test_sizes() -> None:
    assert block_bytes("int4", 128) == 128 * 68 and bytes_per_token("int4", 128) == 68.0
    assert block_bytes("int8", 128) == 128 * 132 and block_bytes(None, 128) == 0


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="sketch: got 'int2', allowed: 'int4' or 'int8'"):
        encode(keys(32), "int2")
    with pytest.raises(ValueError, match=r"keys: got shape \(127, 32\), allowed: \[128, any\]"):
        encode(keys(32)[:127], "int4")
    with pytest.raises(ValueError, match="head_dim: got 40, allowed: 32 or 64"):
        encode(torch.zeros(BLOCK_TOKENS, 40), "int4")
    with pytest.raises(TypeError, match=r"keys: got torch.float64"):
        encode(keys(32).double(), "int4")
    with pytest.raises(ValueError, match=r"records: got shape \(5,\)"):
        decode(torch.zeros(5, dtype=torch.uint8), "int4", 32)
    with pytest.raises(ValueError, match="sketch: got 'fp4', allowed: 'int4' or 'int8' or None"):
        block_bytes("fp4", 32)
