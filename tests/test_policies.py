"""What all policies share: names, dicts, class constants, statistics that start at nothing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import kvselect
from kvselect import (
    ActQKV,
    AdaSpa,
    ColumnRank,
    Coverage,
    Dense,
    Dilate,
    Dilated,
    InfLLM,
    KVCache,
    Landmark,
    LayerSchedule,
    MaxMin,
    Policy,
    PolicyState,
    Quest,
    RegionQuota,
    SnapKV,
    SpAtten,
    StreamingLLM,
    TokenSelect,
    policy_from_dict,
    prefill,
)
from kvselect.decode import decode_step
from kvselect.eval.request import has_budget, policy_names
from kvselect.policies import POLICIES
from kvselect.policies.budgets import MIN_BUDGET
from kvselect.queries import Queries
from kvselect.rope import Rope
from kvselect.testing import make_qkv

EXAMPLES: list[Policy] = [
    ActQKV(),
    ActQKV(topk_blocks=3, scope="kv_head", layer_budget="fixed", question_weight=4.0),
    Dense(),
    InfLLM(),
    InfLLM(topk_blocks=3, positions="compact", scope="kv_head", num_representatives=1),
    Landmark(),
    Landmark(order=1, scope="layer", attention="residual", dense_layers=(1,)),
    Quest(),
    SpAtten(),
    SpAtten(cascade="hard", decay=0.5, value_fraction=0.3, refine_below=0.1, dense_layers=(1,)),
    Quest(token_budget=512, page_size=32, dense_layers=()),
    StreamingLLM(),
    StreamingLLM(num_sink_tokens=0, num_recent_tokens=7, positions="original"),
    TokenSelect(),
    TokenSelect(topk=7, sketch=None, dense_layers=(0, 3), similarity_threshold=0.9),
    TokenSelect.paper_compat(),
    AdaSpa(sparsity=0.9, recall_threshold=None),
    AdaSpa(head_split="proportional", recall_threshold=0.7),
    SnapKV(span=(3, 90), budgets="layer"),
    MaxMin(ratio=0.1),
    ColumnRank(damping=0.3, num_steps=2),
    Coverage(alpha=1.0),
    Dilate(grid_columns=24),
    RegionQuota(alpha=0.2),
    LayerSchedule(method="MaxMin", first_layer=2, last_layer=4),
    Dilated(inner=TokenSelect(topk=9), radius=2),
]


@pytest.mark.parametrize("policy", EXAMPLES, ids=repr)
def test_dicts_survive_json(policy: Policy) -> None:
    settings = policy.to_dict()
    assert settings["policy"] == type(policy).__name__
    assert policy_from_dict(json.loads(json.dumps(settings))) == policy
    assert set(settings) == {"policy", *(field.name for field in dataclasses.fields(policy))}


def test_what_is_left_out_has_its_default() -> None:
    assert policy_from_dict({"policy": "TokenSelect", "topk": 5}) == TokenSelect(topk=5)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({}, ValueError, "policy: got None, allowed: .*'Dense' or .*'Quest' or .*'TokenSelect'"),
        ({"policy": "Quest2"}, ValueError, "policy: got 'Quest2', allowed: .*'Dense' or"),
        ({"policy": 3}, ValueError, "policy: got 3"),
        ({"policy": "Dense", "topk": 3}, ValueError, r"settings of Dense: got \['topk'\]"),
        ({"policy": "TokenSelect", "topk": 0}, ValueError, "topk: got 0"),
        ({"policy": "TokenSelect", "topk": "5"}, TypeError, "topk: got str '5'"),
        ("TokenSelect", TypeError, "settings: got str 'TokenSelect', allowed: a dict made by"),
    ],
)
def test_bad_dicts_are_named(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        policy_from_dict(settings)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_says_what_it_is(name: str) -> None:
    policy = POLICIES[name]
    assert policy.__name__ == name and getattr(kvselect, name) is policy
    assert policy.phases <= {"prefill", "decode"} and policy.phases
    for constant in ("revocable", "query_aware", "persistent"):  # settings may decide
        assert isinstance(getattr(policy(), constant), bool)
    assert dataclasses.fields(policy) is not None and "__dict__" not in dir(policy())


@pytest.mark.parametrize("policy", EXAMPLES, ids=repr)
def test_state_is_per_layer_and_starts_at_nothing(policy: Policy) -> None:
    cache = KVCache(2, 2, 32)
    state, other = policy.new_state(cache), policy.new_state(cache)
    assert isinstance(state, PolicyState) and state.prefill is not other.prefill
    for phase in ("prefill", "decode"):
        counts = state.statistics(phase).to_dict()  # type: ignore[arg-type]
        assert all(value in (0, None) for value in counts.values())
    state.invalidate()


def test_the_base_has_no_method_of_its_own() -> None:
    policy, cache = Policy(), KVCache(1, 2, 32)
    queries = Queries(
        q=torch.zeros(1, 1, 4, 32),
        phase="decode",
        softmax_scale=1.0,
        cache_seqlens=cache.cache_seqlens,
        max_seqlen=0,
    )
    assert queries.seqlen_q == queries.num_blocks == 1
    assert not policy.is_dense("decode", 0, 1, None) and policy.capacity == 0
    with pytest.raises(NotImplementedError):
        policy.select(policy.new_state(cache), queries, cache)


def test_public_names() -> None:
    assert set(kvselect.__all__) <= set(dir(kvselect))
    for name in kvselect.__all__:
        if name != "attach":  # needs transformers
            assert getattr(kvselect, name) is not None
    with pytest.raises(AttributeError, match="module 'kvselect' has no attribute 'atach'"):
        kvselect.atach  # noqa: B018


def test_import_leaves_transformers_alone() -> None:
    import subprocess
    import sys

    code = "import sys, kvselect; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- budgets

SIZED = [POLICIES[method] for name, method in policy_names().items() if has_budget(name)]


def test_all_methods_that_leave_tokens_out_have_a_budget() -> None:
    assert {method.__name__ for method in POLICIES.values()} - {m.__name__ for m in SIZED} == {
        "Dense",
        "SpAtten",  # leaves out a share of the row, not all but a number
        "AdaSpa",  # dense decode
        "Dilated",  # around another method
        "LayerSchedule",  # by layer
    }
    with pytest.raises(ValueError, match="budget: got 512, allowed: None: Dense has none"):
        Dense.at_budget(512)


@pytest.mark.parametrize("method", SIZED)
@pytest.mark.parametrize("budget", [MIN_BUDGET, 512, 2000])
def test_a_step_attends_to_its_budget(method: type[Policy], budget: int) -> None:
    """Right after its selection; methods that count in blocks may leave out part of one."""
    policy = method.at_budget(budget)
    generator = torch.Generator().manual_seed(budget)
    cache = policy.new_cache(1, 2, 64)
    k, v = torch.randn(2, 1, 3000, 2, 64, generator=generator)
    state = policy.new_state(cache)
    later = int(getattr(method, "watches_whole_prompt", False))  # a step's token after a prompt
    cache.append(k[:, later:], v[:, later:])
    if later:
        prefill(torch.randn(1, 2999, 4, 64, generator=generator), cache, policy, state)
        cache.append(k[:, :1], v[:, :1])
    q = torch.randn(1, 1, 4, 64, generator=generator)
    rope = Rope.from_frequencies(torch.logspace(0, -3, 32), 4096)
    decode_step(q, cache, policy, state, q_unrotated=q, rope=rope)
    lists = 2.0  # KV heads
    assert 0.85 * budget - 32 <= float(state.decode.tokens_attended) / lists <= budget + later


@pytest.mark.parametrize("budget", [MIN_BUDGET - 1, 0, -5])
@pytest.mark.parametrize("method", SIZED)
def test_budgets_that_hold_nothing_are_refused(method: type[Policy], budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget: got {budget}, allowed: an int >= {MIN_BUDGET}"):
        method.at_budget(budget)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Quest(token_budget=64, page_size=16), Quest(token_budget=64, page_size=4)),
        (Landmark(topk_blocks=2, block_size=16, num_recent_tokens=32), {"block_size": 8}),
        (Landmark(topk_blocks=2, num_recent_tokens=32), {"attention": "residual"}),
        (InfLLM(topk_blocks=2, num_recent_tokens=32, positions="original"), {"block_size": 16}),
        (ActQKV(topk_blocks=2, block_size=16, num_recent_tokens=32), {"block_size": 8}),
        (
            Dilated(inner=TokenSelect(topk=8, num_recent_tokens=32, sketch=None)),
            {"inner": TokenSelect(topk=20, num_recent_tokens=32, sketch=None)},
        ),
    ],
)
def test_a_state_goes_on_under_other_settings(before: Any, after: Any) -> None:
    """What it remembers of blocks is of their size: all of it is made anew."""
    wanted = dataclasses.replace(before, **after) if isinstance(after, dict) else after
    q, k, v = make_qkv(1, 1, 300, 4, 2, 32)
    cache = KVCache(1, 2, 32, sketch=None)
    cache.append(k, v)
    state = before.new_state(cache)
    decode_step(q, cache, before, state)
    out, _ = decode_step(q, cache, wanted, state)
    assert torch.equal(out, decode_step(q, cache, wanted, wanted.new_state(cache))[0])
    assert state.decode.num_calls == 2


@pytest.mark.parametrize(
    ("policy", "joins", "alone"),
    [
        (TokenSelect(), False, False),
        (TokenSelect(scope="layer"), True, False),
        (TokenSelect(layer_budget="entropy_pool"), False, True),
        (TokenSelect(layer_budget="entropy_pool", scope="layer"), True, False),
        (Dilated(inner=TokenSelect(scope="layer")), True, False),
        (ActQKV(), True, False),
        (ActQKV(scope="kv_head"), False, True),
        (AdaSpa(), False, True),
        (AdaSpa(recall_threshold=None), False, False),
        (InfLLM(), True, False),
        (Landmark(scope="layer"), True, True),
        (Landmark(), False, False),
        (Quest(), False, False),
        (SnapKV(), False, False),
        (SnapKV(budgets="layer"), False, True),
        (SpAtten(), True, False),
    ],
    ids=str,
)
def test_who_decides_with_all_heads(policy: Policy, joins: bool, alone: bool) -> None:
    """What tensor parallel goes by."""
    assert policy.joins_heads == joins
    assert (policy.needs_all_heads is not None) == alone
