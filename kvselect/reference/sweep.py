"""Decode lists from a part of the keys: one segment of the sketch, and pools of the others."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.reference.cache import BLOCK_TOKENS, CacheLike, sketched_keys
from kvselect.reference.query_blocks import BlockRange, QueryBlocks
from kvselect.reference.rotation import RopeTable, rotate
from kvselect.reference.selection import BlockLists, without_nonfinite
from kvselect.reference.soft_cap import soft_capped


class SweepState(NamedTuple):
    """What a sweep remembers of each list; int32, changed in place.

    All zeros: nothing was scanned yet, so that the next step scans everything.
    """

    pool: Tensor  # [batch, num_lists, num_segments, pool_width] ascending positions
    pool_length: Tensor  # [batch, num_lists, num_segments]
    scanned_to: Tensor  # [batch, num_lists, num_segments] candidates below it competed for the pool
    next_segment: Tensor  # [batch, num_lists]

    @classmethod
    def empty(cls, batch: int, num_lists: int, num_segments: int, pool_width: int) -> SweepState:
        pool = torch.zeros(batch, num_lists, num_segments, pool_width, dtype=torch.int32)
        return cls(pool, *(pool.new_zeros(pool.shape[:n]) for n in (3, 3, 2)))


class SweptLists(NamedTuple):
    """What rolling_sweep gives."""

    indices: Tensor  # [batch, num_lists, width] int32, ascending, -1 pads
    topk_length: Tensor  # [batch, num_lists] int32
    kept_score: Tensor  # [batch, num_lists] float64
    num_seen: Tensor  # [batch, num_lists, 2] int32: tokens scanned, pool members scored
    num_nonfinite: Tensor  # [batch, num_kv_heads] int64
    votes: Tensor  # [batch, num_lists, max_seqlen] float64; -1 where not seen, NaN where defective


def rolling_sweep(
    q: Tensor,
    cache: CacheLike,
    blocks: QueryBlocks,
    state: SweepState,
    *,
    keep: int,
    softmax_scale: float,
    q_local: Tensor | None = None,
    source: str = "keys",
    normalise_candidates_only: bool = False,
    rope: RopeTable | None = None,
    hit: Tensor | None = None,
    scan_all: Tensor | None = None,
    previous: BlockLists | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> SweptLists:
    """Lists of one decode step, from the tokens that this step looks at.

    Segment of a token: its logical 128-token block modulo ``num_segments``. A list looks at its
    sinks and recent tokens; at all candidates of the segment whose turn it is; at all candidates
    from the block of ``min(scanned_to)`` on; and at the members of the other segments' pools. One
    softmax per query head over what it looks at, added over the heads, is the vote. The segment's
    best tokens become its pool.

    Parameters
    ----------
    q, q_local : Tensor, [batch, num_q_heads, head_dim]
        For the candidates; for sinks and recent tokens (None: q).
    cache : CacheLike
    blocks : QueryBlocks
        One query per row, rule "decode".
    state : SweepState
        Changed. One list: all heads vote on it.
    keep : int
        Candidates to pick. [tokens]
    softmax_scale : float
    source : {"keys", "sketch"}
        What scanned candidates are scored from; pool members are scored from their keys.
    normalise_candidates_only : bool
        The softmax runs over the candidates alone.
    rope : RopeTable or None
        As in score_query_blocks.
    hit : Tensor or None, [batch, num_lists]
        Where non-zero, the list of ``previous`` gets the newest token and nothing else happens.
    scan_all : Tensor or None, [batch, num_lists]
        Where non-zero, every candidate is looked at, and the list's state stays as it is.
    previous : BlockLists or None
    softcap, sink_logits
        As in score_query_blocks.

    Returns
    -------
    SweptLists
    """
    batch, num_lists, num_segments, pool_width = state.pool.shape
    num_kv_heads, max_seqlen = cache.k.shape[2], cache.k.shape[1]
    votes = torch.full((batch, num_lists, max_seqlen), -1.0, dtype=torch.float64)
    num_seen = torch.zeros(batch, num_lists, 2, dtype=torch.int32)
    num_nonfinite = torch.zeros(batch, num_kv_heads, dtype=torch.int64)
    lists: list[list[int]] = []
    kept: list[float] = []
    for row in range(batch):
        at = blocks.range(row, 0)
        candidates = range(at.sink_end, at.window_start)
        for n in range(num_lists):
            if hit is not None and previous is not None and int(hit[row, n]):
                length = int(previous.topk_length[row, 0, n])
                lists.append([*previous.indices[row, 0, n, :length].tolist(), at.end - 1])
                kept.append(math.nan)
                continue
            segment = int(state.next_segment[row, n])
            everything = scan_all is not None and bool(scan_all[row, n])
            seen_to = 0 if everything else int(state.scanned_to[row, n].min())
            seen_to = min(max(seen_to, at.sink_end), at.window_start)
            tail = at.start + (seen_to - at.start) // BLOCK_TOKENS * BLOCK_TOKENS

            def segment_of(i: int, start: int = at.start) -> int:
                return (i - start) // BLOCK_TOKENS % num_segments

            scanned = [i for i in candidates if i >= tail or segment_of(i) == segment]
            pooled = [
                int(i)
                for s in range(num_segments)
                if s != segment and tail > at.sink_end
                for i in state.pool[row, n, s, : int(state.pool_length[row, n, s])]
                if at.sink_end <= i < tail
            ]
            always = [*range(at.start, at.sink_end), *range(at.window_start, at.end)]
            num_seen[row, n, 0] = len(always) + len(scanned)
            num_seen[row, n, 1] = len(pooled)

            heads = range(num_kv_heads) if num_lists == 1 else [n]
            own = torch.zeros(max_seqlen, dtype=torch.float64)
            for g in heads:
                vote, bad = _head_votes(
                    q[row],
                    q[row] if q_local is None else q_local[row],
                    cache,
                    row,
                    g,
                    at,
                    (always, scanned, pooled),
                    keep=keep,
                    softmax_scale=softmax_scale,
                    source=source,
                    normalise_candidates_only=normalise_candidates_only,
                    rope=rope,
                    softcap=softcap,
                    sink_logits=sink_logits,
                )
                own = own + vote
                num_nonfinite[row, g] = bad
            seen = [*always, *scanned, *pooled]
            votes[row, n, seen] = own[seen]

            found = _best(own, [*scanned, *pooled], keep)
            sinks, window = range(at.start, at.sink_end), range(at.window_start, at.end)
            listed = without_nonfinite([*sinks, *found, *window], own.tolist())
            lists.append(listed)
            kept.append(math.fsum(float(own[i]) for i in listed))

            if everything or not any(float(own[i]) > 0 for i in seen):
                continue
            whole = tail <= at.sink_end
            for s in range(num_segments) if whole else [segment]:
                best = _best(own, [i for i in scanned if segment_of(i) == s], pool_width)
                state.pool[row, n, s, : len(best)] = torch.tensor(best, dtype=torch.int32)
                state.pool_length[row, n, s] = len(best)
                state.scanned_to[row, n, s] = at.window_start
            state.next_segment[row, n] = 0 if whole else (segment + 1) % num_segments

    width = max((len(x) for x in lists), default=0)
    indices = torch.full((len(lists), width), -1, dtype=torch.int32)
    for number, listed in enumerate(lists):
        indices[number, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
    shape = (batch, num_lists)
    return SweptLists(
        indices.view(*shape, width),
        torch.tensor([len(x) for x in lists], dtype=torch.int32).view(shape),
        torch.tensor(kept, dtype=torch.float64).view(shape),
        num_seen,
        num_nonfinite,
        votes,
    )


def _best(votes: Tensor, positions: list[int], count: int) -> list[int]:
    """The best by (votes descending, position ascending), ascending; NaN never competes."""
    finite = [i for i in positions if math.isfinite(votes[i])]
    return sorted(sorted(finite, key=lambda i: (-float(votes[i]), i))[:count])


def _head_votes(
    q: Tensor,
    q_local: Tensor,
    cache: CacheLike,
    row: int,
    g: int,
    at: BlockRange,
    looked_at: tuple[list[int], list[int], list[int]],
    *,
    keep: int,
    softmax_scale: float,
    source: str,
    normalise_candidates_only: bool,
    rope: RopeTable | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, int]:
    """Votes of KV head ``g``, [max_seqlen] float64, NaN for defects; how many were not finite."""
    always, scanned, pooled = looked_at
    group_size = q.shape[0] // cache.k.shape[2]
    exact = cache.k[row, :, g].double()
    keys = exact.clone()
    if source == "sketch":
        keys[scanned] = sketched_keys(cache, row, g)[scanned]
    if rope is not None:
        after_picked = at.sink_end - at.start + min(keep, at.num_candidates) - at.window_start
        ranks = [i + (-at.start if i < at.sink_end else after_picked) for i in always]
        keys[always] = rotate(exact[always], torch.tensor(ranks, dtype=torch.int64), rope)
    seen = [*always, *scanned, *pooled]
    num_nonfinite, logits, sinks = 0, [], []
    for h in range(g * group_size, (g + 1) * group_size):
        far, near = q[h].double(), q_local[h].double()
        if not (far.isfinite().all() and near.isfinite().all()):
            num_nonfinite += 1
            continue
        both = torch.cat([keys[always] @ near, keys[[*scanned, *pooled]] @ far])
        logits.append(softmax_scale * both)
        sinks.append(-torch.inf if sink_logits is None else float(sink_logits[h]))
    bad = torch.zeros(len(seen), dtype=torch.bool)
    for own in logits:
        bad |= ~own.isfinite()
    vote = torch.zeros(len(seen), dtype=torch.float64)
    for own, sink in zip(logits, sinks):
        own = soft_capped(own, softcap)
        own[bad] = -torch.inf
        if normalise_candidates_only:
            own[: len(always)] = -torch.inf
        if (own > -torch.inf).any():
            total = own.logsumexp(0)
            if not normalise_candidates_only:
                total = total.logaddexp(torch.tensor(sink, dtype=torch.float64))
            vote += (own - total).exp()
    votes = torch.zeros(cache.k.shape[1], dtype=torch.float64)
    votes[seen] = vote.where(~bad, torch.nan)
    return votes, num_nonfinite + int(bad.sum())
