"""SelectionCache: the last selection, reused while queries stay similar. Never blind.

A list may be reused when its anchor query (of the last refresh, not of the last step) is similar
enough, it is younger than ``max_age`` steps, and exactly one token was appended since. On reuse the
newest token joins the list, whose window keeps starting where it started: nothing that leaves the
window is lost.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.selection import Lists

__all__ = ["SelectionCache", "Similarity"]

Similarity = Literal["min", "q10", "flat"]


class SelectionCache:
    """Selection and anchor of each list of one layer; row = request.

    Parameters
    ----------
    similarity_threshold : float in (0, 1]
        Least similarity of a hit.
    max_age : int
        Most steps in a row that a list is reused. [steps]
    similarity : "min", "q10" or "flat"
        Of the cosines of the query heads that share a list: the smallest, the 10 % quantile (lower
        value), or the cosine of all heads laid end to end (the published form, which one loud head
        can dominate).

    Notes
    -----
    `lookup` decides for every list by itself; a vector of zeros and one that is not finite miss.
    The host only knows of changes that it made itself: another cache version or batch, or more than
    one token at once, make every list miss. Source: TokenSelect, arXiv:2411.02886, section on the
    selection cache; window and forced misses are ours.
    """

    def __init__(self, similarity_threshold: float, max_age: int, similarity: Similarity) -> None:
        self.similarity_threshold = similarity_threshold
        self.max_age = max_age
        self.similarity: Similarity = similarity
        self.anchor_query: Tensor | None = None  # as `direction` gives it
        self.age: Tensor | None = None  # [batch, num_lists] int32, steps since the refresh
        self.expected_seqlens: Tensor | None = None  # [batch] int32; -1: the row's lists are void
        self.lists: Lists | None = None  # one block; extended in place by hits
        self._version: tuple[int, int] | None = None
        self.num_nonfinite: Tensor | None = None  # [batch, num_lists] int64, at the last step

    def direction(self, q: Tensor) -> Tensor:
        """Queries as `lookup` and `store` take them: unit vectors, whose products are cosines.

        Parameters
        ----------
        q : Tensor, [batch, num_lists, heads per list, head_dim], float32

        Returns
        -------
        Tensor of the shape of ``q`` ("flat": [batch, num_lists, 1, heads per list * head_dim])
            NaN for a vector of zeros and for one that is not finite, so that they miss.
        """
        if self.similarity == "flat":
            q = q.flatten(-2).unsqueeze(-2)
        return q * q.square().sum(-1, keepdim=True).rsqrt()

    def lookup(self, direction: Tensor, cache: KVCache) -> Tensor | None:
        """Which lists this step may reuse.

        Parameters
        ----------
        direction : Tensor
            Of the step's query, one token, after its append.
        cache : KVCache

        Returns
        -------
        Tensor, [batch, num_lists], int32, 1 = hit; or None: nothing is stored that could hit
        """
        if (
            self.anchor_query is None
            or self.expected_seqlens is None
            or self.age is None
            or self._version != (cache.serial, cache.version)
            or cache.num_appended != 1
            or self.anchor_query.shape != direction.shape
        ):
            return None
        cosines = (direction * self.anchor_query).sum(-1)
        if self.similarity == "q10":
            lowest = (cosines.shape[-1] - 1) // 10  # 10 % quantile, lower value
            similar = cosines.nan_to_num(nan=-1.0).kthvalue(lowest + 1, dim=-1).values
        else:
            similar = cosines.amin(-1)  # NaN, if one is
        hit = similar >= self.similarity_threshold
        hit &= self.age < self.max_age
        hit &= (self.expected_seqlens == cache.cache_seqlens)[:, None]
        hit &= self._nonfinite(cache, hit.shape[1]) == self.num_nonfinite
        return hit.int()

    def store(
        self,
        direction: Tensor,
        hit: Tensor | None,
        cache: KVCache,
        lists: Lists,
        void: Tensor | None = None,
    ) -> None:
        """Take the lists of a step: reused ones grow older, fresh ones get a new anchor.

        Parameters
        ----------
        direction, hit : Tensor
            As `lookup` took and gave them.
        lists : Lists
            Kept; the next hit extends them in place.
        void : Tensor, [batch], bool, or None
            Rows that must miss at the next step.
        """
        if hit is None or self.anchor_query is None or self.age is None:
            self.anchor_query = direction
            self.age = torch.zeros(direction.shape[:2], dtype=torch.int32, device=direction.device)
        else:
            reused = hit[..., None, None] != 0
            self.anchor_query = torch.where(reused, self.anchor_query, direction)
            self.age = (self.age + 1) * hit
        self.expected_seqlens = cache.cache_seqlens + 1
        if void is not None:
            self.expected_seqlens.masked_fill_(void, -1)
        self.lists = lists
        self._version = (cache.serial, cache.version)
        self.num_nonfinite = self._nonfinite(cache, direction.shape[1]).clone()

    @staticmethod
    def _nonfinite(cache: KVCache, num_lists: int) -> Tensor:
        """Defects that each list's heads met, [batch, num_lists]; a new one forces a miss."""
        counts = cache.num_nonfinite
        if num_lists == counts.shape[1]:
            return counts
        return counts.view(counts.shape[0], num_lists, -1).sum(-1)

    def clear(self) -> None:
        """Forget everything: the next step misses."""
        self.anchor_query = self.age = self.expected_seqlens = self.lists = self._version = None
        self.num_nonfinite = None
