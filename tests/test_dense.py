"""Dense: our own attention over everything, what all other policies are measured against."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvselect import Dense, KVCache, decode_step, prefill, reference
from kvselect.testing import TOLERANCE, make_qkv, rel_err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seqlen_q", [1, 5, 97])
@pytest.mark.parametrize("page_block_size", [None, 16])
def test_equals_sdpa(seqlen_q: int, dtype: torch.dtype, page_block_size: int | None) -> None:
    q, k, v = make_qkv(2, seqlen_q, 97, 8, 2, 64, dtype=dtype)
    cache = KVCache(2, 2, 64, dtype=dtype, page_block_size=page_block_size)
    cache.append(k, v)
    policy = Dense()
    out, lse = prefill(q, cache, policy, policy.new_state(cache))
    mask = torch.ones(seqlen_q, 97, dtype=torch.bool).tril(97 - seqlen_q)
    arranged = [x.double().transpose(1, 2) for x in (q, k, v)]
    expected = scaled_dot_product_attention(*arranged, attn_mask=mask, enable_gqa=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert rel_err(out, expected.transpose(1, 2)) <= TOLERANCE[dtype]


def test_ragged_rows_and_padding() -> None:
    q, k, v = make_qkv(3, 1, 50, 4, 2, 32)
    cache = KVCache(3, 2, 32)
    cache.set_starts([0, 20, 0])
    cache.append(k, v, [50, 45, 0])
    policy = Dense()
    state = policy.new_state(cache)
    out, info = decode_step(q, cache, policy, state)
    expected, lse = reference.sparse_attention(q, cache)
    assert rel_err(out, expected) <= 2e-6 and rel_err(info.lse, lse) <= 2e-6
    assert not out[2].any() and (info.lse[2] == -torch.inf).all()
    assert info.selection is None
    assert state.decode.tokens_attended == state.decode.tokens_visible == (50 + 25) * 2


def test_softmax_scale_is_applied_once() -> None:
    q, k, v = make_qkv(1, 1, 50, 4, 2, 32)
    cache = KVCache(1, 2, 32)
    cache.append(k, v)
    policy = Dense()
    out, _ = decode_step(q, cache, policy, policy.new_state(cache), softmax_scale=0.3)
    assert rel_err(out, reference.sparse_attention(q, cache, softmax_scale=0.3)[0]) <= 2e-6


def test_needs_no_sketch_and_no_lists() -> None:
    policy = Dense()
    assert policy.required_sketch is None and policy.capacity == 0
    assert policy.positions == "original" and policy.dense_layers == ()
    assert policy.revocable and policy.query_aware and not policy.persistent
