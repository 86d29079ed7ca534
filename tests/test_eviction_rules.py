"""Evictions by neighbourhood, region and layer; lists that are widened; what later queries find."""

from __future__ import annotations

import json
from typing import Any

import hf_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eviction import DIM, HEADS, Run, small
from torch import Tensor

from kvselect import (
    Coverage,
    Dilate,
    Dilated,
    KVCache,
    LayerSchedule,
    MaxMin,
    Quest,
    RegionQuota,
    Selection,
    SnapKV,
    StreamingLLM,
    TokenSelect,
    decode_step,
    policy_from_dict,
    prefill,
    reference,
)
from kvselect.integrations.hf import attach
from kvselect.policies.eviction import Span
from kvselect.policies.region_quota import quotas
from kvselect.testing import make_qkv, rel_err


def span_of(weights: Tensor, keys: Tensor | None = None) -> Span:
    """``weights`` [num_kv_heads, num_queries, num_tokens] of one query head per KV head."""
    if keys is None:
        keys = torch.zeros(*weights.shape[::2], 8)
    return Span(keys, weights, 0, weights.shape[1])


# ---- Dilate


@pytest.mark.parametrize("kind", [Dilate, RegionQuota])
def test_both_run_like_all_evictions(kind: type[Any]) -> None:
    changes = {"overview_tokens": 30, "region_tokens": 20} if kind is RegionQuota else {}
    run = Run(small(kind, topk=200, **changes), group=7, starts=[0, 4])
    q, out = run.step()
    assert rel_err(out, reference.sparse_attention(q, run.whole)[0]) <= 2e-6
    run = Run(small(kind, **changes), starts=[0, 4])
    q, out = run.step()
    kept = run.kept()
    assert kept.topk_length.tolist() == [[33] * HEADS] * 2
    assert rel_err(out, reference.sparse_attention(q, run.whole, kept)[0]) <= 2e-6


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(1, 40),
    radius=st.integers(0, 4),
    columns=st.none() | st.integers(1, 9),
)
def test_neighbours(seed: int, num_tokens: int, radius: int, columns: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(num_tokens, generator=generator) < 0.15
    wide = Dilate(radius=radius, grid_columns=columns).dilated(kept)
    anchors = kept.nonzero()[:, 0].tolist()
    for i in range(num_tokens):
        if columns is None:
            wanted = any(abs(i - a) <= radius for a in anchors)
        else:
            here = divmod(i, columns)
            there = [divmod(a, columns) for a in anchors]
            wanted = any(abs(here[0] - y) + abs(here[1] - x) <= 1 for y, x in there)
        assert bool(wide[i]) == wanted


def test_anchors_come_first_then_neighbours_then_the_rest() -> None:
    weights = torch.zeros(1, 2, 30)
    weights[0, 0, 10], weights[0, 0, 20] = 0.9, 0.8  # what all queries but the last look at
    weights[0, 1, 5], weights[0, 1, 6] = 0.3, 0.2  # the last one
    kept = Dilate(alpha=0.75).choose(span_of(weights), 8)
    assert kept[0].nonzero()[:, 0].tolist() == [5, 6, 9, 10, 11, 19, 20, 21]


def test_dilation_finds_more_of_what_lies_in_runs() -> None:
    """Runs of five tokens matter; the window happened to look at one token of each."""
    generator = torch.Generator().manual_seed(0)
    runs = torch.randperm(60, generator=generator)[:12] * 10
    matter = torch.zeros(600, dtype=torch.bool)
    weights = torch.rand(1, 4, 600, generator=generator) * 0.01
    for begin in runs.tolist():
        matter[begin + 2 : begin + 7] = True
        weights[0, :, begin + 4] = 0.5
    recall = {}
    for policy in (SnapKV(pool_width=1), Dilate(alpha=1.0, radius=2)):
        kept = policy.choose(span_of(weights), 60)
        recall[type(policy).__name__] = float((kept[0] & matter).sum() / matter.sum())
    assert recall["Dilate"] == 1.0 and recall["SnapKV"] < 0.5


# ---- RegionQuota


@settings(deadline=None, max_examples=60)
@given(
    shares=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    total=st.integers(0, 60),
    seed=st.integers(0, 2**31),
)
def test_quotas_add_up(shares: list[int], total: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    room = torch.randint(0, 25, (len(shares),), generator=generator).tolist()
    parts = quotas([float(s) for s in shares], total, room)
    assert sum(parts) == min(total, sum(room))
    assert all(0 <= part <= space for part, space in zip(parts, room))
    exact = [total * share / max(sum(shares), 1) for share in shares]
    if sum(shares) and all(e <= r for e, r in zip(exact, room)):  # nobody is full
        assert all(abs(part - e) < 1 for part, e in zip(parts, exact))


def test_quotas_by_largest_remainder() -> None:
    assert quotas([1.0, 1.0, 1.0], 10, [9, 9, 9]) == [4, 3, 3]
    assert quotas([5.0, 3.0, 2.0], 7, [9, 9, 9]) == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert quotas([8.0, 1.0, 1.0], 10, [2, 9, 9]) == [2, 4, 4]
    assert quotas([1.0, 0.0], 6, [4, 4]) == [4, 2]


def test_the_overview_says_which_region_keeps_more() -> None:
    weights = torch.zeros(1, 1, 40 + 4 * 50)
    weights[0, 0, 20:30] = 1.0  # of the overview: what region 2 shows
    weights[0, 0, 40:] = torch.rand(200, generator=torch.Generator().manual_seed(1)) * 0.5
    policy = RegionQuota(overview_tokens=40, region_tokens=50, alpha=0.75)
    kept = policy.choose(span_of(weights), 40)[0]
    assert [int(part.sum()) for part in (kept[:40], *kept[40:].split(50))] == [30, 0, 0, 10, 0]
    inside = weights[0, 0, 140:190]
    assert inside[kept[140:190]].min() >= inside[~kept[140:190]].max()
    short = policy.choose(span_of(weights[..., :30]), 12)  # an overview and nothing else
    assert int(short.sum()) == 12


# ---- LayerSchedule


def test_a_schedule_falls_to_nothing() -> None:
    policy = LayerSchedule(ratio=1.0)
    assert [policy.fraction(layer) for layer in (0, 14, 15, 21, 27)] == [
        pytest.approx(x) for x in (1, 1, 6 / 7, 0, 0)
    ]
    first, last = policy.for_layer(3), policy.for_layer(25)
    assert first == SnapKV(ratio=1.0) and last == SnapKV(topk=0)
    halved = LayerSchedule(method="MaxMin", first_layer=0, last_layer=2, topk=64, span=(3, 90))
    assert halved.for_layer(1) == MaxMin(topk=32, span=(3, 90))
    assert SnapKV().for_layer(7) == SnapKV()


def test_a_schedule_through_attach() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 150)
    num_layers = model.config.num_hidden_layers
    policy = LayerSchedule(
        method="Coverage",
        first_layer=0,
        last_layer=num_layers,
        ratio=1.0,
        num_sink_tokens=2,
        num_recent_tokens=8,
    )
    with attach(model, policy) as handle, torch.no_grad():
        handle.verify(prompt_tokens=60)
        result = model(ids, use_cache=True)
        model(ids[:, :1], past_key_values=result.past_key_values)
        for index, layer in enumerate(result.past_key_values.layers):
            kept = round((1 - index / num_layers) * 140)
            assert set(layer.cache.rows.lengths) == {kept + 11}


def test_a_schedule_itself_runs_nowhere() -> None:
    run = Run(small(SnapKV))
    policy = LayerSchedule()
    with pytest.raises(ValueError, match=r"policy: got 'a LayerSchedule', allowed: policy.for_lay"):
        decode_step(run.q[:, :1], run.cache, policy, policy.new_state(run.cache))


# ---- Dilated


def listed(selection: Selection, row: int, head: int) -> list[int]:
    count = int(selection.topk_length[row, head])
    assert (selection.indices[row, head, count:] == -1).all()
    return selection.indices[row, head, :count].tolist()


def test_dilated_lists_hold_the_neighbours() -> None:
    q, k, v = make_qkv(2, 1, 300, 4, HEADS, DIM, seed=2)
    cache = KVCache(2, HEADS, DIM, sketch=None)
    cache.set_starts([0, 30])
    cache.append(k, v, [300, 257])
    inner = TokenSelect(topk=12, num_sink_tokens=2, num_recent_tokens=5, sketch=None, overselect=1)
    policy = Dilated(inner=inner, radius=2)
    state = policy.new_state(cache)
    out, info = decode_step(q, cache, policy, state)
    wide = info.selection
    chosen = decode_step(q, cache, inner, inner.new_state(cache))[1].selection
    assert wide is not None and chosen is not None
    for row, (start, length) in enumerate(((0, 300), (30, 257))):
        for head in range(HEADS):
            beside = {i + j for i in listed(chosen, row, head) for j in range(-2, 3)}
            assert listed(wide, row, head) == sorted(i for i in beside if start <= i < length)
    assert rel_err(out, reference.sparse_attention(q, cache, wide)[0]) <= 2e-6
    assert state.decode.num_calls == 1
    assert state.decode.tokens_attended == int(wide.topk_length.sum())


@pytest.mark.parametrize("topk", [8, 500])
def test_dilated_prefill(topk: int) -> None:
    q, k, v = make_qkv(2, 150, 150, 8, HEADS, DIM, seed=2)
    cache = KVCache(2, HEADS, DIM, sketch=None)
    cache.append(k, v, [150, 120])
    inner = TokenSelect(
        topk=topk, num_sink_tokens=2, num_recent_tokens=16, q_block_size=16, sketch=None
    )
    policy = Dilated(inner=inner)
    out, _ = prefill(q, cache, policy, policy.new_state(cache))
    wanted = reference.sparse_attention(q, cache)[0]
    plain, _ = prefill(q, cache, inner, inner.new_state(cache))
    if topk == 500:
        assert rel_err(out, wanted) <= 3e-6
    else:  # more tokens than the inner method's are nearer to all of them
        assert 1e-3 < rel_err(out, wanted) < rel_err(plain, wanted)


def test_dilated_through_json_and_attach() -> None:
    inner = TokenSelect(topk=16, num_sink_tokens=2, num_recent_tokens=16, sketch=None)
    policy = Dilated(inner=inner, radius=3)
    assert policy_from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 200)
    with attach(model, policy) as handle, torch.no_grad():
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        layer = handle.report().layers[0]
        assert layer.tokens_per_step is not None and 34 < layer.tokens_per_step < 200


def test_dilated_is_verified_and_scores_the_queries_before_rope() -> None:
    inner = TokenSelect(topk=16, num_sink_tokens=2, num_recent_tokens=16, sketch=None)
    policy, model = Dilated(inner=inner), hf_models.model("llama")
    with attach(model, policy) as handle:
        assert set(handle.verify().logit_error) == {"dense", "lists"}
        assert [layer.needs_unrotated for layer in handle._plan.layers] == [{"prefill"}] * 3


def test_dilated_refuses_a_static_cache() -> None:
    model, policy = hf_models.model("llama"), Dilated(inner=TokenSelect(topk=16))
    with attach(model, policy), pytest.raises(ValueError, match="cache: got 'FixedKVCache'"):
        model.generate(hf_models.tokens(1, 20), max_new_tokens=2, cache_implementation="static")


# ---- what later queries find


def test_diversity_serves_questions_that_were_not_asked() -> None:
    """A document of filler and 40 facts, a window that asks for one, later queries for others."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(43, DIM, generator=generator), dim=1)
    of_token = torch.randint(40, 43, (400,), generator=generator)  # filler says three things
    of_token[torch.randperm(400, generator=generator)[:40]] = torch.arange(40)
    k = 3 * directions[of_token] + 0.05 * torch.randn(400, DIM, generator=generator)
    asked, later = 12 * directions[:1].expand(8, -1), 12 * directions[1:40]
    weights = (asked @ k.T * DIM**-0.5).softmax(-1)[None]
    seen = (later @ k.T * DIM**-0.5).softmax(-1)
    mass, own = {}, {}
    for kind in (SnapKV, MaxMin, Coverage):
        kept = small(kind).choose(Span(k[None], weights, 0, 8), 60)[0]
        mass[kind.__name__] = float(seen[:, kept].sum(1).mean())
        own[kind.__name__] = float(weights[0, 0, kept].sum())
    print(f"mass of later queries {mass}, of the window's own {own}")
    assert mass["MaxMin"] > mass["SnapKV"] + 0.2 and mass["Coverage"] > mass["SnapKV"] + 0.2
    assert own["SnapKV"] > 0.5


# ---- bounds


@pytest.mark.parametrize(
    "kind, changes, error, message",
    [
        (Dilate, {"alpha": 1.5}, ValueError, r"alpha: got 1.5, allowed: a float in \[0, 1\]"),
        (Dilate, {"radius": -1}, ValueError, "radius: got -1"),
        (Dilate, {"grid_columns": 0}, ValueError, "grid_columns: got 0, allowed: None or an int"),
        (RegionQuota, {"overview_tokens": 0}, ValueError, "overview_tokens: got 0"),
        (RegionQuota, {"region_tokens": 0}, ValueError, "region_tokens: got 0"),
        (RegionQuota, {"alpha": -1}, ValueError, "alpha: got -1"),
        (LayerSchedule, {"method": "Dense"}, ValueError, "method: got 'Dense', allowed: 'ColumnR"),
        (LayerSchedule, {"method": 3}, TypeError, "method: got int 3"),
        (LayerSchedule, {"first_layer": -1}, ValueError, "first_layer: got -1"),
        (
            LayerSchedule,
            {"last_layer": 14},
            ValueError,
            r"last_layer: got 14, allowed: an int >= 15",
        ),
        (Dilated, {"radius": 0}, ValueError, "radius: got 0"),
        (Dilated, {"inner": 3}, TypeError, "inner: got int 3"),
        (Dilated, {"inner": StreamingLLM()}, ValueError, "inner: got 'StreamingLLM', allowed: a m"),
        (Dilated, {"inner": SnapKV()}, ValueError, "inner: got 'SnapKV'"),
        (Dilated, {"inner": Quest()}, ValueError, "inner: got 'Quest'"),
        (
            Dilated,
            {"inner": TokenSelect(layer_budget="entropy_pool")},
            ValueError,
            "inner.layer_budget: got 'entropy_pool', allowed: 'fixed'",
        ),
        (Dilated, {"inner": Dilated()}, ValueError, "inner: got 'Dilated'"),
        (
            Dilated,
            {"inner": TokenSelect(positions="compact")},
            ValueError,
            r"inner.positions: got 'compact', allowed: 'original'",
        ),
        (
            Dilated,
            {"inner": TokenSelect(prefill_attention="dense_kernel")},
            ValueError,
            r"inner.prefill_attention: got 'dense_kernel', allowed: 'sparse_attention' \(neigh",
        ),
        (
            Dilated,
            {"inner": TokenSelect(similarity_threshold=0.9)},
            ValueError,
            r"inner.similarity_threshold: got 0.9, allowed: None",
        ),
    ],
)
def test_every_bound_is_checked(
    kind: type[Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(**changes)
