"""Properties that hold for every input, sought by hypothesis on all implementations."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import attend, int32, make_case, mass, score, select
from torch import Tensor

from kvselect import ops
from kvselect.reference import QueryBlocks, decode_block, encode_block
from kvselect.testing import make_qkv, rel_err

implementations = st.sampled_from(ops.cpu_implementations())
seeds = st.integers(0, 2**31)
quick = settings(deadline=None, max_examples=40)


class Forced:
    """The implementation of one example; hypothesis and function-scoped fixtures do not mix."""

    def __init__(self, name: str) -> None:
        self.name, self.before = name, ops.cpu_implementation()

    def __enter__(self) -> None:
        ops.set_cpu_implementation(self.name)

    def __exit__(self, *_: object) -> None:
        ops.set_cpu_implementation(self.before)


def listed(indices: Tensor, lengths: Tensor) -> set[int]:
    return set(indices.flatten()[: int(lengths)].tolist())


def tied_scores(seqlen: int, seed: int) -> Tensor:
    """Scores of few distinct values, zeros and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, 1e-45, 1e-40, 1e-9, 0.1, 0.1000000015, 0.5, 1.0])
    return values[torch.randint(0, 8, (1, 1, 1, seqlen), generator=generator)]


# ---- merging


@quick
@given(implementations, st.integers(1, 16), st.integers(1, 8), seeds)
def test_order_of_splits_does_not_matter(name: str, num_splits: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(num_splits, rows, 32, generator=generator)
    lse = 8.0 * torch.randn(num_splits, rows, generator=generator)
    lse[torch.rand(num_splits, rows, generator=generator) < 0.2] = -torch.inf
    order = torch.randperm(num_splits, generator=generator)
    with Forced(name):
        merged = torch.ops.kvselect.merge_splits(out, lse)
        shuffled = torch.ops.kvselect.merge_splits(out[order], lse[order])
    assert rel_err(shuffled[0], merged[0]) <= 4e-6
    assert rel_err(shuffled[1], merged[1]) <= 4e-6


@quick
@given(implementations, st.integers(1, 150), st.lists(st.integers(0, 150), max_size=5), seeds)
def test_splitting_then_merging_changes_nothing(
    name: str, seqlen: int, cuts: list[int], seed: int
) -> None:
    q, k, v = make_qkv(1, 1, seqlen, 4, 2, 32, seed=seed)
    borders = [0, *sorted(min(cut, seqlen) for cut in cuts), seqlen]
    with Forced(name):
        case = make_case(k, v, int32(seqlen))
        parts = []
        for first, last in pairwise(borders):
            indices = torch.full((1, 1, 2, seqlen), -1, dtype=torch.int32)
            indices[..., : last - first] = torch.arange(first, last)
            lengths = torch.full((1, 1, 2), last - first, dtype=torch.int32)
            parts.append(attend(case, q, indices, lengths))
        merged = torch.ops.kvselect.merge_splits(
            torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
        )
        whole = attend(case, q)
    assert rel_err(merged[0], whole[0]) <= 4e-6
    assert rel_err(merged[1], whole[1]) <= 4e-6


# ---- selecting


@quick
@given(
    implementations,
    st.integers(1, 300),
    st.integers(0, 310),
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from([1, 3, 9]),
    seeds,
)
def test_lists_are_what_they_promise(
    name: str, seqlen: int, keep: int, sinks: int, recent: int, pool_width: int, seed: int
) -> None:
    """Ascending, unique, complete; no dropped candidate ranks above a kept one."""
    scores = tied_scores(seqlen, seed)
    blocks = QueryBlocks(
        cache_seqlens=int32(seqlen), seqlen_q=1, num_sink_tokens=sinks, num_recent_tokens=recent
    )
    at = blocks.range(0, 0)
    with Forced(name):
        indices, lengths, _ = select(
            scores, blocks, keep=keep, pool_width=pool_width, width=seqlen + 3
        )
    ordered = indices.flatten()[: int(lengths)].tolist()
    assert ordered == sorted(set(ordered))
    assert (indices.flatten()[int(lengths) :] == -1).all()
    always = {*range(at.start, at.sink_end), *range(at.window_start, at.end)}
    assert always <= set(ordered)
    assert len(ordered) == len(always) + min(keep, at.num_candidates)
    candidates = range(at.sink_end, at.window_start)
    own = scores.flatten().tolist()
    pooled = {
        i: max(own[j] for j in candidates if abs(i - j) <= pool_width // 2) for i in candidates
    }
    rank = {i: (-pooled[i], -own[i], i) for i in candidates}
    kept = [rank[i] for i in candidates if i in set(ordered)]
    dropped = [rank[i] for i in candidates if i not in set(ordered)]
    assert not kept or not dropped or max(kept) < min(dropped)


@quick
@given(implementations, st.integers(2, 300), st.integers(1, 299), st.data(), seeds)
def test_raising_a_score_never_drops_a_token(
    name: str, seqlen: int, keep: int, data: st.DataObject, seed: int
) -> None:
    scores = tied_scores(seqlen, seed)
    blocks = QueryBlocks(cache_seqlens=int32(seqlen), seqlen_q=1)
    keep = min(keep, seqlen - 1)
    with Forced(name):
        before = select(scores, blocks, keep=keep, width=seqlen)
        token = data.draw(st.sampled_from(sorted(listed(*before[:2]))))
        scores[..., token] *= 1.5
        scores[..., token] += 1e-42
        after = select(scores, blocks, keep=keep, width=seqlen)
    assert token in listed(*after[:2])
    # and nobody else changes places but for the one it may have pushed out: it was already in
    assert listed(*before[:2]) == listed(*after[:2])


@quick
@given(implementations, st.integers(2, 300), st.integers(1, 300), seeds)
def test_permuting_candidates_permutes_the_picks(
    name: str, seqlen: int, keep: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(seqlen, generator=generator).unique()  # no ties: positions decide those
    seqlen = len(scores)
    order = torch.randperm(seqlen, generator=generator)
    blocks = QueryBlocks(cache_seqlens=int32(seqlen), seqlen_q=1)
    with Forced(name):
        plain = select(scores.view(1, 1, 1, -1), blocks, keep=keep, width=seqlen)
        moved = select(scores[order].view(1, 1, 1, -1), blocks, keep=keep, width=seqlen)
    assert {int(order[i]) for i in listed(*moved[:2])} == listed(*plain[:2])


# ---- scoring and attending


@quick
@given(
    implementations,
    st.integers(1, 200),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    seeds,
)
def test_votes_add_up(
    name: str, seqlen: int, num_vectors: int, group_size: int, sketch: bool, seed: int
) -> None:
    """Every head and vector hands out exactly one vote, from the keys and from a sketch of them."""
    q, k, v = make_qkv(1, num_vectors, seqlen, 2 * group_size, 2, 32, seed=seed)
    case = make_case(k, v, int32(seqlen), sketch="int4" if sketch else None)
    blocks = QueryBlocks(cache_seqlens=int32(seqlen), seqlen_q=1, num_recent_tokens=7)
    with Forced(name):
        scores, _, _ = score(case, q[:, None], blocks, sketch=sketch)
    assert (scores >= 0).all()
    votes = torch.full((1, 1, 2), float(num_vectors * group_size))
    assert rel_err(scores.sum(-1), votes) <= 4e-6


@quick
@given(implementations, st.integers(1, 150), st.integers(1, 20), st.integers(0, 30), seeds)
def test_topk_of_everything_is_dense_attention(
    name: str, seqlen: int, seqlen_q: int, recent: int, seed: int
) -> None:
    q, k, v = make_qkv(1, seqlen_q, seqlen, 4, 2, 32, seed=seed)
    case = make_case(k, v, int32(seqlen))
    blocks = QueryBlocks(
        cache_seqlens=int32(seqlen),
        seqlen_q=seqlen_q,
        window_rule="block_start",
        num_sink_tokens=3,
        num_recent_tokens=recent,
    )
    with Forced(name):
        scores = torch.rand(1, 1, 2, seqlen, generator=torch.Generator().manual_seed(seed))
        indices, lengths, _ = select(scores, blocks, keep=seqlen, width=seqlen)
        sparse, dense = attend(case, q, indices, lengths), attend(case, q)
        share = mass(case, q, indices, lengths)
    assert torch.equal(sparse[0], dense[0]) and torch.equal(sparse[1], dense[1])
    assert rel_err(share, torch.ones_like(share)) <= 1e-6


@quick
@given(implementations, st.integers(1, 150), st.integers(0, 150), st.integers(0, 150), seeds)
def test_mass_grows_with_the_list(name: str, seqlen: int, fewer: int, more: int, seed: int) -> None:
    """In [0, 1], and never smaller for a list that holds another; lse says the same."""
    fewer, more = sorted((min(fewer, seqlen), min(more, seqlen)))
    q, k, v = make_qkv(1, 1, seqlen, 2, 1, 32, seed=seed)
    case = make_case(k, v, int32(seqlen))
    order = torch.randperm(seqlen, generator=torch.Generator().manual_seed(seed))
    masses, sums = [], []
    with Forced(name):
        whole = attend(case, q)[1]
        for count in (fewer, more):
            indices = torch.full((1, 1, 1, seqlen), -1, dtype=torch.int32)
            indices[..., :count] = order[:count].sort().values
            lengths = torch.full((1, 1, 1), count, dtype=torch.int32)
            masses.append(mass(case, q, indices, lengths))
            sums.append(attend(case, q, indices, lengths)[1])
    assert (masses[0] >= 0).all() and (masses[1] <= 1).all()
    assert (masses[0] <= masses[1] + 1e-6).all()
    for share, lse in zip(masses, sums, strict=True):
        assert rel_err((lse - whole).exp(), share) <= 1e-5  # exp of a difference of two float32


# ---- the codec


@quick
@given(
    st.sampled_from(["int4", "int8"]),
    st.floats(-4, 4),
    st.floats(-100, 100),
    seeds,
)
def test_codec_errs_by_half_a_step_at_most(
    sketch: str, log_scale: float, offset: float, seed: int
) -> None:
    """And by what float16 takes from the ends of the range."""
    generator = torch.Generator().manual_seed(seed)
    keys = offset + 10.0**log_scale * torch.randn(128, 32, generator=generator)
    record = encode_block(keys, sketch)
    decoded = decode_block(record, sketch, 32)
    step = record[: 2 * 32].view(torch.float16).double()
    if decoded is None:
        assert keys.abs().max() > 65504 or (keys.amax(0) - keys.amin(0)).max() > 65504
        return
    levels = 15 if sketch == "int4" else 255
    ends = 2.0**-11 * (keys.abs().amax(0) + (keys.amax(0) - keys.amin(0))) + levels * 2.0**-25
    error = (decoded - keys.double()).abs().amax(0)
    assert (error <= 0.5 * step + ends + 1e-6 * keys.abs().amax(0)).all()
