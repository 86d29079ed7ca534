"""Attention over the KV blocks that a mask keeps, and how much attention each block gets."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.arguments import require_softcap, require_softmax_scale
from kvselect.checks import (
    HEAD_DIMS,
    STORAGE_DTYPES,
    require,
    require_bool,
    require_int,
    require_tensor,
    require_type,
)

__all__ = ["BLOCK_SIZES", "block_mass", "block_sparse_attention"]

BLOCK_SIZES = (16, 32, 64, 128)  # [tokens] of a q block and of a KV block, as the kernels have them

IMPLEMENTATIONS = ("auto", "sm90a")
_IMPLEMENTATION_NAMES = ", ".join(map(repr, IMPLEMENTATIONS))


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | tuple[Tensor, Tensor],
    *,
    q_block_size: int = 128,
    kv_block_size: int = 128,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    seqlens_q: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact attention of each block of queries over the KV blocks that a mask keeps for it.

    ``out = sum_i softmax_i(softmax_scale * q . k_i) v_i`` over the tokens ``i`` of kept blocks,
    ``causal``: at or before the query's position, which is ``seqlen_k - seqlen_q + j`` for query
    ``j`` of a row (lower-right aligned).

    Parameters
    ----------
    q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
        Any strides, last dim contiguous. Head ``h`` reads KV head ``h // group_size``.
    k, v : Tensor, [batch, seqlen_k, num_kv_heads, head_dim]
    block_mask : Tensor or (Tensor, Tensor)
        A set of KV blocks per (row, query head, q block); blocks are counted from the first token,
        and ``num_q_blocks = ceil(seqlen_q / q_block_size)``, KV blocks likewise.

        - bool ``[batch, num_q_heads, num_q_blocks, num_kv_blocks]``, True: kept;
        - int32 ``[batch, num_q_heads, num_q_blocks, k]``: block indices, -1: none;
        - ``(row_offsets, indices)``, CSR over (row, head, q block) in this order: int32 or int64
          ``[batch * num_q_heads * num_q_blocks + 1]`` and int32 ``[nnz]``.

        Tensors without the batch dimension serve all rows, a batch or head dimension of 1 serves
        all. Order and repetition of indices change no bit; blocks that a query does not see do not
        matter.
    q_block_size, kv_block_size : int
        [tokens] 16, 32, 64 or 128.
    causal : bool
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    softcap : float or None
        Given, a logit ``x`` becomes ``softcap * tanh(x / softcap)``.
    seqlens_q, cache_seqlens : Tensor, [batch], int32, or None
        Queries and keys of each row, the first ones of ``q`` and ``k``; None: all. What lies behind
        does not matter.
    implementation : str
        "auto": on the CPU what `set_cpu_implementation` says, on a GPU the kernel for all of them.
        "sm90a": Hopper's own instructions, for GPUs of architecture 9.0 and builds for 90a; float16
        and bfloat16, head_dim 64 to 256, ``q_block_size`` 64 or 128, rows of ``q`` at multiples of
        16 bytes. It compiles and has not run on a GPU, so "auto" never takes it.

    Returns
    -------
    out : Tensor, [batch, seqlen_q, num_q_heads, head_dim], dtype of ``q``; 0 where a query sees
    nothing lse : Tensor, [batch, seqlen_q, num_q_heads], float32, natural log; -inf there

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or devices do not agree, a block size is not among those of the kernel, a
        block index lies outside the keys, or the implementation does not take this or does not
        exist here. On a GPU indices, offsets and lengths are not read by
        the host: what lies outside is left out.

    Notes
    -----
    Cost: ``4 * head_dim`` flops per query and kept token; compute-bound.
    """
    _require_grid(q, k, q_block_size, kv_block_size, causal, seqlens_q, cache_seqlens)
    require_type(implementation, str, "implementation", _IMPLEMENTATION_NAMES)
    require(
        implementation in IMPLEMENTATIONS, "implementation", implementation, _IMPLEMENTATION_NAMES
    )
    require_tensor(v, "v", tuple(k.shape), (k.dtype,), k.device)
    _require_no_grad(v, "v")
    scale, cap = require_softmax_scale(softmax_scale, q.shape[3]), require_softcap(softcap)
    num_kv_blocks = -(-k.shape[1] // kv_block_size)
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // q_block_size))
    mask, row_offsets = _read_mask(block_mask, shape, num_kv_blocks, q.device)
    out, lse = torch.ops.kvselect.block_sparse_attention.default(
        q,
        k,
        v,
        mask,
        row_offsets,
        seqlens_q,
        cache_seqlens,
        q_block_size,
        kv_block_size,
        causal,
        scale,
        cap,
        implementation,
    )
    return out, lse


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    q_block_size: int = 128,
    kv_block_size: int = 128,
    causal: bool = True,
    row_stride: int = 1,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    seqlens_q: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """How much of its queries' attention each KV block gets, exactly: the oracle of block scorers.

    ``mass[h, P, Q] = sum over counted t in P, i in Q of exp(s[h, t, i] - lse[h, t])``

    Parameters
    ----------
    q, k, q_block_size, kv_block_size, causal, softmax_scale, softcap, seqlens_q, cache_seqlens
        As in `block_sparse_attention`.
    lse : Tensor, [batch, seqlen_q, num_q_heads], float32, or None
        Normalisers of an earlier pass (natural log): of the same queries, or of like ones, where
        masses are then estimates. A query of lse -inf counts nothing. None: of these queries and
        keys.
    row_stride : int
        Of each q block the last query counts, and every ``row_stride``-th before it. 1: all.

    Returns
    -------
    Tensor, [batch, num_q_heads, num_q_blocks, num_kv_blocks], float32
        Without a given ``lse``, the sum over KV blocks is the number of counted queries that see
        something. 0 where no counted query sees the block.

    Raises
    ------
    ValueError, TypeError
        As `block_sparse_attention`.

    Notes
    -----
    Source: AdaSpa, arXiv:2502.21079 (the cached normaliser, and what it is good for).
    Cost: ``2 * head_dim`` flops per counted query and visible key; no value is read.
    """
    _require_grid(q, k, q_block_size, kv_block_size, causal, seqlens_q, cache_seqlens)
    require_int(row_stride, "row_stride", 1)
    if lse is not None:
        lse_shape = tuple(q.shape[:3])
        require_tensor(lse, "lse", lse_shape, (torch.float32,), q.device, contiguous_last_dim=False)
    scale, cap = require_softmax_scale(softmax_scale, q.shape[3]), require_softcap(softcap)
    mass: Tensor = torch.ops.kvselect.block_mass.default(
        q,
        k,
        lse,
        seqlens_q,
        cache_seqlens,
        q_block_size,
        kv_block_size,
        causal,
        row_stride,
        scale,
        cap,
    )
    return mass


def _require_grid(
    q: object,
    k: object,
    q_block_size: object,
    kv_block_size: object,
    causal: object,
    seqlens_q: object,
    cache_seqlens: object,
) -> None:
    """Queries and keys that fit together, cut into blocks that the kernels have."""
    require_tensor(q, "q", (None, None, None, None), STORAGE_DTYPES)
    assert isinstance(q, Tensor)
    batch, head_dim = q.shape[0], q.shape[3]
    require(head_dim in HEAD_DIMS, "head_dim", head_dim, ", ".join(map(str, HEAD_DIMS)))
    require_tensor(k, "k", (batch, None, None, head_dim), (q.dtype,), q.device)
    assert isinstance(k, Tensor)
    _require_no_grad(q, "q")
    _require_no_grad(k, "k")
    require(k.shape[2] >= 1, "num_kv_heads", k.shape[2], "an int >= 1")
    grouped = q.shape[2] >= 1 and q.shape[2] % k.shape[2] == 0
    require(grouped, "num_q_heads", q.shape[2], f"a multiple of num_kv_heads = {k.shape[2]}")
    for name, size in (("q_block_size", q_block_size), ("kv_block_size", kv_block_size)):
        allowed = ", ".join(map(str, BLOCK_SIZES))
        require_type(size, int, name, allowed)
        require(size in BLOCK_SIZES, name, size, allowed)
    require_bool(causal, "causal")
    for name, lengths in (("seqlens_q", seqlens_q), ("cache_seqlens", cache_seqlens)):
        if lengths is not None:
            require_tensor(lengths, name, (batch,), (torch.int32,), q.device)


def _require_no_grad(x: Tensor, name: str) -> None:
    tracked = x.requires_grad and torch.is_grad_enabled()
    allowed = "no gradient: the ops have none (use torch.no_grad() or detach())"
    require(not tracked, name, "a tensor that requires grad", allowed)


def _read_mask(
    block_mask: object, shape: tuple[int, int, int], num_kv_blocks: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The mask as the op takes it: views of the caller's, nothing of its size is made."""
    if isinstance(block_mask, tuple | list):
        require(len(block_mask) == 2, "block_mask", len(block_mask), "(row_offsets, indices)")
        row_offsets, indices = block_mask
        num_rows = shape[0] * shape[1] * shape[2]
        integers = (torch.int64, torch.int32)
        require_tensor(row_offsets, "row_offsets", (num_rows + 1,), integers, device)
        require_tensor(indices, "block_mask", (None,), (torch.int32,), device)
        return indices, row_offsets.long()
    if not isinstance(block_mask, Tensor):
        allowed = "a torch.Tensor or (row_offsets, indices)"
        raise TypeError(f"block_mask: got {type(block_mask).__name__}, allowed: {allowed}")
    mask = block_mask[None] if block_mask.dim() == 3 else block_mask
    batch, num_q_heads, num_q_blocks = shape
    width = num_kv_blocks if mask.dtype == torch.bool else None
    name = num_kv_blocks if mask.dtype == torch.bool else "k"
    fits = (
        mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, num_q_heads)
        and mask.shape[2] == num_q_blocks
        and width in (None, mask.shape[3])
    )
    allowed = f"[{batch} or 1, {num_q_heads} or 1, {num_q_blocks}, {name}], or without the first"
    require(fits, "block_mask", tuple(block_mask.shape), allowed)
    require_tensor(
        mask,
        "block_mask",
        (None,) * 4,
        (torch.bool, torch.int32),
        device,
        contiguous_last_dim=False,
    )
    return mask.expand(*shape, mask.shape[3]), None
