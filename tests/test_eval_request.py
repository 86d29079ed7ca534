"""What users type, turned into lengths and policies, or refused."""

from __future__ import annotations

import re

import pytest

from kvselect.eval.demo import demo_policies, demo_request
from kvselect.eval.request import (
    default_policies,
    parse_budgets,
    parse_lengths,
    parse_policies,
    parse_policy,
    policy_names,
    split_policies,
)
from kvselect.eval.results import Length
from kvselect.policies.dense import Dense
from kvselect.policies.streaming_llm import StreamingLLM
from kvselect.policies.token_select import TokenSelect


def test_lengths_in_three_units_come_out_sorted_and_once() -> None:
    assert parse_lengths("16k, 4x,700,2048 ,", 512) == (
        Length(label="700", tokens=700),
        Length(label="2048", tokens=2048),
        Length(label="16k", tokens=16384),
    )


@pytest.mark.parametrize("text", ["4q", "0", "-1k", "k", "1.5k", "4 k"])
def test_a_length_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"lengths: got '{re.escape(text)}', allowed: tokens"):
        parse_lengths(f"4k,{text}", 512)


def test_no_length_at_all() -> None:
    with pytest.raises(ValueError, match="lengths: got ' , ', allowed: at least one"):
        parse_lengths(" , ", 512)


def test_policies_by_name_with_settings() -> None:
    assert parse_policy("dense") == Dense()
    text = "token_select:topk=64,sketch=none,overselect=1.0,positions=compact,dense_layers=0+2"
    assert parse_policy(text) == TokenSelect(
        topk=64, sketch=None, overselect=1.0, positions="compact", dense_layers=(0, 2)
    )
    assert parse_policy("token_select:dense_layers=1") == TokenSelect(dense_layers=(1,))
    assert parse_policy("token_select:dense_prefill=true").dense_prefill is True  # type: ignore[attr-defined]
    assert parse_policy("paper_compat:topk=64") == TokenSelect.paper_compat(topk=64)
    assert set(policy_names()) >= {"dense", "streaming_llm", "token_select"}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tokenselect", ValueError, "policies: got 'tokenselect', allowed: ada_spa, "),
        ("token_select:topc=1", ValueError, "settings of TokenSelect: got ['topc'], allowed: topk"),
        ("token_select:topk", ValueError, "settings of token_select: got 'topk', allowed: name=va"),
        ("token_select:topk=1,topk=2", ValueError, "got 'topk twice', allowed: each once"),
        ("token_select:topk=0", ValueError, "topk: got 0, allowed: an int >= 1"),
        ("token_select:topk=many", TypeError, "topk: got str 'many', allowed: an int >= 1"),
        ("token_select:positions=x", ValueError, "positions: got 'x', allowed: 'original' or 'co"),
        ("dense:topk=1", ValueError, "settings of Dense: got ['topk'], allowed: "),
    ],
)
def test_bad_policies_are_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        parse_policy(text)


def test_policies_keep_their_order_and_have_labels() -> None:
    policies = parse_policies(["token_select:topk=2,scope=layer", "dense"])
    assert list(policies) == ["token_select topk=2 scope=layer", "dense"]
    with pytest.raises(ValueError, match="policies: got 'dense twice', allowed: each once"):
        parse_policies(["dense", "dense"])
    with pytest.raises(ValueError, match="policies: got 'none', allowed: at least one"):
        parse_policies([])


def test_the_demo_compares_equal_budgets_inside_a_quarter_of_the_window() -> None:
    policies = demo_policies()
    compact = policies["TokenSelect compact"]
    assert isinstance(compact, TokenSelect)
    assert compact.topk <= 512 // 4 and compact.capacity <= 512
    streaming = policies["StreamingLLM"]
    assert isinstance(streaming, StreamingLLM)
    budget = compact.num_sink_tokens + compact.keep + compact.num_recent_tokens
    assert streaming.num_sink_tokens + streaming.num_recent_tokens == budget
    assert [length.tokens for length in demo_request(512).lengths] == [512, 2048, 8192]


def test_policies_may_be_joined_by_commas() -> None:
    joined = ["dense,token_select:topk=2,scope=layer,streaming_llm"]
    apart = ["dense", "token_select:topk=2,scope=layer", "streaming_llm"]
    assert split_policies(joined[0]) == apart
    assert parse_policies(joined) == parse_policies(apart)
    with pytest.raises(ValueError, match="policies: got 'sparse', allowed: ada_spa, "):
        parse_policies(["dense,sparse"])


def test_budgets_size_the_policies_that_have_no_settings() -> None:
    assert parse_budgets("1k,256") == [256, 1024]
    policies = parse_policies(["dense,token_select,token_select:topk=9"], [256, 512])
    assert list(policies) == [
        "dense",
        "token_select 256",
        "token_select 512",
        "token_select topk=9",
    ]
    assert list(default_policies(512)) == [
        *("dense", "streaming_llm 227", "token_select 227", "token_select 227 compact")
    ]
    assert "token_select 3712 compact" in default_policies(131_072)
    assert len(default_policies(512, [200, 300])) == 7


@pytest.mark.parametrize("text", ["12", "143", "soon"])
def test_bad_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"got '?{text}'?, allowed: "):
        parse_budgets(text)
