"""drop_below: from the layer on that does not look at the span, all of it goes."""

from __future__ import annotations

from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor

from kvselect import (
    LayerSchedule,
    MaxMin,
    PolicyState,
    SnapKV,
    decode_step,
    policy_from_dict,
    prefill,
    reference,
)
from kvselect.evictable_cache import EvictableKVCache
from kvselect.integrations.hf import attach
from kvselect.policies.eviction import EvictionPolicy, Span
from kvselect.queries import Queries
from kvselect.testing import rel_err

DIM, HEADS, TOKENS, SINKS, RECENT = 32, 2, 100, 3, 9
SPAN = TOKENS - SINKS - RECENT


def small(kind: type[Any] = MaxMin, **changes: Any) -> Any:
    sizes = {"num_sink_tokens": SINKS, "num_recent_tokens": RECENT, "num_window_queries": 8}
    return kind(**({"ratio": 0.25} | sizes | changes))


class Stack:
    """Layers whose last queries look at the span (a share near 1) or at the first token (0)."""

    def __init__(self, looks: list[list[bool]]) -> None:
        """``looks``: by layer and row."""
        generator = torch.Generator().manual_seed(0)
        batch = len(looks[0])
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows in looks:
            k, v = 0.1 * torch.randn(2, batch, TOKENS, HEADS, DIM, generator=generator)
            k[:, :, :, 0] = 1.0  # of every key; the first one points the other way
            k[:, 0, :, 0] = -1.0
            q = 0.1 * torch.randn(batch, TOKENS + 1, 2 * HEADS, DIM, generator=generator)
            q[..., 0] = torch.where(torch.tensor(rows), 60.0, -60.0)[:, None, None]
            self.layers.append((q, k, v))

    def run(self, policies: list[Any], states: list[PolicyState] | None = None) -> list[list[int]]:
        """A prompt and a step through all layers, in turn; tokens of the span that each row keeps,
        layer by layer."""
        batch = self.layers[0][0].shape[0]
        self.caches = [EvictableKVCache(batch, HEADS, DIM) for _ in self.layers]
        self.states = policies[0].new_states(self.caches) if states is None else states
        for (q, k, v), cache, policy, state in zip(self.layers, self.caches, policies, self.states):
            cache.append(k, v)
            prefill(q[:, :TOKENS], cache, policy, state)
        self.before = [cache.nbytes for cache in self.caches]
        self.outs = []
        for (q, k, v), cache, policy, state in zip(self.layers, self.caches, policies, self.states):
            cache.append(k[:, :1], v[:, :1])
            self.outs.append(decode_step(q[:, TOKENS:], cache, policy, state)[0])
        kept = []
        for cache in self.caches:
            assert cache.rows is not None
            lengths = cache.listed().topk_length
            assert torch.equal(lengths[:, :1].expand_as(lengths), lengths)
            kept.append((lengths[:, 0] - SINKS - RECENT - 1).tolist())
        return kept


def test_the_span_goes_from_the_first_layer_on_that_does_not_look() -> None:
    stack = Stack([[True], [True], [False], [True]])
    policy = small(drop_below=0.1)
    assert stack.run([policy] * 4) == [[22], [22], [0], [0]]  # the last one is not asked
    for cache, before, dropped in zip(stack.caches, stack.before, (False, False, True, True)):
        assert cache.nbytes < (0.3 if dropped else 0.6) * before  # pages of 16 tokens
        assert cache.k.isnan().all()
    _, k, v = stack.layers[2]
    left = [*range(SINKS), *range(TOKENS - RECENT, TOKENS)]
    k, v = (torch.cat((x[:, left], x[:, :1]), 1) for x in (k, v))
    wanted = reference.sparse_attention(stack.layers[2][0][:, TOKENS:], cache_of(k, v))[0]
    assert rel_err(stack.outs[2], wanted) <= 3e-6


def cache_of(k: Tensor, v: Tensor) -> EvictableKVCache:
    cache = EvictableKVCache(k.shape[0], HEADS, DIM)
    cache.append(k, v)
    return cache


def test_nothing_is_dropped_while_all_layers_look() -> None:
    stack = Stack([[True], [True], [True]])
    assert stack.run([small(drop_below=0.1)] * 3) == [[22]] * 3
    kept, outs = [cache.listed().indices for cache in stack.caches], stack.outs
    assert stack.run([small()] * 3) == [[22]] * 3
    assert all(torch.equal(a, b.listed().indices) for a, b in zip(kept, stack.caches))
    assert all(torch.equal(a, b) for a, b in zip(outs, stack.outs))


def test_every_row_has_its_own_layer() -> None:
    stack = Stack([[True, True, False], [True, False, True], [True, True, True]])
    assert stack.run([small(drop_below=0.1)] * 3) == [[22, 22, 0], [22, 0, 0], [22, 0, 0]]


def test_a_budget_for_everything_is_dropped_all_the_same() -> None:
    stack = Stack([[True], [False]])
    assert stack.run([small(ratio=1.0, drop_below=0.1)] * 2) == [[SPAN], [0]]


def test_what_follows_and_another_prompt_start_anew() -> None:
    """Steps after the eviction carry nothing, and the same stack decides anew after a reset."""
    stack, policy = Stack([[True], [False]]), small(drop_below=0.1)
    stack.run([policy] * 2)
    for (q, k, v), cache, state in zip(stack.layers, stack.caches, stack.states):
        cache.append(k[:, :1], v[:, :1])
        decode_step(q[:, TOKENS:], cache, policy, state)
        cache.reset()
    for (q, k, v), cache, state in zip(stack.layers, stack.caches, stack.states):
        cache.append(k[:, :60], v[:, :60])
        prefill(q[:, -60:], cache, policy, state)
    for (q, k, v), cache, state in zip(stack.layers, stack.caches, stack.states):
        cache.append(k[:, :1], v[:, :1])
        decode_step(q[:, TOKENS:], cache, policy, state)
    lengths = [int(cache.listed().topk_length[0, 0]) for cache in stack.caches]
    assert lengths == [SINKS + RECENT + 1 + 12, SINKS + RECENT + 1]


def test_a_schedule_that_ends_early() -> None:
    schedule = LayerSchedule(
        method="MaxMin",
        first_layer=1,
        last_layer=3,
        ratio=0.5,
        drop_below=0.1,
        num_sink_tokens=SINKS,
        num_recent_tokens=RECENT,
        num_window_queries=8,
    )
    assert schedule.flows_between_layers and not LayerSchedule().flows_between_layers
    assert policy_from_dict(schedule.to_dict()) == schedule
    assert schedule.for_layer(0) == small(ratio=0.5, drop_below=0.1)
    for looks, wanted in ((True, [[44], [44], [22], [0]]), (False, [[44], [0], [0], [0]])):
        stack = Stack([[True], [looks], [True], [True]])
        caches = [EvictableKVCache(1, HEADS, DIM) for _ in range(4)]
        policies = [schedule.for_layer(layer) for layer in range(4)]
        states = schedule.new_states(caches)
        assert [state.policy for state in states] == policies
        assert stack.run(policies, states) == wanted


def test_a_layer_by_itself_is_refused() -> None:
    stack, policy = Stack([[True]]), small(drop_below=0.1)
    state = policy.new_state(EvictableKVCache(1, HEADS, DIM))
    message = r"state: got 'the state of a layer by itself', allowed: one of policy.new_states"
    with pytest.raises(ValueError, match=message):
        stack.run([policy], [state])
    assert stack.run([policy]) == [[22]]  # a stack of one is one


def test_through_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the masses of the model's own layers: from the least one on all goes."""
    model, ids = hf_models.model("llama"), hf_models.tokens(1, 150, seed=3)
    masses: list[float] = []
    ask = EvictionPolicy._is_ignored

    def watched(self: EvictionPolicy, span: Span, queries: Queries) -> bool:
        masses.append(float(span.weights.sum(2).mean()))
        return ask(self, span, queries)

    def lengths(policy: EvictionPolicy) -> list[list[int]]:
        with attach(model, policy) as handle, torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            model(ids[:, :1], past_key_values=cache)
            handle.verify(prompt_tokens=60)
            return [layer.cache.rows.lengths for layer in cache.layers]

    options: dict[str, Any] = {"num_sink_tokens": 2, "num_recent_tokens": 8, "topk": 16}
    monkeypatch.setattr(EvictionPolicy, "_is_ignored", watched)
    assert [set(found) for found in lengths(SnapKV(**options, drop_below=1e-6))] == [{27}] * 3
    least = masses.index(min(masses[:3]))
    assert least > 0  # of this prompt
    found = lengths(SnapKV(**options, drop_below=min(masses[:3]) + 1e-6))
    assert [set(each) for each in found] == [{27}] * least + [{11}] * (3 - least)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"drop_below": 0.0}, ValueError, r"drop_below: got 0.0, allowed: None or a float in \(0"),
        ({"drop_below": 1.5}, ValueError, "drop_below: got 1.5"),
        ({"drop_below": "low"}, TypeError, "drop_below: got str 'low'"),
    ],
)
@pytest.mark.parametrize("kind", [MaxMin, LayerSchedule])
def test_bounds(
    kind: type[Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(**changes)


def test_a_key_that_is_no_number_does_not_hide_the_others() -> None:
    stack = Stack([[True, True], [True, False]])
    for _, k, _ in stack.layers:
        k[1, 50] = torch.nan
    assert stack.run([small(SnapKV, drop_below=0.1)] * 2) == [[22, 22], [22, 0]]


def test_rows_that_all_left() -> None:
    q, k, v = Stack([[True]]).layers[0]
    policy, cache = small(SnapKV, drop_below=0.1), EvictableKVCache(1, HEADS, DIM)
    (state,) = policy.new_states([cache])
    cache.append(k, v)
    prefill(q[:, :TOKENS], cache, policy, state)
    cache.reorder([])
    cache.append(k[:0, :1], v[:0, :1])
    assert decode_step(q[:0, TOKENS:], cache, policy, state)[0].shape == (0, 1, 2 * HEADS, DIM)
