"""What a policy did in one layer: counted on the device, read by the host when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvselect.selection import Selection
from kvselect.sketch import bytes_per_token

__all__ = ["PhaseStatistics"]

_ATTENDED, _MASS_SUM, _MASS_COUNT, _NONFINITE, _HITS, _LISTS_LOOKED_UP, _NOT_SCANNED = range(7)


@dataclass(slots=True, eq=False)
class PhaseStatistics:
    """Counts of one phase.

    Tokens are summed over rows, query blocks and KV heads: each is one key and one value.

    Reading a property of the device's counts waits for the device.

    Parameters
    ----------
    num_calls : int
        Decode steps, or runs of query blocks of prefill calls.
    num_dense_calls : int
        Calls among them that attended to everything.
    tokens_visible : int
        What dense attention would have read.
    """

    num_calls: int = 0
    num_dense_calls: int = 0
    tokens_visible: int = 0
    _attended_densely: int = 0
    _scanned: int = 0
    _totals: Tensor | None = None  # float64 [7]: exact far beyond any count here

    def record_dense(self, tokens_visible: int) -> None:
        """A call that attended to everything."""
        self.num_calls += 1
        self.num_dense_calls += 1
        self.tokens_visible += tokens_visible
        self._attended_densely += tokens_visible

    def record_selection(
        self,
        selection: Selection,
        tokens_visible: int,
        scored: bool,
        num_nonfinite: Tensor | None = None,
        tokens_not_scanned: Tensor | None = None,
    ) -> None:
        """A call that attended to lists.

        Parameters
        ----------
        scored : bool
            Whether the visible tokens were scored (StreamingLLM does not).
        num_nonfinite : Tensor, any shape, or None
            Tokens and query vectors that were not finite.
        tokens_not_scanned : Tensor, scalar, or None
            Visible tokens of reused lists.
        """
        self.num_calls += 1
        self.tokens_visible += tokens_visible
        self._scanned += tokens_visible if scored else 0
        lengths = selection.topk_length
        attended = lengths.sum(dtype=torch.float64)
        zero = torch.zeros_like(attended)
        parts = [attended, zero, zero, zero, zero, zero, zero]
        if (mass := selection.kept_mass) is not None:
            parts[_MASS_SUM] = mass.nansum(dtype=torch.float64)
            # Reused lists hold NaN; 0 means that nothing was visible before the block: both say
            # nothing.
            parts[_MASS_COUNT] = (mass > 0).sum(dtype=torch.float64)
        if num_nonfinite is not None:
            parts[_NONFINITE] = num_nonfinite.sum(dtype=torch.float64)
        if selection.hit is not None:
            parts[_HITS] = selection.hit.sum(dtype=torch.float64)
            parts[_LISTS_LOOKED_UP] = zero + selection.hit.numel()
        if tokens_not_scanned is not None:
            parts[_NOT_SCANNED] = tokens_not_scanned.to(torch.float64)
        counts = torch.stack(parts)
        # Not in place: inference tensors may not be changed outside the mode that made them.
        self._totals = counts if self._totals is None else self._totals + counts

    def _total(self, which: int) -> float:
        return 0.0 if self._totals is None else float(self._totals[which])

    @property
    def num_steps(self) -> int:
        """The same as ``num_calls``."""
        return self.num_calls

    @property
    def tokens_attended(self) -> int:
        return self._attended_densely + int(self._total(_ATTENDED))

    @property
    def tokens_scanned(self) -> int:
        """Tokens that were scored, from the sketch or the keys."""
        return self._scanned - int(self._total(_NOT_SCANNED))

    @property
    def num_hits(self) -> int:
        """Lists that the selection cache reused."""
        return int(self._total(_HITS))

    @property
    def num_misses(self) -> int:
        """Lists that the selection cache looked at and made anew; forced misses do not count."""
        return int(self._total(_LISTS_LOOKED_UP)) - self.num_hits

    @property
    def hit_rate(self) -> float | None:
        """Share of the lists looked up that were reused; None: none was looked up."""
        looked_up = self._total(_LISTS_LOOKED_UP)
        return self._total(_HITS) / looked_up if looked_up else None

    @property
    def kept_mass(self) -> float | None:
        """Mean attention mass that lists held, by the scoring queries; None: not measured."""
        count = self._total(_MASS_COUNT)
        return self._total(_MASS_SUM) / count if count else None

    @property
    def num_nonfinite(self) -> int:
        """Tokens and vectors met by the scores that were not finite, once per call."""
        return int(self._total(_NONFINITE))

    def bytes_read(self, head_dim: int, itemsize: int, sketch: str | None) -> float:
        """Bytes that scoring and attention read: modelled, not measured.

        Sketch, or keys, per token scanned; keys and values per token attended.
        """
        scan = 0.0 + head_dim * itemsize if sketch is None else bytes_per_token(sketch, head_dim)
        return self.tokens_scanned * scan + self.tokens_attended * 2.0 * head_dim * itemsize

    def dense_bytes_read(self, head_dim: int, itemsize: int) -> float:
        """Bytes that dense attention would have read, by the same model."""
        return self.tokens_visible * 2.0 * head_dim * itemsize

    def to_dict(self) -> dict[str, int | float | None]:
        """All counts as plain numbers."""
        return {
            "num_calls": self.num_calls,
            "num_dense_calls": self.num_dense_calls,
            "tokens_visible": self.tokens_visible,
            "tokens_attended": self.tokens_attended,
            "tokens_scanned": self.tokens_scanned,
            "num_hits": self.num_hits,
            "num_misses": self.num_misses,
            "hit_rate": self.hit_rate,
            "kept_mass": self.kept_mass,
            "num_nonfinite": self.num_nonfinite,
        }
