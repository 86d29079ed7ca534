"""entropy_pool and what flows between layers: counts, rows, passes; over TokenSelect and blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import KVCache, StreamingLLM, TokenSelect, decode_step, prefill, reference
from kvselect.fixed_cache import FixedKVCache
from kvselect.policies.entropy_pool import (
    FLOOR_SHARE,
    NUM_SAMPLES,
    EntropyHistory,
    normalised_entropy,
    pool_counts,
)
from kvselect.policies.stack_state import StackState
from kvselect.queries import Queries
from kvselect.testing import make_qkv, rel_err

LAYERS, TOPK = 4, 40


def queries_of(num_blocks: int, num_later_tokens: int = 0) -> Queries:
    return Queries(
        q=torch.zeros(1, num_blocks, 1, 32),
        phase="prefill",
        softmax_scale=1.0,
        cache_seqlens=torch.zeros(1, dtype=torch.int32),
        max_seqlen=0,
        offsets=tuple(range(num_blocks + 1)),
        num_later_tokens=num_later_tokens,
    )


def one_pass(
    stack: StackState, entropies: Tensor, units: Tensor, cache: KVCache, granule: int = 1
) -> Tensor:
    """Counts [num_layers, batch, num_blocks] of a pass; entropies of the same shape."""
    cache.append(*torch.zeros(2, cache.batch, 1, 1, 32))
    counts = []
    for layer in range(LAYERS):
        stack.follow(layer, cache)
        queries = queries_of(units.shape[1])
        counts.append(
            pool_counts(stack, layer, queries, entropies[layer], units, topk=TOPK, granule=granule)
        )
    return torch.stack(counts)


@pytest.mark.parametrize("granule", [1, 4])
def test_counts_are_those_of_the_reference(granule: int) -> None:
    generator = torch.Generator().manual_seed(1)
    stack, cache = StackState(LAYERS), KVCache(3, 1, 32, sketch=None)
    samples: list[list[list[float]]] = [[[] for _ in range(LAYERS)] for _ in range(3)]
    level = torch.tensor([0.2, 0.9, 0.5, 0.05])[:, None, None]
    for step in range(NUM_SAMPLES // 2 + 12):
        entropies = (level + 0.1 * torch.rand(LAYERS, 3, 2, generator=generator)).clamp(0, 1)
        units = torch.tensor([[500, 501], [TOPK, 30], [0, 90 + step]])
        counts = one_pass(stack, entropies, units, cache, granule)
        for row in range(3):
            pools = [TOPK * LAYERS] * 2
            before = copy.deepcopy(samples[row])
            for layer in range(LAYERS):
                for block in range(2):
                    known = [*before]
                    num_units = int(units[row, block])
                    if num_units > TOPK:
                        samples[row][layer].append(float(entropies[layer, row, block]))
                    known[layer] = samples[row][layer]
                    expected = reference.pool_count(
                        known, layer, pools[block], num_units, TOPK, granule, FLOOR_SHARE
                    )
                    assert int(counts[layer, row, block]) == expected, (step, row, layer, block)
                    pools[block] -= expected
    # Once everything is known, the flattest layer takes the most and the most peaked the least.
    last = counts[:, 0, 0].tolist()
    assert last[1] == max(last) > TOPK > min(last) == last[3] >= FLOOR_SHARE * TOPK
    assert sum(last) <= TOPK * LAYERS


def test_layers_share_evenly_before_everything_is_known() -> None:
    stack, cache = StackState(LAYERS), KVCache(1, 1, 32, sketch=None)
    entropies = torch.tensor([0.1, 0.9, 0.9, 0.9]).view(LAYERS, 1, 1)
    for _ in range(NUM_SAMPLES - 1):
        counts = one_pass(stack, entropies, torch.tensor([[1000]]), cache)
        assert counts.flatten().tolist() == [TOPK] * LAYERS


@pytest.mark.parametrize("first_layer", [0, 1, 3])
def test_the_pool_is_never_overdrawn(first_layer: int) -> None:
    """The first layers want all; those below still get their least."""
    stack, cache = StackState(LAYERS), KVCache(1, 1, 32, sketch=None)
    entropies = torch.full((LAYERS, 1, 1), 1e-3)
    entropies[first_layer] = 1.0
    for _ in range(NUM_SAMPLES + 1):
        counts = one_pass(stack, entropies, torch.tensor([[1000]]), cache).flatten()
    assert counts.sum() <= TOPK * LAYERS and counts[first_layer] == counts.max()
    assert counts.min() >= FLOOR_SHARE * TOPK and counts.max() <= 2 * TOPK


def test_entropy() -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(3, 50, generator=generator)
    weights[1, 20:] = 0.0
    weights[2, 1:] = 0.0
    got = normalised_entropy(weights, torch.tensor([50, 20, 1]))
    expected = [reference.normalised_entropy(w[:n].tolist()) for w, n in zip(weights, (50, 20, 1))]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)
    assert normalised_entropy(torch.ones(7), torch.tensor(7)).item() == pytest.approx(1.0)
    assert normalised_entropy(torch.zeros(7), torch.tensor(7)).item() == 0.0


def test_history_follows_rows_and_forgets_nothing_of_the_others() -> None:
    stack, cache = StackState(2), KVCache(2, 1, 32, sketch=None)
    cache.append(*torch.zeros(2, 2, 5, 1, 32))
    stack.follow(0, cache)
    history = stack.rows("entropy_pool", lambda: EntropyHistory(2, 2, cache.device))
    history.add(0, torch.tensor([[0.25], [0.75]]), torch.ones(2, 1, dtype=torch.bool))
    cache.crop(2)
    cache.reorder([1, 0, 1])
    stack.follow(0, cache)
    assert stack.rows("entropy_pool", lambda: history).means()[:, 0].tolist() == [0.75, 0.25, 0.75]
    cache.reset()
    stack.follow(0, cache)
    fresh = stack.rows("entropy_pool", lambda: EntropyHistory(3, 2, cache.device))
    assert fresh is not history and not fresh.count.any()
    assert stack.nbytes == fresh.nbytes // 2


@pytest.mark.parametrize("inference", [False, True])
def test_blocks_one_by_one_add_what_they_add_together(inference: bool) -> None:
    """More than a layer remembers, some of no sample; in place, also of another grad mode's."""
    generator = torch.Generator().manual_seed(3)
    entropy = torch.rand(3, 260, generator=generator)
    valid = torch.rand(3, 260, generator=generator) < torch.tensor([[1.0], [0.7], [0.1]])
    single, several = (EntropyHistory(3, 2, torch.device("cpu")) for _ in range(2))
    for begin in range(0, 260, 13):
        part = slice(begin, begin + 13)
        mean, count = several.add(1, entropy[:, part], valid[:, part])
        for i in range(13):
            at = slice(begin + i, begin + i + 1)
            with torch.inference_mode(inference and i % 2 == 0):
                one, seen = single.add(1, entropy[:, at], valid[:, at])
            there = valid[:, begin + i]  # of others nobody asks
            assert torch.allclose(one[there, 0], mean[there, i], atol=1e-6)
            assert torch.equal(seen[there, 0], count[there, i])
        with torch.inference_mode(inference):
            rows = torch.tensor([2, 0, 1])
            single.take_rows(rows)
            several.take_rows(rows)
        entropy, valid = entropy[rows], valid[rows]
    assert torch.equal(single.samples, several.samples) and torch.equal(single.count, several.count)
    assert torch.allclose(single.means(), several.means(), atol=1e-6)
    assert single.count.max() == NUM_SAMPLES and not single.means()[:, 0].any()


def test_what_is_carried_belongs_to_one_pass() -> None:
    stack, cache = StackState(3), KVCache(1, 1, 32, sketch=None)
    cache.append(*torch.zeros(2, 1, 5, 1, 32))
    stack.follow(0, cache)
    stack.carry("x", 0, queries_of(2), "from 0")
    assert stack.carried("x", 2, queries_of(2), lambda: "none") == "from 0"
    assert stack.carried("x", 2, queries_of(3), lambda: "none") == "none"  # other queries
    assert stack.carried("y", 2, queries_of(2), lambda: "none") == "none"
    assert stack.carried("x", 0, queries_of(2), lambda: "none") == "none"  # the pass once more
    cache.append(*torch.zeros(2, 1, 1, 1, 32))
    stack.follow(1, cache)
    assert stack.carried("x", 2, queries_of(2), lambda: "none") == "none"  # another step
    stack.carry("x", 0, queries_of(2), "from 0")
    cache.crop(1)
    cache.append(*torch.zeros(2, 1, 1, 1, 32))
    stack.follow(1, cache)
    assert stack.carried("x", 2, queries_of(2), lambda: "none") == "none"  # other tokens
    stack.carry("x", 0, queries_of(2), "from 0")
    stack.serve("another policy")
    assert stack.carried("x", 2, queries_of(2), lambda: "none") == "none"


# ---- over TokenSelect

POOLED: dict[str, Any] = {
    "topk": 32,
    "num_sink_tokens": 4,
    "num_recent_tokens": 32,
    "q_block_size": 32,
    "num_tail_tokens": 0,
    "sketch": None,
    "overselect": 1.0,
    "dense_below_tokens": 0,
    "layer_budget": "entropy_pool",
}
HEADS, GROUP, DIM, NUM_TOKENS = 2, 2, 32, 400


def stack_of(batch: int, peaked: tuple[float, ...]) -> tuple[list[KVCache], list[Tensor]]:
    """Caches of layers and queries for all tokens; a larger scale makes a layer more peaked."""
    caches, all_q = [], []
    for layer, scale in enumerate(peaked):
        q, k, v = make_qkv(batch, NUM_TOKENS, NUM_TOKENS, GROUP * HEADS, HEADS, DIM, seed=layer)
        cache = KVCache(batch, HEADS, DIM, sketch=None)
        cache.append(k, v)
        caches.append(cache)
        all_q.append(scale * q)
    return caches, all_q


def lists_of_steps(
    policy: TokenSelect, caches: list[KVCache], all_q: list[Tensor], steps: int
) -> list[Tensor]:
    """Lengths [layers, batch, heads] of decode steps that append one token each."""
    states = policy.new_states(caches)
    lengths = []
    for step in range(steps):
        of_layers = []
        for state, cache, q in zip(states, caches, all_q):
            kv = torch.Generator().manual_seed(step)
            new = torch.randn(2, 1, 1, HEADS, DIM, generator=kv)
            cache.append(*new.expand(-1, cache.batch, -1, -1, -1))
            info = decode_step(q[:, step : step + 1].contiguous(), cache, policy, state)[1]
            assert info.selection is not None
            of_layers.append(info.selection.topk_length)
        lengths.append(torch.stack(of_layers))
    return lengths


def test_pool_over_token_select_moves_tokens_to_flat_layers() -> None:
    policy = TokenSelect(**POOLED)
    assert policy.flows_between_layers and policy.keep_max == 64
    caches, all_q = stack_of(2, (3.0, 0.2, 1.0))
    lengths = lists_of_steps(policy, caches, all_q, NUM_SAMPLES + 3)
    always = 4 + 32
    assert (lengths[0] == always + 32).all()
    last = lengths[-1][:, 0, 0] - always
    assert last[1] > 32 > last[0] and last.sum() <= 3 * 32
    assert (lengths[-1] == lengths[-1][:, :, :1]).all()  # all lists of a layer are as long


def test_results_do_not_depend_on_the_order_of_requests() -> None:
    policy = TokenSelect(**POOLED)
    peaked = (3.0, 0.2, 1.0)
    caches, all_q = stack_of(3, peaked)
    together = lists_of_steps(policy, caches, all_q, NUM_SAMPLES + 3)
    for order in ([2, 0, 1], [1]):
        caches, all_q = stack_of(3, peaked)
        for cache in caches:
            cache.reorder(order)
        apart = lists_of_steps(policy, caches, [q[order] for q in all_q], NUM_SAMPLES + 3)
        assert torch.equal(torch.stack(together)[:, :, order], torch.stack(apart))


def test_two_requests_one_after_the_other_know_nothing_of_each_other() -> None:
    policy = TokenSelect(**POOLED)
    runs = []
    for _ in range(2):
        caches, all_q = stack_of(1, (3.0, 0.2))
        runs.append(torch.stack(lists_of_steps(policy, caches, all_q, NUM_SAMPLES + 2)))
    assert torch.equal(*runs)


@pytest.mark.parametrize("chunk_size", [32, 96, 2048])
def test_prefill_lists_do_not_depend_on_the_chunk_size(chunk_size: int) -> None:
    outs = []
    for size in (chunk_size, 64):
        policy = TokenSelect(**POOLED, chunk_size=size)
        caches, all_q = stack_of(2, (3.0, 0.2, 1.0))
        states = policy.new_states(caches)
        outs.append([prefill(q, c, policy, s)[0] for q, c, s in zip(all_q, caches, states)])
    for one, other in zip(*outs):
        assert torch.equal(one, other)


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("change", [{"layer_budget": "entropy_pool"}, {"aggregate": "probe"}])
def test_budget_at_least_the_length_is_dense(group: int, change: dict[str, Any]) -> None:
    policy = TokenSelect(**{**POOLED, "layer_budget": "fixed", "topk": 60, **change})
    for seqlen in (95, 96):  # budget 96
        q, k, v = make_qkv(2, seqlen, seqlen, group * HEADS, HEADS, DIM, seed=seqlen)
        cache = KVCache(2, HEADS, DIM, sketch=None)
        cache.append(k, v, [seqlen, seqlen - 30])
        out, _ = prefill(q, cache, policy, policy.new_state(cache))
        assert rel_err(out, reference.sparse_attention(q, cache)[0]) <= 2e-6
        step, _ = decode_step(q[:, -1:].contiguous(), cache, policy, policy.new_state(cache))
        assert rel_err(step, reference.sparse_attention(q[:, -1:], cache)[0]) <= 2e-6
    # Beside a longer row the short one goes through a list of everything.
    q, k, v = make_qkv(2, 1, 300, group * HEADS, HEADS, DIM, seed=3)
    cache = KVCache(2, HEADS, DIM, sketch=None)
    cache.append(k, v, [300, 96])
    step, _ = decode_step(q, cache, policy, policy.new_state(cache))
    assert rel_err(step[1], reference.sparse_attention(q, cache)[0][1]) <= 2e-6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_budget": "pool"}, "layer_budget: got 'pool', allowed: 'fixed' or 'entropy_pool'"),
        ({"mass_target": 0.9, "topk_max": 64}, r"mass_target: got 0.9, allowed: None with layer_b"),
        ({"similarity_threshold": 0.9}, "similarity_threshold: got 0.9, allowed: None with layer"),
        ({"num_segments": 4}, "num_segments: got 4, allowed: None with layer_budget"),
        ({"pool_width": 3}, "pool_width: got 3, allowed: 1 with layer_budget='entropy_pool'"),
        (
            {"aggregate": "probe", "average_queries": "after_rope"},
            "average_queries: got 'after_rope', allowed: 'before_rope' with aggregate='probe'",
        ),
        ({"aggregate": "probes"}, "aggregate: got 'probes', allowed: .* or 'probe'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenSelect(**{**POOLED, **change})


def test_other_settings_void_what_is_shared() -> None:
    caches, all_q = stack_of(1, (3.0, 0.2))
    policy, other = TokenSelect(**POOLED), TokenSelect(**{**POOLED, "topk": 16})
    states = policy.new_states(caches)
    assert states[0].stack is states[1].stack is not None and states[1].layer == 1
    assert StreamingLLM().new_states(caches)[0].stack is None
    for state, cache, q in zip(states, caches, all_q):
        decode_step(q[:, :1].contiguous(), cache, policy, state)
    assert states[0].nbytes > 0
    for state, cache, q in zip(states, caches, all_q):
        info = decode_step(q[:, :1].contiguous(), cache, other, state)[1]
        assert info.selection is not None
        assert (info.selection.topk_length == 4 + 16 + 32).all()


def test_a_cache_of_fixed_room_is_refused() -> None:
    policy = TokenSelect(**POOLED)
    q, k, v = make_qkv(1, 1, 200, 4, HEADS, DIM, seed=0)
    cache = FixedKVCache(1, HEADS, DIM, capacity=256, sketch=None)
    cache.append(k, v)
    with pytest.raises(ValueError, match="cache: got 'FixedKVCache', allowed: a cache whose"):
        decode_step(q, cache, policy, policy.new_state(cache))


def kept_mass(policy: TokenSelect, scales: tuple[float, ...]) -> tuple[float, int]:
    """Mean attention mass that lists keep at the last steps, and tokens that they hold in all."""
    caches, all_q = stack_of(2, scales)
    states = policy.new_states(caches)
    masses, tokens = [], 0
    for step in range(NUM_SAMPLES + 20):
        for state, cache, q in zip(states, caches, all_q):
            cache.append(*torch.zeros(2, 2, 1, HEADS, DIM))
            info = decode_step(q[:, step : step + 1].contiguous(), cache, policy, state)[1]
            if step >= NUM_SAMPLES:
                assert info.kept_mass is not None and info.selection is not None
                masses.append(info.kept_mass.mean())
                tokens += int(info.selection.topk_length.sum())
    return float(torch.stack(masses).mean()), tokens


def test_the_pool_keeps_more_mass_than_even_shares_of_the_same_total() -> None:
    """Works when (METHODS 3.4): layers differ in how peaked they are; drawn keys (simulated)."""
    pool, pool_tokens = kept_mass(TokenSelect(**POOLED), (4.0, 0.7, 4.0, 0.7))
    even, even_tokens = kept_mass(
        TokenSelect(**{**POOLED, "layer_budget": "fixed"}), (4.0, 0.7, 4.0, 0.7)
    )
    assert pool_tokens <= even_tokens
    assert pool > even + 0.01, (pool, even)
