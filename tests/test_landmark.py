"""Landmark: blocks by moments of their keys; how good the estimate is, and what the rest adds."""

from __future__ import annotations

import itertools
from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor

from kvselect import KVCache, Landmark, Rope, TieredKVCache, attach, decode_step, prefill, reference
from kvselect.block_scores import moment_logits
from kvselect.block_statistics import BlockStatistics
from kvselect.queries import Queries
from kvselect.testing import make_qkv, rel_err

DIM, HEADS = 32, 2


def small(**changes: Any) -> Landmark:
    fields: dict[str, Any] = {
        "topk_blocks": 3,
        "block_size": 16,
        "num_recent_tokens": 32,
        "q_block_size": 16,
    }
    return Landmark(**(fields | changes))


def drifting(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values that resemble their neighbours, as those of text do."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(2, batch, -(-tokens // 24), HEADS, DIM, generator=generator)
    noise = torch.randn(2, batch, tokens, HEADS, DIM, generator=generator)
    k, v = 0.7 * noise + 0.7 * topics.repeat_interleave(24, 2)[:, :, :tokens]
    return k, v


def filled(
    seqlens: tuple[int, ...],
    group: int = 2,
    starts: list[int] | None = None,
    seqlen_q: int = 1,
    seed: int = 0,
) -> tuple[Tensor, KVCache]:
    batch = len(seqlens)
    q, _, _ = make_qkv(batch, seqlen_q, 1, group * HEADS, HEADS, DIM, seed=seed)
    cache = KVCache(batch, HEADS, DIM, sketch=None)
    if starts is not None:
        cache.set_starts(starts)
    cache.append(*drifting(batch, max(seqlens), seed), list(seqlens))
    return q, cache


def lists(info: Any, row: int, head: int) -> list[int]:
    selection = info.selection
    found: list[int] = selection.indices[
        row, head, : int(selection.topk_length[row, head])
    ].tolist()
    assert (selection.indices[row, head, len(found) :] == -1).all()
    return found


def picked_by_reference(
    q: Tensor, cache: KVCache, policy: Landmark, row: int, heads: list[int], first: int
) -> list[int]:
    """Blocks of the best weights for queries [n, num_q_heads, dim], which share a list."""
    sinks = policy.num_sink_blocks
    blocks = reference.blocks_of_row(cache, row, policy.block_size)[:first]  # type: ignore[arg-type]
    weights = torch.full((len(blocks),), -torch.inf, dtype=torch.float64)
    group = q.shape[1] // HEADS
    for token, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
        if head // group not in heads:
            continue
        own = [
            reference.moment_lse(
                q[token, head],
                reference.finite_keys(cache, row, head // group, block),  # type: ignore[arg-type]
                DIM**-0.5,
                policy.order,
            )
            for block in blocks[sinks:]
        ]
        weights[sinks:] = weights[sinks:].maximum(torch.tensor(own).double().log_softmax(0))
    order = sorted(range(sinks, len(blocks)), key=lambda block: (-weights[block], block))
    return sorted([*range(min(sinks, first)), *order[: policy.topk_blocks]])


@pytest.mark.parametrize("scope", ["kv_head", "layer"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sinks", [0, 20])
def test_decode(scope: str, order: int, sinks: int) -> None:
    policy = small(scope=scope, order=order, num_sink_tokens=sinks)
    q, cache = filled((300, 287, 40), starts=[0, 9, 0])
    state = policy.new_state(cache)
    out, info = decode_step(q, cache, policy, state)
    assert (info.selection.indices.stride(1) == 0) == (scope == "layer")
    for row, (start, end) in enumerate([(0, 300), (9, 287), (0, 40)]):
        first = max(end - 32 - start, 0) // 16
        for head in range(HEADS):
            heads = [head] if scope == "kv_head" else [0, 1]
            blocks = picked_by_reference(q[row], cache, policy, row, heads, first)
            tokens = [start + 16 * b + i for b in blocks for i in range(16)]
            assert lists(info, row, head) == [*tokens, *range(start + 16 * first, end)]
    assert rel_err(out, reference.sparse_attention(q, cache, info.selection)[0]) <= 2e-6


@pytest.mark.parametrize("scope", ["kv_head", "layer"])
@pytest.mark.parametrize("chunk_size", [16, 50, 2048])
def test_prefill(scope: str, chunk_size: int) -> None:
    """Query blocks by the same rule, whatever the runs; every list by the reference."""
    policy = small(scope=scope, chunk_size=chunk_size, num_sink_tokens=5)
    q, cache = filled((170, 170), starts=[0, 37], seqlen_q=170)
    out, lse = prefill(q, cache, policy, policy.new_state(cache))
    for row, start in enumerate([0, 37]):
        for begin, end in itertools.pairwise([0, *range(10, 171, 16)]):
            if end <= start:
                assert not out[row, begin:end].any()
                continue
            first = max(max(begin, start) - 32 - start, 0) // 16
            for head in range(HEADS):
                heads = [head] if scope == "kv_head" else [0, 1]
                blocks = picked_by_reference(q[row, begin:end], cache, policy, row, heads, first)
                tokens = [start + 16 * b + i for b in blocks for i in range(16)]
                tokens += range(start + 16 * first, end)
                for token in range(max(begin, start), end):
                    seen = [position for position in tokens if position <= token]
                    own = q[row, token, 2 * head : 2 * head + 2].double()
                    logits = own @ cache.k[row, seen, head].double().mT * DIM**-0.5
                    expect = logits.softmax(-1) @ cache.v[row, seen, head].double()
                    assert rel_err(out[row, token, 2 * head : 2 * head + 2], expect) <= 4e-6
                    found = lse[row, token, 2 * head : 2 * head + 2].double()
                    assert torch.allclose(found, logits.logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize("attention", ["joint", "residual"])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 31, 32, 33, 143, 144, 145])
def test_budget_at_least_the_length_is_dense(attention: str, group: int, seqlen: int) -> None:
    policy = small(topk_blocks=7, attention=attention)
    q, cache = filled((seqlen, max(seqlen - 9, 1)), group, seqlen_q=seqlen)
    out, _ = prefill(q, cache, policy, policy.new_state(cache))
    for row, length in enumerate([seqlen, max(seqlen - 9, 1)]):
        dense = reference.sparse_attention(q, cache)[0]
        assert rel_err(out[row, -length:], dense[row, -length:]) <= 2e-6
    # Short rows beside a long one go through lists of everything.
    q, cache = filled((seqlen, 400, max(seqlen - 9, 1)), group)
    out, info = decode_step(q, cache, policy, policy.new_state(cache))
    assert info.selection is not None
    dense = reference.sparse_attention(q, cache)[0]
    assert rel_err(out[[0, 2]], dense[[0, 2]]) <= 2e-6


@pytest.mark.parametrize("keys", ["gaussian", "drifting"])
def test_error_of_the_estimate_by_order(keys: str) -> None:
    """Mean and largest error against the exact lse of each block: the second moment is worth it."""
    if keys == "gaussian":
        q, k, v = make_qkv(1, 8, 1024, 4 * HEADS, HEADS, DIM, seed=2)
    else:
        q, k, v = *make_qkv(1, 8, 1, 4 * HEADS, HEADS, DIM, seed=2)[:1], *drifting(1, 1024)
    cache, blocks = KVCache(1, HEADS, DIM, sketch=None), BlockStatistics(64, ("moments",))
    cache.append(k, v)
    blocks.follow(cache)
    by_block = k[0].double().view(16, 64, HEADS, DIM).permute(2, 0, 1, 3)
    own = q[0].double().view(8, HEADS, 4, DIM).transpose(0, 1)
    exact = torch.einsum("hqgd,hbtd->hqgbt", own, by_block).mul(DIM**-0.5).logsumexp(-1)
    error = {}
    for order in (1, 2):
        found = moment_logits(
            q, blocks.moments[:, :, :16], blocks.num_finite[:, :, :16], order, DIM**-0.5
        )[0]
        one = reference.moment_lse(q[0, 3, 5], by_block[1, 7], DIM**-0.5, order)
        assert found[1, 3, 1, 7].item() == pytest.approx(one, abs=1e-5)
        assert reference.block_lse(q[0, 3, 5], by_block[1, 7], DIM**-0.5) == pytest.approx(
            exact[1, 3, 1, 7].item()
        )
        error[order] = (found.double() - exact).abs()
    # Jensen: the mean key never promises more than there is.
    assert error[2].mean() < 0.5 * error[1].mean()
    assert error[2].mean() < 0.6 and error[2].amax() < 4.0


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_residual_is_nearer_to_dense(order: int, seqlen_q: int) -> None:
    q, cache = filled((600, 533), 4, seqlen_q=seqlen_q)
    dense = reference.sparse_attention(q, cache)[0]
    errors = {}
    for attention in ("joint", "residual"):
        policy = small(order=order, attention=attention)
        out, _ = prefill(q, cache, policy, policy.new_state(cache))
        errors[attention] = rel_err(out, dense)
    assert errors["residual"] < 0.6 * errors["joint"]


def test_residual_is_exact_where_a_block_is_one_key() -> None:
    """Equal keys and values within every block: pseudo-tokens are the tokens themselves."""
    q, cache = filled((400, 330), seqlen_q=40)
    flat = KVCache(2, HEADS, DIM, sketch=None)
    k, v = (x[:, ::16].repeat_interleave(16, 1)[:, :400] for x in (cache.k, cache.v))
    flat.append(k, v, [400, 330])
    policy = small(attention="residual", num_sink_tokens=3)
    out, lse = prefill(q, flat, policy, policy.new_state(flat))
    expect, expect_lse = reference.sparse_attention(q, flat)
    assert rel_err(out, expect) <= 4e-6 and rel_err(lse, expect_lse) <= 2e-6
    sinks = torch.randn(4)
    out, info = decode_step(
        q[:, -1:].contiguous(), flat, policy, policy.new_state(flat), sink_logits=sinks
    )
    expect = reference.sparse_attention(q[:, -1:], flat, sink_logits=sinks)[0]
    assert info.selection is not None and rel_err(out, expect) <= 4e-6


def test_recall_lost_per_scope_step() -> None:
    """What the picked blocks hold: a list per token, one for 16 similar tokens, one per layer."""
    _, cache = filled((912,), 4)
    generator = torch.Generator().manual_seed(3)
    topic = torch.randn(1, 1, 4 * HEADS, DIM, generator=generator)
    q = 2.0 * (topic + 0.7 * torch.randn(1, 16, 4 * HEADS, DIM, generator=generator))
    logits = q[0].double().view(16, HEADS, 4, DIM).transpose(0, 1).flatten(1, 2)
    mass = (logits @ cache.k[0].double().transpose(0, 1).mT * DIM**-0.5).softmax(-1)
    mass = mass.view(HEADS, 16, 4, 912)

    kept = {}
    for name, length, scope in (
        ("token", 1, "kv_head"),
        ("queries", 16, "kv_head"),
        ("layer", 16, "layer"),
    ):
        policy = small(q_block_size=length, scope=scope, num_recent_tokens=32)
        offsets = tuple(range(0, 17, length))
        queries = Queries(
            q=q,
            phase="prefill",
            softmax_scale=DIM**-0.5,
            cache_seqlens=cache.cache_seqlens,
            max_seqlen=912,
            offsets=offsets,
            q_block_offsets=torch.tensor(offsets, dtype=torch.int32),
        )
        state = policy.new_state(cache)
        policy.update(state, cache)
        selection = policy.select(state, queries, cache)
        assert selection is not None
        total = 0.0
        for token, head in itertools.product(range(16), range(HEADS)):
            listed = selection.indices[0, token // length, head]
            total += float(mass[head, token][:, listed[(listed >= 0) & (listed < 864)]].sum())
        kept[name] = total / (16 * HEADS * 4)
    assert kept["token"] > 1.1 * kept["queries"] > 1.1 * kept["layer"] > 0.05


def test_batched_equals_one_by_one_and_drafts_their_steps() -> None:
    policy = small(attention="residual")
    q, cache = filled((300, 211), starts=[0, 20], seqlen_q=9)
    out, _ = prefill(q, cache, policy, policy.new_state(cache))
    again, _ = prefill(q, cache, policy, policy.new_state(cache))
    assert torch.equal(out, again)
    for row, (start, end) in enumerate([(0, 300), (20, 211)]):
        for back in (0, 3, 8):
            alone = KVCache(1, HEADS, DIM, sketch=None)
            part = slice(start, end - back)
            alone.append(cache.k[row : row + 1, part], cache.v[row : row + 1, part])
            token = q[row : row + 1, 8 - back : 9 - back].contiguous()
            one, _ = decode_step(token, alone, policy, policy.new_state(alone))
            assert rel_err(out[row : row + 1, 8 - back : 9 - back], one) <= 2e-6


@pytest.mark.parametrize("positions", ["original", "stingy"])
@pytest.mark.parametrize("seqlen_q", [150, 60])
def test_padding_that_every_row_has_changes_nothing(positions: Any, seqlen_q: int) -> None:
    """Blocks begin at the first real token: there are fewer than columns would make."""
    policy = small(positions=positions, num_recent_tokens=16)
    rope = None
    if positions == "stingy":  # as many positions as it asks for
        inv_freq = 100.0 ** (-torch.arange(8) / 8)
        rope = Rope.from_frequencies(inv_freq, policy.num_positions, 1.0, 4, False)
    q, k, v = make_qkv(2, 151, 151, 2 * HEADS, HEADS, DIM, seed=1)
    results = []
    for padding in (0, 250):
        cache = KVCache(2, HEADS, DIM, sketch=None)
        if padding:
            cache.set_starts([padding, padding])
        columns = [torch.nn.functional.pad(x, (0, 0, 0, 0, padding, 0)) for x in (k, v)]
        cache.append(*(x[:, : padding + 150].contiguous() for x in columns))
        state = policy.new_state(cache)
        out, _ = prefill(q[:, 150 - seqlen_q : 150], cache, policy, state, rope=rope)
        cache.append(*(x[:, padding + 150 :].contiguous() for x in columns))
        results.append((out, decode_step(q[:, 150:], cache, policy, state, rope=rope)[0]))
    for plain, padded in zip(*results):
        assert torch.equal(plain, padded)


def test_keys_that_are_not_finite_are_never_listed() -> None:
    q, cache = filled((300,))
    k = cache.k.clone()
    k[0, 64:80, 0] = torch.nan
    k[0, 290, 1, 3] = torch.inf
    k[0, 100:300:7, 1, 0] = torch.nan
    poisoned = KVCache(1, HEADS, DIM, sketch=None)
    poisoned.append(k, cache.v)
    for attention in ("joint", "residual"):
        policy = small(attention=attention, topk_blocks=12)
        out, info = decode_step(q, poisoned, policy, policy.new_state(poisoned))
        assert out.isfinite().all()
        for head in range(HEADS):
            positions = lists(info, 0, head)
            assert k[0, positions, head].isfinite().all() and positions == sorted(set(positions))
        assert 290 not in lists(info, 0, 1) and len(lists(info, 0, 0)) == 12 * 16 + 44


def test_keys_in_host_memory() -> None:
    policy = small()
    q, cache = filled((300,))
    sizes: dict[str, Any] = {"num_sink_tokens": 0, "num_recent_tokens": 32, "resident_tokens": 200}
    tier = TieredKVCache(1, HEADS, DIM, sketch=None, **sizes)
    tier.append(cache.k, cache.v)
    prompt = make_qkv(1, 300, 1, 4, HEADS, DIM, seed=4)[0]
    state, plain = policy.new_state(tier), policy.new_state(cache)
    assert torch.equal(
        prefill(prompt, tier, policy, state)[0], prefill(prompt, cache, policy, plain)[0]
    )
    for step in range(30):
        k, v = drifting(1, 1, 60 + step)
        for into in (tier, cache):
            into.append(k, v)
        out, info = decode_step(q, tier, policy, state)
        expect, expect_info = decode_step(q, cache, policy, plain)
        assert torch.equal(info.selection.indices, expect_info.selection.indices)
        assert rel_err(out, expect) <= 2e-6
        assert not tier.has_whole_rows
    assert tier.residency.num_loads < 8 and 0 < tier.residency.hit_rate < 1  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"keep: got 'cpu', allowed: None with .*values"):
        small(attention="residual").new_state(tier)
    with pytest.raises(ValueError, match="num_recent_tokens < block_size"):
        small(num_recent_tokens=8).new_state(tier)
    with pytest.raises(ValueError, match="num_recent_tokens: got 64, allowed: at most 32"):
        small(num_recent_tokens=64).new_state(tier)


def test_through_attach() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(2, 150)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    policy = small(dense_layers=(1,), attention="residual")
    with attach(model, policy) as handle:
        dynamic = model.generate(ids, **options)
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(model.generate(ids, **options, **static), dynamic)
        layers = handle.report().to_dict()["layers"]
        assert handle.verify(prompt_tokens=60).logit_error.keys() == {"dense"}
    assert layers[1]["decode"]["num_calls"] == 0
    assert layers[0]["decode"]["num_calls"] == 2 * 5 and layers[0]["prefill"]["num_calls"] > 2
    with attach(model, small(), keep="cpu", resident_tokens=None) as handle:
        on_cpu = model.generate(ids, **options)
    with attach(model, small()):
        assert torch.equal(model.generate(ids, **options), on_cpu)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_blocks": 0}, ValueError, "topk_blocks: got 0, allowed: an int >= 1"),
        ({"block_size": -64}, ValueError, "block_size: got -64"),
        ({"num_recent_tokens": 0}, ValueError, "num_recent_tokens: got 0"),
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens: got -1"),
        ({"chunk_size": 0}, ValueError, "chunk_size: got 0"),
        ({"q_block_size": 2.0}, TypeError, "q_block_size: got float 2.0"),
        ({"order": 3}, ValueError, "order: got 3, allowed: 1 or 2"),
        ({"order": True}, ValueError, "order: got True, allowed: 1 or 2"),
        ({"scope": "token"}, ValueError, "scope: got 'token', allowed: 'kv_head' or 'layer'"),
        ({"attention": "merge"}, ValueError, "attention: got 'merge', allowed: 'joint' or 'resid"),
        ({"positions": "compact"}, ValueError, "positions: got 'compact', allowed: 'original' or"),
        (
            {"positions": "stingy", "attention": "residual"},
            ValueError,
            "positions: got 'stingy', allowed: 'original' with attention='residual'",
        ),
        ({"dense_layers": 3}, TypeError, "dense_layers: got int 3"),
        ({"dense_layers": (-1,)}, ValueError, "dense_layers: got -1"),
    ],
)
def test_every_bound_is_checked(change: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Landmark(**change)


def test_the_capacity_is_what_the_longest_list_takes() -> None:
    policy = small(num_sink_tokens=20)
    assert policy.capacity == (2 + 3 + 4) * 16
    assert Landmark().capacity == (0 + 4 + 11) * 64
