"""TokenSelect(mass_target=...): as many tokens as the mass asks for, between two bounds."""

from __future__ import annotations

from typing import Any

import hf_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvselect import KVCache, TokenSelect, attach, decode_step, prefill, recovered_mass
from kvselect.policies.mass_floor import FLOOR_BINS
from kvselect.testing import make_qkv


def policy(**changes: Any) -> TokenSelect:
    fields: dict[str, Any] = {
        "topk": 8,
        "topk_max": 64,
        "mass_target": 0.8,
        "num_sink_tokens": 2,
        "num_recent_tokens": 10,
        "overselect": 1.0,
        "sketch": None,
        "q_block_size": 16,
    }
    return TokenSelect(**(fields | changes))


def filled(seqlen: int = 300, batch: int = 2, sharp: float = 2.0) -> tuple[Tensor, KVCache]:
    q, k, v = make_qkv(batch, seqlen, seqlen, 4, 2, 32, seed=3)
    cache = KVCache(batch, 2, 32, sketch=None)
    cache.append(k, v)
    return sharp * q, cache


def step(settings: TokenSelect, q: Tensor, cache: KVCache) -> tuple[Any, Any]:
    state = settings.new_state(cache)
    _, info = decode_step(q[:, -1:], cache, settings, state)
    return info.selection, state.decode


@settings(deadline=None, max_examples=40)
@given(
    target=st.floats(0.05, 0.99),
    sharp=st.floats(0.5, 6.0),
    scope=st.sampled_from(["kv_head", "layer"]),
)
def test_a_list_reaches_the_target_with_no_token_to_spare(
    target: float, sharp: float, scope: str
) -> None:
    q, cache = filled(sharp=sharp)
    asked = policy(mass_target=target, scope=scope)
    selection, counts = step(asked, q, cache)
    shortest, longest = 2 + 8 + 10, 2 + 64 + 10
    lengths = selection.topk_length
    assert ((lengths >= shortest) & (lengths <= longest)).all()
    reached = selection.kept_mass >= target - 1e-5
    assert (reached | (lengths == longest)).all()
    # One token less would not do: the least of those that were picked by score is needed.
    exact = recovered_mass(q[:, -1:], cache, selection)
    exact = exact.view(2, 2, 2).mean(-1) if scope == "kv_head" else exact.mean(-1).expand(2, 2)
    assert torch.allclose(exact, selection.kept_mass, atol=1e-5)
    fewer, _ = step(
        TokenSelect(**(_fields(asked) | {"mass_target": None, "topk_max": None})), q, cache
    )
    assert (lengths >= fewer.topk_length).all()
    grown = lengths > shortest
    assert (fewer.kept_mass[grown] < target).all()
    lists = 2 if scope == "layer" else 4
    assert sum(counts.picked_for_mass) == lists and len(counts.picked_for_mass) == FLOOR_BINS
    short = (~reached & (lengths == longest)).sum()
    assert counts.num_short_of_mass == (short // 2 if scope == "layer" else short)


def _fields(settings: TokenSelect) -> dict[str, Any]:
    return {key: value for key, value in settings.to_dict().items() if key != "policy"} | {
        "dense_layers": settings.dense_layers
    }


def test_the_bounds() -> None:
    q, cache = filled()
    little, counts = step(policy(mass_target=1e-6), q, cache)
    assert (little.topk_length == 20).all() and counts.num_short_of_mass == 0
    assert counts.picked_for_mass[0] == 4
    much, counts = step(policy(mass_target=0.999999), q, cache)
    assert (much.topk_length == 76).all() and counts.num_short_of_mass == 4
    assert counts.picked_for_mass[-1] == 4
    without, _ = step(policy(mass_target=None, topk_max=None), q, cache)
    assert torch.equal(little.indices[..., :20], without.indices[..., :20])
    assert (little.indices[..., 20:] == -1).all()


def test_lists_ascend_and_hold_the_best() -> None:
    q, cache = filled()
    selection, _ = step(policy(), q, cache)
    whole, _ = step(policy(mass_target=0.999999), q, cache)
    for row in range(2):
        for head in range(2):
            length = int(selection.topk_length[row, head])
            listed = selection.indices[row, head, :length].tolist()
            assert listed == sorted(set(listed))
            assert {0, 1, *range(290, 300)} <= set(listed) <= set(whole.indices[row, head].tolist())


def test_query_blocks_of_a_prompt() -> None:
    q, cache = filled()
    asked = policy(chunk_size=64)
    state = asked.new_state(cache)
    out, _ = prefill(q, cache, asked, state)
    assert out.isfinite().all()
    assert sum(state.prefill.picked_for_mass) > 4 * 10  # lists of the blocks that selected
    assert state.prefill.kept_mass >= 0.75


def test_reused_lists_stay_as_they_are() -> None:
    q, cache = filled()
    asked = policy(similarity_threshold=1e-6, similarity="flat", max_age=8)
    state = asked.new_state(cache)
    generator = torch.Generator().manual_seed(0)
    lengths = []
    for _ in range(4):
        k, v = torch.randn((2, 2, 1, 2, 32), generator=generator)
        cache.append(k, v)
        _, info = decode_step(q[:, -1:], cache, asked, state)
        lengths.append(info.selection.topk_length.clone())
    assert torch.equal(lengths[3], lengths[0] + 3)
    assert sum(state.decode.picked_for_mass) == 4  # of the first step only


def test_the_report_shows_what_it_took() -> None:
    model = hf_models.model("llama")
    asked = hf_models.narrow(mass_target=0.98, topk_max=20)
    with attach(model, asked) as handle:
        ids = hf_models.tokens(1, 60)
        model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        static = {"cache_implementation": "static", "disable_compile": True}
        model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, **static)
        report = handle.report()
    decode = report.to_dict()["layers"][0]["decode"]
    assert sum(decode["picked_for_mass"]) == 2 * 2 * 5  # two KV heads, five steps, twice
    assert decode["num_short_of_mass"] > 0
    text = " ".join(str(report).split())
    assert f"{decode['num_short_of_mass']} of 20 lists short of mass 0.98" in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mass_target": None}, ValueError, "topk_max: got 64, allowed: None without mass_target"),
        (
            {"mass_target": 1.0},
            ValueError,
            r"mass_target: got 1.0, allowed: None or a float in \(0",
        ),
        ({"mass_target": "all"}, TypeError, "mass_target: got str 'all', allowed: None or a float"),
        (
            {"topk_max": None},
            TypeError,
            r"topk_max: got NoneType None, allowed: an int >= 8 \(topk",
        ),
        ({"topk_max": 7}, ValueError, r"topk_max: got 7, allowed: an int >= 8 \(topk\) with mass"),
        ({"score_scale": 1.0}, ValueError, "score_scale: got 1.0, allowed: None with mass_target"),
        ({"num_segments": 4}, ValueError, "num_segments: got 4, allowed: None with mass_target"),
        ({"normalise_over": "candidates"}, ValueError, "allowed: 'visible' with mass_target"),
        (
            {"aggregate": "max_vote"},
            ValueError,
            "aggregate: got 'max_vote', allowed: 'sum_vote' or",
        ),
        ({"pool_width": 3}, ValueError, "pool_width: got 3, allowed: 1 with mass_target"),
    ],
)
def test_settings_are_checked(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        policy(**change)


def test_the_capacity_has_room_for_the_most() -> None:
    assert policy().capacity == 2 + 64 + 10 + 64
    assert policy(overselect=1.5).keep_max == 96
