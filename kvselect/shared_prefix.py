"""Attention of requests that begin alike: their common prefix is read once for all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kvselect.arguments import (
    require_queries,
    require_selection,
    require_sink_logits,
    require_softcap,
    require_softmax_scale,
)
from kvselect.attention import merge_splits, sparse_attention
from kvselect.block_sparse import block_sparse_attention
from kvselect.cache import KVCache
from kvselect.checks import require, require_choice, require_int, require_tensor, require_type
from kvselect.score import score_tokens
from kvselect.selection import Selection, select_tokens

__all__ = ["SharedPrefix", "SharedSelection", "num_prefix_passes", "select_shared", "share_pages"]

FEW_ROWS = 32
"""Query rows per KV head up to which the prefix is read token by token, `ROWS_AT_ONCE` rows in one
pass; more go through tiles that are widened once for 128 rows (`bench/shared_prefix.py`)."""
ROWS_AT_ONCE = 16
ROWS_PER_BLOCK = 128


class SharedPrefix:
    """Keys and values that the requests of a group have in common, counted by who uses them.

    Parameters
    ----------
    cache : KVCache, one row
        The prefix. It is not appended to while shared.
    num_members : int
        Requests that use it.

    Raises
    ------
    ValueError, TypeError
        If the cache has another number of rows, or nobody uses it.

    Notes
    -----
    Source: BatchLLM, arXiv:2412.03594.
    """

    def __init__(self, cache: KVCache, num_members: int) -> None:
        require_type(cache, KVCache, "cache", "a kvselect.KVCache")
        require(cache.batch == 1, "cache.batch", cache.batch, "1 (one prefix)")
        require(cache.starts is None, "cache.starts", "padding", "a prefix without padding")
        require_int(num_members, "num_members", 1)
        self._cache: KVCache | None = cache
        self._num_members = num_members

    @property
    def cache(self) -> KVCache:
        """The prefix; ValueError once the last member has left."""
        if self._cache is None:
            raise ValueError("prefix: got one without members, allowed: one in use")
        return self._cache

    @property
    def num_members(self) -> int:
        return self._num_members

    @property
    def num_tokens(self) -> int:
        return self.cache.max_seqlen

    def join(self, count: int = 1) -> None:
        """``count`` more requests use the prefix."""
        require_int(count, "count", 1)
        assert self.cache is not None
        self._num_members += count

    def leave(self, count: int = 1) -> None:
        """``count`` requests are done; the last one to leave frees the prefix."""
        require_int(count, "count", 1)
        allowed = f"at most {self._num_members} (members)"
        require(count <= self._num_members, "count", count, allowed)
        self._num_members -= count
        if self._num_members == 0:
            self._cache = None

    def attend(
        self,
        q: Tensor,
        private: KVCache,
        selection: Selection | None = None,
        *,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Exact attention of each member over the prefix and, causal, over its own tokens.

        The queries of all members, and the query heads of a KV head, are rows of one call over the
        prefix; both parts are joined by `merge_splits`.

        Parameters
        ----------
        q : Tensor, [num_members, seqlen_q, num_q_heads, head_dim]
            Query ``j`` of member ``b`` belongs to its token ``private.cache_seqlens[b] - seqlen_q +
            j``; of a member with fewer private tokens the last queries count. Positions go on
            behind the prefix.
        private : KVCache, ``num_members`` rows
            What follows the prefix, the queries' own tokens among it.
        selection : Selection, one row, or None
            Of the prefix (`select_shared`); None: all of it.
        softmax_scale, softcap, sink_logits
            As in `sparse_attention`.

        Returns
        -------
        out : Tensor, [num_members, seqlen_q, num_q_heads, head_dim], dtype of ``q``; 0 where a
        query sees nothing
        lse : Tensor, [num_members, seqlen_q, num_q_heads], float32, natural log; -inf there

        Raises
        ------
        ValueError, TypeError
            If shapes, dtypes or devices do not agree.

        Notes
        -----
        Cost: the prefix is read once for up to 16 rows (query heads of a KV head, of all members),
        twice for up to 32, once per 128 of more; attending separately reads it once per member.
        """
        prefix = self.cache
        require_queries(q, private)
        allowed = f"{self._num_members} (members of the prefix)"
        require(private.batch == self._num_members, "private.batch", private.batch, allowed)
        shape = (prefix.num_kv_heads, prefix.head_dim, prefix.dtype, prefix.device)
        got = (private.num_kv_heads, private.head_dim, private.dtype, private.device)
        require(got == shape, "private (num_kv_heads, head_dim, dtype, device)", got, str(shape))
        scale = require_softmax_scale(softmax_scale, prefix.head_dim)
        require_softcap(softcap)
        require_sink_logits(sink_logits, q.shape[2], private)
        own = sparse_attention(
            q, private, softmax_scale=scale, softcap=softcap, sink_logits=sink_logits
        )
        shared = attend_prefix(q, prefix, selection, scale, softcap)
        return join_parts(q, private, shared, own)


def join_parts(
    q: Tensor, private: KVCache, shared: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` over prefix and private tokens merged; 0 for queries of no token.

    These are queries in padding, and of rows with fewer private tokens than queries.
    """
    (out, lse), (own_out, own_lse) = shared, own
    seqlen_q = q.shape[1]
    if min(private.num_real_tokens, default=seqlen_q) < seqlen_q:
        place = torch.arange(seqlen_q, device=q.device)
        first = seqlen_q - private.cache_seqlens
        if private.starts is not None:
            first = first + private.starts
        absent = place < first[:, None]
        out = out.masked_fill(absent[:, :, None, None], 0.0)
        lse = lse.masked_fill(absent[:, :, None], -torch.inf)
        own_lse = own_lse.masked_fill(absent[:, :, None], -torch.inf)
    merged, total = merge_splits(
        torch.stack((out.float(), own_out.float())), torch.stack((lse, own_lse))
    )
    return merged.to(q.dtype), total


def num_prefix_passes(num_rows: int, token_by_token: bool = False) -> int:
    """How often `SharedPrefix.attend` reads the prefix, for query rows per KV head.

    ``token_by_token``: whatever their number, as off the CPU and with a selection.
    """
    few = num_rows <= FEW_ROWS or token_by_token
    return -(-num_rows // (ROWS_AT_ONCE if few else ROWS_PER_BLOCK))


def attend_prefix(
    q: Tensor, prefix: KVCache, selection: Selection | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Every query of all members over the whole prefix, or over one list per KV head.

    ``out`` [num_members, seqlen_q, num_q_heads, head_dim], dtype of ``q``, and ``lse``.
    """
    batch, seqlen_q, num_q_heads, head_dim = q.shape
    num_kv_heads = prefix.num_kv_heads
    num_rows = batch * seqlen_q * (num_q_heads // num_kv_heads)
    if selection is not None:
        require_selection(selection, prefix, 1)
    if num_rows == 0 or prefix.max_seqlen == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    # [num_kv_heads, batch, seqlen_q, group_size, head_dim]
    rows = q.reshape(batch, seqlen_q, num_kv_heads, -1, head_dim).permute(2, 0, 1, 3, 4)
    rows = rows.reshape(num_kv_heads, num_rows, head_dim)
    if selection is not None or num_rows <= FEW_ROWS or q.device.type != "cpu":
        out, lse = _attend_token_by_token(rows, prefix, selection, scale, softcap)
    else:
        num_blocks = (-(-num_rows // ROWS_PER_BLOCK), -(-prefix.max_seqlen // ROWS_PER_BLOCK))
        out, lse = block_sparse_attention(
            rows.transpose(0, 1)[None],
            prefix.k,
            prefix.v,
            torch.ones((1, 1, *num_blocks), dtype=torch.bool),
            q_block_size=ROWS_PER_BLOCK,
            kv_block_size=ROWS_PER_BLOCK,
            causal=False,
            softmax_scale=scale,
            softcap=softcap,
        )
        out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
    shape = (num_kv_heads, batch, seqlen_q, num_q_heads // num_kv_heads)
    out = out.reshape(*shape, head_dim).permute(1, 2, 0, 3, 4).reshape(q.shape)
    return out, lse.reshape(shape).permute(1, 2, 0, 3).reshape(q.shape[:3])


def _attend_token_by_token(
    rows: Tensor,
    prefix: KVCache,
    selection: Selection | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Rows [num_kv_heads, num_rows, head_dim] as heads of single queries, which see everything.

    A call has one query for each pass over the prefix: a batch whose rows are the same pages.
    """
    num_kv_heads, num_rows, head_dim = rows.shape
    num_passes = -(-num_rows // ROWS_AT_ONCE)
    width = -(-num_rows // num_passes)
    padded = functional.pad(rows, (0, 0, 0, num_passes * width - num_rows))
    queries = padded.view(num_kv_heads, num_passes, width, head_dim).transpose(0, 1)
    table, indices, topk_length = prefix.block_table, None, None
    k_pages, v_pages = prefix.k_pages, prefix.v_pages
    if table is None:
        k_pages, v_pages = (x.expand(num_passes, -1, -1, -1) for x in (k_pages, v_pages))
    else:
        table = table.expand(num_passes, -1).contiguous()
    if selection is not None:
        indices, topk_length = selection.with_blocks()
        indices = indices.expand(num_passes, -1, -1, -1)
        topk_length = topk_length.expand(num_passes, -1, -1)
    out, lse = torch.ops.kvselect.sparse_attention.default(
        queries.reshape(num_passes, 1, -1, head_dim),
        k_pages,
        v_pages,
        table,
        prefix.cache_seqlens.expand(num_passes).contiguous(),
        None,
        indices,
        topk_length,
        None,
        scale,
        None,
        None,
        0,
        False,
        require_softcap(softcap),
        None,
    )
    out = out.view(queries.shape).transpose(0, 1).reshape(padded.shape)
    lse = lse.view(queries.shape[:-1]).transpose(0, 1).reshape(padded.shape[:-1])
    return out[:, :num_rows], lse[:, :num_rows]


def share_pages(
    k_pages: Tensor, v_pages: Tensor, block_table: Tensor, cache_seqlens: Tensor
) -> tuple[SharedPrefix | None, KVCache]:
    """Requests of an engine whose block tables begin with the same pages, as prefix and members.

    Whole pages only: the common tokens of a page that is not whole, or that a request goes on to
    fill, stay with the members, and so does every request's last token, whose query it is.

    Parameters
    ----------
    k_pages, v_pages, block_table, cache_seqlens
        As `KVCache.from_pages` takes them; read in place. The host reads the table.

    Returns
    -------
    prefix : SharedPrefix or None
        None: the first page is not everybody's.
    private : KVCache
        What follows, one row per request; appending to it writes the engine's pages.

    Raises
    ------
    ValueError, TypeError
        As `KVCache.from_pages`.
    """
    require_tensor(k_pages, "k_pages", (None, None, None, None), (k_pages.dtype,))
    require_tensor(block_table, "block_table", (None, None), (torch.int32,), k_pages.device)
    batch, page = block_table.shape[0], k_pages.shape[1]
    require_tensor(cache_seqlens, "cache_seqlens", (batch,), (torch.int32,), k_pages.device)
    same = (block_table == block_table[:1]).all(0)
    shortest = min(cache_seqlens.tolist(), default=1)
    count = min(int(same.cumprod(0).sum()), max(shortest - 1, 0) // page)
    private = KVCache.from_pages(
        k_pages, v_pages, block_table[:, count:].contiguous(), cache_seqlens - count * page, None
    )
    if count == 0 or batch == 0:
        return None, private
    seqlens = torch.full((1,), count * page, dtype=torch.int32, device=k_pages.device)
    prefix = KVCache.from_pages(
        k_pages, v_pages, block_table[:1, :count].contiguous(), seqlens, None
    )
    return SharedPrefix(prefix, batch), private


class SharedSelection(NamedTuple):
    """Tokens of a prefix that a group of requests attends to together."""

    selection: Selection
    union_size: Tensor  # [num_kv_heads] int64: tokens that at least one request picked
    picked: Tensor  # [num_kv_heads] int64: what the requests picked, counted once each


def select_shared(
    q: Tensor,
    prefix: SharedPrefix,
    *,
    topk: int,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    by: str = "union",
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> SharedSelection:
    """One list per KV head for a whole group, so that picked rows of the prefix are read once.

    Parameters
    ----------
    q : Tensor, [num_members, seqlen_q, num_q_heads, head_dim]
    prefix : SharedPrefix
        Scored from its sketch, or from its keys where it has none.
    topk : int
        Tokens per request and KV head ("union"), or of the group ("vote").
    num_sink_tokens, num_recent_tokens : int
        Tokens at either end of the prefix that are always listed, and scored from exact keys.
    by : "union" or "vote"
        "union": every token that some request's own top-k holds. "vote": the top-k of the sum of
        all requests' scores.
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    softcap, sink_logits
        As in `score_tokens`.

    Returns
    -------
    SharedSelection

    Raises
    ------
    ValueError, TypeError
        If a shape or setting does not fit.

    Notes
    -----
    Scores are shares of the attention inside the prefix; private tokens are attended to in full and
    compete with nothing.
    """
    require_choice(by, "by", ("union", "vote"))
    cache = prefix.cache
    shape = (prefix.num_members, None, None, cache.head_dim)
    require_tensor(q, "q", shape, (cache.dtype,), cache.device)
    ends: dict[str, Any] = {
        "num_sink_tokens": num_sink_tokens,
        "num_recent_tokens": num_recent_tokens,
    }
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "sink_logits": sink_logits,
        **ends,
    }
    if by == "vote":
        together = q.reshape(1, -1, *q.shape[2:])
        scores = score_tokens(together, cache, **options)
        picked = select_tokens(scores, cache.cache_seqlens, topk=topk, **ends)
        size = picked.topk_length[0].long()
        return SharedSelection(picked, size, size)
    seqlen_k = cache.max_seqlen
    # One place more, which pads mark.
    listed = torch.zeros(cache.num_kv_heads, seqlen_k + 1, dtype=torch.bool, device=cache.device)
    total = torch.zeros(cache.num_kv_heads, dtype=torch.int64, device=cache.device)
    for row in range(q.shape[0]):
        scores = score_tokens(q[row : row + 1], cache, **options)
        lists = select_tokens(scores, cache.cache_seqlens, topk=topk, **ends)
        indices = lists.indices[0].long()
        listed.scatter_(1, indices.where(indices >= 0, seqlen_k), True)
        total += lists.topk_length[0]
    listed = listed[:, :seqlen_k]
    size = listed.sum(1)
    # As wide as it may get: the host need not know how wide it is.
    width = min(seqlen_k, q.shape[0] * topk + num_sink_tokens + num_recent_tokens)
    place = torch.arange(seqlen_k, device=cache.device, dtype=torch.int32)
    ascending = place.where(listed, seqlen_k).sort(1).values[:, :width]
    indices = ascending.where(ascending < seqlen_k, -1).contiguous()
    return SharedSelection(Selection(indices[None], size[None].int()), size, total)
