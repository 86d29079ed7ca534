"""A batch of several shared prefixes gives what dense attention gives each request."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import KVCache, reference
from kvselect.prefix_groups import PrefixGroups
from kvselect.testing import make_qkv, rel_err

DIM, HEADS = 32, 2
PREFIXES = (70, 131)
ROWS = (1, 0, -1, 0, 1, 0)  # prefix of each row; the third has none
OWN = (9, 14, 14, 3, 1, 12)  # tokens of its own


def new_cache(rows: int) -> KVCache:
    return KVCache(rows, HEADS, DIM, sketch=None)


class Batch:
    """Groups and padded private tokens, and every row's tokens in a cache of its own."""

    def __init__(self, seqlen_q: int, group_size: int, seed: int = 0) -> None:
        longest = max(OWN)
        sizes = (group_size * HEADS, HEADS, DIM)
        self.q, own_k, own_v = make_qkv(len(ROWS), seqlen_q, longest, *sizes, seed=seed)
        self.prefixes: list[tuple[Tensor, Tensor]] = []
        caches = []
        for number, tokens in enumerate(PREFIXES):
            _, k, v = make_qkv(1, 1, tokens, *sizes, seed=seed + 10 + number)
            caches.append(new_cache(1))
            caches[-1].append(k, v)
            self.prefixes.append((k, v))
        self.groups = PrefixGroups(caches, ROWS)
        self.private = new_cache(len(ROWS))
        self.private.set_starts([longest - count for count in OWN])
        self.private.append(own_k, own_v)
        self.own = own_k, own_v

    def whole(self, row: int) -> KVCache:
        """Prefix and own tokens of a row."""
        parts = [x[row : row + 1, -OWN[row] :] for x in self.own]
        if ROWS[row] >= 0:
            prefix = self.prefixes[ROWS[row]]
            parts = [torch.cat((a, b), 1) for a, b in zip(prefix, parts)]
        cache = new_cache(1)
        cache.append(*parts)
        return cache


@pytest.mark.parametrize("group_size", [1, 4, 7])
@pytest.mark.parametrize("seqlen_q", [1, 5, 14])
def test_equals_dense_per_request(group_size: int, seqlen_q: int) -> None:
    batch = Batch(seqlen_q, group_size)
    out, lse = batch.groups.attend(batch.q, batch.private)
    for row, count in enumerate(OWN):
        real = min(count, seqlen_q)
        wanted = reference.sparse_attention(batch.q[row : row + 1, -real:], batch.whole(row))
        assert rel_err(out[row, -real:], wanted[0][0]) <= 3e-6
        assert rel_err(lse[row, -real:], wanted[1][0]) <= 2e-6
        assert not out[row, : seqlen_q - real].any()  # queries in the padding
        assert (lse[row, : seqlen_q - real] == -torch.inf).all()


def test_softcap_and_sink_logits() -> None:
    batch = Batch(1, 4)
    options: dict[str, Any] = {
        "softmax_scale": 0.4,
        "softcap": 3.0,
        "sink_logits": torch.linspace(-1, 1, 8),
    }
    out, _ = batch.groups.attend(batch.q, batch.private, **options)
    for row in range(len(ROWS)):
        wanted = reference.sparse_attention(batch.q[row : row + 1], batch.whole(row), **options)
        assert rel_err(out[row], wanted[0][0]) <= 3e-6


def test_rows_move_and_leave_and_the_last_one_frees_its_prefix() -> None:
    batch = Batch(1, 2)
    groups, private = batch.groups, batch.private
    assert groups.row_tokens == [131, 70, 0, 70, 131, 70] and groups.num_prefixes == 2
    alive = [weakref.ref(prefix.cache) for prefix, _ in groups.prefixes()]
    held = groups.nbytes
    assert groups.separate_nbytes == sum(
        prefix.cache.nbytes * prefix.num_members for prefix, _ in groups.prefixes()
    )
    rows = list(range(len(ROWS)))
    for index in ([5, 0, 0, 2, 4], [1, 4], [0, 0]):
        groups.take_rows(index)
        private.reorder(index)
        batch.q = batch.q[index]
        rows = [rows[i] for i in index]
        out, _ = groups.attend(batch.q, private)
        for place, row in enumerate(rows):
            wanted = reference.sparse_attention(batch.q[place : place + 1], batch.whole(row))[0]
            assert rel_err(out[place], wanted[0]) <= 3e-6
    assert alive[0]() is None and alive[1]() is not None
    assert groups.nbytes < held and groups.num_prefixes == 1
    assert groups.num_tokens == 131  # columns stay where they are
    groups.take_rows([])
    assert groups.batch == 0 and alive[1]() is None


def test_reads_are_those_of_a_group() -> None:
    groups = Batch(1, 2).groups
    # 3 rows of 70 and 2 of 131, two query heads each: one pass over each prefix.
    assert groups.reads(1, 2) == (201, 3 * 70 + 2 * 131)
    assert groups.reads(1, 8) == (2 * 70 + 131, 472)  # 24 rows take two passes, 16 one
    assert groups.reads(200, 2) == (10 * 70 + 7 * 131, 2 * 472)


def test_bad_input() -> None:
    batch = Batch(1, 2)
    caches = [prefix.cache for prefix, _ in batch.groups.prefixes()]
    with pytest.raises(TypeError, match=r"prefixes\[0\]: got"):
        PrefixGroups([3], [0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"rows\[1\]: got 2, allowed: -1..1"):
        PrefixGroups(caches, [0, 2])
    with pytest.raises(ValueError, match=r"rows: got 'none with prefix \[1\]'"):
        PrefixGroups(caches, [0, 0, -1])
    other = KVCache(1, HEADS, 64, sketch=None)
    with pytest.raises(ValueError, match=r"prefixes: got"):
        PrefixGroups([*caches, other], [0, 1, 2])
    with pytest.raises(ValueError, match=r"cache.batch: got 6"):
        PrefixGroups([batch.private], [0])
    with pytest.raises(ValueError, match=r"private.batch: got 2, allowed: 6"):
        batch.groups.attend(batch.q[:2], new_cache(2))
    with pytest.raises(ValueError, match=r"selections: got 1, allowed: 2 entries"):
        batch.groups.attend(batch.q, batch.private, [None])
    with pytest.raises(ValueError, match=r"index: got 6, allowed: rows 0..5"):
        batch.groups.take_rows([6])
    wide = KVCache(6, HEADS, 64, sketch=None)
    wide.append(torch.zeros(6, 1, HEADS, 64), torch.zeros(6, 1, HEADS, 64))
    with pytest.raises(ValueError, match=r"private .num_kv_heads, head_dim"):
        batch.groups.attend(torch.zeros(6, 1, 4, 64), wide)
