"""EngineSelectionCache: a selection cache of rows that a serving engine brings in any order.

Nobody says which request a row is. But the page that holds a row's newest token is no other
request's, so that a step finds a row's list by the page of the token before its own, and trusts it
only if the engine's last step left it there: since then that page can have changed hands, but not
filled up to the same length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.selection import Lists
from kvselect.selection_cache import ReuseStep, SelectionCache, Similarity

__all__ = ["EngineSelectionCache"]


class EngineSelectionCache(SelectionCache):
    """A SelectionCache of an `EngineKVCache`: `serve` says whose rows the next lookup asks for.

    Rows without a list of the step before select: new and preempted requests, those that a step
    left out, those that were dense. A row that two requests share up to its newest token may find
    the list of either: they are lists of the same tokens.

    Notes
    -----
    As long as the same rows come in the same order everything stays where it is; otherwise lists
    and anchors are copied once. Nothing is kept of rows that a selecting step did not bring.
    """

    def __init__(self, similarity_threshold: float, max_age: int, similarity: Similarity) -> None:
        super().__init__(similarity_threshold, max_age, similarity)
        self._row_of: dict[int, int] = {}  # by page of the newest token, after step `_stored`
        self._stored = -1
        self._step = 0
        self._before: Sequence[int] = ()
        self._after: Sequence[int] = ()

    def serve(self, step: int, before: Sequence[int], after: Sequence[int]) -> None:
        """The rows of the lookup that follows.

        Parameters
        ----------
        step : int
            The engine's step; it counts up by one, whoever is served.
        before, after : sequence of int, [batch]
            Pages of each row's last token but one, and of its last.
        """
        allowed = f"as many pages as before, {len(before)}"
        require(len(before) == len(after), "after", len(after), allowed)
        self._step, self._before, self._after = step, before, after

    def lookup(
        self,
        q: Tensor,
        cache: KVCache,
        *,
        num_lists: int,
        width: int,
        room: int,
        dense_limit: int,
        reuse_counts: Tensor,
    ) -> ReuseStep:
        """As SelectionCache; rows that have no list miss where any row has one.

        ``cache.num_nonfinite`` counts the defects of the newest tokens alone.
        """
        rows = self._rows_before()
        allowed = f"{len(rows)} rows, as served"
        require(q.shape[0] == len(rows), "q", f"{q.shape[0]} rows", allowed)
        self._row_of = {}
        usable = any(row >= 0 for row in rows)
        if usable:
            self._bring(rows, width, room)
        else:
            self.lists = None
            self._allocate(q.shape[0], q.shape[2], q.shape[3], num_lists, q.device)
        self.known_nonfinite.zero_()
        return self._reuse_step(q, cache, dense_limit, reuse_counts, usable)

    def store(self, lists: Lists, cache: KVCache) -> None:
        """As SelectionCache."""
        self.lists = lists
        self._row_of = {page: row for row, page in enumerate(self._after)}
        self._stored = self._step

    def clear(self) -> None:
        """Forget everything: the next step misses."""
        super().clear()
        self._row_of = {}

    def _rows_before(self) -> list[int]:
        """Where the last step left the lists of the rows that are served; -1: nowhere."""
        known = self._row_of if self._stored == self._step - 1 and self.lists is not None else {}
        return [known.get(page, -1) for page in self._before]

    def _bring(self, rows: list[int], width: int, room: int) -> None:
        """Put these rows first, in this order, with room for ``width`` entries."""
        assert self.lists is not None and self.anchor_query is not None
        indices = self.lists.indices
        in_place = rows == list(range(indices.shape[0]))
        if in_place and indices.shape[-1] >= width:
            return
        index = torch.tensor(rows, dtype=torch.int64, device=indices.device)
        taken = index.clamp(min=0)
        fresh = [part[taken] for part in self.lists]
        if room > indices.shape[-1]:
            fresh[0] = torch.nn.functional.pad(fresh[0], (0, room - indices.shape[-1]), value=-1)
        self.lists = Lists(*fresh)
        self.anchor_query, self.age = self.anchor_query[taken], self.age[taken]
        self.known_nonfinite = self.known_nonfinite[taken]
        self.expected_seqlens = self.expected_seqlens[taken].masked_fill_(index < 0, -1)
