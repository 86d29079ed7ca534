"""InfLLM: representatives by received attention, far blocks at one distance, keys on the host."""

from __future__ import annotations

import itertools
from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor

from kvselect import (
    InfLLM,
    KVCache,
    Rope,
    TieredKVCache,
    attach,
    decode_step,
    prefill,
    reference,
)
from kvselect.block_statistics import BlockStatistics
from kvselect.explain import explain
from kvselect.policies.block_policy import BlockState
from kvselect.testing import make_qkv, rel_err

DIM, HEADS, SIZE, RECENT = 32, 2, 16, 40
SCALE = DIM**-0.5
ROPE = Rope.from_frequencies(100.0 ** (-torch.arange(DIM // 2) / (DIM // 2)), 400)
POSITIONS = ("clamp", "compact", "original")


def small(**changes: Any) -> InfLLM:
    fields: dict[str, Any] = {
        "topk_blocks": 2,
        "block_size": SIZE,
        "num_sink_tokens": 4,
        "num_recent_tokens": RECENT,
        "num_representatives": 3,
        "q_block_size": 32,
    }
    return InfLLM(**(fields | changes))


def filled(
    seqlens: tuple[int, ...],
    group: int = 2,
    starts: list[int] | None = None,
    seqlen_q: int = 1,
) -> tuple[Tensor, KVCache]:
    batch = len(seqlens)
    q, k, v = make_qkv(batch, seqlen_q, max(seqlens), group * HEADS, HEADS, DIM, seed=8)
    cache = KVCache(batch, HEADS, DIM, sketch=None)
    if starts is not None:
        cache.set_starts(starts)
    cache.append(k, v, list(seqlens))
    return q, cache


def rope_of(policy: InfLLM) -> Rope | None:
    return ROPE if policy.caches_unrotated else None


class Expected:
    """The policy in float64 loops for one row: what its keys received, lists, attention."""

    def __init__(self, policy: InfLLM, k: Tensor, v: Tensor) -> None:
        self.policy, self.k, self.v = policy, k, v  # [tokens, heads, dim], padding cut off
        self.received = torch.zeros(HEADS, k.shape[0], dtype=torch.float64)

    def block(self, q: Tensor, begin: int, step: bool) -> tuple[list[list[int]], Tensor]:
        """Lists by KV head, and the output, of queries [n, num_q_heads, dim] at ``begin ..``."""
        policy, end = self.policy, begin + len(q)
        anchor = end if step else begin
        first = max(anchor - RECENT, 0) // SIZE
        sinks = min(policy.num_sink_blocks, first)
        group = q.shape[1] // HEADS
        scores = torch.zeros(HEADS, first, dtype=torch.float64)
        mean = q.double().mean(0, keepdim=True)
        if policy.caches_unrotated:
            mean = ROPE.rotate(mean, RECENT - 1).double()
        for head, block in itertools.product(range(HEADS), range(first)):
            tokens = slice(block * SIZE, (block + 1) * SIZE)
            rep = reference.representative(
                self.k[tokens, head], self.received[head, tokens], policy.num_representatives
            )
            scores[head, block] = (mean[0, head * group : (head + 1) * group] @ rep).sum()
        if policy.scope == "layer":
            scores = scores.sum(0, keepdim=True).expand(HEADS, -1)
        lists, out = [], torch.zeros(len(q), q.shape[1], DIM, dtype=torch.float64)
        for head in range(HEADS):
            order = sorted(range(sinks, first), key=lambda b, head=head: (-scores[head, b], b))
            blocks = sorted([*range(sinks), *order[: policy.topk_blocks]])
            far = [SIZE * b + i for b in blocks for i in range(SIZE)]
            near = list(range(first * SIZE, end))
            lists.append(far + near)
            own = q[:, head * group : (head + 1) * group].transpose(0, 1)
            local = self.logits(own, begin - first * SIZE, near, head)
            self.received[head, near] += reference.local_mass(local, begin, first * SIZE)
            for row in range(len(q)):
                listed = far + near
                seen = [i for i, token in enumerate(listed) if token <= begin + row]
                if policy.positions == "clamp":
                    turned = ROPE.rotate(own[:, row], RECENT - 1).double()
                    there = turned @ self.k[far, head].double().mT * SCALE
                    logits = torch.cat([there, local[:, row]], -1)
                elif policy.positions == "compact":
                    rank = listed.index(begin + row)
                    logits = self.logits(own[:, row : row + 1], rank, listed, head)[:, 0]
                else:
                    logits = own[:, row].double() @ self.k[listed, head].double().mT * SCALE
                values = self.v[listed, head].double()[seen]
                out[row, head * group : (head + 1) * group] = logits[:, seen].softmax(-1) @ values
        return lists, out

    def logits(self, q: Tensor, rank: int, tokens: list[int], head: int) -> Tensor:
        """Of queries [group, n, dim] at rank ``rank ..`` and keys at ranks 0 .."""
        k = self.k[tokens, head]
        if self.policy.caches_unrotated:
            places = torch.arange(rank, rank + q.shape[1])
            q = ROPE.rotate(q.transpose(0, 1), places).transpose(0, 1)
            k = ROPE.rotate(k[:, None], torch.arange(len(tokens)))[:, 0]
        return q.double() @ k.double().mT * SCALE


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("scope", ["layer", "kv_head"])
def test_prefill_and_steps(positions: str, scope: str) -> None:
    """A prompt in runs of query blocks, then steps: lists, output and what was received."""
    policy = small(positions=positions, scope=scope, chunk_size=50)
    q, cache = filled((170, 170), starts=[0, 37], seqlen_q=170)
    state = policy.new_state(cache)
    out, _ = prefill(q, cache, policy, state, rope=rope_of(policy))
    expected = []
    for row, start in enumerate([0, 37]):
        one = Expected(policy, cache.k[row, start:].clone(), cache.v[row, start:].clone())
        expected.append(one)
        for begin, end in itertools.pairwise([0, *range(10, 171, 32)]):
            if end <= start:
                continue
            part = q[row, max(begin, start) : end]
            _, wanted = one.block(part, max(begin, start) - start, False)
            assert rel_err(out[row, max(begin, start) : end], wanted) <= 4e-6
    generator = torch.Generator().manual_seed(1)
    for step in range(19):
        k, v = torch.randn((2, 2, 1, HEADS, DIM), generator=generator)
        cache.append(k, v)
        token = q[:, step : step + 1].contiguous()
        out, info = decode_step(token, cache, policy, state, rope=rope_of(policy))
        assert info.selection is not None
        for row, start in enumerate([0, 37]):
            one = expected[row]
            one.k, one.v = cache.k[row, start:], cache.v[row, start:]
            one.received = torch.nn.functional.pad(one.received, (0, 1))
            lists, wanted = one.block(token[row], 170 + step - start, True)
            for head in range(HEADS):
                length = int(info.selection.topk_length[row, head])
                found = (info.selection.indices[row, head, :length] - start).tolist()
                assert found == lists[head]
            assert rel_err(out[row], wanted) <= 4e-6
            found_mass = state.blocks.received[row].flatten(1)[:, : one.received.shape[1]]
            assert rel_err(found_mass, one.received) <= 1e-5


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("seqlen", [1, 39, 40, 41, 55, 56, 57])
def test_budget_at_least_the_length_is_dense(positions: str, group: int, seqlen: int) -> None:
    policy = small(positions=positions)
    rope = rope_of(policy)
    if positions == "clamp":
        seqlen = min(seqlen, RECENT + SIZE - 1)  # beyond it, distances are no longer true
    q, cache = filled((seqlen, max(seqlen - 9, 1)), group, seqlen_q=seqlen)
    out, _ = prefill(q, cache, policy, policy.new_state(cache), rope=rope)
    dense = reference.sparse_attention(q, cache, rope=rope)[0]
    for row, length in enumerate([seqlen, max(seqlen - 9, 1)]):
        assert rel_err(out[row, -length:], dense[row, -length:]) <= 2e-6
    q, cache = filled((seqlen, 300, max(seqlen - 9, 1)), group)
    out, info = decode_step(q, cache, policy, policy.new_state(cache), rope=rope)
    assert info.selection is not None  # short rows beside a long one: by lists of everything
    dense = reference.sparse_attention(q, cache, rope=rope)[0]
    assert rel_err(out[[0, 2]], dense[[0, 2]]) <= 4e-6


@pytest.mark.parametrize("positions", ["clamp", "compact"])
def test_a_table_that_scales_is_a_larger_softmax_scale(positions: str) -> None:
    """YaRN's attention scaling, near and far."""
    q, cache = filled((200,), seqlen_q=200)
    policy, factor = small(positions=positions), 1.3
    frequencies = 100.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    scaled = Rope.from_frequencies(frequencies, 400, scaling=factor)
    outs = []
    for rope, scale in ((scaled, SCALE), (ROPE, factor**2 * SCALE)):
        state = policy.new_state(cache)
        out, _ = prefill(q, cache, policy, state, rope=rope, softmax_scale=scale)
        step, _ = decode_step(q[:, -1:], cache, policy, state, rope=rope, softmax_scale=scale)
        outs.append((out, step))
    for got, expected in zip(*outs):
        assert rel_err(got, expected) <= 4e-6


@pytest.mark.parametrize("positions", POSITIONS)
def test_chunks_and_drafts_change_nothing(positions: str) -> None:
    q, cache = filled((200,), seqlen_q=200)
    outs = []
    for chunk_size in (32, 100, 2048):
        policy = small(positions=positions, chunk_size=chunk_size)
        state = policy.new_state(cache)
        outs.append(prefill(q, cache, policy, state, rope=rope_of(policy))[0])
        assert torch.equal(outs[0], outs[-1])
    grown = {}
    for pieces in ((1,) * 8, (8,)):
        cache = KVCache(1, HEADS, DIM, sketch=None)
        _, k, v = make_qkv(1, 1, 208, 2 * HEADS, HEADS, DIM, seed=9)
        cache.append(k[:, :200], v[:, :200])
        state = policy.new_state(cache)
        prefill(q, cache, policy, state, rope=rope_of(policy))
        found, at = [], 200
        for piece in pieces:
            cache.append(k[:, at : at + piece], v[:, at : at + piece])
            token = q[:, at - 200 : at - 200 + piece].contiguous()
            found.append(prefill(token, cache, policy, state, rope=rope_of(policy))[0])
            at += piece
        grown[len(pieces)] = torch.cat(found, 1)
    assert rel_err(grown[1], grown[8]) <= 2e-6


def test_representatives_by_received_attention_beat_mean_keys() -> None:
    """Blocks with a few keys that matter among many that do not: how often the best one is found.

    Every block has a topic of its own on 3 of its 64 keys, which the text around it attends to;
    later queries ask for one block's topic. Mean keys drown it (METHODS.md 3.2).
    """
    generator = torch.Generator().manual_seed(0)
    size, count, heads = 64, 24, 1
    topics = torch.nn.functional.normalize(torch.randn(count, DIM, generator=generator), dim=-1)
    k = torch.randn(count, size, DIM, generator=generator)
    q = torch.randn(count, size, DIM, generator=generator)
    k[:, 10:13] += 9.0 * topics[:, None]
    q += 9.0 * topics[:, None]
    v = torch.randn(1, count * size, heads, DIM, generator=generator)
    keys, queries = (x.reshape(1, -1, heads, DIM) for x in (k, q))
    recall = {}
    for name, representatives in (("received", 3), ("mean", size)):
        policy = InfLLM(
            topk_blocks=1,
            block_size=size,
            num_sink_tokens=0,
            num_recent_tokens=64,
            num_representatives=representatives,
            q_block_size=32,
            positions="original",
        )
        cache = KVCache(1, heads, DIM, sketch=None)
        cache.append(keys, v)
        state = policy.new_state(cache)
        prefill(queries, cache, policy, state)
        found = 0
        for block in range(count - 3):
            ask = (9.0 * topics[block] + torch.randn(DIM, generator=generator)).view(1, 1, 1, DIM)
            info = decode_step(ask, cache, policy, state)[1]
            assert info.selection is not None
            found += int(block * size in info.selection.indices[0, 0].tolist())
        recall[name] = found / (count - 3)
    assert recall["received"] >= 0.9 and recall["mean"] < recall["received"]


@pytest.mark.parametrize("positions", POSITIONS)
def test_steps_follow_the_cache(positions: str) -> None:
    """A new order of rows takes what they received along; a crop forgets what it drops."""
    policy = small(positions=positions)
    rope = rope_of(policy)
    q, cache = filled((200, 180), seqlen_q=200)
    state = policy.new_state(cache)
    prefill(q, cache, policy, state, rope=rope)
    before = decode_step(q[:, -1:].contiguous(), cache, policy, state, rope=rope)[0]
    mass = state.blocks.received.clone()
    cache.reorder([1, 0])
    after = decode_step(q[[1, 0], -1:].contiguous(), cache, policy, state, rope=rope)[0]
    assert rel_err(after[[1, 0]], before) <= 2e-6
    assert (state.blocks.received >= mass[[1, 0]] - 1e-6).all()
    cache.crop(20)
    cache.append(*torch.randn(2, 2, 20, HEADS, DIM).unbind(0))
    policy.update(state, cache)
    flat = state.blocks.received.flatten(2)
    assert not flat[0, :, 160:180].any() and not flat[1, :, 180:200].any()
    assert flat[1, :, :180].any()


def test_a_block_that_nothing_looked_at_stands_by_its_mean() -> None:
    _, cache = filled((64,))
    blocks = BlockStatistics(SIZE, representatives=3)
    blocks.follow(cache)
    blocks.received[0, 0, 1] = torch.arange(16.0) % 5
    blocks.represent(cache, torch.tensor([3], dtype=torch.int32), (3,), 0)
    keys = cache.k[0, :, 0].double().view(4, SIZE, DIM)
    assert torch.allclose(blocks.representatives[0, 0, 0].double(), keys[0].mean(0), atol=1e-6)
    wanted = reference.representative(keys[1], torch.arange(16.0) % 5, 3)
    assert torch.allclose(wanted, keys[1, [4, 9, 14]].mean(0))
    assert torch.allclose(blocks.representatives[0, 0, 1].double(), wanted, atol=1e-6)


@pytest.mark.parametrize("positions", POSITIONS)
def test_keys_in_host_memory(positions: str) -> None:
    """The same lists and output; what a list names again is found; device memory stays flat."""
    policy = small(positions=positions)
    rope = rope_of(policy)
    q, cache = filled((300,), seqlen_q=300)
    sizes: dict[str, Any] = {
        "num_sink_tokens": 4,
        "num_recent_tokens": RECENT + policy.num_margin_tokens,
        "resident_tokens": 260,
    }
    tier = TieredKVCache(1, HEADS, DIM, sketch=None, **sizes)
    tier.append(cache.k, cache.v)
    state, plain = policy.new_state(tier), policy.new_state(cache)
    first = prefill(q, tier, policy, state, rope=rope)[0]
    assert torch.equal(first, prefill(q, cache, policy, plain, rope=rope)[0])
    generator, held = torch.Generator().manual_seed(1), []
    direction = torch.randn(1, 1, 2 * HEADS, DIM, generator=generator)
    for _ in range(60):
        k, v = torch.randn((2, 1, 1, HEADS, DIM), generator=generator)
        for into in (tier, cache):
            into.append(k, v)
        token = direction + 0.1 * torch.randn(direction.shape, generator=generator)
        out, info = decode_step(token, tier, policy, state, rope=rope)
        expect, expect_info = decode_step(token, cache, policy, plain, rope=rope)
        assert torch.equal(info.selection.indices, expect_info.selection.indices)  # type: ignore[union-attr]
        assert rel_err(out, expect) <= 2e-6
        assert not tier.has_whole_rows
        held.append(tier.nbytes)
    assert len(set(held)) == 1
    residency = tier.residency
    assert residency.hit_rate is not None and residency.hit_rate > 0.8
    assert residency.fetched_bytes_per_step is not None
    assert residency.fetched_bytes_per_step < 0.2 * 2 * 2 * (2 + 4) * SIZE * DIM * 4
    with pytest.raises(ValueError, match=f"num_recent_tokens: got 72, allowed: at most {RECENT}"):
        sizes["num_recent_tokens"] = RECENT
        policy.new_state(TieredKVCache(1, HEADS, DIM, sketch=None, **sizes))


def test_keys_that_are_not_finite_are_never_listed() -> None:
    q, cache = filled((200,), seqlen_q=200)
    k = cache.k.clone()
    k[0, 33, 0, 2] = torch.nan
    k[0, 64:80, 1] = torch.inf
    k[0, 190, 0] = torch.nan
    for positions in POSITIONS:
        policy = small(positions=positions, topk_blocks=7, scope="kv_head")
        bad = KVCache(1, HEADS, DIM, sketch=None)
        bad.append(k, cache.v)
        state = policy.new_state(bad)
        prefill(q, bad, policy, state, rope=rope_of(policy))
        out, info = decode_step(q[:, -1:].contiguous(), bad, policy, state, rope=rope_of(policy))
        assert info.selection is not None and out.isfinite().all()
        for head in range(HEADS):
            listed = [i for i in info.selection.indices[0, head].tolist() if i >= 0]
            assert k[0, listed, head].isfinite().all()
        assert state.blocks.received.isfinite().all()


@pytest.mark.parametrize("positions", POSITIONS)
def test_through_attach(positions: str) -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(2, 110)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    policy = small(positions=positions, num_recent_tokens=24, q_block_size=16)
    with attach(model, policy) as handle:
        dynamic = model.generate(ids, **options)
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(model.generate(ids, **options, **static), dynamic)
        layers = handle.report().to_dict()["layers"]
        assert handle.verify(prompt_tokens=30).logit_error.keys() == {"dense"}
    assert all(layer["decode"]["num_dense_calls"] == 0 for layer in layers)
    assert layers[0]["decode"]["num_calls"] == 2 * 5
    with attach(model, policy, keep="cpu") as handle:
        assert torch.equal(model.generate(ids, **options), dynamic)


def test_explain_shows_both_parts_of_clamped_attention() -> None:
    model = hf_models.model("llama")
    policy = small(num_recent_tokens=24, q_block_size=16)
    found = explain(model, policy, hf_models.tokens(1, 110)[0])
    for layer in found.steps[0].layers:
        for head in layer.heads:
            positions = head.positions.tolist()
            assert positions == sorted(set(positions)) and positions[:16] == list(range(16))
            assert len(positions) == 16 + 32 + 110 - 80
            assert float(head.mass.sum()) == pytest.approx(1.0, abs=1e-5)
            assert float(head.mass[:48].sum()) > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_blocks": -1}, ValueError, "topk_blocks: got -1, allowed: an int >= 1"),
        ({"num_representatives": 0}, ValueError, "num_representatives: got 0"),
        ({"positions": "stingy"}, ValueError, "positions: got 'stingy', allowed: 'clamp' or 'co"),
        ({"scope": "head"}, ValueError, "scope: got 'head', allowed: 'layer' or 'kv_head'"),
        ({"q_block_size": 0}, ValueError, "q_block_size: got 0"),
    ],
)
def test_every_bound_is_checked(change: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        InfLLM(**change)


def test_positions_are_as_many_as_the_window_takes() -> None:
    assert small().num_positions == small(topk_blocks=999).num_positions == 6 * SIZE
    assert small(positions="compact").num_positions == (1 + 2 + 6) * SIZE
    q, cache = filled((200,))
    short = Rope.from_frequencies(torch.ones(DIM // 2), 90)
    with pytest.raises(ValueError, match="capacity: got 96, allowed: at most 90"):
        decode_step(q, cache, small(), small().new_state(cache), rope=short)
    with pytest.raises(ValueError, match="rope: got None"):
        decode_step(q, cache, small(), small().new_state(cache))
    assert isinstance(small().new_state(cache), BlockState)
