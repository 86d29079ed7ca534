"""TokenSelect: its settings and their bounds, and what every one of them does to a decode step."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import KVCache, Rope, TokenSelect, decode_step, reference, select_tokens
from kvselect.selection import num_kept
from kvselect.testing import make_qkv, rel_err

DIM, HEADS, GROUP = 32, 2, 4
ROPE = Rope.from_frequencies(100.0 ** (-torch.arange(DIM // 2) / (DIM // 2)), 512)


def small(**settings: Any) -> TokenSelect:
    defaults: dict[str, Any] = {
        "topk": 10,
        "num_sink_tokens": 3,
        "num_recent_tokens": 20,
        "sketch": None,
        "overselect": 1.0,
    }
    return TokenSelect(**(defaults | settings))


def step(
    policy: TokenSelect,
    seqlens: tuple[int, ...] = (150, 133),
    starts: list[int] | None = None,
    sketch: str | None = None,
    **options: Any,
) -> tuple[Tensor, KVCache, Tensor, Any]:
    batch = len(seqlens)
    q, k, v = make_qkv(batch, 1, max(seqlens), GROUP * HEADS, HEADS, DIM, seed=11)
    cache = KVCache(batch, HEADS, DIM, sketch=sketch or policy.sketch)
    if starts is not None:
        cache.set_starts(starts)
    cache.append(k, v, list(seqlens))
    rope = ROPE if policy.positions == "compact" else None
    out, info = decode_step(q, cache, policy, policy.new_state(cache), rope=rope, **options)
    return q, cache, out, info


def picked(info: Any, row: int, head: int) -> list[int]:
    length = int(info.selection.topk_length[row, head])
    positions: list[int] = info.selection.indices[row, head, :length].tolist()
    return positions


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "layer"},
    {"score_scale": 1.0},
    {"normalise_over": "candidates"},
    {"pool_width": 7},
    {"overselect": 2.5},
    {"num_sink_tokens": 0},
    {"num_recent_tokens": 1},
    {"positions": "compact"},
    {"positions": "compact", "scope": "layer"},
    {"positions": "compact", "overselect": 1.3, "topk": 30},
    {"dense_below_tokens": 140},
    {"dense_below_tokens": 140, "positions": "compact"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("starts", [None, [0, 60]])
def test_decode_equals_the_reference(options: dict[str, Any], starts: list[int] | None) -> None:
    policy = small(**options)
    q, cache, out, info = step(policy, starts=starts)
    rope = ROPE if policy.positions == "compact" else None
    expected, expected_info = reference.decode_step(
        q, cache, policy, reference.DecodeState(), rope=rope
    )
    assert rel_err(out, expected) <= 4e-6
    assert info.selection.indices.shape == (2, HEADS, info.selection.indices.shape[-1])
    assert info.selection.indices.shape[-1] % 64 == 0
    assert torch.equal(info.selection.topk_length, expected_info.selection.topk_length)
    for row in range(2):
        for head in range(HEADS):
            assert picked(info, row, head) == picked(expected_info, row, head)


@pytest.mark.parametrize("scope", ["kv_head", "layer"])
@pytest.mark.parametrize("sketch", [None, "int4", "int8"])
def test_lists_are_what_they_should_be(scope: str, sketch: str | None) -> None:
    """Ascending, unique, sinks and window present, as many picks as asked for."""
    policy = small(scope=scope, sketch=sketch, num_recent_tokens=128, overselect=1.5)
    _, _, _, info = step(policy, (400, 333), starts=[0, 40])
    for row, (start, seqlen) in enumerate([(0, 400), (40, 333)]):
        for head in range(HEADS):
            positions = picked(info, row, head)
            assert positions == sorted(set(positions))
            assert positions[:3] == [start, start + 1, start + 2]
            assert positions[-128:] == list(range(seqlen - 128, seqlen))
            assert len(positions) == 3 + 15 + 128
    indices, lengths = info.selection.indices, info.selection.topk_length
    assert (indices.stride(1) == 0) == (scope == "layer")  # one list for all heads, stored once
    pads = torch.arange(indices.shape[-1]) >= lengths[..., None]
    assert (indices[pads] == -1).all()


def test_sketch_keeps_as_much_mass_as_exact_keys() -> None:
    masses = {}
    for sketch in (None, "int4", "int8"):
        _, _, _, info = step(small(sketch=sketch, num_recent_tokens=128), (500, 500))
        masses[sketch] = info.kept_mass.mean().item()
    assert masses["int4"] == pytest.approx(masses[None], abs=0.01)
    assert masses["int8"] == pytest.approx(masses[None], abs=0.001)


def test_kept_mass_is_the_recovered_mass_of_exact_scores() -> None:
    q, cache, _, info = step(small())
    mass = reference.recovered_mass(q, cache, info.selection)[:, 0].view(2, HEADS, GROUP).mean(-1)
    assert rel_err(info.kept_mass, mass) <= 2e-6


@pytest.mark.parametrize(
    "options", [{"score_scale": 0.1}, {"normalise_over": "candidates"}, {"aggregate": "max_vote"}]
)
def test_kept_mass_is_not_claimed_where_scores_are_no_shares(options: dict[str, Any]) -> None:
    assert step(small(**options))[3].kept_mass is None


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("seqlen", [1, 2, 32, 33, 34, 127, 128, 129])
@pytest.mark.parametrize("dense_below_tokens", [None, 0, 1000])
def test_budget_at_least_the_length_is_dense(
    seqlen: int, positions: str, dense_below_tokens: int | None
) -> None:
    policy = small(topk=106, positions=positions, dense_below_tokens=dense_below_tokens)
    assert policy.budget == 129
    q, cache, out, info = step(policy, (seqlen, max(seqlen - 3, 0)))
    rope = ROPE if positions == "compact" else None
    assert info.selection is None and info.kept_mass is None and info.hit is None
    assert rel_err(out, reference.sparse_attention(q, cache, rope=rope)[0]) <= 2e-6


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_lists_of_everything_are_dense_too(positions: str) -> None:
    """Between the budget and what over-selection holds: by lists, and still dense attention."""
    policy = small(topk=60, overselect=2.0, positions=positions)
    q, cache, out, info = step(policy, (140, 100))
    rope = ROPE if positions == "compact" else None
    assert info.selection is not None
    assert info.selection.topk_length.tolist() == [[140, 140], [100, 100]]
    assert rel_err(out, reference.sparse_attention(q, cache, rope=rope)[0]) <= 2e-6
    assert torch.allclose(info.kept_mass, torch.ones(2, HEADS), atol=1e-5)


def test_dense_ends_at_the_trained_length_with_compact_positions() -> None:
    rope = Rope(ROPE.cos[:200].contiguous(), ROPE.sin[:200].contiguous())
    policy = small(positions="compact", dense_below_tokens=10**6)
    assert policy.dense_limit(rope) == 200 and policy.dense_limit(None) == 10**6
    assert small(dense_below_tokens=10**6).dense_limit(rope) == 10**6
    assert policy.is_dense("decode", 199, 200, rope)
    assert not policy.is_dense("decode", 200, 201, rope)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("similarity_threshold", [None, 0.9])
def test_rows_decide_alone_whether_they_are_dense(
    positions: str, similarity_threshold: float | None
) -> None:
    policy = small(
        positions=positions, dense_below_tokens=100, similarity_threshold=similarity_threshold
    )
    seqlens = (150, 97, 20, 0)
    q, k, v = make_qkv(4, 4, 153, GROUP * HEADS, HEADS, DIM, seed=2)
    rope = ROPE if positions == "compact" else None
    together = KVCache(4, HEADS, DIM, sketch=None)
    together.append(k, v, list(seqlens))
    alone = [KVCache(1, HEADS, DIM, sketch=None) for _ in seqlens]
    for row, seqlen in enumerate(seqlens):
        alone[row].append(k[row : row + 1, :seqlen], v[row : row + 1, :seqlen])
    state, states = policy.new_state(together), [policy.new_state(c) for c in alone]
    # One query for all steps: the long row hits from its second step on, and the row that passes
    # 100 tokens on the way selects first, then hits.
    for number in range(6):
        out, info = decode_step(q[:, :1], together, policy, state, rope=rope)
        for row, cache in enumerate(alone):
            expected, single = decode_step(
                q[row : row + 1, :1], cache, policy, states[row], rope=rope
            )
            assert rel_err(out[row], expected[0]) <= 2e-6
            if single.selection is None:
                if cache.lengths[0] <= 100:
                    assert info.selection.topk_length[row].tolist() == [cache.lengths[0]] * HEADS
                continue
            for head in range(HEADS):
                assert picked(info, row, head) == picked(single, 0, head), (number, row)
            hit = None if info.hit is None else info.hit[row].any()
            assert bool(hit) == bool(single.hit is not None and single.hit.any())
        new = k[:, 100 + number : 101 + number]
        together.append(new, new)
        for row, cache in enumerate(alone):
            cache.append(new[row : row + 1], new[row : row + 1])


def test_pooling_brings_neighbours() -> None:
    _, _, _, info = step(small(topk=9, pool_width=3))
    middle = [i for i in picked(info, 0, 0) if 3 <= i < 130]
    assert len(middle) == 9
    assert sum(b - a == 1 for a, b in itertools.pairwise(middle)) >= 5


# --- settings


def test_defaults_are_the_documented_ones() -> None:
    policy = TokenSelect()
    assert (policy.topk, policy.num_sink_tokens, policy.num_recent_tokens) == (2048, 128, 512)
    assert (policy.scope, policy.sketch, policy.overselect) == ("kv_head", "int4", 1.5)
    assert (policy.positions, policy.pool_width, policy.similarity_threshold) == (
        "original",
        1,
        None,
    )
    assert (policy.chunk_size, policy.q_block_size, policy.query_groups) == (2048, 128, 8)
    assert policy.keep == 3072 and policy.budget == 2688
    assert policy.capacity == 128 + 3072 + 512 + 128
    assert policy.required_sketch == "int4" and policy.dense_layers == ()


def test_paper_compat_is_the_published_form() -> None:
    policy = TokenSelect.paper_compat()
    expected = {
        "topk": 2048,
        "num_sink_tokens": 128,
        "num_recent_tokens": 512,
        "scope": "layer",
        "score_scale": 1.0,
        "normalise_over": "candidates",
        "chunk_size": 512,
        "q_block_size": 512,
        "num_tail_tokens": 0,
        "window_anchor": "block_end",
        "query_groups": 1,
        "aggregate": "mean",
        "pool_width": 1,
        "positions": "compact",
        "sketch": None,
        "overselect": 1.0,
        "dense_layers": (),
        "dense_prefill": False,
        "similarity_threshold": 0.9,
        "max_age": 64,
        "similarity": "flat",
    }
    assert {name: getattr(policy, name) for name in expected} == expected
    assert policy.average_queries == "after_rope"
    changed = TokenSelect.paper_compat(topk=4096, num_recent_tokens=4096)
    assert (changed.topk, changed.num_recent_tokens, changed.scope) == (4096, 4096, "layer")
    with pytest.raises(TypeError):
        TokenSelect.paper_compat(top_k=1)


def test_capacity_has_room_for_reuse_and_for_a_block() -> None:
    assert small(max_age=64, q_block_size=16).capacity == 3 + 10 + 20 + 64
    assert small(max_age=64, q_block_size=100).capacity == 3 + 10 + 20 + 100
    assert small(topk=10, overselect=1.5).capacity == 3 + 15 + 20 + 128
    assert num_kept(7, 1.5) == 11 and num_kept(8, 1.0) == 8


def test_settings_are_frozen_and_known() -> None:
    policy = small()
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.topk = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        TokenSelect(2048)  # type: ignore[call-arg, misc]
    with pytest.raises(TypeError):
        TokenSelect(top_k=3)  # type: ignore[call-arg]


def no_sketch(**settings: Any) -> dict[str, Any]:
    return {"sketch": None, **settings}


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"topk": 0}, ValueError, "topk: got 0, allowed: an int >= 1"),
        ({"topk": 1.5}, TypeError, "topk: got float 1.5, allowed: an int >= 1"),
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens: got -1, allowed: an int >= 0"),
        (
            no_sketch(num_recent_tokens=0),
            ValueError,
            "num_recent_tokens: got 0, allowed: an int >= 1",
        ),
        (
            {"num_recent_tokens": 127},
            ValueError,
            "num_recent_tokens: got 127, allowed: an int >= 128",
        ),
        ({"scope": "head"}, ValueError, "scope: got 'head', allowed: 'kv_head' or 'layer'"),
        ({"score_scale": 0.0}, ValueError, "score_scale: got 0.0, allowed: None or a float > 0"),
        ({"score_scale": "1"}, TypeError, "score_scale: got str '1'"),
        ({"normalise_over": "all"}, ValueError, "normalise_over: got 'all', allowed: 'visible' or"),
        ({"chunk_size": 0}, ValueError, "chunk_size: got 0"),
        ({"q_block_size": 0}, ValueError, "q_block_size: got 0"),
        ({"num_tail_tokens": -1}, ValueError, "num_tail_tokens: got -1"),
        ({"tail_q_block_size": 0}, ValueError, "tail_q_block_size: got 0"),
        (
            {"window_anchor": "end"},
            ValueError,
            "window_anchor: got 'end', allowed: 'block_start' or",
        ),
        (
            no_sketch(window_anchor="block_end", num_recent_tokens=100),
            ValueError,
            r"num_recent_tokens: got 100, allowed: an int >= 128 \(q_block_size\)",
        ),
        (
            {"window_anchor": "block_end", "tail_q_block_size": 600},
            ValueError,
            "num_recent_tokens: got 512, allowed: an int >= 600",
        ),
        ({"query_groups": 0}, ValueError, "query_groups: got 0"),
        ({"aggregate": "sum"}, ValueError, "aggregate: got 'sum', allowed: 'mean' or 'sum_vote'"),
        (
            {"average_queries": "never"},
            ValueError,
            "average_queries: got 'never', allowed: 'before_r",
        ),
        ({"pool_width": 4}, ValueError, "pool_width: got 4, allowed: an odd int >= 1"),
        ({"pool_width": 0}, ValueError, "pool_width: got 0, allowed: an odd int >= 1"),
        (
            {"positions": "clamp"},
            ValueError,
            "positions: got 'clamp', allowed: 'original' or 'compa",
        ),
        ({"sketch": "int2"}, ValueError, "sketch: got 'int2', allowed: 'int4' or 'int8' or None"),
        ({"overselect": 0.9}, ValueError, "overselect: got 0.9, allowed: a float >= 1"),
        ({"overselect": float("inf")}, ValueError, "overselect: got inf, allowed: a float >= 1"),
        ({"dense_layers": [0]}, TypeError, r"dense_layers: got list \[0\], allowed: a tuple"),
        ({"dense_layers": (-1,)}, ValueError, "dense_layers: got -1, allowed: layer indices >= 0"),
        ({"dense_prefill": 1}, TypeError, "dense_prefill: got int 1, allowed: True or False"),
        ({"dense_below_tokens": -1}, ValueError, "dense_below_tokens: got -1, allowed: None or an"),
        (
            {"similarity_threshold": 0.0},
            ValueError,
            "similarity_threshold: got 0.0, allowed: None or",
        ),
        ({"similarity_threshold": 1.1}, ValueError, "similarity_threshold: got 1.1"),
        ({"similarity_threshold": "0.9"}, TypeError, "similarity_threshold: got str '0.9'"),
        ({"max_age": 0}, ValueError, "max_age: got 0"),
        (
            {"similarity": "max"},
            ValueError,
            "similarity: got 'max', allowed: 'min' or 'q10' or 'flat'",
        ),
        (
            {"similarity_on": "keys"},
            ValueError,
            "similarity_on: got 'keys', allowed: 'unrotated' or",
        ),
        (
            {"similarity_on": "rotated", "positions": "compact"},
            ValueError,
            "similarity_on: got 'rotated', allowed: 'unrotated' with positions='compact'",
        ),
    ],
)
def test_every_bound_is_checked(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TokenSelect(**settings)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"scores": torch.zeros(2, 10)}, ValueError, r"scores: got shape \(2, 10\)"),
        ({"scores": torch.zeros(2, 2, 10).half()}, TypeError, "scores: got torch.float16"),
        (
            {"cache_seqlens": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            "cache_seqlens: got shape",
        ),
        ({"cache_seqlens": torch.zeros(2)}, TypeError, "cache_seqlens: got torch.float32"),
        ({"starts": torch.zeros(2)}, TypeError, "starts: got torch.float32"),
        ({"topk": 0}, ValueError, "topk: got 0, allowed: an int >= 1"),
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens: got -1"),
        ({"num_recent_tokens": -1}, ValueError, "num_recent_tokens: got -1"),
        ({"overselect": 0.5}, ValueError, "overselect: got 0.5"),
        ({"pool_width": 2}, ValueError, "pool_width: got 2, allowed: an odd int >= 1"),
    ],
)
def test_select_tokens_checks_its_input(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {
        "scores": torch.rand(2, 2, 10),
        "cache_seqlens": torch.tensor([10, 7], dtype=torch.int32),
        "topk": 3,
    }
    assert select_tokens(**good).topk_length.tolist() == [[3, 3], [3, 3]]
    with pytest.raises(error, match=message):
        select_tokens(**(good | change))
