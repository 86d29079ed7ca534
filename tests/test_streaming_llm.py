"""StreamingLLM: sinks and a window, renumbered, and nothing that depends on a query."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import (
    KVCache,
    Policy,
    Rope,
    Selection,
    StreamingLLM,
    decode_step,
    prefill,
    reference,
)
from kvselect.testing import make_qkv, rel_err

DIM, HEADS, GROUP = 32, 2, 2
ROPE = Rope.from_frequencies(100.0 ** (-torch.arange(DIM // 2) / (DIM // 2)), 64)


def filled(
    seqlens: tuple[int, ...], seqlen_q: int = 1, starts: list[int] | None = None
) -> tuple[Tensor, KVCache]:
    batch = len(seqlens)
    q, k, v = make_qkv(batch, seqlen_q, max(seqlens), GROUP * HEADS, HEADS, DIM, seed=3)
    cache = KVCache(batch, HEADS, DIM, sketch=None)
    if starts is not None:
        cache.set_starts(starts)
    cache.append(k, v, list(seqlens))
    return q, cache


def rope_of(policy: Policy) -> Rope | None:
    return ROPE if policy.positions == "compact" else None


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_decode(positions: Any) -> None:
    policy = StreamingLLM(
        num_sink_tokens=3, num_recent_tokens=20, q_block_size=16, positions=positions
    )
    q, cache = filled((200, 23, 10), starts=[0, 0, 4])
    state = policy.new_state(cache)
    out, info = decode_step(q, cache, policy, state, rope=rope_of(policy))
    lists = [[0, 1, 2, *range(180, 200)], list(range(23)), list(range(4, 10))]
    assert info.selection is not None and info.kept_mass is None
    for row, expected in enumerate(lists):
        for head in range(HEADS):
            length = int(info.selection.topk_length[row, head])
            assert info.selection.indices[row, head, :length].tolist() == expected
    assert info.selection.indices.stride(1) == 0  # one list for all heads
    assert (
        rel_err(out, reference.sparse_attention(q, cache, info.selection, rope=rope_of(policy))[0])
        <= 2e-6
    )
    counts = state.decode.to_dict()
    assert counts["tokens_attended"] == (23 + 23 + 6) * HEADS
    assert counts["tokens_visible"] == (200 + 23 + 6) * HEADS and counts["tokens_scanned"] == 0


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("chunk_size", [1, 30, 2048])
def test_prefill_is_sinks_and_band(positions: Any, chunk_size: int) -> None:
    policy = StreamingLLM(
        num_sink_tokens=3,
        num_recent_tokens=20,
        q_block_size=16,
        positions=positions,
        chunk_size=chunk_size,
    )
    q, cache = filled((120, 120), 120, starts=[0, 50])
    out, _ = prefill(q, cache, policy, policy.new_state(cache), rope=rope_of(policy))
    offsets = [0, *range(8, 121, 16)]
    for row, start in enumerate([0, 50]):
        for begin, end in itertools.pairwise(offsets):
            if end <= start:
                assert not out[row, begin:end].any()
                continue
            window = range(max(max(begin, start) - 20, start), end)
            kept = sorted({*range(start, min(start + 3, end)), *window})
            one = reference.PlainCache(
                k=cache.k[row : row + 1],
                v=cache.v[row : row + 1],
                cache_seqlens=torch.tensor([end], dtype=torch.int32),
                starts=torch.tensor([start], dtype=torch.int32),
            )
            indices = torch.tensor(kept, dtype=torch.int32).expand(1, HEADS, -1)
            lengths = torch.full((1, HEADS), len(kept), dtype=torch.int32)
            expected, _ = reference.sparse_attention(
                q[row : row + 1, begin:end], one, Selection(indices, lengths), rope=rope_of(policy)
            )
            assert rel_err(out[row, begin:end], expected[0]) <= 2e-6


def test_endless_text_stays_inside_the_trained_length() -> None:
    policy = StreamingLLM(num_sink_tokens=4, num_recent_tokens=40, q_block_size=16)
    assert policy.capacity == 60 <= ROPE.num_positions
    q, cache = filled((1000,))
    out, _ = decode_step(q, cache, policy, policy.new_state(cache), rope=ROPE)
    # The same tokens in a cache of their own, which dense attention numbers 0..43.
    kept = [*range(4), *range(960, 1000)]
    own = KVCache(1, HEADS, DIM, sketch=None)
    own.append(cache.k[:, kept], cache.v[:, kept])
    assert rel_err(out, reference.sparse_attention(q, own, rope=ROPE)[0]) <= 2e-6


def test_short_rows_are_dense() -> None:
    policy = StreamingLLM(num_sink_tokens=4, num_recent_tokens=20, positions="original")
    q, cache = filled((24, 11))
    out, info = decode_step(q, cache, policy, policy.new_state(cache))
    assert info.selection is None
    assert rel_err(out, reference.sparse_attention(q, cache)[0]) <= 2e-6


def test_a_list_does_not_depend_on_the_query() -> None:
    policy = StreamingLLM(num_sink_tokens=4, num_recent_tokens=20, positions="original")
    q, cache = filled((100,))
    state = policy.new_state(cache)
    first = decode_step(q, cache, policy, state)[1].selection
    second = decode_step(-7 * q, cache, policy, state)[1].selection
    assert first is not None and second is not None
    assert torch.equal(first.indices, second.indices)
    assert not policy.query_aware and not policy.revocable and policy.required_sketch is None


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens: got -1"),
        ({"num_recent_tokens": 0}, ValueError, "num_recent_tokens: got 0, allowed: an int >= 1"),
        ({"positions": "clamp"}, ValueError, "positions: got 'clamp', allowed: 'compact' or 'orig"),
        ({"chunk_size": 0}, ValueError, "chunk_size: got 0"),
        ({"q_block_size": 1.0}, TypeError, "q_block_size: got float 1.0"),
    ],
)
def test_every_bound_is_checked(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        StreamingLLM(**settings)


def test_compact_needs_enough_positions() -> None:
    q, cache = filled((200,))
    policy = StreamingLLM(num_recent_tokens=40, q_block_size=64)
    with pytest.raises(ValueError, match=r"rope: got None, allowed: a kvselect.Rope"):
        decode_step(q, cache, policy, policy.new_state(cache))
    with pytest.raises(ValueError, match="capacity: got 108, allowed: at most 64"):
        decode_step(q, cache, policy, policy.new_state(cache), rope=ROPE)
