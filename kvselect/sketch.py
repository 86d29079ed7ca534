"""The sketch: a low-bit copy of the keys that is scanned instead of them. Formats, sizes, codec.

`encode` and `decode` define the codec: the kernels give the same bits. The layout of one block of
128 tokens is drawn in ``csrc/include/kvselect/sketch.h``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvselect.checks import (
    HEAD_DIMS,
    STORAGE_DTYPES,
    require,
    require_choice,
    require_tensor,
)

__all__ = [
    "BLOCK_TOKENS",
    "SKETCH_FORMATS",
    "SketchFormat",
    "block_bytes",
    "bytes_per_token",
    "decode",
    "encode",
]

SketchFormat = Literal["int4", "int8"]
SKETCH_FORMATS = ("int4", "int8")
BLOCK_TOKENS = 128  # tokens of one row and KV head that share a block's steps and lows

_SUB_BLOCK_TOKENS = 16
_LEVELS = {"int4": 15, "int8": 255}
_BITS = {"int4": 4, "int8": 8}


def op_format(sketch: str | None) -> str:
    """The name by which the ops know a sketch format; they call no sketch "none"."""
    return "none" if sketch is None else sketch


def block_bytes(sketch: str | None, head_dim: int) -> int:
    """Bytes of one block's record: steps and lows in float16, then codes; 0 without a sketch."""
    require_choice(sketch, "sketch", (*SKETCH_FORMATS, None))
    return 0 if sketch is None else 4 * head_dim + BLOCK_TOKENS * head_dim * _BITS[sketch] // 8


def bytes_per_token(sketch: str | None, head_dim: int) -> float:
    """Bytes that a scan reads per token and KV head, steps and lows shared out; int4 at 128: 68."""
    return block_bytes(sketch, head_dim) / BLOCK_TOKENS


def encode(keys: Tensor, sketch: str) -> Tensor:
    """The records of whole blocks of keys.

    Per channel of a block: ``lo = fp16(min)``, ``step = fp16((max - min) / levels)``, then ``code =
    clamp(rint((key - lo) / step), 0, levels)`` with the rounded ``lo`` and ``step``; 0 where
    ``step`` is 0. Both ends of the range are levels, so the extreme keys, hence the heavy tokens,
    do not shrink.

    Parameters
    ----------
    keys : Tensor, [..., 128, head_dim], float32, float16 or bfloat16
    sketch : "int4" or "int8"

    Returns
    -------
    Tensor, [..., block_bytes], uint8
        A block that holds a key that is not finite, or whose range leaves float16, has NaN as its
        first step and zeros elsewhere: it is scored from the keys themselves.

    Raises
    ------
    ValueError, TypeError
        If the shape, dtype or format is not one of these.
    """
    require_choice(sketch, "sketch", SKETCH_FORMATS)
    leading = keys.shape[:-2] if isinstance(keys, Tensor) and keys.dim() >= 2 else ()
    require_tensor(
        keys, "keys", (*leading, BLOCK_TOKENS, None), STORAGE_DTYPES, contiguous_last_dim=False
    )
    head_dim = keys.shape[-1]
    require(head_dim in HEAD_DIMS, "head_dim", head_dim, " or ".join(map(str, HEAD_DIMS)))
    levels = _LEVELS[sketch]

    keys = keys.float()
    low, high = keys.aminmax(dim=-2)
    step, lo = ((high - low) / levels).half(), low.half()
    usable = keys.isfinite().flatten(-2).all(-1)
    usable &= step.isfinite().all(-1) & lo.isfinite().all(-1)

    wide_step, wide_lo = step.float().unsqueeze(-2), lo.float().unsqueeze(-2)
    codes = ((keys - wide_lo) / wide_step).round().clamp(0, levels)
    codes = torch.where((wide_step > 0) & usable[..., None, None], codes, 0.0).to(torch.uint8)

    step = torch.where(usable[..., None], step, 0.0)
    step[..., 0] = torch.where(usable, step[..., 0], torch.nan)
    lo = torch.where(usable[..., None], lo, 0.0)
    header = torch.cat((step, lo), dim=-1).view(torch.uint8)
    return torch.cat((header, _pack(codes, sketch)), dim=-1)


def decode(records: Tensor, sketch: str, head_dim: int) -> Tensor:
    """The keys that a scan sees: ``lo + step * code``.

    Parameters
    ----------
    records : Tensor, [..., block_bytes], uint8
    sketch : "int4" or "int8"
    head_dim : int

    Returns
    -------
    Tensor, [..., 128, head_dim], float32; NaN in a block without codes
    """
    require_choice(sketch, "sketch", SKETCH_FORMATS)
    leading = records.shape[:-1] if isinstance(records, Tensor) and records.dim() else ()
    size = block_bytes(sketch, head_dim)
    require_tensor(records, "records", (*leading, size), (torch.uint8,))
    header = records[..., : 4 * head_dim].contiguous().view(torch.float16).float()
    step, lo = header[..., :head_dim], header[..., head_dim:]
    codes = _unpack(records[..., 4 * head_dim :], sketch, head_dim).float()
    keys = lo.unsqueeze(-2) + step.unsqueeze(-2) * codes
    return torch.where(step[..., :1].isnan().unsqueeze(-1), torch.nan, keys)


def _pack(codes: Tensor, sketch: str) -> Tensor:
    """Codes [..., 128, head_dim] as the record has them: 64-byte lines of 16 tokens x 4 bytes."""
    head_dim = codes.shape[-1]
    codes = torch.unflatten(codes, -2, (-1, _SUB_BLOCK_TOKENS))
    if sketch == "int4":
        nibbles = torch.unflatten(codes, -1, (head_dim // 8, 2, 4))
        codes = (nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)).flatten(-2)
    by_token = torch.unflatten(codes, -1, (-1, 4))  # [..., sub-block, token, line, byte]
    return by_token.transpose(-3, -2).flatten(-4)


def _unpack(packed: Tensor, sketch: str, head_dim: int) -> Tensor:
    num_lines = head_dim * _BITS[sketch] // 32
    shape = (BLOCK_TOKENS // _SUB_BLOCK_TOKENS, num_lines, _SUB_BLOCK_TOKENS, 4)
    by_token = torch.unflatten(packed, -1, shape).transpose(-3, -2)
    if sketch == "int4":
        by_token = torch.stack((by_token & 15, by_token >> 4), dim=-2)
        by_token = by_token.flatten(-3)
    else:
        by_token = by_token.flatten(-2)
    return by_token.flatten(-3, -2)
