"""decode_step: what a step is given, gives back, counts and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import (
    Dense,
    KVCache,
    Policy,
    Rope,
    TokenSelect,
    decode_step,
    prefill,
    reference,
)
from kvselect.testing import TOLERANCE, make_qkv, non_contiguous, rel_err

DIM, HEADS, GROUP = 32, 2, 2
POLICY = TokenSelect(topk=10, num_sink_tokens=3, num_recent_tokens=20, sketch=None, overselect=1.0)


def filled(
    seqlen: int = 150, batch: int = 2, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, KVCache]:
    q, k, v = make_qkv(batch, 1, seqlen, GROUP * HEADS, HEADS, DIM, seed=7, dtype=dtype)
    cache = KVCache(batch, HEADS, DIM, dtype=dtype, **({"sketch": None} | options))
    cache.append(k, v)
    return q, cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_block_size", [None, 16])
def test_dtypes_and_layouts(dtype: torch.dtype, page_block_size: int | None) -> None:
    q, cache = filled(dtype=dtype, page_block_size=page_block_size)
    out, info = decode_step(q, cache, POLICY, POLICY.new_state(cache))
    assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
    expected, lse = reference.sparse_attention(q, cache, info.selection)
    assert rel_err(out, expected) <= TOLERANCE[dtype]
    assert info.lse.dtype == torch.float32 and rel_err(info.lse, lse) <= TOLERANCE[dtype]


def test_queries_of_any_stride() -> None:
    q, cache = filled()
    expected, _ = decode_step(q, cache, POLICY, POLICY.new_state(cache))
    out, _ = decode_step(non_contiguous(q), cache, POLICY, POLICY.new_state(cache))
    assert torch.equal(out, expected)
    head_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(decode_step(head_major, cache, POLICY, POLICY.new_state(cache))[0], expected)


def test_the_same_step_gives_the_same_bits() -> None:
    q, cache = filled()
    first, again = (decode_step(q, cache, POLICY, POLICY.new_state(cache)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert first[1].selection is not None and again[1].selection is not None
    assert torch.equal(first[1].selection.indices, again[1].selection.indices)


def test_a_selection_without_reuse_is_the_callers() -> None:
    q, cache = filled()
    state = POLICY.new_state(cache)
    _, info = decode_step(q, cache, POLICY, state)
    assert info.selection is not None
    before = info.selection.indices.clone()
    cache.append(q[:, :, :HEADS], q[:, :, :HEADS])
    decode_step(-q, cache, POLICY, state)
    assert torch.equal(info.selection.indices, before)


def test_counts_and_bytes() -> None:
    q, cache = filled()
    state = POLICY.new_state(cache)
    for _ in range(3):
        decode_step(q, cache, POLICY, state)
    counts = state.decode
    lists = 2 * HEADS
    assert counts.num_calls == counts.num_steps == 3 and counts.num_dense_calls == 0
    assert counts.tokens_visible == counts.tokens_scanned == 3 * 150 * lists
    assert counts.tokens_attended == 3 * (3 + 10 + 20) * lists
    assert counts.hit_rate is None and counts.num_hits == counts.num_misses == 0
    # By the byte model: keys and values for what is attended, keys (or 68 / 4 bytes of sketch) for
    # what is scanned.
    assert counts.dense_bytes_read(DIM, 4) == 3 * 150 * lists * 2 * DIM * 4
    assert counts.bytes_read(DIM, 4, None) == 3 * lists * (150 * DIM * 4 + 33 * 2 * DIM * 4)
    assert counts.bytes_read(DIM, 2, "int4") == 3 * lists * (150 * 17 + 33 * 2 * DIM * 2)
    assert state.prefill.to_dict()["kept_mass"] is None and state.prefill.num_calls == 0


def test_non_finite_tokens_are_skipped_and_counted() -> None:
    q, cache = filled()
    clean, _ = decode_step(q, cache, POLICY, POLICY.new_state(cache))
    _, k, v = make_qkv(2, 1, 150, GROUP * HEADS, HEADS, DIM, seed=7)
    k[0, 140, 1, 0] = torch.inf  # inside the window of row 0
    poisoned = KVCache(2, HEADS, DIM, sketch=None)
    poisoned.append(k, v)
    state = POLICY.new_state(poisoned)
    out, info = decode_step(q, poisoned, POLICY, state)
    assert out.isfinite().all() and state.decode.num_nonfinite == 1
    assert info.selection is not None
    assert 140 not in info.selection.indices[0, 1] and 140 in info.selection.indices[0, 0]
    assert torch.equal(out[1], clean[1]) and torch.equal(out[0, :, :GROUP], clean[0, :, :GROUP])
    with pytest.raises(
        ValueError, match=r"cache: got 1 appended tokens .* \(first in row 0, head 1"
    ):
        decode_step(q, poisoned, POLICY, state, check_finite=True)


def test_non_finite_queries_are_counted() -> None:
    q, cache = filled()
    q[1, 0, 3, 5] = torch.nan
    state = POLICY.new_state(cache)
    out, _ = decode_step(q, cache, POLICY, state)
    assert out[0].isfinite().all() and out[1, :, :3].isfinite().all()
    assert state.decode.num_nonfinite == 1
    with pytest.raises(ValueError, match=r"q: got 1 queries .* \(first in row 1, head 3\)"):
        decode_step(q, cache, POLICY, state, check_finite=True)


def test_rows_without_tokens() -> None:
    q, k, v = make_qkv(2, 1, 60, GROUP * HEADS, HEADS, DIM)
    cache = KVCache(2, HEADS, DIM, sketch=None)
    cache.append(k, v, [60, 0])
    out, info = decode_step(q, cache, POLICY, POLICY.new_state(cache))
    assert not out[1].any() and (info.lse[1] == -torch.inf).all()
    assert info.selection is not None and info.selection.topk_length[1].tolist() == [0, 0]
    assert out[0].isfinite().all()


def test_an_empty_cache_and_an_empty_batch() -> None:
    for batch in (2, 0):
        cache = KVCache(batch, HEADS, DIM, sketch=None)
        q = torch.zeros(batch, 1, GROUP * HEADS, DIM)
        out, info = decode_step(q, cache, POLICY, POLICY.new_state(cache))
        assert out.shape == q.shape and not out.any() and (info.lse == -torch.inf).all()


def test_decode_follows_prefill() -> None:
    """A step after prefill equals the step on a cache that was filled in another way."""
    q, cache = filled()
    state = POLICY.new_state(cache)
    prefill(q.expand(-1, 150, -1, -1).contiguous(), cache, POLICY, state)
    after, _ = decode_step(q, cache, POLICY, state)
    alone, _ = decode_step(q, cache, POLICY, POLICY.new_state(cache))
    assert torch.equal(after, alone)


COMPACT = TokenSelect(
    topk=10,
    num_sink_tokens=3,
    num_recent_tokens=20,
    sketch=None,
    positions="compact",
    q_block_size=16,
)
REUSING = TokenSelect(
    topk=10, num_sink_tokens=3, num_recent_tokens=20, sketch=None, similarity_threshold=0.9
)
TABLE = Rope.from_frequencies(torch.ones(DIM // 2), 64)
GOOD = torch.zeros(2, 1, GROUP * HEADS, DIM)


@pytest.mark.parametrize(
    "policy, change, error, message",
    [
        (
            POLICY,
            {"q": GOOD[:, [0, 0]]},
            ValueError,
            r"seqlen_q: got 2, allowed: 1 \(prefill takes",
        ),
        (
            POLICY,
            {"q": GOOD[:1]},
            ValueError,
            r"q: got shape \(1, 1, 4, 32\), allowed: \[2, any, any",
        ),
        (
            POLICY,
            {"q": GOOD[:, :, :3]},
            ValueError,
            "num_q_heads: got 3, allowed: a multiple of num_kv",
        ),
        (POLICY, {"q": GOOD.double()}, TypeError, "q: got torch.float64, allowed: torch.float32"),
        (POLICY, {"q": GOOD.to("meta")}, ValueError, "q: got device meta, allowed: cpu"),
        (POLICY, {"q": GOOD.tolist()}, TypeError, "q: got a list, allowed: a torch.Tensor"),
        (
            POLICY,
            {"policy": Dense()},
            ValueError,
            "state: got 'a state of TokenSelect', allowed: a st",
        ),
        (POLICY, {"cache": GOOD}, TypeError, "cache: got a Tensor, allowed: a kvselect.KVCache"),
        (
            POLICY,
            {"policy": "Dense"},
            TypeError,
            "policy: got str 'Dense', allowed: a kvselect policy",
        ),
        (
            POLICY,
            {"state": {}},
            TypeError,
            r"state: got dict \{\}, allowed: policy.new_state\(cache\)",
        ),
        (
            POLICY,
            {"softmax_scale": -1.0},
            ValueError,
            "softmax_scale: got -1.0, allowed: None or a fl",
        ),
        (POLICY, {"softcap": 0.0}, ValueError, "softcap: got 0.0, allowed: None or a float in"),
        (POLICY, {"softcap": "50"}, TypeError, "softcap: got str '50', allowed: None or a float"),
        (
            POLICY,
            {"sink_logits": torch.zeros(2)},
            ValueError,
            r"sink_logits: got shape \(2,\), allowed: \[4\]",
        ),
        (
            POLICY,
            {"sink_logits": torch.zeros(4).half()},
            TypeError,
            "sink_logits: got torch.float16, allowed: torch.float32",
        ),
        (POLICY, {"q_unrotated": GOOD[:1]}, ValueError, r"q_unrotated: got shape \(1, 1, 4, 32\)"),
        (
            POLICY,
            {"rope": "yarn"},
            TypeError,
            "rope: got str 'yarn', allowed: a kvselect.Rope or None",
        ),
        (POLICY, {"rope": TABLE.to("meta")}, ValueError, "rope: got device.* allowed: device cpu"),
        (
            POLICY,
            {"rope": Rope.from_frequencies(torch.ones(17), 64)},
            ValueError,
            "rope: got 'rotated channels to 34', allowed: <= 32",
        ),
        (COMPACT, {}, ValueError, "rope: got None, allowed: a kvselect.Rope"),
        (COMPACT, {"rope": TABLE}, ValueError, "capacity: got 102, allowed: at most 64"),
        (
            REUSING,
            {"rope": TABLE},
            ValueError,
            "q_unrotated: got None, allowed: the queries before",
        ),
        (TokenSelect(), {}, ValueError, "sketch: got None, allowed: 'int4'"),
    ],
)
def test_bad_input_is_named(
    policy: Policy, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    q, cache = filled()
    arguments: dict[str, Any] = {
        "q": q,
        "cache": cache,
        "policy": policy,
        "state": policy.new_state(cache),
    }
    with pytest.raises(error, match=message):
        decode_step(**(arguments | change))
    assert cache.lengths == (150, 150)


def test_a_cache_with_a_sketch_serves_policies_without() -> None:
    q, cache = filled(sketch="int8")
    for policy in (POLICY, Dense()):
        out, _ = decode_step(q, cache, policy, policy.new_state(cache))
        assert out.isfinite().all()


@pytest.mark.parametrize("policy", [POLICY, REUSING, Dense()], ids=["fresh", "reusing", "dense"])
@pytest.mark.parametrize("page_block_size", [None, 1])
def test_grad_modes_may_change_between_steps(policy: Policy, page_block_size: int | None) -> None:
    """A cache and a state made under inference_mode go on outside it, and the other way round."""
    modes: list[Any] = [
        torch.inference_mode,
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
    ]
    q, _ = filled(1)
    with torch.inference_mode():
        cache = KVCache(2, HEADS, DIM, page_block_size=page_block_size)
        state = policy.new_state(cache)
        _, k, v = make_qkv(2, 1, 150, GROUP * HEADS, HEADS, DIM, seed=7)
        cache.append(k, v)
    for mode in modes * 2:
        with mode():
            cache.append(k[:, :1], v[:, :1])
            out, _ = decode_step(q, cache, policy, state)
            prefill(q, cache, policy, state)
            cache.crop(1)
            cache.append(k[:, :1], v[:, :1])
            cache.set_starts([1, 0])
    assert out.isfinite().all() and state.decode.num_calls == 16


def test_a_defect_is_not_listed_by_a_reused_list() -> None:
    policy = TokenSelect(
        topk=16, num_sink_tokens=4, num_recent_tokens=32, sketch=None, similarity_threshold=0.5
    )
    q, k, v = make_qkv(1, 1, 310, 4, 2, 32)
    cache = KVCache(1, 2, 32, sketch=None)
    state = policy.new_state(cache)
    cache.append(k[:, :300], v[:, :300])
    for t in range(300, 304):
        broken = k[:, t : t + 1].clone()
        if t == 302:
            broken[..., 3] = torch.nan
        cache.append(broken, v[:, t : t + 1])
        out, info = decode_step(q, cache, policy, state)
        assert out.isfinite().all()
        assert info.selection is not None
        assert not (info.selection.indices == 302).any()
        expected = None if t == 300 else torch.full((1, 2), int(t != 302))
        assert info.hit is None if expected is None else torch.equal(info.hit, expected.int())


def test_a_key_of_minus_infinity_is_not_listed() -> None:
    policy = TokenSelect(topk=16, num_sink_tokens=4, num_recent_tokens=32, sketch=None)
    q, k, v = make_qkv(1, 1, 300, 4, 2, 32)
    q[..., 0] = 1.0
    k[:, 50, :, 0] = -torch.inf
    cache = KVCache(1, 2, 32, sketch=None)
    cache.append(k, v)
    state = policy.new_state(cache)
    out, info = decode_step(q, cache, policy, state)
    assert info.selection is not None and out.isfinite().all()
    assert not (info.selection.indices == 50).any()
    assert state.decode.num_nonfinite == 2


def test_lists_of_one_cache_are_not_reused_on_another() -> None:
    policy = TokenSelect(
        topk=16, num_sink_tokens=4, num_recent_tokens=32, sketch=None, similarity_threshold=0.5
    )
    q, k, v = make_qkv(1, 1, 301, 4, 2, 32)
    first, second = KVCache(1, 2, 32, sketch=None), KVCache(1, 2, 32, sketch=None)
    first.append(k[:, :300], v[:, :300])
    second.append(-k[:, :299], v[:, :299])
    second.append(-k[:, 299:300], v[:, 299:300])
    state = policy.new_state(first)
    decode_step(q, first, policy, state)
    second.append(k[:, 300:], v[:, 300:])
    _, info = decode_step(q, second, policy, state)
    assert info.hit is None


def test_queries_that_want_a_gradient_are_refused() -> None:
    q, k, v = make_qkv(1, 1, 40, 4, 2, 32)
    cache = KVCache(1, 2, 32, sketch=None)
    cache.append(k, v)
    q.requires_grad_()
    policy = TokenSelect(sketch=None)
    with pytest.raises(ValueError, match="q: got 'a tensor that requires grad', allowed: no grad"):
        decode_step(q, cache, policy, policy.new_state(cache))
    with torch.no_grad():
        decode_step(q, cache, policy, policy.new_state(cache))
