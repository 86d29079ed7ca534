"""cascade: fewer tokens layer by layer, by the attention that they got in the layers above."""

from __future__ import annotations

from math import ceil
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.policies.mass_floor import trim_to_count
from kvselect.policies.stack_state import StackState
from kvselect.queries import Queries
from kvselect.query_blocks import BlockRange, block_range
from kvselect.selection import Lists, Selection, list_width, select_blocks

__all__ = ["HardCascade", "cascade_lists", "cascade_record", "keep_count", "kept_share"]


def kept_share(
    layer: int, num_layers: int, mean_pruned: float, first_pruned: float, free_layers: float
) -> float:
    """Share of the visible tokens that a layer keeps, ``1 - r_l``.

    ``r_l = 0`` in the first ``ceil(free_layers * num_layers)`` layers and in the very first, which
    nothing comes before; then linear from ``first_pruned`` to ``2 * mean_pruned - first_pruned``.
    """
    free = max(ceil(free_layers * num_layers), 1)
    if layer < free or mean_pruned == 0.0:
        return 1.0
    last_pruned = 2.0 * mean_pruned - first_pruned
    steps = num_layers - 1 - free
    along = (layer - free) / steps if steps else 0.5
    return 1.0 - (first_pruned + (last_pruned - first_pruned) * along)


def keep_count(share: float, num_tokens: Tensor) -> Tensor:
    """``max(1, floor(share * num_tokens))``, int64."""
    return (num_tokens.double() * share + 1e-9).floor().long().clamp(min=1)


class HardCascade:
    """Cumulative scores of the tokens of each row, and which tokens a layer has dropped for good.

    ``score[j] = sum of the attention that token j got, over heads, layers, queries and steps``;
    tokens rank by ``score[j] / seen[j]``, the queries that could see them: a plain sum favours
    early ones. Positions count from a row's first real token.

    Parameters
    ----------
    batch, num_layers : int
    decay : float in [0, 1]
        What older passes count for, once per pass.
    """

    def __init__(self, batch: int, num_layers: int, decay: float, device: torch.device) -> None:
        self.decay = decay
        self.score = torch.zeros((batch, 0), dtype=torch.float64, device=device)
        self.seen = torch.zeros_like(self.score)
        self.dropped = torch.zeros((batch, num_layers, 0), dtype=torch.bool, device=device)
        self._new: tuple[Tensor, Tensor] | None = None  # of the layer at work: it ranks by others'
        self._at: tuple[object, int] | None = None
        self._tokens: object = None

    @property
    def nbytes(self) -> int:
        return self.score.nbytes + self.seen.nbytes + self.dropped.nbytes

    def take_rows(self, rows: Tensor) -> None:
        """Rows became ``rows[...]``."""
        self._add_up()
        self.score, self.seen = self.score[rows], self.seen[rows]
        self.dropped = self.dropped[rows]

    def crop(self, num_real_tokens: tuple[int, ...]) -> None:
        """What is behind is no token any more; a later one at its place is another."""
        self._add_up()
        left = torch.tensor(num_real_tokens, device=self.score.device)[:, None]
        gone = torch.arange(self.score.shape[1], device=left.device) >= left
        self.score = self.score.masked_fill(gone, 0.0)
        self.seen = self.seen.masked_fill(gone, 0.0)
        self.dropped = self.dropped & ~gone[:, None]

    def begin(self, layer: int, cache: KVCache) -> bool:
        """Before a layer's call, or a run of one; whether it is the first run of this layer."""
        tokens = (cache.lengths, cache.version)
        if (tokens, layer) == self._at:
            return False
        self._add_up()
        if tokens != self._tokens:
            self.score, self.seen = self.score * self.decay, self.seen * self.decay
        self._tokens, self._at = tokens, (tokens, layer)
        grow = max(max(cache.num_real_tokens, default=0) - self.score.shape[1], 0)
        if grow:
            pad = torch.nn.functional.pad
            grow += grow // 8 + 64
            self.score, self.seen = pad(self.score, (0, grow)), pad(self.seen, (0, grow))
            self.dropped = pad(self.dropped, (0, grow))
        self._new = torch.zeros_like(self.score), torch.zeros_like(self.seen)
        return True

    def drop(
        self, layer: int, cache: KVCache, share: float, num_sink_tokens: int, num_recent_tokens: int
    ) -> None:
        """Drop what ranks behind ``share`` of the row's tokens, and what the layer above dropped.

        Sinks and the row's last tokens stay, and count.
        """
        real = torch.tensor(cache.num_real_tokens, device=self.score.device)[:, None]
        place = torch.arange(self.score.shape[1], device=real.device)
        candidate = (place >= num_sink_tokens) & (place < real - num_recent_tokens)
        dropped = self.dropped[:, layer]
        if layer:
            dropped = dropped | (self.dropped[:, layer - 1] & candidate)
        alive = candidate & ~dropped
        always = real.clamp(max=num_sink_tokens + num_recent_tokens)
        left = (keep_count(share, real) - always).clamp(min=0)
        rank = (self.score / self.seen.clamp(min=1e-30)).where(alive, -1.0)
        order = rank.argsort(dim=1, descending=True, stable=True)
        best = torch.zeros_like(alive).scatter(1, order, place < left)
        self.dropped = self.dropped.clone()
        self.dropped[:, layer] = dropped | (alive & ~best)

    def add(self, sums: Tensor, seen: Tensor, cache: KVCache) -> None:
        """What tokens got from one layer's queries, and how many of these could see them.

        Parameters
        ----------
        sums, seen : Tensor, [batch, n], by position in the cache
        """
        assert self._new is not None
        score, count = self._new
        place = torch.arange(sums.shape[1], device=sums.device).expand_as(sums)
        if cache.starts is not None:
            place = place - cache.starts[:, None]
        there = place >= 0
        place = place.clamp(min=0).minimum(place.new_tensor(score.shape[1] - 1))
        score = score.scatter_add(1, place, sums.double().where(there, 0.0))
        self._new = score, count.scatter_add(1, place, seen.double().where(there, 0.0))

    def alive(self, layer: int, cache: KVCache, num_tokens: int) -> Tensor:
        """Which tokens the layer still has, by position in the cache; bool [batch, num_tokens]."""
        place = torch.arange(num_tokens, device=self.score.device).expand(cache.batch, -1)
        if cache.starts is not None:
            place = place - cache.starts[:, None]
        room = self.dropped.shape[2]
        return ~self.dropped[:, layer].gather(1, place.clamp(min=0, max=room - 1).long())

    def _add_up(self) -> None:
        if self._new is not None:
            self.score, self.seen = self.score + self._new[0], self.seen + self._new[1]
            self._new = None


class CascadeSettings(Protocol):
    """What the functions below read of a policy."""

    @property
    def cascade(self) -> Literal["soft", "hard"]: ...
    @property
    def mean_pruned(self) -> float: ...
    @property
    def first_pruned(self) -> float: ...
    @property
    def free_layers(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def num_sink_tokens(self) -> int: ...
    @property
    def num_recent_tokens(self) -> int: ...


class _Left(NamedTuple):
    """What a soft cascade hands down for the query blocks of a run."""

    scores: Tensor  # [batch, num_blocks, n] float32: attention that tokens got in this pass
    kept: Tensor  # [batch, num_blocks, n] bool


def cascade_lists(
    settings: CascadeSettings, stack: StackState, layer: int, queries: Queries, cache: KVCache
) -> Lists | None:
    """What is left for this layer, as one list for all heads; None: everything.

    A layer that nothing came before in this pass has nothing to rank by and attends to everything.
    """
    schedule = settings.mean_pruned, settings.first_pruned, settings.free_layers
    share = kept_share(layer, stack.num_layers, *schedule)
    at = _range(settings, queries, cache)
    place = torch.arange(queries.max_seqlen, device=cache.device)
    candidate = (place >= at.sink_end[..., None]) & (place < at.window_start[..., None])
    if settings.cascade == "hard":
        tokens = _hard(settings, stack, cache)
        sizes = settings.num_sink_tokens, settings.num_recent_tokens
        if tokens.begin(layer, cache) and share < 1.0:
            tokens.drop(layer, cache, share, *sizes)
        if share == 1.0:
            return None
        kept = tokens.alive(layer, cache, queries.max_seqlen)[:, None] | ~candidate
        return _pick(settings, torch.where(kept, 1.0, torch.nan), queries, cache, None)
    above = stack.carried("cascade", layer, queries, lambda: None)
    if share == 1.0 or not isinstance(above, _Left):
        return None
    scores = above.scores.where(candidate, 0.0).where(above.kept | ~candidate, torch.nan)
    always = at.sink_end - at.start + at.end - at.window_start
    left = (keep_count(share, at.end - at.start) - always).clamp(min=0)
    return _pick(settings, scores, queries, cache, left)


def cascade_record(
    settings: CascadeSettings,
    stack: StackState,
    layer: int,
    queries: Queries,
    cache: KVCache,
    selection: Selection | None,
    sums: Tensor,
) -> None:
    """Hand on what tokens got from the layer's queries.

    Parameters
    ----------
    selection : Selection or None
        What the layer attended to.
    sums : Tensor, [batch, num_blocks, max_seqlen], float32
        `column_sums` of its weights.
    """
    if settings.cascade == "hard":
        place = torch.arange(queries.max_seqlen, device=cache.device)
        end = queries.cache_seqlens[:, None]
        first = end - queries.seqlen_q
        if cache.starts is not None:
            first = first.maximum(cache.starts[:, None])
        seen = (end - place.maximum(first)).clamp(min=0)
        _hard(settings, stack, cache).add(sums.sum(1), seen, cache)
        return
    above = stack.carried("cascade", layer, queries, lambda: None)
    scores = sums + above.scores.to(sums.device) if isinstance(above, _Left) else sums
    kept = torch.ones_like(sums, dtype=torch.bool)
    if selection is not None:
        lists = selection.with_blocks()[0][:, :, 0].long()
        n = sums.shape[2]
        room = kept.new_zeros((*kept.shape[:2], n + 1))  # pads mark a place of their own
        kept = room.scatter(2, lists.where(lists >= 0, n), True)[..., :n]
    stack.carry("cascade", layer, queries, _Left(scores, kept))


def _hard(settings: CascadeSettings, stack: StackState, cache: KVCache) -> HardCascade:
    sizes = cache.batch, stack.num_layers, settings.decay, cache.device
    return stack.rows("cascade", lambda: HardCascade(*sizes))


def _range(settings: CascadeSettings, queries: Queries, cache: KVCache) -> BlockRange:
    return block_range(
        queries.cache_seqlens,
        cache.starts,
        queries.q_block_offsets,
        queries.seqlen_q,
        "decode" if queries.phase == "decode" else "block_start",
        settings.num_sink_tokens,
        settings.num_recent_tokens,
    )


def _pick(
    settings: CascadeSettings,
    scores: Tensor,
    queries: Queries,
    cache: KVCache,
    left: Tensor | None,
) -> Lists:
    """Sinks, window, and candidates whose score is not NaN: the ``left`` best; None: all."""
    votes = scores[:, :, None].float().contiguous()
    lists = select_blocks(
        votes,
        cache_seqlens=queries.cache_seqlens,
        starts=cache.starts,
        q_block_offsets=queries.q_block_offsets,
        seqlen_q=queries.seqlen_q,
        window_rule="decode" if queries.phase == "decode" else "block_start",
        num_sink_tokens=settings.num_sink_tokens,
        num_recent_tokens=settings.num_recent_tokens,
        keep=queries.max_seqlen,
        width=list_width(queries.max_seqlen),
    )
    if left is None:
        return lists
    return trim_to_count(lists, votes, _range(settings, queries, cache), left)
