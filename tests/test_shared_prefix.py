"""A prefix that is attended to once per group gives what dense attention gives each request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import KVCache, reference
from kvselect.shared_prefix import SharedPrefix, select_shared, share_pages
from kvselect.testing import TOLERANCE, make_qkv, rel_err

DIM, HEADS = 32, 2


def group_of(
    num_tokens: int,
    private: tuple[int, ...],
    seqlen_q: int,
    group_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    page: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, SharedPrefix, KVCache, KVCache]:
    """Queries, prefix, private tokens, and every member's whole row in a cache of its own."""
    members, longest = len(private), max(private)
    sizes = (group_size * HEADS, HEADS, DIM)
    q, k, v = make_qkv(members, seqlen_q, num_tokens + longest, *sizes, dtype=dtype, seed=seed)
    k[:, :num_tokens], v[:, :num_tokens] = k[:1, :num_tokens], v[:1, :num_tokens]
    settings: dict[str, Any] = {"dtype": dtype, "sketch": None, "page_block_size": page}
    prefix, own, whole = (KVCache(n, HEADS, DIM, **settings) for n in (1, members, members))
    prefix.append(k[:1, :num_tokens], v[:1, :num_tokens])
    own.append(k[:, num_tokens:], v[:, num_tokens:], list(private))
    whole.append(k, v, [num_tokens + n for n in private])
    return q, SharedPrefix(prefix, members), own, whole


def expected(q: Tensor, whole: KVCache, private: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Dense attention of each member; queries of tokens that are not there give nothing."""
    out, lse = reference.sparse_attention(q, whole)
    for row, count in enumerate(private):
        absent = max(q.shape[1] - count, 0)
        out[row, :absent], lse[row, :absent] = 0.0, -torch.inf
    return out, lse


@pytest.mark.parametrize("group_size", [1, 4, 7, 8])
@pytest.mark.parametrize("seqlen_q", [1, 5, 40])
@pytest.mark.parametrize("num_tokens", [1, 64, 131])
def test_equals_dense_per_request(group_size: int, seqlen_q: int, num_tokens: int) -> None:
    private = (40, 7, 1, 19)  # some with fewer tokens than queries
    q, prefix, own, whole = group_of(num_tokens, private, seqlen_q, group_size)
    out, lse = prefix.attend(q, own)
    wanted, wanted_lse = expected(q, whole, private)
    assert rel_err(out, wanted) <= 3e-6
    assert rel_err(lse, wanted_lse) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("seqlen_q", [1, 3, 20])  # in one pass, in two, in tiles
def test_dtypes_and_pages(dtype: torch.dtype, page: int | None, seqlen_q: int) -> None:
    private = (25, 21)
    q, prefix, own, whole = group_of(100, private, seqlen_q, 4, dtype=dtype, page=page)
    out, lse = prefix.attend(q, own)
    assert out.dtype == dtype and lse.dtype == torch.float32
    wanted, wanted_lse = expected(q, whole, private)
    assert rel_err(out, wanted) <= TOLERANCE[dtype]
    assert rel_err(lse, wanted_lse) <= TOLERANCE[dtype]


def test_one_member_and_an_empty_prefix() -> None:
    q, prefix, own, whole = group_of(50, (9,), 3, 2)
    assert rel_err(prefix.attend(q, own)[0], reference.sparse_attention(q, whole)[0]) <= 3e-6
    empty = SharedPrefix(KVCache(1, HEADS, DIM, sketch=None), 1)
    assert rel_err(empty.attend(q, own)[0], reference.sparse_attention(q, own)[0]) <= 3e-6


@pytest.mark.parametrize("members", [2, 12])  # both ways over the prefix
def test_options_of_the_softmax(members: int) -> None:
    private = (3,) * members
    q, prefix, own, whole = group_of(40, private, 1, 4)
    options: dict[str, Any] = {
        "softmax_scale": 0.3,
        "softcap": 5.0,
        "sink_logits": torch.linspace(-1, 2, 8),
    }
    out, lse = prefix.attend(q, own, **options)
    wanted, wanted_lse = reference.sparse_attention(q, whole, **options)
    assert rel_err(out, wanted) <= 3e-6 and rel_err(lse, wanted_lse) <= 2e-6


def test_decode_goes_on_after_prefill() -> None:
    q, prefix, own, whole = group_of(70, (6, 2, 9), 1, 4)
    _, k, v = make_qkv(3, 1, 4, 8, HEADS, DIM, seed=5)
    for cache in (own, whole):
        cache.append(k, v)
    assert rel_err(prefix.attend(q, own)[0], reference.sparse_attention(q, whole)[0]) <= 3e-6


def test_the_last_member_frees_the_prefix() -> None:
    _, prefix, _, _ = group_of(10, (2, 2), 1, 1)
    prefix.join()
    assert prefix.num_members == 3 and prefix.num_tokens == 10
    prefix.leave(2)
    assert prefix.cache.nbytes > 0
    with pytest.raises(ValueError, match=r"count: got 2, allowed: at most 1 \(members\)"):
        prefix.leave(2)
    prefix.leave()
    assert prefix.num_members == 0
    for use in (lambda: prefix.cache, lambda: prefix.num_tokens, prefix.join):
        with pytest.raises(ValueError, match="prefix: got one without members"):
            use()


@pytest.mark.parametrize("lengths, shared", [((70, 53, 64), 48), ((48, 80, 81), 32), ((9, 70), 0)])
def test_pages_of_an_engine_are_shared_in_place(lengths: tuple[int, ...], shared: int) -> None:
    """Rows agree in their first four pages; nothing else of the pool may be read."""
    page, batch = 16, len(lengths)
    q, k, v = make_qkv(batch, 1, 96, 8, HEADS, DIM, seed=2)
    k[:, :64], v[:, :64] = k[:1, :64], v[:1, :64]
    pools = [torch.full((40, page, HEADS, DIM), torch.nan) for _ in "kv"]
    table = torch.full((batch, 6), 39, dtype=torch.int32)
    table[:, :4] = torch.tensor([7, 3, 11, 2])
    table[:, 4:] = torch.arange(20, 20 + 2 * batch).view(batch, 2)
    for row, length in enumerate(lengths):
        for position in range(length):
            at = int(table[row, position // page]), position % page
            pools[0][at], pools[1][at] = k[row, position], v[row, position]
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    prefix, own = share_pages(pools[0], pools[1], table, seqlens)
    whole = KVCache(batch, HEADS, DIM, sketch=None)
    whole.append(k, v, seqlens)
    wanted = reference.sparse_attention(q, whole)[0]
    if shared == 0:
        assert prefix is None and own.lengths == lengths
        assert rel_err(reference.sparse_attention(q, own)[0], wanted) <= 2e-6
        return
    assert prefix is not None and prefix.num_tokens == shared
    assert own.lengths == tuple(n - shared for n in lengths)
    assert prefix.cache.k_pages.data_ptr() == own.k_pages.data_ptr() == pools[0].data_ptr()
    assert rel_err(prefix.attend(q, own)[0], wanted) <= 3e-6


@pytest.mark.parametrize("by", ["union", "vote"])
def test_shared_selection(by: str) -> None:
    private = (4, 6, 1)
    q, prefix, own, _ = group_of(200, private, 1, 4, seed=4)
    chosen = select_shared(q, prefix, topk=20, by=by)
    lists = []
    for row in range(3):
        scores = reference.score_tokens(q[row : row + 1], prefix.cache)[0]
        lists.append([set(scores[head].topk(20).indices.tolist()) for head in range(HEADS)])
    for head in range(HEADS):
        union = lists[0][head] | lists[1][head] | lists[2][head]
        if by == "vote":
            stacked = q.reshape(1, 3, *q.shape[2:])
            union = set(
                reference.score_tokens(stacked, prefix.cache)[0, head].topk(20).indices.tolist()
            )
        size = int(chosen.union_size[head])
        got = chosen.selection.indices[0, head]
        assert got[:size].tolist() == sorted(union) and (got[size:] == -1).all()
        assert int(chosen.picked[head]) == (60 if by == "union" else 20)
    # Attention is that of the listed prefix tokens and all private ones, joined.
    out, lse = prefix.attend(q, own, chosen.selection)
    for row in range(3):
        one = q[row : row + 1]
        listed = reference.sparse_attention(one, prefix.cache, chosen.selection)
        mine = reference.PlainCache(
            k=own.k[row : row + 1],
            v=own.v[row : row + 1],
            cache_seqlens=own.cache_seqlens[row : row + 1],
        )
        rest = reference.sparse_attention(one, mine)
        wanted = reference.merge_splits(
            torch.stack((listed[0], rest[0])), torch.stack((listed[1], rest[1]))
        )
        assert rel_err(out[row : row + 1], wanted[0]) <= 3e-6
        assert rel_err(lse[row : row + 1], wanted[1]) <= 2e-6


def test_a_full_shared_selection_is_dense() -> None:
    q, prefix, own, whole = group_of(90, (5, 8, 2, 3, 4, 1), 1, 7)  # 42 rows
    chosen = select_shared(q, prefix, topk=1000)
    assert chosen.union_size.tolist() == [90, 90]
    out, _ = prefix.attend(q, own, chosen.selection)
    assert rel_err(out, reference.sparse_attention(q, whole)[0]) <= 3e-6


def test_same_bits_every_time() -> None:
    q, prefix, own, _ = group_of(300, (30, 11), 20, 4)
    first, second = prefix.attend(q, own), prefix.attend(q, own)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("by", ["union", "vote"])
@pytest.mark.parametrize("ends", [(0, 7), (5, 0), (4, 9)])
def test_shared_selection_keeps_both_ends(by: str, ends: tuple[int, int]) -> None:
    sinks, recent = ends
    q, prefix, _, _ = group_of(150, (3, 3, 3), 1, 4, seed=6)
    chosen = select_shared(
        q, prefix, topk=11, num_sink_tokens=sinks, num_recent_tokens=recent, by=by
    )
    for head in range(HEADS):
        picked: set[int] = set()
        for row in [slice(0, 3)] if by == "vote" else [slice(i, i + 1) for i in range(3)]:
            one = q[row].reshape(1, -1, *q.shape[2:])
            scores = reference.score_tokens(one, prefix.cache)[0, head]
            best = scores[sinks : 150 - recent].topk(11).indices + sinks
            picked |= set(best.tolist())
        wanted = [*range(sinks), *sorted(picked), *range(150 - recent, 150)]
        count = int(chosen.selection.topk_length[0, head])
        assert chosen.selection.indices[0, head, :count].tolist() == wanted
        assert int(chosen.union_size[head]) == count


def test_bad_arguments() -> None:
    q, prefix, own, _ = group_of(20, (3, 3), 1, 2)
    with pytest.raises(TypeError, match=r"cache: got int 3, allowed: a kvselect.KVCache"):
        SharedPrefix(3, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cache.batch: got 2, allowed: 1 \(one prefix\)"):
        SharedPrefix(own, 1)
    padded = KVCache(1, HEADS, DIM, sketch=None)
    padded.set_starts([2])
    with pytest.raises(ValueError, match=r"cache.starts: got 'padding'"):
        SharedPrefix(padded, 1)
    with pytest.raises(ValueError, match="num_members: got 0, allowed: an int >= 1"):
        SharedPrefix(prefix.cache, 0)
    with pytest.raises(ValueError, match="count: got 0"):
        prefix.leave(0)
    with pytest.raises(ValueError, match=r"private.batch: got 1, allowed: 2 \(members"):
        prefix.attend(q[:1], prefix.cache)
    wide = KVCache(2, HEADS, DIM, sketch=None, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"private \(num_kv_heads, head_dim, dtype, device\): got"):
        prefix.attend(q.bfloat16(), wide)
    with pytest.raises(ValueError, match="by: got 'sum', allowed: 'union' or 'vote'"):
        select_shared(q, prefix, topk=3, by="sum")
    with pytest.raises(ValueError, match=r"q: got shape \(1, 1, 4, 32\), allowed: \[2, any"):
        select_shared(q[:1], prefix, topk=3)
    with pytest.raises(TypeError, match=r"block_table: got torch.int64"):
        share_pages(own.k, own.v, torch.zeros(1, 1, dtype=torch.int64), own.cache_seqlens[:1])
