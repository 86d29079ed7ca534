"""The functional layer on a KVCache, contiguous and paged, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import int32
from torch import Tensor

import kvselect
from kvselect import KVCache, Rope, Selection, reference
from kvselect.reference import BLOCK_TOKENS, DecodeState
from kvselect.testing import TOLERANCE, make_qkv, poison, rel_err, rope_tables

pytestmark = pytest.mark.usefixtures("implementation")

SEQLENS, STARTS = (300, 141, 17), (0, 130, 2)


def filled(
    seqlen_q: int = 1,
    *,
    sketch: str | None = None,
    page_block_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    starts: bool = True,
) -> tuple[Tensor, KVCache]:
    """Queries, and a cache of three ragged rows filled in two appends."""
    q, k, v = make_qkv(3, seqlen_q, 300, 8, 2, 64, dtype=dtype)
    cache = KVCache(3, 2, 64, dtype=dtype, sketch=sketch, page_block_size=page_block_size)
    cache.append(k[:, :200], v[:, :200], int32(200, 41, 17))
    cache.append(k[:, 200:], v[:, 200:], int32(100, 100, 0))
    assert cache.cache_seqlens.tolist() == list(SEQLENS)
    if starts:
        cache.set_starts(list(STARTS))
    return q, cache


PAGES = [None, 16]


@pytest.mark.parametrize("page_block_size", PAGES)
@pytest.mark.parametrize("sketch", [None, "int4", "int8"])
def test_cache_holds_what_the_reference_holds(
    page_block_size: int | None, sketch: str | None
) -> None:
    _, cache = filled(sketch=sketch, page_block_size=page_block_size, starts=False)
    _, k, v = make_qkv(3, 1, 300, 8, 2, 64)
    empty = reference.PlainCache(
        k=k[:, :0], v=v[:, :0], cache_seqlens=int32(0, 0, 0), sketch_format=sketch
    )
    plain = reference.kv_append(empty, k[:, :200], v[:, :200], int32(200, 41, 17))
    plain = reference.kv_append(plain, k[:, 200:], v[:, 200:], int32(100, 100, 0))
    for got, expected in ((cache.k, plain.k), (cache.v, plain.v)):
        assert rel_err(poison(got, cache.cache_seqlens).nan_to_num(), expected.nan_to_num()) == 0
    if sketch is not None:
        assert cache.sketch_data is not None and plain.sketch_data is not None
        for row, seqlen in enumerate(SEQLENS):
            whole = seqlen // BLOCK_TOKENS
            assert torch.equal(cache.sketch_data[row, :, :whole], plain.sketch_data[row, :, :whole])


@pytest.mark.parametrize("page_block_size", PAGES)
@pytest.mark.parametrize("scope", ["kv_head", "layer"])
@pytest.mark.parametrize("aggregate", ["sum_vote", "max_vote"])
def test_score_tokens(page_block_size: int | None, scope: str, aggregate: str) -> None:
    q, cache = filled(3, page_block_size=page_block_size)
    got = kvselect.score_tokens(q, cache, scope=scope, aggregate=aggregate)
    expected = reference.score_tokens(q, cache, scope=scope, aggregate=aggregate)
    assert got.shape == (3, 2, 300) and got.dtype == torch.float32
    assert rel_err(got, expected) <= 4e-6
    assert (got.stride(1) == 0) == (scope == "layer")


@pytest.mark.parametrize("sketch, bound", [("int4", 5e-2), ("int8", 5e-4)])
def test_score_tokens_from_a_sketch(sketch: str, bound: float) -> None:
    q, cache = filled(sketch=sketch)
    options: dict[str, Any] = {"num_sink_tokens": 4, "num_recent_tokens": 64}
    got = kvselect.score_tokens(q, cache, **options)
    assert rel_err(got, reference.score_tokens(q, cache, **options)) <= bound
    by_keys = kvselect.score_tokens(q, cache, source="keys", **options)
    assert rel_err(by_keys, reference.score_tokens(q, cache, source="keys", **options)) <= 4e-6
    assert not torch.equal(got, by_keys)


@pytest.mark.parametrize("pool_width", [1, 5])
@pytest.mark.parametrize("overselect", [1.0, 1.3])
def test_select_tokens(pool_width: int, overselect: float) -> None:
    q, cache = filled()
    options: dict[str, Any] = {
        "topk": 10,
        "num_sink_tokens": 3,
        "num_recent_tokens": 6,
        "overselect": overselect,
        "pool_width": pool_width,
        "starts": cache.starts,
    }
    scores = kvselect.score_tokens(q, cache)
    got = kvselect.select_tokens(scores, cache.cache_seqlens, **options)
    expected = reference.select_tokens(scores, cache.cache_seqlens, **options)
    longest = expected.indices.shape[-1]
    assert torch.equal(got.indices[..., :longest], expected.indices)
    assert (got.indices[..., longest:] == -1).all()
    assert torch.equal(got.topk_length, expected.topk_length)
    assert got.kept_score is not None and expected.kept_score is not None
    assert rel_err(got.kept_score, expected.kept_score) <= 2e-6


def select(q: Tensor, cache: KVCache) -> Selection:
    return kvselect.select_tokens(
        kvselect.score_tokens(q[:, -1:], cache),
        cache.cache_seqlens,
        topk=20,
        num_sink_tokens=3,
        num_recent_tokens=16,
        starts=cache.starts,
    )


MODIFIED: dict[str, Any] = {"softcap": 0.5, "sink_logits": torch.linspace(-2.0, 5.0, 8)}


@pytest.mark.parametrize("page_block_size", PAGES)
@pytest.mark.parametrize("seqlen_q", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sparse_attention_and_recovered_mass(
    page_block_size: int | None, seqlen_q: int, dtype: torch.dtype
) -> None:
    q, cache = filled(seqlen_q, page_block_size=page_block_size, dtype=dtype)
    selection = select(q, cache)
    for chosen in (selection, None):
        out, lse = kvselect.sparse_attention(q, cache, chosen)
        expected = reference.sparse_attention(q, cache, chosen)
        assert rel_err(out, expected[0]) <= TOLERANCE[dtype]
        assert rel_err(lse, expected[1]) <= 2e-6
        out, lse = kvselect.sparse_attention(q, cache, chosen, **MODIFIED)
        expected = reference.sparse_attention(q, cache, chosen, **MODIFIED)
        assert rel_err(out, expected[0]) <= TOLERANCE[dtype]
        assert rel_err(lse, expected[1]) <= 2e-6
    capped = kvselect.recovered_mass(q, cache, selection, softcap=0.5)
    assert rel_err(capped, reference.recovered_mass(q, cache, selection, softcap=0.5)) <= 4e-6
    mass = kvselect.recovered_mass(q, cache, selection)
    assert rel_err(mass, reference.recovered_mass(q, cache, selection)) <= 4e-6


def test_sparse_attention_at_compact_positions() -> None:
    q, cache = filled(5)
    cos, sin = rope_tables(300, 32)
    rope = Rope(cos, sin)
    selection = select(q, cache)
    for chosen in (selection, None):
        out, lse = kvselect.sparse_attention(q, cache, chosen, rope=rope)
        expected = reference.sparse_attention(q, cache, chosen, rope=rope)
        assert rel_err(out, expected[0]) <= TOLERANCE[torch.float32]
        assert rel_err(lse, expected[1]) <= 2e-6


def test_merge_splits() -> None:
    generator = torch.Generator().manual_seed(0)
    out, lse = torch.randn(3, 2, 8, 64, generator=generator), torch.randn(3, 2, 8)
    got, expected = kvselect.merge_splits(out, lse), reference.merge_splits(out, lse)
    assert rel_err(got[0], expected[0]) <= 2e-6 and rel_err(got[1], expected[1]) <= 2e-6


# ---- whole decode steps


def token_select(**settings: Any) -> kvselect.TokenSelect:
    defaults: dict[str, Any] = {
        "topk": 24,
        "num_sink_tokens": 4,
        "num_recent_tokens": 16,
        "sketch": None,
        "overselect": 1.25,
        "q_block_size": 16,
        "max_age": 4,
    }
    return kvselect.TokenSelect(**(defaults | settings))


POLICIES: dict[str, kvselect.Policy] = {
    "default": token_select(),
    "layer": token_select(scope="layer"),
    "pooled": token_select(pool_width=5),
    "candidates": token_select(normalise_over="candidates", score_scale=0.5),
    "max_vote": token_select(aggregate="max_vote"),
    "compact": token_select(positions="compact"),
    "compact_layer": token_select(positions="compact", scope="layer"),
    "dense_below": token_select(dense_below_tokens=200),
    "mass_floor": token_select(mass_target=0.7, topk_max=60),
    "mass_floor_layer": token_select(mass_target=0.6, topk_max=100, scope="layer"),
    "mass_floor_compact": token_select(mass_target=0.7, topk_max=60, positions="compact"),
    "mass_floor_reusing": token_select(mass_target=0.7, topk_max=60, similarity_threshold=0.9),
    "reusing": token_select(similarity_threshold=0.9),
    "reusing_layer": token_select(similarity_threshold=0.9, scope="layer"),
    "reusing_flat": token_select(similarity_threshold=0.9, similarity="flat"),
    "reusing_compact": token_select(similarity_threshold=0.9, positions="compact"),
    "paper": kvselect.TokenSelect.paper_compat(
        topk=24, num_sink_tokens=4, num_recent_tokens=16, q_block_size=16, max_age=4
    ),
    "streaming": kvselect.StreamingLLM(num_recent_tokens=16, q_block_size=16),
    "streaming_original": kvselect.StreamingLLM(num_recent_tokens=16, positions="original"),
    "dense": kvselect.Dense(),
}


SOFTMAX: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 1.5},
    "sinks": {"sink_logits": torch.linspace(-2.0, 5.0, 8)},
}


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("name", POLICIES)
def test_decode_steps(name: str, softmax: str) -> None:
    """Seven steps of three ragged rows: the same lists, hits and results as the reference's."""
    policy = POLICIES[name]
    _, cache = filled()
    cos, sin = rope_tables(300, 32, base=500.0)
    rope = Rope(cos, sin)
    state, plain_state = policy.new_state(cache), DecodeState()
    steady, k, v = make_qkv(3, 8, 8, 8, 2, 64, seed=7)
    num_hits = 0
    for step in range(7):
        # queries drift slowly, but for one that jumps: hits and misses in every reusing policy
        q = steady[:, :1] + 0.02 * steady[:, step : step + 1] if step != 4 else steady[:, 4:5]
        cache.append(k[:, step : step + 1], v[:, step : step + 1])
        options: dict[str, Any] = {"rope": rope} if policy.positions == "compact" else {}
        options |= SOFTMAX[softmax]
        out, info = kvselect.decode_step(q, cache, policy, state, **options)
        expected, plain = reference.decode_step(q, cache, policy, plain_state, **options)
        assert (info.selection is None) == (plain.selection is None)
        if info.selection is not None and plain.selection is not None:
            assert torch.equal(info.selection.topk_length, plain.selection.topk_length)
            longest = plain.selection.indices.shape[-1]
            assert torch.equal(info.selection.indices[..., :longest], plain.selection.indices)
            assert (info.kept_mass is None) == (plain.kept_mass is None)
            if info.kept_mass is not None and plain.kept_mass is not None:
                assert torch.equal(info.kept_mass.isnan(), plain.kept_mass.isnan())
                assert rel_err(info.kept_mass.nan_to_num(), plain.kept_mass.nan_to_num()) <= 4e-6
        if info.hit is not None:
            assert plain.hit is not None and torch.equal(info.hit != 0, plain.hit != 0)
            num_hits += int((info.hit != 0).sum())
        assert rel_err(out, expected) <= TOLERANCE[torch.float32]
        assert rel_err(info.lse, plain.lse) <= 2e-6
    reuses = getattr(policy, "similarity_threshold", None) is not None
    assert (num_hits > 0) == reuses


@pytest.mark.parametrize("sketch", ["int4", "int8"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_decode_step_with_a_sketch(sketch: str, positions: str) -> None:
    """Attention is exact on whatever list the sketch gave; the list keeps nearly as much mass."""
    policy = token_select(sketch=sketch, num_recent_tokens=128, topk=32, positions=positions)
    q, cache = filled(sketch=sketch)
    cos, sin = rope_tables(300, 32, base=500.0)
    rope = Rope(cos, sin) if positions == "compact" else None
    out, info = kvselect.decode_step(q, cache, policy, policy.new_state(cache), rope=rope)
    _, plain = reference.decode_step(q, cache, policy, DecodeState(), rope=rope)
    assert info.selection is not None and plain.selection is not None
    expected, lse = reference.sparse_attention(q, cache, info.selection, rope=rope)
    assert rel_err(out, expected) <= TOLERANCE[torch.float32]
    assert rel_err(info.lse, lse) <= 2e-6
    assert torch.equal(info.selection.topk_length, plain.selection.topk_length)
    assert info.kept_mass is not None and plain.kept_mass is not None
    assert rel_err(info.kept_mass, plain.kept_mass) <= (5e-2 if sketch == "int4" else 1e-3)


def test_reference_decode_step_errors() -> None:
    q, cache = filled()
    with pytest.raises(ValueError, match="policy: got 3, allowed: TokenSelect, StreamingLLM, Dens"):
        reference.decode_step(q, cache, 3, None)  # type: ignore[arg-type]
    policy = token_select(similarity_threshold=0.9)
    with pytest.raises(TypeError, match=r"state: got NoneType, allowed: DecodeState\(\)"):
        reference.decode_step(q, cache, policy, None)
