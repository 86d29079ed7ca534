"""Random lives of a cache against transformers' own: append, crop, reorder, repeat, select, reset.

Between them decode steps attend through remembered lists that hold every token: a list, a sketch
block or a row that outlived what it was made of shows as a difference to plain attention over
transformers' tensors.

``KVSELECT_TEST_PROFILE=long`` (or ``make test-long``) runs 10,000 sequences.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor
from transformers import DynamicCache

from kvselect import TokenSelect, decode_step
from kvselect.integrations.hf.cache_layer import KVSelectLayer
from kvselect.integrations.hf.head_dims import filled_up
from kvselect.integrations.hf.plan import Tier
from kvselect.integrations.hf.tiered_layer import KVSelectTieredLayer
from kvselect.integrations.hf.upgrade_cache import upgrade_cache
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.testing import rel_err

LONG = os.environ.get("KVSELECT_TEST_PROFILE") == "long"
LAYERS, HEADS, GROUP, LARGEST_BATCH, LONGEST = 2, 2, 2, 6, 700

# Everything is listed; a remembered list is reused whenever it may be.
LISTING: dict[str, Any] = {
    "topk": 8,
    "num_sink_tokens": 2,
    "overselect": 100.0,
    "dense_below_tokens": 0,
    "max_age": 1000,
}
POLICIES = {
    "fresh": LISTING,
    "reused": {**LISTING, "similarity_threshold": 1e-6},
    "reused by layer": {**LISTING, "similarity_threshold": 1e-6, "scope": "layer"},
    "rolling": {**LISTING, "num_segments": 2, "pool_factor": 100.0},
}


STEPS = st.integers(0, 4)


class CacheLives(RuleBasedStateMachine):
    """Two caches that must not differ: ``ours``, upgraded, and ``theirs``."""

    sketches: ClassVar[list[str | None]] = ["int4", None]
    tiers: ClassVar[dict[int, Tier]] = {}

    @initialize(
        batch=st.integers(1, 3),
        head_dim=st.sampled_from([16, 32]),
        policy=st.sampled_from([*POLICIES]),
    )
    def begin(self, batch: int, head_dim: int, policy: str) -> None:
        if self.tiers and policy == "rolling":
            policy = "fresh"  # pools need keys that lie elsewhere
        self.ours, self.theirs = DynamicCache(), DynamicCache()
        upgrade_cache(self.ours, self.sketches, tiers=self.tiers)
        self.batch, self.head_dim, self.draws = batch, head_dim, 0
        self.statistics = PhaseStatistics(), PhaseStatistics()
        self.changed = [True] * LAYERS  # by more than the token of a decode step
        self.policies = [
            TokenSelect(**POLICIES[policy], sketch=sketch, num_recent_tokens=128 if sketch else 12)
            for sketch in self.sketches
        ]

    def draw(self, heads: int, count: int) -> Tensor:
        self.draws += 1
        generator = torch.Generator().manual_seed(self.draws)
        shape = (self.batch, count, heads, self.head_dim)
        return torch.randn(shape, generator=generator).transpose(1, 2)

    @property
    def length(self) -> int:
        layers = self.theirs.layers
        return layers[0].get_seq_length() if layers and layers[0].is_initialized else 0

    def append_tokens(self, count: int) -> None:
        for index in range(LAYERS):
            keys, values = self.draw(HEADS, count), self.draw(HEADS, count)
            got = self.ours.update(keys, values, index)
            expected = self.theirs.update(keys, values, index)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])

    def decode(self, steps: int) -> None:
        """Tokens one by one, each attended to through what the policy remembers of the layer."""
        for _ in range(steps if self.length and self.length < LONGEST else 0):
            self.append_tokens(1)
            for index, policy in enumerate(self.policies):
                layer: Any = self.ours.layers[index]
                assert type(layer) is (KVSelectTieredLayer if self.tiers else KVSelectLayer)
                state = layer.state(index, policy, self.statistics)
                query = 1.0 + 0.1 * self.draw(HEADS * GROUP, 1)  # alike: lists may be reused
                q = filled_up(query.transpose(1, 2), layer.cache.head_dim)
                out, info = decode_step(q, layer.cache, policy, state)
                if info.hit is not None and self.changed[index]:
                    assert not info.hit.any(), "a list of other tokens was reused"
                self.changed[index] = False
                keys, values = self.theirs.layers[index].keys, self.theirs.layers[index].values
                expected = torch.nn.functional.scaled_dot_product_attention(
                    query.double(),
                    keys.double().repeat_interleave(GROUP, 1),
                    values.double().repeat_interleave(GROUP, 1),
                    scale=layer.cache.head_dim**-0.5,
                )
                assert rel_err(out[..., : self.head_dim].transpose(1, 2), expected) <= 4e-6

    @rule(count=st.one_of(st.integers(1, 9), st.integers(100, 200)), then=STEPS)
    def append(self, count: int, then: int) -> None:
        if self.length < LONGEST:
            self.append_tokens(count)
            self.changed = [changed or count > 1 for changed in self.changed]
        self.decode(then)

    @rule(data=st.data(), then=STEPS)
    def crop(self, data: Any, then: int) -> None:
        count = data.draw(st.integers(0, self.length))
        for cache in (self.ours, self.theirs):
            cache.crop(-count)
        self.changed = [changed or count > 0 for changed in self.changed]
        self.decode(then)

    @rule(data=st.data(), then=STEPS)
    def reorder(self, data: Any, then: int) -> None:
        if not self.length:
            return
        row = st.integers(0, self.batch - 1)
        rows = data.draw(st.lists(row, min_size=self.batch, max_size=self.batch))
        for cache in (self.ours, self.theirs):
            cache.reorder_cache(torch.tensor(rows))
        self.changed = [True] * LAYERS
        self.decode(then)

    @rule(data=st.data(), then=STEPS)
    def select(self, data: Any, then: int) -> None:
        if not self.length:
            return
        row = st.integers(0, self.batch - 1)
        rows = data.draw(st.lists(row, min_size=1, max_size=self.batch, unique=True))
        for cache in (self.ours, self.theirs):
            cache.batch_select_indices(torch.tensor(rows))
        self.batch = len(rows)
        self.changed = [True] * LAYERS
        self.decode(then)

    @rule(then=STEPS)
    def repeat(self, then: int) -> None:
        if not self.length or 2 * self.batch > LARGEST_BATCH:
            return
        for cache in (self.ours, self.theirs):
            cache.batch_repeat_interleave(2)
        self.batch *= 2
        self.changed = [True] * LAYERS
        self.decode(then)

    @rule(seldom=st.integers(0, 3))
    def reset(self, seldom: int) -> None:
        if seldom:
            return
        self.ours.reset()
        self.theirs = DynamicCache()  # older versions only zero what they hold
        self.changed = [True] * LAYERS

    @invariant()
    def nothing_differs(self) -> None:
        if not hasattr(self, "ours"):
            return
        assert self.ours.get_seq_length() == self.length
        assert self.ours.get_mask_sizes(3, 0) == (self.length + 3, 0)
        for ours, theirs in zip(self.ours.layers, self.theirs.layers):
            if self.length:
                assert torch.equal(ours.keys, theirs.keys)
                assert torch.equal(ours.values, theirs.values)


class TieredCacheLives(CacheLives):
    """The same with keys and values on the host, and room for the longest list on the device."""

    sketches: ClassVar[list[str | None]] = ["int4", "int8"]
    tiers: ClassVar[dict[int, Tier]] = {
        index: Tier(2, 128, LONGEST + 220) for index in range(LAYERS)
    }


TestCacheLives, TestTieredCacheLives = CacheLives.TestCase, TieredCacheLives.TestCase
TestCacheLives.settings = TestTieredCacheLives.settings = settings(
    deadline=None,
    max_examples=10_000 if LONG else 60,
    stateful_step_count=15,
    suppress_health_check=[HealthCheck.too_slow],
)
