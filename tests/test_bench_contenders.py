"""Peers written with torch compute what they are named after, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvselect import KVCache, Selection, TokenSelect, decode_step, reference
from kvselect.bench.contenders import (
    TORCH_DENSE,
    DisagreementError,
    TorchTokenSelect,
    attention_over,
    dense_attention,
    require_agreement,
)
from kvselect.bench.layer import Shape, StructuredLayer
from kvselect.testing import TOLERANCE, make_qkv, rel_err

FLOAT32 = TOLERANCE[torch.float32]


def filled(
    num_tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, KVCache, Tensor, Tensor]:
    q, k, v = make_qkv(1, 1, num_tokens, 8, 2, 64, dtype=dtype)
    cache = KVCache(1, 2, 64, dtype=dtype, capacity=num_tokens, sketch=None)
    cache.append(k, v)
    return q, cache, cache.k.transpose(1, 2), cache.v.transpose(1, 2)


@pytest.mark.parametrize("name", TORCH_DENSE)
@pytest.mark.parametrize("num_tokens", [1, 127, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_forms_agree_with_float64(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    q, cache, k, v = filled(num_tokens, dtype)
    expected, _ = reference.sparse_attention(q, cache)
    out = dense_attention(name, q, k, v).reshape(expected.shape)
    assert rel_err(out, expected) <= (FLOAT32 if dtype == torch.float32 else 3.2e-2)


def test_attention_over_a_list_agrees_with_float64() -> None:
    q, cache, k, v = filled(200)
    indices = torch.full((1, 2, 64), -1, dtype=torch.int32)
    indices[0, 0, :3] = torch.tensor([1, 7, 199])
    indices[0, 1, :50] = torch.arange(0, 200, 4)
    selection = Selection(indices, torch.tensor([[3, 50]], dtype=torch.int32))
    for chosen in (selection, None):
        expected, _ = reference.sparse_attention(q, cache, chosen)
        assert rel_err(attention_over(q, k, v, chosen).view(expected.shape), expected) <= FLOAT32


@pytest.mark.parametrize(("sinks", "recent", "topk"), [(4, 16, 32), (0, 1, 1), (7, 33, 100)])
def test_token_select_as_torch_ops_is_token_select(sinks: int, recent: int, topk: int) -> None:
    q, cache, k, v = filled(301)
    peer = TorchTokenSelect(k, v, sinks, recent)
    policy = TokenSelect(
        topk=topk,
        num_sink_tokens=sinks,
        num_recent_tokens=recent,
        sketch=None,
        overselect=1.0,
        dense_below_tokens=0,
    )
    out, info = decode_step(q, cache, policy, policy.new_state(cache))
    selection, count = peer.selection(q, topk), sinks + recent + topk
    assert info.selection is not None
    assert torch.equal(selection.topk_length, info.selection.topk_length)
    assert torch.equal(selection.indices[..., :count], info.selection.indices[..., :count])
    assert rel_err(peer.step(q, topk).view(out.shape), out) <= 2 * FLOAT32


def test_who_is_off_is_named() -> None:
    require_agreement("peer", 8, 1e-3, 1e-3)
    message = r"peer, 8 tokens: got an output 2.0e-03 from float32, allowed: 1.0e-03; nothing was"
    with pytest.raises(DisagreementError, match=message):
        require_agreement("peer", 8, 2e-3, 1e-3)
    with pytest.raises(DisagreementError):
        require_agreement("peer", 8, float("nan"), 1.0)


# ---- the layer


SHAPE = Shape(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="float32")


def test_a_layer_is_the_same_for_every_cache_and_every_time() -> None:
    caches = [SHAPE.new_cache(2500, sketch) for sketch in ("int4", None)]
    layer = StructuredLayer(SHAPE, seed=3)
    layer.fill(caches, 2500)
    q, unrotated = layer.query(layer.draw_query(), caches[0])
    assert torch.equal(caches[0].k, caches[1].k) and torch.equal(caches[0].v, caches[1].v)
    again, cache = StructuredLayer(SHAPE, seed=3), SHAPE.new_cache(2500, None)
    again.fill([cache], 2500)
    assert torch.equal(cache.k, caches[0].k)
    assert torch.equal(again.query(again.draw_query(), cache)[0], q)
    assert rel_err(q.norm(dim=-1), unrotated.norm(dim=-1)) <= 1e-6 and not torch.equal(q, unrotated)


def test_logits_and_signal_have_the_statistics_promised() -> None:
    layer, cache = StructuredLayer(SHAPE), SHAPE.new_cache(4096, None)
    layer.fill([cache], 4096)
    q, _ = layer.query(layer.draw_query(), cache)
    logits = torch.einsum("ghd,tgd->ght", q.view(2, 4, 64), cache.k[0]) * 64**-0.5
    assert logits.std(-1).allclose(torch.tensor(2.2), rtol=1e-3)
    signal = layer._next_signal(5000)
    assert signal.shape == (5000, 2, 16)
    variance = signal.square().mean()
    correlation = (signal[1:] * signal[:-1]).mean() / variance
    assert 0.8 < variance < 1.2 and 0.96 < correlation < 0.99
    later = layer.query(layer.draw_query(), cache)[0]  # another draw, the same scale
    assert not torch.equal(later, q)


def test_rotation_is_that_of_the_shared_tables() -> None:
    from kvselect.bench.layer import rotated
    from kvselect.testing import rope_tables

    cos, sin = rope_tables(50, 32)
    x = torch.randn(50, 2, 64)
    a, b = x.chunk(2, -1)
    expected = torch.cat(
        [a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], -1
    )
    assert rel_err(rotated(x, torch.arange(50)[:, None]), expected) <= 1e-6


@pytest.mark.parametrize("white", [False, True])
def test_drifting_queries_keep_their_cosine_and_length(white: bool) -> None:
    layer = StructuredLayer(Shape(num_q_heads=64, num_kv_heads=8, head_dim=128))
    first = layer.draw_query()
    q, cosines = first, []
    for _ in range(20):
        drifted = layer.drifted(q, 0.95, white=white)
        cosines.append(float(torch.cosine_similarity(q, drifted).mean()))
        q = drifted
    assert abs(sum(cosines) / len(cosines) - 0.95) < 0.01
    assert 0.85 < float(q.norm(dim=-1).mean() / first.norm(dim=-1).mean()) < 1.15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_q_heads": 3, "num_kv_heads": 2}, "q-heads: got 3, allowed: a multiple of kv-heads"),
        ({"num_q_heads": 0}, "q-heads: got 0, allowed: an int >= 1"),
        ({"head_dim": 100}, "head-dim: got 100, allowed: 32 or 64"),
        ({"dtype": "float64"}, "dtype: got 'float64', allowed: 'float32' or"),
    ],
)
def test_shapes_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(**settings)  # type: ignore[arg-type]


def test_sizes_of_a_shape_are_those_of_its_cache() -> None:
    for sketch in ("int4", "int8", None):
        cache = SHAPE.new_cache(1024, sketch)
        assert SHAPE.cache_bytes(1024, sketch) == cache.nbytes
    assert str(SHAPE) == "8/2 heads of 64, float32"
