"""Counts of captured steps: on the device, since no host code runs when a graph is replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.policies.mass_floor import FLOOR_BINS
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.rolling_pools import SweepCounts
from kvselect.selection import Selection

__all__ = ["CapturedStatistics"]

_CALLS, _DENSE, _VISIBLE, _ATTENDED, _SCANNED, _LISTS = range(6)
_MASS_SUM, _MASS_COUNT, _NONFINITE, _LOOKED_UP = range(6, 10)


class CapturedStatistics(PhaseStatistics):
    """`PhaseStatistics` whose recording only adds to a tensor, in place.

    Parameters
    ----------
    cache : KVCache
        Whose tokens are counted: its lengths lie on the device.
    """

    __slots__ = ("__weakref__", "cache", "counts", "floor", "reuse")

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache
        self.counts = torch.zeros(10, dtype=torch.float64, device=cache.device)
        self.floor = self.counts.new_zeros(FLOOR_BINS + 1)
        self.reuse = self.counts.new_zeros(2, dtype=torch.int64)

    def tensors(self) -> list[Tensor]:
        """Everything that steps add to in place: for ``mark_static_address``."""
        return [self.counts, self.floor, self.reuse]

    def reuse_counts(self, device: torch.device) -> Tensor:
        """As PhaseStatistics."""
        return self.reuse

    def record_dense(self, tokens_visible: int) -> None:
        """A call that attended to everything; what that was, the device knows."""
        visible = self._visible()
        zero = torch.zeros_like(visible)
        one = zero + 1
        self.counts.add_(torch.stack([one, one, visible, visible, *[zero] * 6]))

    def record_selection(
        self,
        selection: Selection,
        tokens_visible: int,
        scored: bool,
        num_nonfinite: Tensor | None = None,
        sweep: SweepCounts | None = None,
        tokens_scanned: int = 0,
    ) -> None:
        """A call that attended to lists."""
        visible = self._visible()
        zero = torch.zeros_like(visible)
        mass = selection.kept_mass
        known = None if mass is None else mass > 0  # NaN, and nothing visible, say nothing
        lengths = selection.topk_length
        self.counts.add_(
            torch.stack(
                [
                    zero + 1,
                    zero,
                    visible,
                    lengths.sum(dtype=torch.float64),
                    visible if scored else zero + tokens_scanned,
                    zero + lengths.numel(),
                    zero if mass is None else mass.nansum(dtype=torch.float64),
                    zero if known is None else known.sum(dtype=torch.float64),
                    zero if num_nonfinite is None else num_nonfinite.sum(dtype=torch.float64),
                    zero if selection.hit is None else zero + selection.hit.numel(),
                ]
            )
        )

    def record_floor(self, counts: Tensor) -> None:
        """As PhaseStatistics."""
        self.floor.add_(counts)

    def move_to(self, statistics: PhaseStatistics) -> int:
        """Add everything to ``statistics`` and begin anew; returns how many lists there were."""
        counts, floor, reuse = (tensor.tolist() for tensor in self.tensors())
        for tensor in self.tensors():
            tensor.zero_()
        statistics.add(
            num_calls=int(counts[_CALLS]),
            num_dense_calls=int(counts[_DENSE]),
            tokens_visible=int(counts[_VISIBLE]),
            tokens_attended=int(counts[_ATTENDED]),
            tokens_scanned=int(counts[_SCANNED]),
            mass_sum=counts[_MASS_SUM],
            mass_count=counts[_MASS_COUNT],
            num_nonfinite=int(counts[_NONFINITE]),
            floor=floor if any(floor) else None,
            looked_up=int(counts[_LOOKED_UP]),
            reuse_counts=reuse if any(reuse) else None,
        )
        return int(counts[_LISTS])

    def _visible(self) -> Tensor:
        seqlens, starts = self.cache.cache_seqlens, self.cache.starts
        real = seqlens if starts is None else (seqlens - starts).clamp(min=0)
        return real.sum(dtype=torch.float64) * self.cache.num_kv_heads
