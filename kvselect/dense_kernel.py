"""Attention of a prefill block's lists by somebody else's dense causal kernel.

The listed keys and values are copied side by side (the op ``gather_tokens``); a list is a sequence,
its block's queries are the last queries of that sequence, and the kernel is causal, aligned at the
lower right.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache as cached
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.cache import KVCache
from kvselect.checks import require, require_choice
from kvselect.rope import Rope

__all__ = ["IMPLEMENTATIONS", "attend_gathered", "dense_kernel", "require_implementation"]

IMPLEMENTATIONS = ("sparse_attention", "dense_kernel")
"""Ways to attend the lists of a prefill block."""

SCRATCH_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
"""Copies of as many blocks at a time as this has room for, and of one at least: on a CPU what stays
in a last-level cache, on a GPU what gives every processor a tile (32 heads of 128 queries a block,
31 MB with 3840 tokens and 8 heads)."""

_Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, float], tuple[Tensor, Tensor]]


def require_implementation(implementation: object) -> None:
    """ValueError unless it is one of `IMPLEMENTATIONS`."""
    require_choice(implementation, "implementation", IMPLEMENTATIONS)


def dense_kernel(device: torch.device, dtype: torch.dtype, softcap: float) -> str:
    """The dense kernel that attends here: "flash_attn", or "sdpa", which is torch's own.

    flash-attn where that package imports, on a GPU and not for float32, which it does not know.

    Raises
    ------
    ValueError
        For a softcap, which torch's kernels do not know.
    """
    if device.type == "cuda" and dtype != torch.float32 and _flash_attn_package() is not None:
        return "flash_attn"
    allowed = (
        "none with torch's dense kernels, which have no cap (implementation='sparse_attention' "
        "does, and flash-attn on a GPU)"
    )
    require(softcap == 0.0, "softcap", softcap, allowed)
    return "sdpa"


def attend_gathered(
    q: Tensor,
    cache: KVCache,
    cache_seqlens: Tensor,
    indices: Tensor,
    topk_length: Tensor,
    q_block_offsets: Tensor | None,
    offsets: tuple[int, ...],
    softmax_scale: float,
    rope: Rope | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of `sparse_attention` by a dense kernel over copies of what is listed.

    Parameters
    ----------
    q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
    cache_seqlens : Tensor, [batch], int32
        Tokens of each row up to and with the last query.
    indices, topk_length : Tensor
        With the ``num_blocks`` axis. Every list ends with all tokens of its block.
    q_block_offsets, offsets : Tensor or None, tuple of int
        First query of each block, on the device (None: one block) and on the host.

    Raises
    ------
    ValueError
        If a list does not end with its block's tokens (CPU; a GPU gives NaN for that block), or for
        a softcap that the kernel does not know.

    Notes
    -----
    A key or value that is not finite makes NaN of queries before it, too, in its block.
    """
    kernel = _KERNELS[dense_kernel(q.device, q.dtype, softcap), q.device.type]
    batch, _, num_q_heads, head_dim = q.shape
    num_kv_heads, width = indices.shape[2:]
    group = num_q_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    block_bytes = 2 * batch * num_kv_heads * width * head_dim * q.element_size()
    for first, last in _pieces(offsets, block_bytes, SCRATCH_BYTES[q.device.type]):
        begin, end = offsets[first], offsets[last]
        num_queries = offsets[first + 1] - begin
        k, v, cu_seqlens = torch.ops.kvselect.gather_tokens.default(
            cache.k_pages,
            cache.v_pages,
            cache.block_table,
            cache_seqlens,
            cache.starts,
            indices[:, first:last],
            topk_length[:, first:last],
            None if q_block_offsets is None else q_block_offsets[first : last + 1],
            q.shape[1],
            None if rope is None else rope.cos,
            None if rope is None else rope.sin,
            0 if rope is None else rope.start,
            False if rope is None else rope.interleaved,
        )
        # Lists and their queries, KV head by KV head, row by row, block by block.
        sizes = (batch, last - first, num_queries, num_kv_heads, group, head_dim)
        queries = q[:, begin:end].reshape(sizes).permute(3, 0, 1, 2, 4, 5)
        queries = queries.reshape(-1, num_queries, group, head_dim)
        if rope is not None:
            ranks = _ranks(cu_seqlens, num_queries).clamp(min=0)
            queries = rope.rotate(queries, ranks).to(q.dtype)
        found, found_lse = kernel(queries, k, v, cu_seqlens, width, softmax_scale, softcap)
        if not q.is_cpu:  # where nobody has looked at the lists
            position = torch.arange(begin, end, device=q.device) - q.shape[1]
            start = 0 if cache.starts is None else cache.starts[:, None]
            seeing = (cache_seqlens[:, None] + position >= start).view(batch, -1, num_queries)
            found, found_lse = _nan_where_short(found, found_lse, cu_seqlens, seeing)
        for whole, part in ((out, found), (lse, found_lse)):
            to = whole[:, begin:end].view(sizes[: whole.dim() + 2]).movedim(3, 0)
            to.copy_(part.reshape(to.shape))
    return out, lse


def _pieces(
    offsets: tuple[int, ...], block_bytes: int, scratch_bytes: int
) -> Iterator[tuple[int, int]]:
    """Runs ``[first, last)`` of blocks of one size that the scratch memory has room for."""
    first, num_blocks = 0, len(offsets) - 1
    most = max(scratch_bytes // max(block_bytes, 1), 1)
    while first < num_blocks:
        size, last = offsets[first + 1] - offsets[first], first + 1
        while (
            last < num_blocks and last - first < most and offsets[last + 1] - offsets[last] == size
        ):
            last += 1
        if size > 0:
            yield first, last
        first = last


# --- kernels: q [num_lists, num_queries, group_size, head_dim]; k, v [room, head_dim], list after
# list at cu_seqlens, each of at most max_seqlen tokens. (out, lse) in the order of q; out may be
# float32.


def _torch_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Lists of one length at once; of different lengths, one by one."""
    ends = cu_seqlens.tolist()
    lengths = {end - begin for begin, end in pairwise(ends)}
    if len(lengths) == 1:
        rows = (len(q), lengths.pop(), q.shape[-1])
        return _lower_right(q, k[: ends[-1]].view(rows), v[: ends[-1]].view(rows), softmax_scale)
    out = torch.empty(q.shape, dtype=torch.float32)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32)
    for number, (begin, end) in enumerate(pairwise(ends)):
        part = slice(number, number + 1)
        out[part], lse[part] = _lower_right(
            q[part], k[None, begin:end], v[None, begin:end], softmax_scale
        )
    return out, lse


def _lower_right(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """As the kernels, with ``k``, ``v`` [num_lists, length, head_dim].

    torch's kernel on a CPU aligns at the upper left. So the block's own tokens, a square, go apart
    from those before it, which every query sees: there the queries of all heads are rows of one
    product.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    num_lists, num_queries, group, head_dim = q.shape
    own = min(num_queries, k.shape[1])
    before = k.shape[1] - own
    if own == 0:
        return torch.zeros_like(q), torch.full(q.shape[:-1], -torch.inf)
    seeing = q[:, num_queries - own :]
    square = (num_lists, group, own, head_dim)
    out, lse = flash(
        seeing.transpose(1, 2),
        k[:, None, before:].expand(square),
        v[:, None, before:].expand(square),
        is_causal=True,
        scale=softmax_scale,
    )
    out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    if before:
        far, far_lse = flash(
            seeing.reshape(num_lists, 1, own * group, head_dim),
            k[:, None, :before],
            v[:, None, :before],
            scale=softmax_scale,
        )
        far, far_lse = far.reshape(seeing.shape), far_lse.reshape(seeing.shape[:-1])
        share = torch.sigmoid(far_lse - lse)[..., None]
        out, lse = torch.lerp(out.float(), far.float(), share), torch.logaddexp(lse, far_lse)
    if own < num_queries:  # queries before the row's first token
        missing = num_queries - own
        out = torch.cat([out.new_zeros(num_lists, missing, group, head_dim), out], dim=1)
        lse = torch.cat([lse.new_full((num_lists, missing, group), -torch.inf), lse], dim=1)
    return out, lse


def _torch_on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """torch's FlashAttention for two bytes an element, its memory-efficient kernel for four."""
    _, num_queries, group, head_dim = q.shape
    cu_queries = _starts_of_queries(q)
    rows = q.reshape(-1, group, head_dim)
    if q.dtype != torch.float32:
        out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
            rows,
            k[:, None],
            v[:, None],
            cu_queries,
            cu_seqlens,
            num_queries,
            max_seqlen,
            0.0,
            True,
            False,
            scale=softmax_scale,
        )
        return _as_ours(out.view(q.shape), _of_rows(lse, q), cu_seqlens)
    lower_right = 2
    out, lse, *_ = torch.ops.aten._efficient_attention_forward.default(
        rows[None],
        k[None, :, None].expand(1, len(k), group, head_dim),
        v[None, :, None].expand(1, len(v), group, head_dim),
        None,
        cu_queries,
        cu_seqlens,
        num_queries,
        max_seqlen,
        0.0,
        lower_right,
        True,
        scale=softmax_scale,
    )
    return _as_ours(out.view(q.shape), lse[:, :, :num_queries].transpose(1, 2), cu_seqlens)


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    out, lse, _ = _flash_attn_package().flash_attn_varlen_func(
        q.reshape(-1, *q.shape[2:]),
        k[:, None],
        v[:, None],
        _starts_of_queries(q),
        cu_seqlens,
        q.shape[1],
        max_seqlen,
        softmax_scale=softmax_scale,
        causal=True,
        softcap=softcap,
        return_attn_probs=True,
    )
    return _as_ours(out.view(q.shape), _of_rows(lse, q), cu_seqlens)


_KERNELS: dict[tuple[str, str], _Kernel] = {
    ("sdpa", "cpu"): _torch_on_cpu,
    ("sdpa", "cuda"): _torch_on_cuda,
    ("flash_attn", "cuda"): _flash_attn,
}


@cached
def _flash_attn_package() -> Any:
    """The package flash-attn; None where it does not import."""
    try:
        return importlib.import_module("flash_attn")
    except ImportError:
        return None


def _starts_of_queries(q: Tensor) -> Tensor:
    num_lists, num_queries = q.shape[:2]
    stop = num_lists * num_queries + 1
    return torch.arange(0, stop, num_queries, dtype=torch.int32, device=q.device)


def _ranks(cu_seqlens: Tensor, num_queries: int) -> Tensor:
    """Of each query's own token in its list [num_lists, num_queries]; < 0: it sees nothing."""
    place = torch.arange(num_queries, device=cu_seqlens.device) - num_queries
    return cu_seqlens.diff()[:, None] + place


def _as_ours(out: Tensor, lse: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """0 and -inf for queries that see nothing; NaN where a sum is, of which kernels say inf."""
    blind = (_ranks(cu_seqlens, out.shape[1]) < 0)[..., None]
    lse = lse.masked_fill(lse == torch.inf, torch.nan).masked_fill(blind, -torch.inf)
    return out.masked_fill(blind[..., None], 0.0), lse


def _nan_where_short(
    out: Tensor, lse: Tensor, cu_seqlens: Tensor, seeing: Tensor
) -> tuple[Tensor, Tensor]:
    """NaN for queries that see their own token, but have a list without room for it.

    ``seeing`` [batch, num_blocks, num_queries]: whether a query's own token is one of its row.
    """
    blind = (_ranks(cu_seqlens, out.shape[1]) < 0).view(-1, *seeing.shape)
    short = (blind & seeing).view(*out.shape[:2], 1)
    return out.masked_fill(short[..., None], torch.nan), lse.masked_fill(short, torch.nan)


def _of_rows(lse: Tensor, q: Tensor) -> Tensor:
    """FlashAttention's lse [group_size, rows] as [num_lists, num_queries, group_size]."""
    shape = (q.shape[2], q.shape[0] * q.shape[1])
    allowed = f"{shape}, as flash-attn 2.6 and newer, and torch, give it"
    require(tuple(lse.shape) == shape, "shape of lse", tuple(lse.shape), allowed)
    return lse.T.reshape(q.shape[:-1])
