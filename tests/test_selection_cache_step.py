"""selection_cache_step: the reference's decisions, and the same bits from every implementation.

By the op, and by a scan that decides on its way: the only one of the two on CUDA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import NONE, ONE_IMPLEMENTATION, int32
from torch import Tensor

from kvselect import reference
from kvselect.testing import non_contiguous

pytestmark = pytest.mark.usefixtures("decide")

STATE = ("anchor_query", "age", "expected_seqlens", "known_nonfinite", "reuse_counts")


def make_step(
    q: Tensor, num_kv_heads: int, *, num_lists: int | None = None, seqlen: int = 50, **change: Any
) -> dict[str, Any]:
    """A step that hits in every list: the query is its own anchor, the row grew by one token."""
    batch = q.shape[0]
    num_lists = num_kv_heads if num_lists is None else num_lists
    arguments = {
        "q": q,
        "cache_seqlens": torch.full((batch,), seqlen, dtype=torch.int32),
        "starts": None,
        "num_nonfinite": torch.zeros(batch, num_kv_heads, dtype=torch.int64),
        "similarity": "min",
        "similarity_threshold": 0.9,
        "max_age": 64,
        "dense_limit": 0,
        "anchor_query": q[:, 0].float().clone(),
        "age": torch.zeros(batch, num_lists, dtype=torch.int32),
        "expected_seqlens": torch.full((batch,), seqlen, dtype=torch.int32),
        "known_nonfinite": torch.zeros(batch, num_lists, dtype=torch.int64),
        "reuse_counts": torch.zeros(2, dtype=torch.int64),
    }
    assert set(change) <= set(arguments)
    return arguments | change


def by_op(arguments: dict[str, Any]) -> Tensor:
    hit: Tensor = torch.ops.kvselect.selection_cache_step(**arguments)
    return hit


def by_scan(arguments: dict[str, Any]) -> Tensor:
    """Of keys that are all zeros."""
    step = dict(arguments)
    q, num_nonfinite = step.pop("q"), step.pop("num_nonfinite")
    batch, num_q_heads, head_dim = q.shape[0], *q.shape[-2:]
    num_kv_heads = num_nonfinite.shape[1]
    longest = int(step["cache_seqlens"].max()) if batch else 0
    num_lists = 1 if step["age"].shape[1] == 1 else num_kv_heads
    hit = torch.full((batch, num_lists), 7, dtype=torch.int32)
    dtype = torch.float32 if q.dtype == torch.float64 else q.dtype
    torch.ops.kvselect.score_tokens(
        q=torch.zeros(batch, 1, 1, num_q_heads, head_dim),
        q_local=None,
        k_cache=torch.zeros(batch, longest, num_kv_heads, head_dim, dtype=dtype),
        block_table=None,
        sketch=None,
        sketch_format=NONE,
        q_block_offsets=None,
        seqlen_q=1,
        window_rule="decode",
        num_sink_tokens=0,
        num_recent_tokens=0,
        keep=0,
        scale=1.0,
        normalise_candidates_only=False,
        max_vote=False,
        cos=None,
        sin=None,
        rope_start=0,
        rope_interleaved=False,
        hit=hit,
        max_seqlen_k=longest,
        softcap=0.0,
        sink_logits=None,
        ranking=None,
        sketch_in_pages=False,
        compared_q=q,
        cache_nonfinite=num_nonfinite,
        **step,
    )
    return hit


WAYS: dict[str, Callable[[dict[str, Any]], Tensor]] = {"op": by_op, "scan": by_scan}
way = by_op


@pytest.fixture(params=list(WAYS))
def decide(
    request: pytest.FixtureRequest, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "cuda" and request.param == "op":
        pytest.skip("on CUDA the scan decides")
    monkeypatch.setitem(globals(), "way", WAYS[request.param])


def run(arguments: dict[str, Any]) -> reference.CacheStep:
    """On copies of the state."""
    own = {name: arguments[name].clone() for name in STATE}
    return reference.CacheStep(way(arguments | own), **own)


def assert_equals_reference(arguments: dict[str, Any]) -> reference.CacheStep:
    got, expected = run(arguments), reference.selection_cache_step(**arguments)
    for name in reference.CacheStep._fields:
        one, other = getattr(got, name), getattr(expected, name)
        assert one.dtype == other.dtype, name
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), name
    return got


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("similarity", ["min", "q10", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "num_q_heads, num_kv_heads, num_lists, head_dim",
    [(1, 1, 1, 32), (8, 8, 8, 80), (12, 3, 3, 64), (12, 3, 1, 96), (40, 2, 1, 128), (4, 1, 1, 256)],
)
def test_equals_the_reference(
    similarity: str,
    dtype: torch.dtype,
    num_q_heads: int,
    num_kv_heads: int,
    num_lists: int,
    head_dim: int,
) -> None:
    """Random cosines on both sides of the threshold, ages, lengths and defects in every state."""
    generator = torch.Generator().manual_seed(num_q_heads)
    hits = 0
    for seed in range(12):
        q = randn(3, 1, num_q_heads, head_dim, seed=seed).to(dtype)
        share = 1.0 / (
            2 * num_q_heads // num_lists
        )  # about half the lists have a head that differs
        noise = 0.2 + 0.6 * (torch.rand(3, num_q_heads, 1, generator=generator) < share)
        step = make_step(
            non_contiguous(q) if seed % 2 else q,
            num_kv_heads,
            num_lists=num_lists,
            similarity=similarity,
            cache_seqlens=int32(50, 70, 9),
            expected_seqlens=int32(50, 70 + seed % 2, 9),
            starts=int32(0, 3, 12) if seed % 3 else None,
            max_age=5,
            dense_limit=40,
            anchor_query=q[:, 0].float() + noise * randn(3, num_q_heads, head_dim, seed=-1 - seed),
            age=torch.randint(0, 7, (3, num_lists), generator=generator, dtype=torch.int32),
            num_nonfinite=torch.randint(0, 2, (3, num_kv_heads), generator=generator),
            reuse_counts=torch.tensor([5, 7]),
        )
        step["known_nonfinite"] = step["num_nonfinite"].view(3, num_lists, -1).sum(-1)
        step["known_nonfinite"] -= (torch.rand(3, num_lists, generator=generator) < 0.2).long()
        hits += int(assert_equals_reference(step).hit.sum())
    assert 0 < hits < 36 * num_lists


def in_documented_order(x: Tensor, y: Tensor) -> float:
    """Sum of products as csrc/include/kvselect/selection_cache_step.h defines it, in float64."""
    sums = [0.0] * 8
    for i, (a, b) in enumerate(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)):
        sums[i % 8] += a * b
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads, similarity", [(1, "min"), (3, "flat")])
def test_the_last_bit_of_a_decision_is_defined(
    dtype: torch.dtype, heads: int, similarity: str
) -> None:
    """At the very threshold: the largest that hits, and the next number, which misses."""
    for seed in range(8):
        q = randn(1, 1, heads, 96, seed=seed).to(dtype)
        anchor = q[:, 0].float() + 0.4 * randn(1, heads, 96, seed=-1 - seed)
        wide = q[:, 0].float()
        qa, qq = in_documented_order(wide, anchor), in_documented_order(wide, wide)
        norm = math.sqrt(qq * in_documented_order(anchor, anchor))
        least = qa / norm
        while qa >= least * norm:
            least = math.nextafter(least, 2.0)
        while qa < least * norm:
            least = math.nextafter(least, 0.0)
        for threshold, hit in ((least, 1), (math.nextafter(least, 2.0), 0)):
            change = {"similarity_threshold": threshold, "anchor_query": anchor}
            step = make_step(q, 1, similarity=similarity, **change)
            assert run(step).hit.tolist() == [[hit]], (seed, threshold)


@pytest.mark.parametrize("similarity", ["min", "q10", "flat"])
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e18, 3e38])
def test_the_same_query_hits_at_threshold_1_whatever_its_size(
    similarity: str, scale: float
) -> None:
    """float32 sums would overflow, or underflow to the cosine of nothing."""
    q = randn(2, 1, 6, 80).clamp(-1.0, 1.0) * scale
    step = make_step(q, 3, similarity=similarity, similarity_threshold=1.0)
    assert assert_equals_reference(step).hit.tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "anchor_query"])
@pytest.mark.parametrize("similarity, hit", [("min", 0), ("q10", 1), ("flat", None)])
def test_a_vector_that_is_zero_or_not_finite_is_like_none(
    value: float, where: str, similarity: str, hit: int | None
) -> None:
    """q10 of 12 heads forgives one; "flat" has one vector, where a head of zeros is a head."""
    q = randn(1, 1, 24, 32)
    step = make_step(q, 2, similarity=similarity)
    step[where] = step[where].clone()
    step[where].view(24, 32)[3] = value
    if hit is None:
        hit = int(value == 0.0)
    assert assert_equals_reference(step).hit.tolist() == [[hit, 1]]
    step[where].view(24, 32)[4] = value
    assert assert_equals_reference(step).hit.tolist() == [[hit if similarity == "flat" else 0, 1]]
    step[where].view(24, 32)[:12] = value
    assert assert_equals_reference(step).hit.tolist() == [[0, 1]]


def test_what_makes_a_list_miss() -> None:
    q = randn(1, 1, 4, 64)
    for change, hit in [
        ({}, [1, 1]),
        ({"age": int32(63, 64).view(1, 2)}, [1, 0]),
        ({"max_age": 1, "age": int32(0, 1).view(1, 2)}, [1, 0]),
        ({"expected_seqlens": int32(49)}, [0, 0]),
        ({"expected_seqlens": int32(-1)}, [0, 0]),
        ({"num_nonfinite": torch.tensor([[0, 2]])}, [1, 0]),
        (
            {"num_nonfinite": torch.tensor([[3, 2]]), "known_nonfinite": torch.tensor([[3, 1]])},
            [1, 0],
        ),
        ({"anchor_query": q[:, 0] * torch.tensor([1.0, 1.0, 1.0, -1.0])[:, None]}, [1, 0]),
    ]:
        assert assert_equals_reference(make_step(q, 2, **change)).hit.tolist() == [hit], change


def test_what_is_remembered() -> None:
    """A list made anew takes the query as its anchor and starts at age 0; a reused one grows."""
    q = randn(2, 1, 4, 32).bfloat16()
    turned = q[:, 0].float()
    turned[0, 3] *= -1.0
    step = make_step(
        q,
        2,
        anchor_query=2.0 * turned,
        age=int32(3, 3, 3, 3).view(2, 2),
        starts=int32(40, 0),
        dense_limit=10,
        num_nonfinite=torch.tensor([[0, 5], [1, 0]]),
        known_nonfinite=torch.tensor([[0, 5], [1, 0]]),
    )
    got = assert_equals_reference(step)
    assert got.hit.tolist() == [[1, 0], [1, 1]]
    assert got.age.tolist() == [[4, 0], [4, 4]]
    assert got.expected_seqlens.tolist() == [-1, 51]  # row 0 has ten real tokens: dense if alone
    assert got.known_nonfinite.tolist() == [[0, 5], [1, 0]]
    assert got.reuse_counts.tolist() == [3, 10 + 2 * 50]
    expected = 2.0 * turned
    expected[0, 2:] = q[0, 0, 2:].float()
    assert torch.equal(got.anchor_query, expected)


def test_shared_lists_count_the_tokens_of_all_their_heads() -> None:
    step = make_step(randn(1, 1, 6, 32), 3, num_lists=1, known_nonfinite=torch.tensor([[6]]))
    step["num_nonfinite"] = torch.tensor([[1, 2, 3]])
    got = assert_equals_reference(step)
    assert got.hit.tolist() == [[1]] and got.reuse_counts.tolist() == [1, 3 * 50]


def test_rows_without_tokens_and_batches_without_rows() -> None:
    step = make_step(randn(2, 1, 4, 32), 2, seqlen=0, starts=int32(0, 5))
    got = assert_equals_reference(step)
    assert got.reuse_counts.tolist() == [4, 0] and got.expected_seqlens.tolist() == [-1, -1]
    assert run(make_step(torch.zeros(0, 1, 4, 32), 2)).hit.shape == (0, 2)


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    q = randn(9, 1, 8, 64)
    anchor = q[:, 0] + 0.5 * randn(9, 8, 64, seed=1)
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run(make_step(q, 4, anchor_query=anchor)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert 0 < int(results[0].reuse_counts[0]) < 36


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.integers(1, 30))
def test_a_higher_threshold_and_a_lower_age_never_add_hits(
    seed: int, one: float, other: float, max_age: int
) -> None:
    q = randn(2, 1, 12, 32, seed=seed)
    step = make_step(
        q,
        3,
        anchor_query=q[:, 0] + 0.6 * randn(2, 12, 32, seed=seed + 1),
        age=torch.randint(0, 30, (2, 3), generator=torch.Generator().manual_seed(seed)).int(),
    )
    for similarity in ("min", "q10", "flat"):
        step |= {"similarity": similarity, "max_age": 30}
        loose = run(step | {"similarity_threshold": min(one, other)}).hit
        strict = run(step | {"similarity_threshold": max(one, other)}).hit
        young = run(step | {"similarity_threshold": min(one, other), "max_age": max_age}).hit
        assert (strict <= loose).all() and (young <= loose).all()


def test_decisions_are_those_of_float32_cosines_away_from_the_threshold() -> None:
    """The definition that the paper's authors and users have in mind."""
    q = randn(64, 1, 8, 128)
    anchor = q[:, 0] + 0.5 * randn(64, 8, 128, seed=1)
    cosines = torch.cosine_similarity(q[:, 0], anchor, dim=-1).view(64, 2, 4).amin(-1)
    clear = (cosines - 0.89).abs() > 1e-6
    hit = run(make_step(q, 2, anchor_query=anchor, similarity_threshold=0.89)).hit
    assert torch.equal((cosines >= 0.89)[clear], hit.bool()[clear]) and 0 < int(hit.sum()) < 128


def test_state_of_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode():
        step = make_step(randn(1, 1, 4, 32), 2)
    assert way(step).tolist() == [[1, 1]] and step["age"].tolist() == [[1, 1]]


Q = randn(2, 1, 4, 32)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"similarity": "max"}, "similarity: got 'max', allowed: min, q10, flat"),
    ({"similarity_threshold": 0.0}, r"similarity_threshold: got 0, allowed: a float in \(0, 1\]"),
    ({"similarity_threshold": 1.5}, r"similarity_threshold: got 1.5, allowed: a float in \(0, 1\]"),
    ({"similarity_threshold": math.nan}, "similarity_threshold: got nan"),
    ({"max_age": 0}, "max_age: got 0, allowed: an int >= 1"),
    ({"dense_limit": -1}, "dense_limit: got -1, allowed: an int >= 0"),
    ({"q": Q[:, 0]}, r"q: got shape \[2, 4, 32\], allowed: \[batch, seqlen_q=1, num_q_heads, hea"),
    ({"q": torch.cat((Q, Q), 1)}, r"q: got shape \[2, 2, 4, 32\], allowed: \[batch, seqlen_q=1, "),
    ({"q": Q.double()}, "q: got float64, allowed: float32, float16, bfloat16"),
    ({"q": Q.repeat(1, 1, 1, 2)[..., ::2]}, "q: got strides .*, allowed: 1 in the last dimension"),
    ({"q": Q[..., :16]}, "head_dim: got 16, allowed: 32, 64"),
    ({"q": Q[:, :, :3]}, "num_q_heads: got 3, allowed: a multiple of num_kv_heads = 2"),
    ({"cache_seqlens": int32(1)}, r"cache_seqlens: got shape \[1\], allowed: \[batch=2\]"),
    ({"starts": torch.zeros(2)}, "starts: got float32, allowed: int32"),
    ({"num_nonfinite": torch.zeros(2, 2)}, "num_nonfinite: got float32, allowed: int64"),
    ({"num_nonfinite": torch.zeros(1, 2).long()}, r"num_nonfinite: got shape \[1, 2\]"),
    ({"age": torch.zeros(2, 2).long()}, "age: got int64, allowed: int32"),
    ({"age": torch.zeros(2, 4).int()}, "age: got 4 lists, allowed: 1 or num_kv_heads = 2"),
    ({"age": int32(0).expand(2, 2)}, "age: got strides .*, allowed: a contiguous tensor"),
    ({"anchor_query": torch.zeros(2, 4, 32).half()}, "anchor_query: got float16, allowed: float32"),
    ({"anchor_query": torch.zeros(2, 4, 64)}, r"anchor_query: got shape \[2, 4, 64\], allowed: \["),
    ({"expected_seqlens": torch.zeros(2)}, "expected_seqlens: got float32, allowed: int32"),
    (
        {"expected_seqlens": int32(1, 2, 3)},
        r"expected_seqlens: got shape \[3\], allowed: \[batch=2",
    ),
    ({"known_nonfinite": torch.zeros(2, 2)}, "known_nonfinite: got float32, allowed: int64"),
    (
        {"known_nonfinite": torch.zeros(2, 1).long()},
        r"known_nonfinite: got shape \[2, 1\], allowed",
    ),
    ({"reuse_counts": torch.zeros(2)}, "reuse_counts: got float32, allowed: int64"),
    (
        {"reuse_counts": torch.zeros(3).long()},
        r"reuse_counts: got shape \[3\], allowed: \[counts=2\]",
    ),
]


@ONE_IMPLEMENTATION
@pytest.mark.parametrize("change, message", ERRORS, ids=[e[1][:44] for e in ERRORS])
def test_error_messages(change: dict[str, Any], message: str) -> None:
    step = make_step(Q, 2) | change
    before = {name: step[name].clone() for name in STATE}
    if way is by_scan:  # which has a query and defects of its own
        message = re.sub("^q:", "compared_q:", message)
        message = re.sub("^num_nonfinite:", "cache_nonfinite:", message)
    with pytest.raises(ValueError, match=message):
        way(step)
    assert all(torch.equal(step[name], value) for name, value in before.items())
