"""Exact attention over a Selection or everything, the merging of parts, what a Selection keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.arguments import (
    raise_if_not_finite,
    require_queries,
    require_rope,
    require_selection,
    require_sink_logits,
    require_softcap,
    require_softmax_scale,
)
from kvselect.cache import KVCache
from kvselect.checks import require, require_bool, require_tensor, require_type
from kvselect.dense_kernel import attend_gathered, dense_kernel, require_implementation
from kvselect.evictable_cache import EvictableKVCache
from kvselect.queries import Queries
from kvselect.rope import Rope
from kvselect.selection import Selection
from kvselect.tiered_cache import Fetched, TieredKVCache

__all__ = ["merge_splits", "recovered_mass", "sparse_attention"]


def sparse_attention(
    q: Tensor,
    cache: KVCache,
    selection: Selection | None = None,
    *,
    softmax_scale: float | None = None,
    rope: Rope | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    check_finite: bool = False,
    implementation: str = "sparse_attention",
) -> tuple[Tensor, Tensor]:
    """Exact attention of the last ``seqlen_q`` tokens over those that a Selection lists, causal.

    ``out = sum_i softmax_i(softmax_scale * q . k_i) v_i`` over the listed tokens at or before the
    query's position.

    Parameters
    ----------
    q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
        The cache's dtype and device. Query ``j`` of row ``b`` sits at ``cache_seqlens[b] - seqlen_q
        + j``: append first. Head ``h`` reads KV head ``h // group_size``.
    cache : KVCache
    selection : Selection or None
        None: every visible token, which is dense attention.
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    rope : Rope or None
        Given, the cache holds un-rotated keys ("compact" positions): the key of rank ``r`` in its
        list is rotated to ``r``, a query to the rank of its own token.
    softcap : float or None
        Given, a logit ``x`` becomes ``softcap * tanh(x / softcap)``; one that is not finite, NaN.
    sink_logits : Tensor, [num_q_heads], float32, or None
        One more logit per head in the denominator of its softmax, of a value that is 0.
    check_finite : bool
        Raise if a query, or any token ever appended, holds NaN or inf (reads a flag back from the
        device).
    implementation : "sparse_attention" or "dense_kernel"
        "dense_kernel": listed keys and values are copied side by side, and a dense causal kernel
        runs over the copies: flash-attn where it is installed on a GPU, torch's otherwise. For
        blocks of queries whose lists end with all of their tokens, as those of `prefill` do. Reads
        ``q_block_offsets`` back from the device.

    Returns
    -------
    out : Tensor, [batch, seqlen_q, num_q_heads, head_dim], dtype of ``q``; 0 where a query sees
    nothing lse : Tensor, [batch, seqlen_q, num_q_heads], float32, natural log; -inf there

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or devices do not agree, or ``rope`` has fewer positions than a list has
        tokens; if a dense kernel cannot do what it is asked for.

    Notes
    -----
    Cost: reads ``2 * head_dim`` numbers per listed token and KV head; memory-bound at decode.
    """
    require_queries(q, cache)
    scale = require_softmax_scale(softmax_scale, cache.head_dim)
    require_rope(rope, cache)
    cap = require_softcap(softcap)
    require_sink_logits(sink_logits, q.shape[2], cache)
    if selection is not None:
        require_selection(selection, cache, q.shape[1])
    require_bool(check_finite, "check_finite")
    require_implementation(implementation)
    if check_finite:
        raise_if_not_finite(q, cache)
    if implementation == "dense_kernel":
        allowed = "a Selection with implementation='dense_kernel' (it attends to lists)"
        require(selection is not None, "selection", selection, allowed)
        assert selection is not None
        given = selection.q_block_offsets
        borders = (0, q.shape[1]) if given is None else tuple(given.tolist())
        allowed = f"ascending from 0 to seqlen_q = {q.shape[1]}"
        covers = (*borders[:1], *borders[-1:]) == (0, q.shape[1])
        require(covers and list(borders) == sorted(borders), "q_block_offsets", borders, allowed)
        queries = Queries(
            q=q,
            phase="prefill",
            softmax_scale=scale,
            cache_seqlens=cache.cache_seqlens,
            max_seqlen=cache.max_seqlen,
            offsets=borders,
            q_block_offsets=given,
            softcap=cap,
            sink_logits=sink_logits,
        )
        return attend_queries(queries, cache, selection, rope, implementation)
    indices, topk_length, offsets = None, None, None
    if selection is not None:
        indices, topk_length = selection.with_blocks()
        offsets = selection.q_block_offsets
    return _attend(
        q,
        cache,
        cache.cache_seqlens,
        cache.max_seqlen,
        indices,
        topk_length,
        offsets,
        scale,
        rope,
        cap,
        sink_logits,
    )


def attend_queries(
    queries: Queries,
    cache: KVCache,
    selection: Selection | None,
    rope: Rope | None,
    implementation: str = "sparse_attention",
) -> tuple[Tensor, Tensor]:
    """`sparse_attention` of checked `Queries`, which may end before the cache does.

    ``implementation`` is for the lists of a prefill; decode steps, and calls that attend to
    everything where it lies, stay with the op of this name.
    """
    indices, topk_length = None, None
    if selection is not None:
        indices, topk_length = selection.with_blocks()
        if implementation == "dense_kernel" and queries.phase == "prefill":
            return _attend_copies(queries, cache, indices, topk_length, rope)
    queries.kernels.append("sparse_attention")
    return _attend(
        queries.q,
        cache,
        queries.cache_seqlens,
        queries.max_seqlen,
        indices,
        topk_length,
        queries.q_block_offsets,
        queries.softmax_scale,
        rope,
        queries.softcap,
        queries.sink_logits,
    )


def _attend_copies(
    queries: Queries, cache: KVCache, indices: Tensor, topk_length: Tensor, rope: Rope | None
) -> tuple[Tensor, Tensor]:
    """`attend_queries` by a dense kernel, over copies of what is listed."""
    if isinstance(cache, EvictableKVCache):
        allowed = "'sparse_attention' for a cache that drops tokens (it has no lists)"
        require(False, "implementation", "dense_kernel", allowed)
    q = queries.q
    queries.kernels.append(dense_kernel(q.device, q.dtype, queries.softcap))
    with cache.whole_rows():
        out, lse = attend_gathered(
            q,
            cache,
            queries.cache_seqlens,
            indices,
            topk_length,
            queries.q_block_offsets,
            queries.offsets,
            queries.softmax_scale,
            rope,
            queries.softcap,
        )
    return (out, lse) if queries.sink_logits is None else with_sinks(out, lse, queries.sink_logits)


def _attend(
    q: Tensor,
    cache: KVCache,
    cache_seqlens: Tensor,
    max_seqlen: int,
    indices: Tensor | None,
    topk_length: Tensor | None,
    q_block_offsets: Tensor | None,
    softmax_scale: float,
    rope: Rope | None,
    softcap: float,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if isinstance(cache, TieredKVCache) and not cache.has_whole_rows:
        if q.shape[1] == 1 and (indices is not None or max_seqlen <= cache.resident_tokens):
            return _attend_fetched(q, cache, indices, softmax_scale, rope, softcap, sink_logits)
        with cache.whole_rows():
            return _attend(
                q,
                cache,
                cache_seqlens,
                max_seqlen,
                indices,
                topk_length,
                q_block_offsets,
                softmax_scale,
                rope,
                softcap,
                sink_logits,
            )
    if isinstance(cache, EvictableKVCache) and cache.rows is not None:
        allowed = "None for a cache that dropped tokens (all that remain are attended to)"
        require(indices is None, "selection", "lists", allowed)
        require(rope is None, "rope", "a rotation by rank", allowed)
        return _attend_rows(
            q, cache, cache.rows, cache_seqlens, softmax_scale, softcap, sink_logits
        )
    cos, sin, start, interleaved = None, None, 0, False
    if rope is not None:
        cos, sin, start, interleaved = rope.cos, rope.sin, rope.start, rope.interleaved
        if indices is None:
            later = cache.max_seqlen - max_seqlen  # tokens of every row that no query sees
            longest = max((0, *cache.num_real_tokens)) - later
            allowed = (
                f"at most {rope.num_positions} (positions of rope) for dense attention by rank"
            )
            require(longest <= rope.num_positions, "seqlen_k", longest, allowed)
    out, lse = torch.ops.kvselect.sparse_attention.default(
        q,
        cache.k_pages,
        cache.v_pages,
        cache.block_table,
        cache_seqlens,
        cache.starts,
        indices,
        topk_length,
        q_block_offsets,
        softmax_scale,
        cos,
        sin,
        start,
        interleaved,
        softcap,
        sink_logits,
    )
    return out, lse


def _attend_rows(
    q: Tensor,
    cache: EvictableKVCache,
    rows: KVCache,
    cache_seqlens: Tensor,
    softmax_scale: float,
    softcap: float,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Every (row, KV head) is a row of one head; the calls' tokens end all of them alike."""
    batch, seqlen_q, _, head_dim = q.shape
    num_kv_heads = cache.num_kv_heads
    group = q.shape[2] // num_kv_heads
    grouped = q.reshape(batch, seqlen_q, num_kv_heads, group, head_dim).transpose(1, 2)
    later = (cache.cache_seqlens - cache_seqlens).repeat_interleave(num_kv_heads)
    out, lse = torch.ops.kvselect.sparse_attention.default(
        grouped.reshape(batch * num_kv_heads, seqlen_q, group, head_dim),
        rows.k_pages,
        rows.v_pages,
        rows.block_table,
        (rows.cache_seqlens - later).clamp(min=0),
        None,
        None,
        None,
        None,
        softmax_scale,
        None,
        None,
        0,
        False,
        softcap,
        None,
    )
    out = out.view(grouped.shape).transpose(1, 2).reshape(q.shape)
    lse = lse.view(grouped.shape[:-1]).transpose(1, 2).reshape(q.shape[:-1])
    return (out, lse) if sink_logits is None else with_sinks(out, lse, sink_logits)


def with_sinks(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """What attention gives with one more logit per head, of a value that is 0, in its softmax.

    ``out`` [..., num_q_heads, head_dim], ``lse`` [..., num_q_heads].
    """
    share = torch.sigmoid(lse - sink_logits).masked_fill(lse == -torch.inf, 0.0)
    total = torch.where(lse > -torch.inf, torch.logaddexp(lse, sink_logits), lse)
    return (out * share[..., None]).to(out.dtype), total


def _attend_fetched(
    q: Tensor,
    cache: TieredKVCache,
    indices: Tensor | None,
    softmax_scale: float,
    rope: Rope | None,
    softcap: float,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One query per row over lists whose tokens come to the device: every list is a row of its own,
    whose tokens are all visible and whose positions are ranks."""
    fetched = cache.fetch(None if indices is None else indices[:, 0], by_rank=rope is not None)
    cos, sin, start, interleaved = None, None, 0, False
    if rope is not None:
        cos, sin, start, interleaved = rope.cos, rope.sin, rope.start, rope.interleaved
    num_lists, num_kv_heads = fetched.block_table.shape[0], cache.num_kv_heads
    group = q.shape[2] // num_kv_heads
    per_list = q.reshape(num_lists, 1, group, cache.head_dim)
    out = torch.empty_like(per_list)
    lse = torch.empty(per_list.shape[:-1], dtype=torch.float32, device=q.device)
    # Sink logits are those of a row's heads, and rows are lists here: one KV head at a time, then.
    num_calls = 1 if sink_logits is None else num_kv_heads
    for head in range(num_calls):
        part = slice(head, None, num_calls)
        out[part], lse[part] = torch.ops.kvselect.sparse_attention.default(
            per_list[part],
            fetched.k_pages,
            fetched.v_pages,
            fetched.block_table[part],
            fetched.cache_seqlens[part].contiguous(),
            None,
            None,
            None,
            None,
            softmax_scale,
            cos,
            sin,
            start,
            interleaved,
            softcap,
            None if sink_logits is None else sink_logits[head * group : (head + 1) * group],
        )
    if cache.replacement == "lru_s":
        cache.note_received(_received(per_list, fetched, lse, softmax_scale, rope, softcap))
    shape = q.shape
    return out.view(shape), lse.view(shape[:-1])


def _received(
    q: Tensor,
    fetched: Fetched,
    lse: Tensor,
    softmax_scale: float,
    rope: Rope | None,
    softcap: float,
) -> Tensor:
    """Attention that every token of a list gets, summed over its queries [num_lists, 1, group,
    head_dim], of which ``lse`` is known; [num_lists, width] float32, 0 where there is no token."""
    width = fetched.block_table.shape[1]
    place = torch.arange(width, device=q.device)
    k = fetched.k_pages[:, 0, 0][fetched.block_table].float()
    queries, count = q[:, 0].float(), fetched.cache_seqlens[:, None]
    if rope is not None:
        k = rope.rotate(k[:, :, None], place)[:, :, 0]
        queries = rope.rotate(queries, (count[:, 0] - 1).clamp(min=0))
    logits = softmax_scale * queries @ k.transpose(1, 2)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    weights = (logits - lse[:, 0, :, None]).exp().sum(1)
    return weights.masked_fill(place >= count, 0.0)


def merge_splits(partial_out: Tensor, partial_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention computed over disjoint parts of the context.

    ``lse = logsumexp_s partial_lse[s]``, ``out = sum_s exp(partial_lse[s] - lse) * partial_out[s]``

    Parameters
    ----------
    partial_out : Tensor, [num_splits, ..., head_dim], float32
    partial_lse : Tensor, [num_splits, ...], float32
        Natural log; -inf where a split saw no token.

    Returns
    -------
    out : Tensor, [..., head_dim], float32; 0 where no split saw a token
    lse : Tensor, [...], float32; -inf there

    Raises
    ------
    ValueError, TypeError
        If the shapes do not agree or a tensor is not float32.

    Notes
    -----
    Source: the online-softmax identity, Milakov & Gimelshein, arXiv:1805.02867.
    Cost: reads ``num_splits * rows * (head_dim + 1)`` floats; memory-bound.
    """
    require_type(partial_out, Tensor, "partial_out", "a torch.Tensor")
    shape = tuple(partial_out.shape)
    require(len(shape) >= 2, "partial_out", shape, "[num_splits, ..., head_dim]")
    require_tensor(partial_out, "partial_out", shape, (torch.float32,), contiguous_last_dim=False)
    require_tensor(
        partial_lse,
        "partial_lse",
        shape[:-1],
        (torch.float32,),
        partial_out.device,
        contiguous_last_dim=False,
    )
    out, lse = torch.ops.kvselect.merge_splits.default(
        partial_out.contiguous(), partial_lse.contiguous()
    )
    return out, lse


def recovered_mass(
    q: Tensor,
    cache: KVCache,
    selection: Selection,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Share of each query's dense attention mass that a Selection holds.

    ``mass[h] = sum over listed i of exp(s[h, i] - lse[h])``, ``lse`` over every visible token.

    Parameters
    ----------
    q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
        As attention uses it, with keys as they are stored ("original" positions).
    cache : KVCache
    selection : Selection
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    softcap : float or None
        As in `sparse_attention`. A sink logit changes nothing: the share is of what tokens get.

    Returns
    -------
    Tensor, [batch, seqlen_q, num_q_heads], float32, in [0, 1]; 1 where nothing is visible

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or devices do not agree.

    Notes
    -----
    Cost: reads every key of the row; an audit, not part of a step.
    """
    require_queries(q, cache)
    scale = require_softmax_scale(softmax_scale, cache.head_dim)
    require_selection(selection, cache, q.shape[1])
    indices, topk_length = selection.with_blocks()
    cap = require_softcap(softcap)
    with cache.whole_rows():
        mass: Tensor = torch.ops.kvselect.recovered_mass.default(
            q,
            cache.k_pages,
            cache.block_table,
            cache.cache_seqlens,
            cache.starts,
            indices,
            topk_length,
            selection.q_block_offsets,
            scale,
            cache.max_seqlen,
            cap,
        )
    return mass
