"""The cache as the specification sees it, and the sketch codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK_TOKENS = 128
SUB_BLOCK_TOKENS = 16
LEVELS = {"int4": 15, "int8": 255}


class CacheLike(Protocol):
    """What the reference reads of a cache. ``kvselect.KVCache`` has it, and so has PlainCache."""

    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def cache_seqlens(self) -> Tensor: ...
    @property
    def starts(self) -> Tensor | None: ...
    @property
    def sketch_format(self) -> str | None: ...
    @property
    def sketch_data(self) -> Tensor | None: ...


@dataclass(slots=True, kw_only=True)
class PlainCache:
    """Keys and values as two ordinary tensors.

    Parameters
    ----------
    k, v : Tensor, [batch, max_seqlen, num_kv_heads, head_dim]
        Entries at and beyond ``cache_seqlens`` mean nothing and are never read.
    cache_seqlens : Tensor, [batch], int32
    starts : Tensor or None, [batch], int32
    sketch_format : {"int4", "int8"} or None
    sketch_data : Tensor or None, [batch, num_kv_heads, num_sketch_blocks, block_bytes], uint8
    num_nonfinite : Tensor or None, [batch, num_kv_heads], int64
        Tokens whose key or value holds NaN or inf; None: not counted yet.
    """

    k: Tensor
    v: Tensor
    cache_seqlens: Tensor
    starts: Tensor | None = None
    sketch_format: str | None = None
    sketch_data: Tensor | None = None
    num_nonfinite: Tensor | None = None


def encode_block(keys: Tensor, sketch_format: str) -> Tensor:
    """Bytes of the sketch of 128 consecutive keys of one KV head.

    ``step = fp16((max - min) / levels)``, ``lo = fp16(min)`` per channel, and
    ``code = clamp(rint((k - lo) / step), 0, levels)``, all in float32: the codec is the one op
    whose arithmetic is part of its definition, because backends must agree on the bits. A block
    that holds a non-finite key, or whose lo or step leaves float16, gets step[0] = NaN and no
    codes.

    Parameters
    ----------
    keys : Tensor, [128, head_dim], any floating dtype
    sketch_format : {"int4", "int8"}

    Returns
    -------
    Tensor, [block_bytes], uint8; layout as in csrc/include/kvselect/sketch.h
    """
    levels = LEVELS[sketch_format]
    head_dim = keys.shape[-1]
    keys = keys.float()
    low, high = keys.amin(0), keys.amax(0)
    lo = low.half()
    step = ((high - low) / levels).half()
    code_bytes = BLOCK_TOKENS * head_dim * (1 if sketch_format == "int8" else 0.5)
    if not (keys.isfinite().all() and lo.isfinite().all() and step.isfinite().all()):
        data = torch.zeros(4 * head_dim + int(code_bytes), dtype=torch.uint8, device=keys.device)
        data[:2] = torch.tensor([float("nan")], dtype=torch.half, device=keys.device).view(
            torch.uint8
        )
        return data
    codes = ((keys - lo.float()) / step.float()).round().clamp(0, levels)
    codes = torch.where(step > 0, codes, 0.0).to(torch.uint8)
    sub_blocks = codes.view(-1, SUB_BLOCK_TOKENS, head_dim)
    if sketch_format == "int4":  # a line holds channels 8l..8l+7, two to a byte
        nibbles = sub_blocks.view(-1, SUB_BLOCK_TOKENS, head_dim // 8, 2, 4)
        lines = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    else:
        lines = sub_blocks.view(-1, SUB_BLOCK_TOKENS, head_dim // 4, 4)
    packed = lines.transpose(1, 2).reshape(-1)
    return torch.cat([step.view(torch.uint8), lo.view(torch.uint8), packed])


def decode_block(data: Tensor, sketch_format: str, head_dim: int) -> Tensor | None:
    """Keys that a block's bytes stand for: ``lo + step * code``.

    Returns
    -------
    Tensor, [128, head_dim], float64, or None where the block holds no codes
    """
    step = data[: 2 * head_dim].view(torch.half).double()
    lo = data[2 * head_dim : 4 * head_dim].view(torch.half).double()
    if step[0].isnan():
        return None
    packed = data[4 * head_dim :].view(BLOCK_TOKENS // SUB_BLOCK_TOKENS, -1, SUB_BLOCK_TOKENS, 4)
    lines = packed.transpose(1, 2)  # [sub-block, token, line, byte]
    if sketch_format == "int4":
        lines = torch.stack([lines & 15, lines >> 4], dim=-2)
    return lo + step * lines.reshape(BLOCK_TOKENS, head_dim).double()


def sketched_keys(cache: CacheLike, row: int, kv_head: int) -> Tensor:
    """Keys of one row as the sketch holds them; tokens without codes keep their exact key.

    Returns
    -------
    Tensor, [seqlen, head_dim], float64
    """
    seqlen = int(cache.cache_seqlens[row])
    keys = cache.k[row, :seqlen, kv_head].double()
    if cache.sketch_format is None or cache.sketch_data is None:
        return keys
    start = 0 if cache.starts is None else int(cache.starts[row])
    for block in range(max(seqlen - start, 0) // BLOCK_TOKENS):
        data = cache.sketch_data[row, kv_head, block]
        decoded = decode_block(data, cache.sketch_format, keys.shape[-1])
        if decoded is not None:
            first = start + block * BLOCK_TOKENS
            keys[first : first + BLOCK_TOKENS] = decoded
    return keys


def kv_append(cache: CacheLike, k: Tensor, v: Tensor, seqlens: Tensor | None = None) -> PlainCache:
    """Append new tokens to every row, and sketch the 128-token blocks that are complete.

    Blocks count from each row's first real token: padding never shares one with a real token.

    Parameters
    ----------
    cache : CacheLike
        Left as it is.
    k, v : Tensor, [batch, num_new, num_kv_heads, head_dim]
    seqlens : Tensor or None, [batch], int32
        How many of the new tokens count in each row, the first ones; None: all.

    Returns
    -------
    PlainCache
        With every block of its sketch encoded from its own keys. What lies beyond a row's length
        is NaN.
    """
    batch, num_new, num_kv_heads, head_dim = k.shape
    counts = torch.full((batch,), num_new) if seqlens is None else seqlens
    lengths = [int(n) for n in cache.cache_seqlens]
    totals = [n + int(c) for n, c in zip(lengths, counts, strict=True)]
    shape = (batch, max(totals, default=0), num_kv_heads, head_dim)
    new_k, new_v = (torch.full(shape, float("nan"), dtype=x.dtype, device=x.device) for x in (k, v))
    for row, (length, total) in enumerate(zip(lengths, totals, strict=True)):
        new_k[row, :length], new_v[row, :length] = cache.k[row, :length], cache.v[row, :length]
        new_k[row, length:total] = k[row, : total - length]
        new_v[row, length:total] = v[row, : total - length]

    num_nonfinite = torch.zeros(batch, num_kv_heads, dtype=torch.int64, device=k.device)
    sketch_data: Tensor | None = None
    if cache.sketch_format is not None:
        block_bytes = 4 * head_dim + BLOCK_TOKENS * head_dim * int(cache.sketch_format[3:]) // 8
        num_sketch_blocks = shape[1] // BLOCK_TOKENS
        sketch_data = torch.zeros(
            batch, num_kv_heads, num_sketch_blocks, block_bytes, dtype=torch.uint8, device=k.device
        )
    for row, total in enumerate(totals):
        finite = (new_k[row, :total].isfinite() & new_v[row, :total].isfinite()).all(-1)
        num_nonfinite[row] = (~finite).sum(0)
        if sketch_data is None or cache.sketch_format is None:
            continue
        start = 0 if cache.starts is None else int(cache.starts[row])
        for block in range(max(total - start, 0) // BLOCK_TOKENS):
            first = start + block * BLOCK_TOKENS
            keys = new_k[row, first : first + BLOCK_TOKENS]
            for head in range(num_kv_heads):
                sketch_data[row, head, block] = encode_block(keys[:, head], cache.sketch_format)
    return PlainCache(
        k=new_k,
        v=new_v,
        cache_seqlens=torch.tensor(totals, dtype=torch.int32, device=k.device),
        starts=cache.starts,
        sketch_format=cache.sketch_format,
        sketch_data=sketch_data,
        num_nonfinite=num_nonfinite,
    )
