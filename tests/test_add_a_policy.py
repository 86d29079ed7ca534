"""docs/add-a-policy.md: the page's example runs, as it stands there, on the embedded model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvselect import Dense, KVCache, Policy, decode_step, policy_from_dict
from kvselect.eval.checkpoint import EMBEDDED, embedded_model_path, load_checkpoint
from kvselect.eval.request import parse_policies
from kvselect.eval.results import Length
from kvselect.eval.runner import Request, run
from kvselect.eval.tasks import TASKS
from kvselect.integrations.hf import attach
from kvselect.policies.base import POLICIES
from kvselect.testing import make_qkv, rel_err

PAGE = Path(__file__).parents[1] / "docs" / "add-a-policy.md"


@pytest.fixture
def largest_keys() -> Iterator[Any]:
    """The example's class, registered only while a test runs."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 1
    before = dict(POLICIES)
    module = ModuleType("largest_keys_of_the_page")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(blocks[0], str(PAGE), "exec"), vars(module))
        assert set(POLICIES) - set(before) == {"LargestKeys"}
        yield POLICIES["LargestKeys"]
    finally:
        POLICIES.clear()
        POLICIES.update(before)
        del sys.modules[module.__name__]


def test_lists_hold_the_largest_keys_between_sinks_and_window(largest_keys: Any) -> None:
    policy = largest_keys(topk=9, num_sink_tokens=3, num_recent_tokens=5)
    q, k, v = make_qkv(2, 1, 90, 4, 2, 32, seed=1)
    cache = KVCache(2, 2, 32, sketch=None)
    cache.append(k, v, [90, 61])
    state = policy.new_state(cache)
    selection = decode_step(q, cache, policy, state)[1].selection
    assert selection is not None
    for row, length in enumerate((90, 61)):
        for head in range(2):
            norms = k[row, 3 : length - 5, head].norm(dim=-1)
            best = (norms.topk(9).indices + 3).sort().values.tolist()
            listed = selection.indices[row, head, : int(selection.topk_length[row, head])]
            assert listed.tolist() == [0, 1, 2, *best, *range(length - 5, length)]
    assert state.decode.num_calls == 1


def test_a_budget_beyond_the_row_is_dense(largest_keys: Any) -> None:
    q, k, v = make_qkv(1, 1, 40, 4, 2, 32, seed=2)
    cache = KVCache(1, 2, 32, sketch=None)
    cache.append(k, v)
    outs = [
        decode_step(q, cache, policy, policy.new_state(cache))[0]
        for policy in (largest_keys(topk=30, num_sink_tokens=5, num_recent_tokens=5), Dense())
    ]
    assert rel_err(outs[0], outs[1]) <= 2e-6


def test_the_embedded_model_generates_and_is_evaluated_under_it(largest_keys: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path())
    ids = torch.randint(3, 200, (1, 300), generator=torch.Generator().manual_seed(0))
    policy = largest_keys.at_budget(200)
    assert isinstance(policy, Policy) and policy.capacity == 200
    assert policy_from_dict(policy.to_dict()) == policy
    with attach(model, policy):
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 303)
    policies = parse_policies(["dense", "largest_keys", "largest_keys:topk=16"], [200])
    assert policies["largest_keys 200"] == policy
    request = Request(
        tasks=(TASKS["niah_multikey"],),
        lengths=(Length(label="1x", tokens=512),),
        policies={label: policies[label] for label in ("dense", "largest_keys 200")},
        samples=4,
        timed_steps=1,
    )
    cells = {cell.policy: cell for cell in run(load_checkpoint(EMBEDDED), request).cells}
    assert cells["dense"].tokens_attended > 500
    assert cells["largest_keys 200"].tokens_attended == pytest.approx(200)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 0}, "topk: got 0"),
        ({"num_sink_tokens": -1}, "num_sink_tokens: got -1"),
        ({"num_recent_tokens": 0}, "num_recent_tokens: got 0"),
    ],
)
def test_settings_are_checked(largest_keys: Any, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        largest_keys(**settings)
