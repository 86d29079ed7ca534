"""RollingPools: tokens that mattered lately, by segment of the row; scored anew at every step.

A decode step scans one segment of the sketch instead of all of it. What the other segments have to
offer stands in their pools: the best tokens of the segment's last scan. Queries that move make a
list of one step useless at the next; the pool of tokens that matter to any query moves little.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.cache import KVCache
from kvselect.rope import Rope
from kvselect.selection import Lists
from kvselect.sketch import op_format

__all__ = ["MAX_SEGMENTS", "Audited", "RollingPools", "SweepCounts", "Swept"]

MAX_SEGMENTS = 64  # as in csrc/include/kvselect/rolling_sweep.h


class SweepCounts(NamedTuple):
    """What a sweep looked at, [batch, num_lists] each; nothing where a list was reused."""

    rolled: Tensor  # bool: a part of the row was scanned
    not_scanned: Tensor  # int32, tokens that were not, of lists that rolled
    members: Tensor  # int32, pool members scored
    heads_per_list: int


class Swept(NamedTuple):
    """What a sweep gives."""

    lists: Lists  # one block; no kept_score (NaN) where only a part was seen
    num_nonfinite: Tensor  # [batch, num_kv_heads] int64
    counts: SweepCounts


class Audited(NamedTuple):
    """What an audit found, [batch, num_lists] each."""

    counted: Tensor  # bool: audited
    kept: Tensor  # float64: mass that the list kept; 0 where not audited
    fresh: Tensor  # float64: mass that the exact top-k keeps
    stopped: Tensor  # bool: from now on it scans everything


class RollingPools:
    """Pools of each list of one layer, and whether the list still rolls; row = request.

    Parameters
    ----------
    num_segments : int in [2, 64]
        A logical 128-token block, counted from the row's first real token, belongs to segment
        ``block % num_segments``.
    pool_width : int
        Tokens per pool.
    floor : float
        A list stops rolling and scans everything once its audits found that it kept less than this
        share of the mass that a fresh exact top-k keeps.
    audit_interval : int or None
        Steps from one audit to the next; None: no audits.

    Notes
    -----
    The next step of a list whose pools are void scans everything and fills them. `follow` voids
    what a cache of another version or batch, or an append of more than one token, left behind;
    `clear` voids everything. A list that stopped rolling starts again when its pools are filled
    anew.

    Audits are due ``num_segments`` steps after a fill, when the pools are as old as they become,
    and every ``audit_interval`` steps from there, by the tokens of the row: a row is audited at the
    same steps alone and in a batch. Masses of all audits since the fill add up, because one query
    says little.
    """

    def __init__(
        self, num_segments: int, pool_width: int, floor: float, audit_interval: int | None
    ) -> None:
        self.num_segments = num_segments
        self.pool_width = pool_width
        self.floor = floor
        self.audit_interval = audit_interval
        self.all_stopped = False  # known to the host: every list of the layer scans everything
        self._state: _State | None = None
        self._version: tuple[int, int] | None = None
        self._lengths: tuple[int, ...] = ()  # real tokens of each row at the last step
        self._filled_at: list[int] = []  # real tokens of each row when its pools were filled
        self._void: list[bool] = []  # rows whose pools are void

    @property
    def pool(self) -> Tensor | None:
        """int32 [batch, num_lists, num_segments, pool_width], ascending positions."""
        return None if self._state is None else self._state.pool

    @property
    def pool_length(self) -> Tensor | None:
        """int32 [batch, num_lists, num_segments], valid members."""
        return None if self._state is None else self._state.pool_length

    @property
    def scanned_to(self) -> Tensor | None:
        """int32, shape of `pool_length`: candidates of the segment below it competed for the pool.

        0 in all segments of a list: its pools are void.
        """
        return None if self._state is None else self._state.scanned_to

    @property
    def next_segment(self) -> Tensor | None:
        """int32 [batch, num_lists], the segment whose turn it is."""
        return None if self._state is None else self._state.next_segment

    @property
    def stopped(self) -> Tensor | None:
        """int32 [batch, num_lists]; 1: the list scans everything."""
        return None if self._state is None else self._state.stopped

    @property
    def nbytes(self) -> int:
        """Memory of the pools."""
        return 0 if self._state is None else self._state.pool.nbytes

    def clear(self) -> None:
        """Forget everything: the next step of every list scans everything."""
        self._state, self._version, self.all_stopped = None, None, False

    def follow(self, cache: KVCache, num_lists: int) -> None:
        """Before a step, after its append: void what does not belong to the cache any more."""
        version, lengths = (cache.serial, cache.version), cache.num_real_tokens
        shape = (cache.batch, num_lists, self.num_segments)
        state = self._state
        if state is None or version != self._version or state.pool_length.shape != shape:
            self._state = _State.void(shape, self.pool_width, cache.device)
            self.all_stopped = False
            self._void = [True] * cache.batch
            self._filled_at = list(lengths)
        else:
            self.void([not 0 <= now - last <= 1 for now, last in zip(lengths, self._lengths)])
        for row, void in enumerate(self._void):
            if void:
                self._filled_at[row] = lengths[row]
        self._version, self._lengths = version, lengths
        self._void = [False] * cache.batch

    def void(self, rows: list[bool]) -> None:
        """Make the next step of these rows scan everything."""
        if not any(rows):
            return
        state = self._state
        assert state is not None
        which = torch.tensor(rows, device=state.pool.device)[:, None]
        state.scanned_to.masked_fill_(which[..., None], 0)
        state.stopped.masked_fill_(which, 0)
        state.masses.masked_fill_(which, 0.0)
        self._void = [old or new for old, new in zip(self._void, rows)]
        self.all_stopped = False

    def due(self) -> list[bool]:
        """Rows whose lists are to be audited at this step."""
        interval = self.audit_interval
        if interval is None:
            return [False] * len(self._lengths)
        ages = [now - filled for now, filled in zip(self._lengths, self._filled_at)]
        first = self.num_segments
        return [age >= first and (age - first) % interval == 0 for age in ages]

    def sweep(
        self,
        q: Tensor,
        q_local: Tensor | None,
        cache: KVCache,
        *,
        num_sink_tokens: int,
        num_recent_tokens: int,
        keep: int,
        scale: float,
        sketch: str | None,
        normalise_candidates_only: bool,
        rope: Rope | None,
        width: int,
        hit: Tensor | None = None,
        reused: Lists | None = None,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
    ) -> Swept:
        """Lists of a decode step, and pools for the next ones; the op itself, after `follow`.

        Parameters
        ----------
        q, q_local : Tensor, [batch, num_q_heads, head_dim], float32, contiguous
            For the candidates; for sinks and recent tokens (None: the same).
        keep : int
            Candidates to pick.
        sketch : str or None
            Format to scan; None: the keys.
        rope : Rope or None
            Given: "compact" positions, see csrc/include/kvselect/score_tokens.h.
        width : int
            Entries per list; room for the longest.
        hit : Tensor, [batch, num_lists], int32, or None
            Non-zero: the row's newest token joins the list of ``reused``, in place, and its pools
            stay as they are.
        reused : Lists or None
            The lists of the last step, whose indices are written to; None: new ones.
        softcap, sink_logits : float, Tensor [num_q_heads] or None
            As `Queries` has them.
        """
        state = self._state
        assert state is not None
        batch, num_lists, _ = state.pool_length.shape
        shape = (batch, 1, num_lists)
        if reused is None:
            indices = q.new_empty((*shape, width), dtype=torch.int32)
            topk_length = q.new_empty(shape, dtype=torch.int32)
        else:  # lengths belong to the caller of the step that made them
            indices, topk_length = reused.indices, reused.topk_length.clone()
        kept_score = q.new_empty(shape)
        cos, sin, start, interleaved = None, None, 0, False
        if rope is not None:
            cos, sin, start, interleaved = rope.cos, rope.sin, rope.start, rope.interleaved
        num_seen, num_nonfinite = torch.ops.kvselect.rolling_sweep.default(
            q,
            q_local,
            cache.k_pages,
            cache.block_table,
            cache.cache_seqlens,
            cache.starts,
            None if sketch is None else cache.sketch_data,
            op_format(sketch),
            num_sink_tokens,
            num_recent_tokens,
            keep,
            scale,
            normalise_candidates_only,
            cos,
            sin,
            start,
            interleaved,
            hit,
            state.stopped,
            state.pool,
            state.pool_length,
            state.scanned_to,
            state.next_segment,
            indices[:, 0],
            topk_length[:, 0],
            kept_score[:, 0],
            softcap,
            sink_logits,
        )
        scanned, members = num_seen.unbind(-1)
        real = torch.tensor(cache.num_real_tokens, dtype=torch.int32, device=cache.device)[:, None]
        seen = scanned + members
        rolled = (seen > 0) & (seen < real)  # the others saw everything, or were reused
        # Votes are shares of what was seen: of a part, they say nothing about the whole.
        kept_score.masked_fill_(rolled[:, None], torch.nan)
        counts = SweepCounts(
            rolled, (real - scanned) * rolled, members, cache.num_kv_heads // num_lists
        )
        return Swept(Lists(indices, topk_length, kept_score), num_nonfinite, counts)

    def add_audit(self, kept: Tensor, fresh: Tensor, counted: Tensor) -> Audited:
        """Take the masses of an audit, and stop lists that kept too little.

        Parameters
        ----------
        kept, fresh : Tensor, [batch, num_lists]
            Attention mass of the list, and of a fresh exact top-k.
        counted : Tensor, [batch, num_lists], bool
            Lists that were audited; the masses of others mean nothing.
        """
        state = self._state
        assert state is not None
        masses = torch.stack([kept, fresh]).double().where(counted, 0.0)
        state.masses.add_(masses)
        too_little = state.masses[0] < self.floor * state.masses[1]
        stopped = counted & too_little & (state.stopped == 0)
        state.stopped.masked_fill_(stopped, 1)
        self.all_stopped = bool(state.stopped.all())  # the one read-back, at audits only
        return Audited(counted, masses[0], masses[1], stopped)


class _State(NamedTuple):
    """Tensors of fixed shape on the cache's device, changed in place."""

    pool: Tensor
    pool_length: Tensor
    scanned_to: Tensor
    next_segment: Tensor
    stopped: Tensor
    masses: Tensor  # [2, batch, num_lists] float64: kept, fresh; of all audits since the fill

    @classmethod
    def void(cls, shape: tuple[int, int, int], pool_width: int, device: torch.device) -> _State:
        with torch.inference_mode(False):  # kept: steps in any grad mode change it in place
            pool = torch.zeros((*shape, pool_width), dtype=torch.int32, device=device)
            per_segment, per_list = pool.new_zeros(shape), pool.new_zeros(shape[:2])
            masses = pool.new_zeros((2, *shape[:2]), dtype=torch.float64)
            return cls(
                pool,
                per_segment,
                per_segment.clone(),
                per_list,
                per_list.clone(),
                masses,
            )
