"""Random block masks and the forms that they can be given in."""

from __future__ import annotations

import torch
from torch import Tensor


def random_mask(shape: tuple[int, ...], *, density: float = 0.5, seed: int = 0) -> Tensor:
    """bool [batch, num_q_heads, num_q_blocks, num_kv_blocks]; about a tenth of the rows empty."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    return kept & (torch.rand(*shape[:-1], 1, generator=generator) < 0.9)


def as_lists(mask: Tensor, *, seed: int = 0) -> Tensor:
    """int32 [..., num_kv_blocks + 1]: kept blocks and -1 in random order, one of them twice."""
    width = mask.shape[-1]
    numbers = torch.arange(width, dtype=torch.int32).expand(mask.shape)
    lists = numbers.where(mask, torch.tensor(-1, dtype=torch.int32))
    lists = torch.cat([lists, lists.amax(-1, keepdim=True)], -1)
    order = torch.rand(lists.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return lists.gather(-1, order)


def as_csr(mask: Tensor) -> tuple[Tensor, Tensor]:
    counts = mask.flatten(0, -2).sum(-1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return offsets, mask.flatten(0, -2).nonzero()[:, 1].int()


def token_mask(mask: Tensor, q_block_size: int, kv_block_size: int, sizes: torch.Size) -> Tensor:
    """The mask per token, bool [batch, num_q_heads, seqlen_q, seqlen_k]."""
    tokens = mask.repeat_interleave(q_block_size, 2).repeat_interleave(kv_block_size, 3)
    return tokens[:, :, : sizes[0], : sizes[1]]
