"""prefill: blocks, groups and windows, whatever the chunks, the batch, the padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from expected_prefill import expected_prefill
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvselect import (
    Dense,
    KVCache,
    Policy,
    Rope,
    StreamingLLM,
    TokenSelect,
    decode_step,
    prefill,
)
from kvselect.testing import TOLERANCE, make_qkv, rel_err

DIM, HEADS, GROUP = 32, 2, 2
ROPE = Rope.from_frequencies(100.0 ** (-torch.arange(DIM // 2) / (DIM // 2)), 512)


def small(**settings: Any) -> TokenSelect:
    """A policy that leaves most of 150 tokens out."""
    defaults: dict[str, Any] = {
        "topk": 6,
        "num_sink_tokens": 3,
        "num_recent_tokens": 24,
        "sketch": None,
        "overselect": 1.0,
        "q_block_size": 20,
        "num_tail_tokens": 12,
        "tail_q_block_size": 5,
        "query_groups": 4,
        "max_age": 8,
    }
    return TokenSelect(**(defaults | settings))


class Call:
    """Queries, un-rotated queries and a filled cache for one prefill call."""

    def __init__(
        self,
        seqlens: tuple[int, ...] = (150,),
        seqlen_q: int = 150,
        starts: list[int] | None = None,
        sketch: str | None = None,
        dtype: torch.dtype = torch.float32,
        compact: bool = False,
        rotated: bool = True,
        page_block_size: int | None = None,
        group: int = GROUP,
    ) -> None:
        batch, longest = len(seqlens), max(seqlens)
        q, k, v = make_qkv(batch, seqlen_q, longest, group * HEADS, HEADS, DIM, seed=5)
        first = torch.tensor(starts or [0] * batch)[:, None]
        self.q_unrotated: Tensor | None = None
        if rotated and not compact:
            ends = torch.tensor(seqlens)[:, None]
            k = ROPE.rotate(k, (torch.arange(longest) - first).clamp(min=0))
            self.q_unrotated = q.to(dtype)
            q = ROPE.rotate(q, (ends + torch.arange(-seqlen_q, 0) - first).clamp(min=0))
        self.q = q.to(dtype)
        self.k, self.v = k.to(dtype), v.to(dtype)
        self.rope = ROPE if rotated else None
        self.cache = KVCache(
            batch, HEADS, DIM, dtype=dtype, sketch=sketch, page_block_size=page_block_size
        )
        if starts is not None:
            self.cache.set_starts(starts)
        self.cache.append(self.k, self.v, list(seqlens))

    def run(self, policy: Policy) -> tuple[Tensor, Tensor]:
        return prefill(
            self.q,
            self.cache,
            policy,
            policy.new_state(self.cache),
            q_unrotated=self.q_unrotated,
            rope=self.rope,
        )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scope": "layer"},
    {"aggregate": "mean"},
    {"aggregate": "max_vote"},
    {"aggregate": "max_vote", "scope": "layer"},
    {"query_groups": 1},
    {"query_groups": 7},
    {"query_groups": 1000},
    {"average_queries": "after_rope"},
    {"window_anchor": "block_end"},
    {"normalise_over": "candidates"},
    {"score_scale": 1.0},
    {"pool_width": 5},
    {"overselect": 1.7},
    {"num_tail_tokens": 0},
    {"num_sink_tokens": 0},
    {"dense_below_tokens": 90},
    {"q_block_size": 1, "num_tail_tokens": 0},
]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_loop(options: dict[str, Any], positions: str) -> None:
    policy = small(positions=positions, **options)
    call = Call(seqlen_q=70, compact=positions == "compact")
    expected, _ = expected_prefill(call.q, call.cache, policy, call.q_unrotated, call.rope)
    out, lse = call.run(policy)
    assert rel_err(out, expected) <= 4e-6
    assert lse.shape == out.shape[:-1] and lse.dtype == torch.float32
    different = call.run(StreamingLLM(num_sink_tokens=3, num_recent_tokens=24, positions=positions))
    assert rel_err(different[0], expected) > 1e-2  # the picked tokens do matter here


def test_paper_compat_equals_the_loop() -> None:
    policy = TokenSelect.paper_compat(
        topk=6, num_sink_tokens=3, num_recent_tokens=24, q_block_size=20, chunk_size=40, max_age=8
    )
    call = Call(seqlen_q=70, compact=True)
    expected, _ = expected_prefill(call.q, call.cache, policy, None, ROPE)
    assert rel_err(call.run(policy)[0], expected) <= 4e-6


def test_queries_without_rotation_are_averaged_as_they_are() -> None:
    policy, call = small(), Call(rotated=False)
    expected, _ = expected_prefill(call.q, call.cache, policy)
    assert rel_err(call.run(policy)[0], expected) <= 4e-6


@pytest.mark.parametrize("sketch", ["int4", "int8"])
def test_a_sketch_picks_almost_the_same(sketch: str) -> None:
    options = {"num_recent_tokens": 128, "topk": 40, "q_block_size": 64, "num_tail_tokens": 0}
    policy = small(sketch=sketch, **options)
    call = Call((600,), 128, sketch=sketch, rotated=False)
    state, exact = policy.new_state(call.cache), small(**options)
    exact_state = exact.new_state(call.cache)
    prefill(call.q, call.cache, policy, state)
    prefill(call.q, call.cache, exact, exact_state)
    kept, best = state.prefill.kept_mass, exact_state.prefill.kept_mass
    assert kept is not None and best is not None and best - 0.02 < kept < best + 0.02


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("sketch", [None, "int4"])
def test_chunk_size_changes_nothing(positions: str, sketch: str | None) -> None:
    settings: dict[str, Any] = {"sketch": sketch, "positions": positions}
    if sketch is not None:
        settings |= {"num_recent_tokens": 128}
    call = Call((300, 300), 270, sketch=sketch, compact=positions == "compact")
    results = [call.run(small(chunk_size=size, **settings)) for size in (1, 33, 100, 4096)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("page_block_size", [None, 16])
@pytest.mark.parametrize("starts", [None, [0, 40, 149]])
@pytest.mark.parametrize("dense_below_tokens", [None, 100])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_batched_equals_one_by_one(
    page_block_size: int | None,
    starts: list[int] | None,
    dense_below_tokens: int | None,
    positions: str,
) -> None:
    policy = small(positions=positions, dense_below_tokens=dense_below_tokens)
    seqlens = (150, 150, 150) if starts else (150, 97, 80)
    call = Call(
        seqlens, 80, starts, compact=positions == "compact", page_block_size=page_block_size
    )
    out, lse = call.run(policy)
    for row, seqlen in enumerate(seqlens):
        first = starts[row] if starts else 0
        real = min(80, seqlen - first)
        alone = KVCache(1, HEADS, DIM, sketch=None)
        span = slice(first, seqlen)
        alone.append(call.k[row : row + 1, span], call.v[row : row + 1, span])
        unrotated = call.q_unrotated
        out_alone, lse_alone = prefill(
            call.q[row : row + 1, 80 - real :],
            alone,
            policy,
            policy.new_state(alone),
            q_unrotated=None if unrotated is None else unrotated[row : row + 1, 80 - real :],
            rope=ROPE,
        )
        assert rel_err(out[row, 80 - real :], out_alone[0]) <= 2e-6
        assert rel_err(lse[row, 80 - real :], lse_alone[0]) <= 2e-6
        assert not out[row, : 80 - real].any()  # padding sees nothing
        assert (lse[row, : 80 - real] == -torch.inf).all()


def test_rows_shorter_than_the_call() -> None:
    call = Call((150, 30, 0), 150, rotated=False)
    out, _ = call.run(small())
    alone = KVCache(1, HEADS, DIM, sketch=None)
    alone.append(call.k[1:2, :30], call.v[1:2, :30])
    policy = small()
    expected, _ = prefill(call.q[1:2, -30:], alone, policy, policy.new_state(alone))
    assert rel_err(out[1, -30:], expected[0]) <= 2e-6
    assert not out[1, :-30].any() and not out[2].any()


@pytest.mark.parametrize("filler", [1, 17, 128, 511])
def test_filler_before_the_prompt_moves_no_block_of_its_end(filler: int) -> None:
    """Un-rotated keys of filler that nobody looks at: the tail selects the same tokens."""
    call = Call((200,), 200, rotated=False)
    policy = small(num_sink_tokens=0)
    noise = torch.zeros(1, filler, HEADS, DIM)
    longer = KVCache(1, HEADS, DIM, sketch=None)
    q = call.q.abs()
    longer.append(torch.cat([noise - 4.0, call.k], 1), torch.cat([noise, call.v], 1))
    q_long = torch.cat([torch.zeros(1, filler, GROUP * HEADS, DIM), q], 1)
    out_long, _ = prefill(q_long, longer, policy, policy.new_state(longer))
    out, _ = prefill(q, call.cache, policy, policy.new_state(call.cache))
    assert rel_err(out_long[:, -12:], out[:, -12:]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize(
    "make", [Dense, lambda: small(topk=200), lambda: small(dense_prefill=True)]
)
def test_budget_beyond_the_length_is_dense(make: Any, group: int, dtype: torch.dtype) -> None:
    call = Call((97, 97), 97, rotated=False, dtype=dtype, group=group)
    arrange = [x.transpose(1, 2) for x in (call.q, call.k, call.v)]
    expected = scaled_dot_product_attention(
        *(x.double() for x in arrange), is_causal=True, enable_gqa=True
    )
    assert rel_err(call.run(make())[0], expected.transpose(1, 2)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("seqlen_q", [1, 3, 5])
def test_short_calls_on_a_filled_cache_are_decode_steps(positions: str, seqlen_q: int) -> None:
    """What assisted decoding needs: a draft gives what its tokens would give one by one."""
    policy = small(positions=positions)
    call = Call((150, 141), seqlen_q, compact=positions == "compact")
    state = policy.new_state(call.cache)
    out, _ = prefill(
        call.q, call.cache, policy, state, rope=call.rope, q_unrotated=call.q_unrotated
    )
    assert state.prefill.num_calls == 0 and state.decode.num_calls == 1
    for query in range(seqlen_q):
        cache = KVCache(2, HEADS, DIM, sketch=None)
        left = seqlen_q - 1 - query
        cache.append(call.k, call.v, [150 - left, 141 - left])
        step, _ = decode_step(
            call.q[:, query : query + 1], cache, policy, policy.new_state(cache), rope=call.rope
        )
        assert rel_err(out[:, query : query + 1], step) <= 2e-6


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("chunk_size", [1, 2, 64])
@pytest.mark.parametrize(
    "settings",
    [{"num_segments": 2}, {"similarity_threshold": 0.01}, {"num_segments": 2, "max_age": 1}],
)
def test_short_calls_remember_nothing(
    settings: dict[str, Any], chunk_size: int, positions: str
) -> None:
    """Runs of one query are no decode steps: later tokens are in the cache, and runs go on."""
    call = Call((150, 141), 3, compact=positions == "compact")
    policy = small(positions=positions, chunk_size=chunk_size, **settings)
    expected, expected_lse = call.run(small(positions=positions))
    state = policy.new_state(call.cache)
    out, lse = prefill(
        call.q, call.cache, policy, state, rope=call.rope, q_unrotated=call.q_unrotated
    )
    assert rel_err(out, expected) <= 2e-6 and rel_err(lse, expected_lse) <= 2e-6
    assert state.decode.num_hits == state.decode.num_misses == 0


@pytest.mark.parametrize("cuts", [(149, 150), (147, 150), (100, 101, 106, 150)])
def test_short_pieces_of_a_prompt_are_prefill(cuts: tuple[int, ...]) -> None:
    """A scheduler cuts where its budget ends; dense prefill does not depend on it."""
    policy = small(dense_prefill=True)
    call = Call()
    expected, expected_lse = call.run(policy)
    cache = KVCache(1, HEADS, DIM, sketch=None)
    state = policy.new_state(cache)
    begin = 0
    for end in cuts:
        cache.append(call.k[:, begin:end], call.v[:, begin:end])
        q = call.q[:, begin:end]
        out, lse = prefill(q, cache, policy, state, rope=ROPE, stepwise=False)
        assert rel_err(out, expected[:, begin:end]) <= 2e-6
        assert rel_err(lse, expected_lse[:, begin:end]) <= 2e-6
        begin = end
    assert state.decode.num_calls == 0 and state.prefill.num_calls >= len(cuts)


def test_a_short_piece_of_a_prompt_is_one_block() -> None:
    call, policy = Call(seqlen_q=4), small()
    assert call.q_unrotated is not None
    rotated = {"rope": ROPE, "q_unrotated": call.q_unrotated}
    state = policy.new_state(call.cache)
    out, _ = prefill(call.q, call.cache, policy, state, stepwise=False, **rotated)
    assert state.decode.num_calls == 0 and state.prefill.num_calls == 1
    expected = expected_prefill(call.q, call.cache, policy, call.q_unrotated, ROPE)[0]
    assert rel_err(out, expected) <= 2e-6


def test_a_short_prompt_is_no_draft() -> None:
    call = Call((5,), 5)
    policy = small()
    state = policy.new_state(call.cache)
    prefill(call.q, call.cache, policy, state, rope=ROPE, q_unrotated=call.q_unrotated)
    assert state.prefill.num_calls == 1 and state.decode.num_calls == 0


def test_an_empty_call() -> None:
    call = Call((20,), 20)
    policy = small()
    out, lse = prefill(call.q[:, :0], call.cache, policy, policy.new_state(call.cache))
    assert out.shape == (1, 0, GROUP * HEADS, DIM) and lse.shape == (1, 0, GROUP * HEADS)


def test_counts() -> None:
    call = Call((150, 150), 150)
    policy = small(q_block_size=50, num_tail_tokens=0, chunk_size=50)
    state = policy.new_state(call.cache)
    prefill(call.q, call.cache, policy, state, rope=ROPE, q_unrotated=call.q_unrotated)
    counts = state.prefill.to_dict()
    lists = 2 * HEADS  # rows x KV heads
    assert counts["num_calls"] == 3 and counts["num_dense_calls"] == 1
    assert counts["tokens_visible"] == (50 + 100 + 150) * lists
    assert counts["tokens_scanned"] == (100 + 150) * lists
    assert counts["tokens_attended"] == (50 + 2 * (3 + 6 + 24 + 50)) * lists
    assert counts["kept_mass"] is not None and 0.1 < counts["kept_mass"] < 1.0
    assert counts["hit_rate"] is None and counts["num_nonfinite"] == 0


def test_kept_mass_counts_vectors_of_every_block() -> None:
    """A first block shorter than query_groups has fewer vectors: its mass is still a share."""
    call = Call((150,), 72, rotated=False)
    policy = small(q_block_size=20, num_tail_tokens=10, query_groups=8, chunk_size=4096)
    state = policy.new_state(call.cache)  # blocks of 2, 20, 20, 20, 5, 5
    prefill(call.q, call.cache, policy, state)
    everything = small(q_block_size=20, num_tail_tokens=10, query_groups=8, overselect=100.0)
    full = everything.new_state(call.cache)
    prefill(call.q, call.cache, everything, full)
    assert full.prefill.kept_mass == pytest.approx(1.0, abs=1e-5)
    assert state.prefill.kept_mass is not None and state.prefill.kept_mass < 0.9


def test_non_finite_tokens_are_not_attended_to_and_counted() -> None:
    call = Call((150,), 70, rotated=False)
    poisoned = call.k.clone()
    poisoned[0, 40, 1, 3] = torch.nan
    cache = KVCache(1, HEADS, DIM, sketch=None)
    cache.append(poisoned, call.v)
    policy = small()
    state = policy.new_state(cache)
    out, _ = prefill(call.q, cache, policy, state)
    assert out[0, 40:].isfinite().all() and state.prefill.num_nonfinite > 0
    with pytest.raises(ValueError, match=r"cache: got 1 appended tokens with NaN or inf .*head 1"):
        prefill(call.q, cache, policy, state, check_finite=True)


@pytest.mark.parametrize(
    "policy, change, error, message",
    [
        (
            small(),
            {"q": torch.zeros(1, 5, 3, DIM)},
            ValueError,
            "num_q_heads: got 3, allowed: a mul",
        ),
        (small(), {"q": torch.zeros(2, 5, 4, DIM)}, ValueError, r"q: got shape \(2, 5, 4, 32\)"),
        (small(), {"q": torch.zeros(1, 5, 4, DIM).half()}, TypeError, "q: got torch.float16"),
        (small(), {"policy": "TokenSelect"}, TypeError, "policy: got str 'TokenSelect'"),
        (
            small(),
            {"state": None},
            TypeError,
            r"state: got NoneType None, allowed: policy.new_state",
        ),
        (small(), {"stepwise": 0}, TypeError, "stepwise: got int 0, allowed: True or False"),
        (small(), {"rope": 1}, TypeError, "rope: got int 1, allowed: a kvselect.Rope or None"),
        (small(), {"softmax_scale": 0.0}, ValueError, "softmax_scale: got 0.0, allowed: None or a"),
        (small(), {"q_unrotated": torch.zeros(1, 5, 4, DIM)}, ValueError, "q_unrotated: got shape"),
        (small(), {"q_unrotated": None}, ValueError, "q_unrotated: got None, allowed: the queries"),
        (small(), {"rope": None}, ValueError, "rope: got None, allowed: the model's Rope"),
        (
            small(positions="compact"),
            {"rope": None},
            ValueError,
            "rope: got None, allowed: a kvsele",
        ),
        (
            small(positions="compact", topk=300, dense_below_tokens=0),
            {"rope": Rope(ROPE.cos[:100], ROPE.sin[:100])},
            ValueError,
            r"capacity: got 347, allowed: at most 100 \(positions of rope\)",
        ),
        (
            small(positions="compact", dense_prefill=True),
            {"rope": Rope(ROPE.cos[:100], ROPE.sin[:100])},
            ValueError,
            r"seqlen_k: got 150, allowed: at most 100 \(positions of rope\) for dense attention",
        ),
        (
            dataclasses.replace(small(num_recent_tokens=128), sketch="int4"),
            {},
            ValueError,
            "sketch: got None, allowed: 'int4'",
        ),
    ],
)
def test_bad_input_is_named(
    policy: TokenSelect, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    call = Call()
    arguments: dict[str, Any] = {
        "q": call.q,
        "cache": call.cache,
        "policy": policy,
        "state": policy.new_state(call.cache),
        "q_unrotated": call.q_unrotated,
        "rope": ROPE,
    }
    with pytest.raises(error, match=message):
        prefill(**(arguments | change))


def test_a_defect_inside_a_query_block_is_not_listed_by_it() -> None:
    policy = TokenSelect(topk=16, num_sink_tokens=4, num_recent_tokens=32, sketch=None)
    q, k, v = make_qkv(1, 600, 600, 4, 2, 32)
    k[0, 340] = torch.nan
    cache = KVCache(1, 2, 32, sketch=None)
    cache.append(k, v)
    state = policy.new_state(cache)
    out, _ = prefill(q, cache, policy, state)
    first = policy.budget + policy.q_block_size  # blocks before it are dense, as stock attention
    assert out[0, first:].isfinite().all()
    assert state.prefill.num_nonfinite > 0


def test_lists_have_room_for_tail_blocks_larger_than_the_others() -> None:
    policy = TokenSelect(
        topk=128,
        sketch=None,
        overselect=1.0,
        num_recent_tokens=128,
        q_block_size=8,
        max_age=8,
        num_sink_tokens=184,
    )
    assert policy.capacity == 184 + 128 + 128 + 16
    q, k, v = make_qkv(1, 600, 600, 4, 2, 32)
    cache = KVCache(1, 2, 32, sketch=None)
    cache.append(k, v)
    out, _ = prefill(q, cache, policy, policy.new_state(cache))
    assert out.isfinite().all()
