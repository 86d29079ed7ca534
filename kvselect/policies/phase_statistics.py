"""What a policy did in one layer: counted on the device, read by the host when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvselect.rolling_pools import SweepCounts
from kvselect.selection import Selection
from kvselect.sketch import bytes_per_token

__all__ = ["PhaseStatistics"]

_ATTENDED, _MASS_SUM, _MASS_COUNT, _NONFINITE, _ROLLED, _NOT_SWEPT, _MEMBERS = range(7)
_REUSED, _NOT_SCANNED = range(2)
_AUDITED, _AUDITED_TOKENS, _AUDIT_KEPT, _AUDIT_FRESH, _STOPPED = range(5)

_CALLS_AT_ONCE = 64  # whose counts are added up together: a sum costs more than the step's checks


class _Recorded(NamedTuple):
    """Counts of one call that are not added up yet; none of them changes after the call."""

    topk_length: Tensor
    kept_score: Tensor | None
    total_score: float | Tensor | None
    num_nonfinite: Tensor | None
    sweep: SweepCounts | None


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
    attention_kernels : dict
        Attention calls of a prefill by the kernel that ran: "sparse_attention",
        "block_sparse_attention", "flash_attn", "sdpa". Decode steps have no choice, and are not
        counted.
    """

    num_calls: int = 0
    num_dense_calls: int = 0
    tokens_visible: int = 0
    attention_kernels: dict[str, int] = field(default_factory=dict)
    _attended_densely: int = 0
    _scanned: int = 0
    _looked_up: int = 0
    _recorded: list[_Recorded] = field(default_factory=list)
    _totals: Tensor | None = None  # float64 [7]: exact far beyond any count here
    _reuse_counts: Tensor | None = None  # int64 [2]
    _audits: Tensor | None = None  # float64 [5]
    _floor: Tensor | None = None  # float64 [FLOOR_BINS + 1]
    _exact: Tensor | None = None  # float64 [4]: sums of overlap, mass, exact mass; lists
    _least_overlap: Tensor | None = None

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
        sweep: SweepCounts | None = None,
        tokens_scanned: int = 0,
    ) -> None:
        """A call that attended to lists.

        Parameters
        ----------
        selection : Selection
            Its counts are kept for a while, its indices are not.
        scored : bool
            Whether the visible tokens were scored (StreamingLLM does not).
        num_nonfinite : Tensor, any shape, or None
            Tokens and query vectors that were not finite.
        sweep : SweepCounts or None
            Of a rolling sweep.
        tokens_scanned : int
            Where only some of the visible tokens were scored: how many.
        """
        self.num_calls += 1
        self.tokens_visible += tokens_visible
        self._scanned += tokens_visible if scored else tokens_scanned
        if selection.hit is not None:
            self._looked_up += selection.hit.numel()
        self._recorded.append(
            _Recorded(
                selection.topk_length,
                selection.kept_score,
                selection.total_score,
                num_nonfinite,
                sweep,
            )
        )
        if len(self._recorded) == _CALLS_AT_ONCE:
            self._add_up()

    def record_kernels(self, names: Iterable[str]) -> None:
        """The kernels that a prefill's call attended with."""
        for name in names:
            self.attention_kernels[name] = self.attention_kernels.get(name, 0) + 1

    def add(
        self,
        *,
        num_calls: int,
        num_dense_calls: int,
        tokens_visible: int,
        tokens_attended: int,
        tokens_scanned: int,
        mass_sum: float,
        mass_count: float,
        num_nonfinite: int,
        floor: list[float] | None = None,
        looked_up: int = 0,
        reuse_counts: list[int] | None = None,
    ) -> None:
        """Counts of other calls, as the properties name them; ``floor`` as `record_floor`.

        ``looked_up``: lists of which a selection cache was asked; ``reuse_counts`` as the method.
        """
        self._looked_up += looked_up
        if reuse_counts is not None:
            kept = self._reuse_counts
            added = torch.tensor(reuse_counts, device=None if kept is None else kept.device)
            self._reuse_counts = added if kept is None else kept + added
        if floor is not None:
            self.record_floor(torch.tensor(floor, dtype=torch.float64))
        self.num_calls += num_calls
        self.num_dense_calls += num_dense_calls
        self.tokens_visible += tokens_visible
        self._attended_densely += tokens_attended
        self._scanned += tokens_scanned
        if self._recorded:
            self._add_up()
        counts = [0.0] * 7
        counts[_MASS_SUM], counts[_MASS_COUNT] = mass_sum, mass_count
        counts[_NONFINITE] = num_nonfinite
        device = None if self._totals is None else self._totals.device
        new = torch.tensor(counts, dtype=torch.float64, device=device)
        self._totals = new if self._totals is None else self._totals + new

    def reuse_counts(self, device: torch.device) -> Tensor:
        """Lists that were reused and their visible tokens, int64 [2]: the lookups add to it."""
        if self._reuse_counts is None:
            self._reuse_counts = torch.zeros(2, dtype=torch.int64, device=device)
        return self._reuse_counts

    def _add_up(self) -> None:
        """Bring the totals up to date, on the device."""
        recorded, self._recorded = self._recorded, []
        scores: dict[float, list[Tensor]] = {}
        masses = []
        for call in recorded:
            if call.kept_score is None or call.total_score is None:
                continue
            if isinstance(call.total_score, Tensor):
                masses.append(call.kept_score / call.total_score)
            else:
                scores.setdefault(call.total_score, []).append(call.kept_score)
        masses += [_joined(kept) / total for total, kept in scores.items()]
        zero = torch.zeros((), dtype=torch.float64, device=recorded[0].topk_length.device)
        counts = [zero] * 7
        counts[_ATTENDED] = _joined([call.topk_length for call in recorded]).sum(dtype=zero.dtype)
        if masses:
            mass = _joined(masses)
            counts[_MASS_SUM] = mass.nansum(dtype=zero.dtype)
            # Reused lists hold NaN; 0 means that nothing was visible before the block: both say
            # nothing.
            counts[_MASS_COUNT] = (mass > 0).sum(dtype=zero.dtype)
        defects = [call.num_nonfinite for call in recorded if call.num_nonfinite is not None]
        if defects:
            counts[_NONFINITE] = _joined(defects).sum(dtype=zero.dtype)
        sweeps = [call.sweep for call in recorded if call.sweep is not None]
        if sweeps:  # of one policy and cache: as many KV heads per list
            heads = sweeps[0].heads_per_list
            counts[_ROLLED] = _joined([s.rolled for s in sweeps]).sum(dtype=zero.dtype)
            not_scanned = _joined([s.not_scanned for s in sweeps]).sum(dtype=zero.dtype)
            counts[_NOT_SWEPT] = not_scanned * heads
            counts[_MEMBERS] = _joined([s.members for s in sweeps]).sum(dtype=zero.dtype) * heads
        # Not in place: inference tensors may not be changed outside the mode that made them.
        totals = torch.stack(counts)
        self._totals = totals if self._totals is None else self._totals + totals

    def record_audit(
        self, counted: Tensor, kept: Tensor, fresh: Tensor, stopped: Tensor, tokens: Tensor
    ) -> None:
        """What `RollingPools.add_audit` found; ``tokens`` were scored for it, over all KV heads."""
        counts = [counted.sum(), tokens, kept.sum(), fresh.sum(), stopped.sum()]
        new = torch.stack([count.double() for count in counts])
        self._audits = new if self._audits is None else self._audits + new

    def record_floor(self, counts: Tensor) -> None:
        """What `trim_to_mass` counted, float64."""
        self._floor = counts if self._floor is None else self._floor + counts

    def record_exact(self, overlap: Tensor, mass: Tensor, exact_mass: Tensor) -> None:
        """What `Policy.audit` found, each [batch, num_lists]."""
        sums = [x.sum(dtype=torch.float64) for x in (overlap, mass, exact_mass)]
        new = torch.stack([*sums, torch.full_like(sums[0], overlap.numel())])
        self._exact = new if self._exact is None else self._exact + new
        least = overlap.amin()
        seen = self._least_overlap
        self._least_overlap = least if seen is None else torch.minimum(least, seen)

    @property
    def exact_audit(self) -> dict[str, float] | None:
        """What audits of decode steps found, by exact scores; None: no step was audited.

        ``num_lists``; means of ``overlap`` (share of the exact top-k that a list holds), of the
        ``mass`` that it keeps and of ``exact_mass``, that of the exact top-k; ``least_overlap``.
        """
        if self._exact is None or self._least_overlap is None:
            return None
        overlap, mass, exact_mass, count = self._exact.tolist()
        return {
            "num_lists": int(count),
            "overlap": overlap / count,
            "least_overlap": float(self._least_overlap),
            "mass": mass / count,
            "exact_mass": exact_mass / count,
        }

    def _total(self, which: int) -> float:
        if self._recorded:
            self._add_up()
        return 0.0 if self._totals is None else float(self._totals[which])

    def _reuse(self, which: int) -> int:
        return 0 if self._reuse_counts is None else int(self._reuse_counts[which])

    def _audit(self, which: int) -> float:
        return 0.0 if self._audits is None else float(self._audits[which])

    @property
    def num_steps(self) -> int:
        """The same as ``num_calls``."""
        return self.num_calls

    @property
    def tokens_attended(self) -> int:
        return self._attended_densely + int(self._total(_ATTENDED))

    @property
    def tokens_scanned(self) -> int:
        """Tokens that were scored one after another, from the sketch or the keys."""
        return self._scanned - self._reuse(_NOT_SCANNED) - int(self._total(_NOT_SWEPT))

    @property
    def tokens_scored_from_keys(self) -> int:
        """What rolling sweeps scored besides, from the keys: pool members, and all in an audit."""
        return int(self._total(_MEMBERS)) + int(self._audit(_AUDITED_TOKENS))

    @property
    def num_hits(self) -> int:
        """Lists that the selection cache reused."""
        return self._reuse(_REUSED)

    @property
    def num_misses(self) -> int:
        """Lists that the selection cache looked at and made anew; forced misses do not count."""
        return self._looked_up - self.num_hits

    @property
    def hit_rate(self) -> float | None:
        """Share of the lists looked up that were reused; None: none was looked up."""
        return self.num_hits / self._looked_up if self._looked_up else None

    @property
    def kept_mass(self) -> float | None:
        """Mean attention mass that lists held, by the scoring queries; None: not measured."""
        count = self._total(_MASS_COUNT)
        return self._total(_MASS_SUM) / count if count else None

    @property
    def num_rolled(self) -> int:
        """Lists made by a rolling sweep of a part of the row."""
        return int(self._total(_ROLLED))

    @property
    def num_audited(self) -> int:
        """Lists among them that were compared with a fresh exact top-k."""
        return int(self._audit(_AUDITED))

    @property
    def num_stopped(self) -> int:
        """Audits that made a list scan everything from then on."""
        return int(self._audit(_STOPPED))

    @property
    def rolling_mass(self) -> float | None:
        """Mass that audited lists kept, over that of a fresh exact top-k; None: no audit."""
        fresh = self._audit(_AUDIT_FRESH)
        return self._audit(_AUDIT_KEPT) / fresh if fresh else None

    @property
    def picked_for_mass(self) -> tuple[int, ...] | None:
        """Lists of a policy with a mass floor, by how many candidates they took to reach it.

        In equal steps from the fewest that they may take to the most; None: no such policy.
        """
        return None if self._floor is None else tuple(int(n) for n in self._floor[:-1].tolist())

    @property
    def num_short_of_mass(self) -> int:
        """Lists that fell short of the mass floor with the most candidates that they may take."""
        return 0 if self._floor is None else int(self._floor[-1])

    @property
    def num_nonfinite(self) -> int:
        """Tokens and vectors met by the scores that were not finite, once per call."""
        return int(self._total(_NONFINITE))

    def bytes_read(self, head_dim: int, itemsize: int, sketch: str | None) -> float:
        """Bytes that scoring and attention read: modelled, not measured.

        Sketch, or keys, per token scanned; keys per token scored from them besides; keys and values
        per token attended.
        """
        key = 1.0 * head_dim * itemsize
        scan = key if sketch is None else bytes_per_token(sketch, head_dim)
        read = self.tokens_scanned * scan + self.tokens_scored_from_keys * key
        return read + self.tokens_attended * 2.0 * key

    def dense_bytes_read(self, head_dim: int, itemsize: int) -> float:
        """Bytes that dense attention would have read, by the same model."""
        return self.tokens_visible * 2.0 * head_dim * itemsize

    def to_dict(self) -> dict[str, Any]:
        """All counts as plain numbers."""
        return {
            "num_calls": self.num_calls,
            "num_dense_calls": self.num_dense_calls,
            "tokens_visible": self.tokens_visible,
            "tokens_attended": self.tokens_attended,
            "tokens_scanned": self.tokens_scanned,
            "tokens_scored_from_keys": self.tokens_scored_from_keys,
            "num_hits": self.num_hits,
            "num_misses": self.num_misses,
            "hit_rate": self.hit_rate,
            "kept_mass": self.kept_mass,
            "num_rolled": self.num_rolled,
            "num_audited": self.num_audited,
            "num_stopped": self.num_stopped,
            "rolling_mass": self.rolling_mass,
            "exact_audit": self.exact_audit,
            "picked_for_mass": self.picked_for_mass,
            "num_short_of_mass": self.num_short_of_mass,
            "num_nonfinite": self.num_nonfinite,
            "attention_kernels": dict(self.attention_kernels) or None,
        }


def _joined(tensors: list[Tensor]) -> Tensor:
    """All entries of tensors that may differ in shape."""
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        return torch.stack(tensors)
    return torch.cat([tensor.flatten() for tensor in tensors])
