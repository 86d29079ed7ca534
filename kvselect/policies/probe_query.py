"""probe_query: the mean of a block's queries in which unusual ones weigh more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ChannelStatistics", "QueryMoments", "probe_query"]


class ChannelStatistics(NamedTuple):
    """Mean and variance of un-rotated queries, float32 [batch, n, num_q_heads, head_dim]."""

    mean: Tensor
    variance: Tensor


class QueryMoments:
    """Running sums over the prefill queries of one layer, per row.

    Attributes
    ----------
    count : Tensor, [batch], float64
    total, squares : Tensor, [batch, num_q_heads, head_dim], float64
    """

    def __init__(self, batch: int, num_q_heads: int, head_dim: int, device: torch.device) -> None:
        self.count = torch.zeros(batch, dtype=torch.float64, device=device)
        shape = (batch, num_q_heads, head_dim)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.total)

    @property
    def nbytes(self) -> int:
        return self.count.nbytes + self.total.nbytes + self.squares.nbytes

    def take_rows(self, rows: Tensor) -> None:
        """Rows became ``rows[...]``."""
        self.count, self.total, self.squares = (
            sums[rows] for sums in (self.count, self.total, self.squares)
        )

    def crop(self, num_real_tokens: tuple[int, ...]) -> None:
        """Cropped queries were queries of this row all the same."""

    def add(self, blocks: Tensor, real: Tensor) -> ChannelStatistics:
        """Take in blocks in their order; statistics of all queries up to and with each block.

        Parameters
        ----------
        blocks : Tensor, [batch, n, length, num_q_heads, head_dim], float32
        real : Tensor, [batch, n, length], bool
            Which of them are queries of the row; the others are padding.
        """
        values = blocks.double().where(real[..., None, None], 0.0)
        count = self.count[:, None] + real.sum(2).cumsum(1)
        total = self.total[:, None] + values.sum(2).cumsum(1)
        squares = self.squares[:, None] + values.square().sum(2).cumsum(1)
        self.count, self.total, self.squares = count[:, -1], total[:, -1], squares[:, -1]
        mean = total / count.clamp(min=1.0)[..., None, None]
        variance = squares / count.clamp(min=1.0)[..., None, None] - mean.square()
        return ChannelStatistics(mean.float(), variance.clamp(min=0.0).float())


def probe_query(
    blocks: Tensor,
    real: Tensor,
    num_probes: int,
    statistics: ChannelStatistics | None = None,
) -> Tensor:
    """``sum_t w[t] h[t]`` with ``w[t]`` in proportion to how unusual query ``t`` is.

    ``w[t] = beta[t] / sum(beta)``, ``beta[t] = mean_c (h[t, c] - mu[c])^2 / (var[c] + mean(var) /
    100)`` over the channels ``c`` of the heads that share a probe. Where nothing is unusual (one
    query, or all the same) the weights are equal; one query is its own probe.

    Parameters
    ----------
    blocks : Tensor, [batch, n, length, num_q_heads, head_dim], float32
        Queries at one fixed angle: before RoPE.
    real : Tensor, [batch, n, length], bool
        Padding weighs nothing.
    num_probes : int
        Neighbouring heads that share their weights: 1, or the number of KV heads.
    statistics : ChannelStatistics or None
        Running ones; None: of each block's own queries.

    Returns
    -------
    Tensor, [batch, n, 1, num_q_heads, head_dim], float32; 0 for a block of padding

    Notes
    -----
    Source: ActQKV, arXiv:2502.13542. Its code takes statistics of all requests together, and ones
    for the first thousand calls; these are per row.
    """
    there = real[..., None, None]
    queries = blocks.where(there, 0.0)
    count = real.sum(2)[..., None, None].clamp(min=1)
    if statistics is None:
        mean = queries.sum(2) / count
        spread = (queries - mean.unsqueeze(2)).where(there, 0.0)
        statistics = ChannelStatistics(mean, spread.square().sum(2) / count)
    apart = (queries - statistics.mean.unsqueeze(2)).square()
    probes = (num_probes, queries.shape[3] // num_probes)
    apart = torch.unflatten(apart, -2, probes).flatten(-2)  # [..., num_probes, channels]
    variance = torch.unflatten(statistics.variance, -2, probes).flatten(-2)
    floor = variance + variance.mean(-1, keepdim=True) / 100
    beta = (apart / floor.clamp(min=1e-30).unsqueeze(2)).mean(-1).where(real[..., None], 0.0)
    total = beta.sum(2, keepdim=True)
    even = real[..., None] / real.sum(2, keepdim=True).clamp(min=1)[..., None]
    weights = torch.where(total > 0, beta / total.clamp(min=1e-30), even)
    weighted = torch.unflatten(queries, 3, probes) * weights[..., None, None]
    return weighted.sum(2).flatten(2, 3).unsqueeze(2)
