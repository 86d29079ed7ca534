"""entropy_pool: one budget for all layers of a pass; flatter layers take more."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from kvselect.policies.stack_state import StackState
from kvselect.queries import Queries

__all__ = ["EntropyHistory", "entropy_of", "normalised_entropy", "pool_counts"]

NUM_SAMPLES = 100
"""Latest entropies of a layer that its mean is of; before every layer has so many, all get alike
shares of what is left."""
FLOOR_SHARE = 32 / 46
"""Least units of a layer, of its even share; 32 of 46 blocks upstream. The most are twice as many
as the even share."""


class EntropyHistory:
    """The last entropies of every layer, per row; see `pool_counts`.

    Attributes
    ----------
    samples : Tensor, [batch, num_layers, 100], float32
        The oldest first; only the last ``count`` of them are any.
    count : Tensor, [batch, num_layers], int64
    """

    def __init__(self, batch: int, num_layers: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # changed in place by steps of any grad mode
            self.samples = torch.zeros((batch, num_layers, NUM_SAMPLES), device=device)
            self.count = torch.zeros((batch, num_layers), dtype=torch.int64, device=device)
            self._means = torch.zeros((batch, num_layers), device=device)

    @property
    def nbytes(self) -> int:
        return self.samples.nbytes + self.count.nbytes + self._means.nbytes

    def take_rows(self, rows: Tensor) -> None:
        """Rows became ``rows[...]``."""
        with torch.inference_mode(False):
            rows = rows.clone()
            self.samples, self.count = self.samples[rows], self.count[rows]
            self._means = self._means[rows]

    def crop(self, num_real_tokens: tuple[int, ...]) -> None:
        """Samples are of steps, not of tokens: those of cropped ones say as much as others."""

    def means(self) -> Tensor:
        """Of every layer, float32 [batch, num_layers]; 0 without a sample. Changed by `add`."""
        return self._means

    def add(self, layer: int, entropy: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the entropies of a layer's query blocks, in their order.

        Parameters
        ----------
        entropy, valid : Tensor, [batch, num_blocks], float32 and bool
            Blocks that are not valid (of rows that are shorter) leave no trace.

        Returns
        -------
        mean : Tensor, [batch, num_blocks], float32
            Of the layer's last samples, up to and with the block's own.
        count : Tensor, [batch, num_blocks], int64
        """
        if entropy.shape[1] == 1:  # a decode step: a dozen small ops less
            return self._add_one(layer, entropy, valid)
        held = torch.arange(NUM_SAMPLES, device=entropy.device) >= (
            NUM_SAMPLES - self.count[:, layer, None]
        )
        there = torch.cat([held, valid], 1)
        values = torch.cat([self.samples[:, layer], entropy], 1).where(there, 0.0)
        # What is no sample goes first, so that the last ones are consecutive in every row.
        order = there.int().argsort(dim=1, stable=True)
        values, there = values.gather(1, order), there.gather(1, order)
        sums = torch.nn.functional.pad(values.double().cumsum(1), (1, 0))
        sums = sums[:, NUM_SAMPLES:] - sums[:, :-NUM_SAMPLES]
        seen = there.cumsum(1)[:, NUM_SAMPLES - 1 :].clamp(max=NUM_SAMPLES)
        place = order.argsort(dim=1)[:, NUM_SAMPLES:] - (NUM_SAMPLES - 1)
        place = place.clamp(min=0)
        mean = (sums.gather(1, place) / seen.gather(1, place).clamp(min=1)).float()
        self.samples[:, layer] = values[:, -NUM_SAMPLES:]
        self.count[:, layer] = seen[:, -1]
        self._means[:, layer] = (sums[:, -1] / seen[:, -1].clamp(min=1)).float()
        return mean, seen.gather(1, place)

    def _add_one(self, layer: int, entropy: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        samples, count = self.samples[:, layer], self.count[:, layer : layer + 1]
        samples.copy_(torch.cat([samples[:, 1:], entropy], 1).where(valid, samples))
        count.add_(valid).clamp_(max=NUM_SAMPLES)
        mean = self._means[:, layer : layer + 1]
        mean.copy_(samples.sum(1, keepdim=True, dtype=torch.float64) / count.clamp(min=1))
        return mean, count


def normalised_entropy(weights: Tensor, num_units: Tensor) -> Tensor:
    """``-sum_i p_i ln p_i / ln num_units`` with ``p = weights / sum(weights)``, in [0, 1].

    Parameters
    ----------
    weights : Tensor, [..., n], float32, >= 0
    num_units : Tensor, [...]
        How many of them are units; one or none have an entropy of 0.
    """
    return entropy_of(weights / weights.sum(-1, keepdim=True).clamp(min=1e-30), num_units)


def entropy_of(p: Tensor, num_units: Tensor) -> Tensor:
    """`normalised_entropy` of weights that add up to 1; whatever they are, of no unit or one, 0."""
    entropy = torch.special.entr(p).sum(-1)
    scaled: Tensor = (entropy / num_units.clamp(min=2).log()).where(num_units > 1, 0.0)
    return scaled.clamp(0.0, 1.0)


def pool_counts(
    stack: StackState,
    layer: int,
    queries: Queries,
    entropy: Tensor,
    num_units: Tensor,
    *,
    topk: int,
    granule: int = 1,
) -> Tensor:
    """Units that this layer may take, for every row and query block; the pool shrinks by them.

    ``count = round(share * pool)``, ``share = E[l] / sum over m >= l of E[m]`` once every layer has
    100 samples, ``1 / (num_layers - l)`` before; at least `FLOOR_SHARE` of ``topk``, and at most
    twice ``topk`` or what leaves the layers below their least. The pool of a pass starts at
    ``topk * num_layers``, and no more is taken.

    Parameters
    ----------
    entropy, num_units : Tensor, [batch, num_blocks]
        Normalised entropy of the layer's scores, and how many units competed.
    topk : int
        Units of each layer on average.
    granule : int
        Counts are rounded to a multiple of it.

    Returns
    -------
    Tensor, [batch, num_blocks], int64, on the device; at most ``num_units``, and all of them where
    there are no more than ``topk``

    Notes
    -----
    Source: ActQKV, arXiv:2502.13542, whose code shares the statistics between requests and starts
    them anew in every process; here they are per row, so that a row's counts depend on nothing but
    its own past. A block's mean is of samples up to its own, and other layers' are from before the
    call: cutting a call into runs changes nothing.
    """
    batch, num_blocks = entropy.shape
    device, num_layers = entropy.device, stack.num_layers
    history = stack.rows("entropy_pool", lambda: EntropyHistory(batch, num_layers, device))
    competes = num_units > topk  # otherwise all fit, as they do in a batch that is dense
    mean, count = history.add(layer, entropy.float(), competes)
    total = mean + history.means()[:, layer + 1 :].sum(1, keepdim=True)
    # A block has no more samples than the layer has after all of them.
    ready = (history.count >= NUM_SAMPLES).all(1, keepdim=True)
    if num_blocks > 1:
        ready = ready & (count >= NUM_SAMPLES)
    share = (mean / total).where(ready & (total > 0), 1.0 / (num_layers - layer))

    def full() -> Tensor:
        return torch.full((batch, num_blocks), float(topk * num_layers), device=device)

    pool = stack.carried("entropy_pool", layer, queries, full).to(device)  # whole numbers
    least = min(granule * ceil(FLOOR_SHARE * topk / granule), topk)
    most = (pool - least * (num_layers - 1 - layer)).clamp(min=least, max=2 * topk)
    wanted = (share * pool / granule).round().mul_(granule)
    counts = wanted.clamp_(min=least).minimum(most).where(competes, topk).minimum(num_units)
    stack.carry("entropy_pool", layer, queries, pool - counts)
    return counts.long()
