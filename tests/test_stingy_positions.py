"""Landmark's stingy positions: blocks at slots before the window, no position beyond the last."""

from __future__ import annotations

import itertools
from typing import Any

import hf_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvselect import KVCache, Landmark, Rope, attach, decode_step, prefill, reference
from kvselect.explain import explain
from kvselect.selection import Selection
from kvselect.testing import make_qkv, rel_err

DIM, HEADS, SIZE = 32, 2, 16
SCALE = DIM**-0.5


def small(**changes: Any) -> Landmark:
    fields: dict[str, Any] = {
        "topk_blocks": 3,
        "block_size": SIZE,
        "num_recent_tokens": 32,
        "q_block_size": 16,
        "positions": "stingy",
    }
    return Landmark(**(fields | changes))


def rope_for(policy: Landmark, scaling: float = 1.0, interleaved: bool = False) -> Rope:
    """As many positions as the policy says that it needs, and none more: an index beyond raises."""
    inv_freq = 100.0 ** (-torch.arange(8) / 8)
    return Rope.from_frequencies(inv_freq, policy.num_positions, scaling, 4, interleaved)


def filled(
    seqlens: tuple[int, ...],
    group: int = 2,
    starts: list[int] | None = None,
    seqlen_q: int = 1,
    seed: int = 0,
    page: int | None = None,
) -> tuple[Tensor, KVCache]:
    batch = len(seqlens)
    q, k, v = make_qkv(batch, seqlen_q, max(seqlens), group * HEADS, HEADS, DIM, seed=seed)
    cache = KVCache(batch, HEADS, DIM, sketch=None, page_block_size=page)
    if starts is not None:
        cache.set_starts(starts)
    cache.append(k, v, list(seqlens))
    return q, cache


def picked_by_reference(
    q: Tensor, places: list[int], cache: KVCache, policy: Landmark, row: int, heads: Any, first: int
) -> list[int]:
    """Blocks of the best weights for queries [n, num_q_heads, dim] at places of the cache."""
    sinks, rope = policy.num_sink_blocks, rope_for(policy, SCALING)
    blocks = reference.blocks_of_row(cache, row, SIZE)[:first]
    start = 0 if cache.starts is None else int(cache.starts[row])
    best = torch.full((len(blocks),), -torch.inf, dtype=torch.float64)
    group = q.shape[1] // HEADS
    for token, head in itertools.product(range(len(places)), range(q.shape[1])):
        if head // group not in heads or len(blocks) <= sinks:
            continue
        position = places[token] - start + (policy.num_slots + 1 - first) * SIZE
        own = [
            reference.stingy_estimate(
                q[token, head],
                reference.finite_keys(cache, row, head // group, blocks[block]),
                reference.scoring_slot(block, first, policy.num_slots),
                position,
                SIZE,
                rope,
                SCALE,
                policy.order,
            )
            for block in range(sinks, len(blocks))
        ]
        best[sinks:] = best[sinks:].maximum(torch.tensor(own).double().log_softmax(0))
    order = sorted(range(sinks, len(blocks)), key=lambda block: (-best[block], block))
    return sorted([*range(min(sinks, first)), *order[: policy.topk_blocks]])


SCALING = 1.0


@pytest.mark.parametrize(
    ("order", "scope", "sinks", "page"),
    [(1, "kv_head", 20, None), (2, "layer", 0, 32), (2, "kv_head", 0, None), (2, "layer", 20, 32)],
)
def test_steps(order: int, scope: str, sinks: int, page: int | None) -> None:
    policy = small(order=order, scope=scope, num_sink_tokens=sinks)
    q, cache = filled((300, 287, 150, 40), starts=[0, 9, 3, 0], page=page)
    rope = rope_for(policy)
    out, info = decode_step(q, cache, policy, policy.new_state(cache), rope=rope)
    for row, (start, end) in enumerate([(0, 300), (9, 287), (3, 150), (0, 40)]):
        first = max(end - 32 - start, 0) // SIZE
        for head in range(2 * HEADS):
            heads = [head // 2] if scope == "kv_head" else [0, 1]
            picked = picked_by_reference(q[row], [end - 1], cache, policy, row, heads, first)
            tokens = [start + SIZE * b + i for b in picked for i in range(SIZE)]
            tokens += range(start + SIZE * first, end)
            count = int(info.selection.topk_length[row, head // 2])
            assert info.selection.indices[row, head // 2, :count].tolist() == tokens
            wanted, lse, positions = reference.stingy_attention(
                q[row, 0, head],
                cache,
                row,
                head // 2,
                end - 1,
                tokens,
                picked,
                first,
                SIZE,
                policy.num_slots,
                rope,
                SCALE,
            )
            assert max(positions) < policy.num_positions
            assert rel_err(out[row, 0, head], wanted) <= 4e-6
            assert abs(float(info.lse[row, 0, head]) - float(lse)) <= 1e-5


@pytest.mark.parametrize(
    ("chunk_size", "scaling", "interleaved"), [(16, 1.0, True), (2048, 1.2, False)]
)
def test_prefill(
    chunk_size: int, scaling: float, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every query block by slots of its own."""
    monkeypatch.setitem(globals(), "SCALING", scaling)
    policy = small(chunk_size=chunk_size, num_sink_tokens=5)
    q, cache = filled((170, 170), starts=[0, 37], seqlen_q=170, seed=3)
    rope = rope_for(policy, scaling, interleaved)
    monkeypatch.setitem(globals(), "rope_for", lambda *_: rope)
    out, lse = prefill(q, cache, policy, policy.new_state(cache), rope=rope)
    for row, start in enumerate([0, 37]):
        for begin, end in itertools.pairwise([0, *range(10, 171, 16)]):
            if end <= start:
                assert not out[row, begin:end].any()
                continue
            begin = max(begin, start)
            first = max(begin - 32 - start, 0) // SIZE
            places = list(range(begin, end))
            for head in range(HEADS):
                own = q[row, begin:end]
                picked = picked_by_reference(own, places, cache, policy, row, [head], first)
                tokens = [start + SIZE * b + i for b in picked for i in range(SIZE)]
                tokens += range(start + SIZE * first, end)
                for token in (begin, end - 1):
                    wanted, expect, _ = reference.stingy_attention(
                        q[row, token, 2 * head],
                        cache,
                        row,
                        head,
                        token,
                        tokens,
                        picked,
                        first,
                        SIZE,
                        policy.num_slots,
                        rope,
                        SCALE,
                    )
                    assert rel_err(out[row, token, 2 * head], wanted) <= 6e-6
                    assert abs(float(lse[row, token, 2 * head]) - float(expect)) <= 1e-5


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_order_is_kept_and_nothing_lies_beyond_the_slots(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 9))
    first = data.draw(st.integers(0, 60))
    most = min(num_slots, first)
    picked = sorted(data.draw(st.sets(st.integers(0, max(first - 1, 0)), max_size=most)))
    if first == 0:
        picked = []
    slots = reference.stingy_slots(picked, first, num_slots)
    assert all(a < b for a, b in itertools.pairwise(slots))
    assert all(0 <= slot <= num_slots for slot in slots)
    old = [s for s, b in zip(slots, picked) if b < first - num_slots]
    late = [s for s, b in zip(slots, picked) if b >= first - num_slots]
    if old and late:
        assert max(old) + 1 < min(late)  # an empty slot between them
    assert 0 not in late  # which is where old ones are scored
    if first <= num_slots or picked == list(range(first - num_slots, first)):
        assert slots == [reference.scoring_slot(b, first, num_slots) for b in picked]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_position_beyond_the_table(data: st.DataObject) -> None:
    """The table ends at ``num_positions``: anything beyond raises, whatever the length."""
    policy = small(
        topk_blocks=data.draw(st.integers(1, 4)),
        num_sink_tokens=data.draw(st.sampled_from([0, 1, 17])),
        num_recent_tokens=data.draw(st.integers(1, 50)),
        q_block_size=data.draw(st.sampled_from([1, 7, 16, 40])),
    )
    seqlen_q = data.draw(st.sampled_from([1, 3, 60]))
    seqlens = tuple(data.draw(st.lists(st.integers(60, 400), min_size=2, max_size=2)))
    q, cache = filled(seqlens, seqlen_q=seqlen_q, seed=data.draw(st.integers(0, 5)))
    state, rope = policy.new_state(cache), rope_for(policy)
    if seqlen_q == 1:
        out, _ = decode_step(q, cache, policy, state, rope=rope)
    else:
        out, _ = prefill(q, cache, policy, state, rope=rope)
    assert out.isfinite().all()
    short = Rope.from_frequencies(torch.ones(4), policy.num_positions - 1)
    with pytest.raises(ValueError, match=r"capacity: got .* allowed: at most"):
        decode_step(q[:, -1:], cache, policy, state, rope=short)


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("seqlen", [1, 33, 143, 144])
def test_budget_at_least_the_length_is_dense(group: int, seqlen: int) -> None:
    policy = small(topk_blocks=7)
    rope = rope_for(policy)
    seqlens = (seqlen, max(seqlen - 9, 1))
    q, cache = filled(seqlens, group, seqlen_q=seqlen)
    out, _ = prefill(q, cache, policy, policy.new_state(cache), rope=rope)
    dense = reference.sparse_attention(q, cache, rope=rope)[0]
    for row, length in enumerate(seqlens):
        assert rel_err(out[row, -length:], dense[row, -length:]) <= 3e-6
    # Short rows beside a long one go through slots, at which everything is where it is.
    q, cache = filled((seqlen, 400, max(seqlen - 9, 1)), group)
    out, info = decode_step(q, cache, policy, policy.new_state(cache), rope=rope)
    assert info.selection is not None
    longer = Rope.from_frequencies(rope.inv_freq, 400, 1.0, 4)
    dense = reference.sparse_attention(q, cache, rope=longer)[0]
    assert rel_err(out[::2], dense[::2]) <= 3e-6
    assert rel_err(out[1], dense[1]) > 1e-3


def test_picked_keys_that_are_not_finite_are_left_out() -> None:
    policy = small()
    q, cache = filled((300,))
    cache.k[0, 5:150:3, 0] = torch.nan
    cache.v[0, 5:150:3, 0] = torch.nan
    cache.k[0, 160:176, 1] = torch.inf  # a whole block
    state, rope = policy.new_state(cache), rope_for(policy)
    out, info = decode_step(q, cache, policy, state, rope=rope)
    assert out.isfinite().all()
    for head in range(HEADS):
        listed = info.selection.indices[0, head]
        assert cache.k[0, listed[listed >= 0].long(), head].isfinite().all()


def test_chunks_and_drafts_change_nothing() -> None:
    policy = small(q_block_size=1, num_recent_tokens=40)
    q, cache = filled((200,), seqlen_q=200, seed=1)
    rope = rope_for(policy)
    whole, _ = prefill(q, cache, policy, policy.new_state(cache), rope=rope)
    grown = KVCache(1, HEADS, DIM, sketch=None)
    state, parts = policy.new_state(grown), []
    for begin, end in itertools.pairwise([0, 90, 180, 183, 184, 200]):
        grown.append(cache.k[:, begin:end], cache.v[:, begin:end])
        parts.append(prefill(q[:, begin:end], grown, policy, state, rope=rope, stepwise=False)[0])
    assert rel_err(torch.cat(parts, 1), whole) <= 3e-6


def test_one_layer_is_the_stock_model_on_the_listed_tokens_at_their_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one layer, keys and values depend on nothing but a token: the stock model, run on the
    tokens of a list at their positions, gives the same logits, whatever our maths is."""
    model = hf_models.build(hf_models.config("llama", num_hidden_layers=1))
    ids = hf_models.tokens(1, 601, seed=4)
    policy = small(scope="layer", num_sink_tokens=3)
    kept: list[Selection] = []
    select = Landmark.select

    def spy(self: Landmark, *args: Any) -> Any:
        kept.append(select(self, *args))
        return kept[-1]

    monkeypatch.setattr(Landmark, "select", spy)
    with attach(model, policy) as handle, torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values
        kept.clear()
        got = model(ids[:, -1:], past_key_values=cache).logits[0, -1]
        assert handle.report().positions == "stingy"
    (found,) = kept
    listed = [place for place in found.indices[0, 0].tolist() if place >= 0]
    first = (601 - 32) // SIZE
    picked = sorted({place // SIZE for place in listed if place < first * SIZE})
    assert len(picked) == policy.num_slots == 4
    slots = dict(zip(picked, reference.stingy_slots(picked, first, 4)))
    at = [
        slots.get(place // SIZE, place // SIZE - first + 5) * SIZE + place % SIZE
        for place in listed
    ]
    with torch.no_grad():
        wanted = model(ids[:, listed], position_ids=torch.tensor([at])).logits[0, -1]
        dense = model(ids).logits[0, -1]
    assert rel_err(got, wanted) <= 5e-6
    assert rel_err(dense, wanted) > 1e-2


def test_through_attach() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(2, 150)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with attach(model, small(dense_layers=(1,))) as handle:
        dynamic = model.generate(ids, **options)
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(model.generate(ids, **options, **static), dynamic)
        layers = handle.report().layers
        assert handle.verify(prompt_tokens=60).logit_error.keys() == {"dense"}
    assert layers[0].decode["num_dense_calls"] == 0 and layers[0].decode["num_calls"] == 10
    with pytest.raises(ValueError, match="keep: got 'cpu', allowed: None with this Landmark"):
        attach(model, small(), keep="cpu")
    with pytest.raises(ValueError, match=r"policy.positions: got 'stingy', allowed: others"):
        explain(model, small(), ids[0])


def test_attach_refuses_more_positions_than_were_trained() -> None:
    model = hf_models.build(hf_models.config("llama", max_position_embeddings=128))
    ids = hf_models.tokens(1, 500)
    most = (3 + 1) * SIZE + 48  # slots, and a window of 32 with a query block of 16, in blocks
    policy = small()
    assert policy.num_positions == most + SIZE
    with pytest.raises(ValueError, match=r"policy.capacity: got 144, .*positions='stingy'"):
        attach(model, small(topk_blocks=4))
    with attach(model, policy), torch.no_grad():
        assert model(ids).logits.isfinite().all()
