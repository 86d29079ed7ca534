"""Rotary position embedding from a table, in float64."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class RopeTable(Protocol):
    """``cos`` and ``sin`` [num_positions, num_pairs]; channels [start, start + 2 num_pairs) rotate.

    Pair i is channels (2i, 2i + 1) of that span when ``interleaved``, otherwise (i, i + num_pairs).
    """

    @property
    def cos(self) -> Tensor: ...
    @property
    def sin(self) -> Tensor: ...
    @property
    def start(self) -> int: ...
    @property
    def interleaved(self) -> bool: ...


def rotate(x: Tensor, positions: Tensor, rope: RopeTable) -> Tensor:
    """Rotate ``x`` to ``positions``: ``(a, b) -> (a cos - b sin, b cos + a sin)`` for every pair.

    Parameters
    ----------
    x : Tensor, [..., head_dim]
    positions : Tensor, [...], integer
        Rows of the table; broadcast against the leading dims of ``x``.
    rope : RopeTable

    Returns
    -------
    Tensor, [..., head_dim], float64

    Notes
    -----
    Source: Su et al., RoFormer, arXiv:2104.09864.
    """
    cos = rope.cos.double()[positions]
    sin = rope.sin.double()[positions]
    num_pairs = rope.cos.shape[-1]
    pair = torch.arange(num_pairs, device=x.device)
    if rope.interleaved:
        first, second = rope.start + 2 * pair, rope.start + 2 * pair + 1
    else:
        first, second = rope.start + pair, rope.start + num_pairs + pair
    x = x.double()
    a, b = x[..., first], x[..., second]
    shape = (a * cos).shape
    out = x.expand(*shape[:-1], x.shape[-1]).clone()
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out
