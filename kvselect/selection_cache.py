"""SelectionCache: the last selection, reused while queries stay similar. Never blind.

A list may be reused when its anchor query (of the last refresh, not of the last step) is similar
enough, it is younger than ``max_age`` steps, and exactly one token was appended since. On reuse the
newest token joins the list, whose window keeps starting where it started: nothing that leaves the
window is lost.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.fixed_cache import FixedKVCache
from kvselect.selection import Lists

__all__ = ["CapturedSelectionCache", "ReuseStep", "SelectionCache", "Similarity"]

Similarity = Literal["min", "q10", "flat"]


class ReuseStep(NamedTuple):
    """What decides which lists a decode step reuses, and what the decision changes in place.

    `score_blocks` decides on its way; a step that scans nothing asks `decide`.
    """

    q: Tensor  # [batch, 1, num_q_heads, head_dim], what is compared
    num_nonfinite: Tensor  # [batch, num_kv_heads], of the cache
    similarity: Similarity
    similarity_threshold: float
    max_age: int
    dense_limit: int
    anchor_query: Tensor
    age: Tensor
    expected_seqlens: Tensor
    known_nonfinite: Tensor
    reuse_counts: Tensor
    is_filled: bool  # whether anything is stored that could be reused

    def decide(self, cache: KVCache) -> Tensor:
        """Which lists are reused, [batch, num_lists], int32, 1 = hit; on the CPU."""
        hit: Tensor = torch.ops.kvselect.selection_cache_step.default(
            self.q, cache.cache_seqlens, cache.starts, *self[1:-1]
        )
        return hit


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
    Every list is decided by itself; a vector of zeros and one that is not finite miss.
    The host only knows of changes that it made itself: another cache version or batch, or more than
    one token at once, make every list miss. Source: TokenSelect, arXiv:2411.02886, section on the
    selection cache; window and forced misses are ours. Cost of a step whose lists all hit: that of
    attention over them; nothing grows with the length of the context (docs/kernels).
    """

    def __init__(self, similarity_threshold: float, max_age: int, similarity: Similarity) -> None:
        self.similarity_threshold = similarity_threshold
        self.max_age = max_age
        self.similarity: Similarity = similarity
        self.lists: Lists | None = None  # one block; extended in place by hits
        self.anchor_query: Tensor | None = None  # [batch, num_q_heads, head_dim] float32
        self.age: Tensor  # [batch, num_lists] int32, steps since the refresh
        self.expected_seqlens: Tensor  # [batch] int32; -1: the row's lists are void
        self.known_nonfinite: Tensor  # [batch, num_lists] int64, defects met up to the last step
        self._version: tuple[int, int] | None = None

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
        """What decides which lists this step reuses; the others take its query as their anchor.

        Until `store` gives the lists that the step ended with, nothing is reusable.

        Parameters
        ----------
        q : Tensor, [batch, 1, num_q_heads, head_dim]
            What is compared, after the append of its token.
        cache : KVCache
        num_lists : int
            ``cache.num_kv_heads``, or 1 where all heads share a list.
        width : int
            Entries that lists must have room for.
        room : int
            Entries that new lists get.
        dense_limit : int
            Rows of at most so many real tokens attend to everything: the lists that they hold now
            are no selection, so they miss at the next step.
        reuse_counts : Tensor, [2], int64
            Grows by the lists reused and by the visible tokens of their KV heads.

        Returns
        -------
        ReuseStep
            To be decided once.
        """
        anchor = self.anchor_query
        usable = (
            anchor is not None
            and self.lists is not None
            and self._version == (cache.serial, cache.version)
            and cache.num_appended == 1
            and anchor.shape == (q.shape[0], q.shape[2], q.shape[3])
            and self.lists.indices.shape[-2:-1] == (num_lists,)
            and self.lists.indices.shape[-1] >= width
        )
        self._version = None
        if not usable:
            # Anew: sizes may differ. Tensors made under inference_mode are no reason: the op writes
            # to them, in and outside of it.
            self._allocate(q.shape[0], q.shape[2], q.shape[3], num_lists, q.device)
        return self._reuse_step(q, cache, dense_limit, reuse_counts, usable)

    def _reuse_step(
        self, q: Tensor, cache: KVCache, dense_limit: int, reuse_counts: Tensor, is_filled: bool
    ) -> ReuseStep:
        assert self.anchor_query is not None
        return ReuseStep(
            q,
            cache.num_nonfinite,
            self.similarity,
            self.similarity_threshold,
            self.max_age,
            dense_limit,
            self.anchor_query,
            self.age,
            self.expected_seqlens,
            self.known_nonfinite,
            reuse_counts,
            is_filled,
        )

    def store(self, lists: Lists, cache: KVCache) -> None:
        """Keep the lists of the step that `lookup` began; the next hit extends them in place."""
        self.lists = lists
        self._version = (cache.serial, cache.version)

    @property
    def nbytes(self) -> int:
        """Memory of lists and anchors; single numbers per list are not counted."""
        kept = [] if self.lists is None else [self.lists.indices]
        return sum(part.nbytes for part in (self.anchor_query, *kept) if part is not None)

    def clear(self) -> None:
        """Forget everything: the next step misses."""
        self.lists = self.anchor_query = self._version = None

    def _allocate(
        self, batch: int, num_q_heads: int, head_dim: int, num_lists: int, device: torch.device
    ) -> None:
        """State in which every list misses."""
        self.anchor_query = torch.zeros((batch, num_q_heads, head_dim), device=device)
        self.age = torch.zeros((batch, num_lists), dtype=torch.int32, device=device)
        self.expected_seqlens = torch.full((batch,), -1, dtype=torch.int32, device=device)
        self.known_nonfinite = torch.zeros((batch, num_lists), dtype=torch.int64, device=device)


class CapturedSelectionCache(SelectionCache):
    """A SelectionCache of a `FixedKVCache`, for steps that are captured once and replayed.

    Every step does the same to tensors that stay where they are: the device alone knows whether
    there is anything to reuse. What a SelectionCache learns from the version of its cache, that
    cache tells this one: crops and the like make every list miss. Lists that are void count as
    misses, where a SelectionCache is not even asked.
    """

    _followed: FixedKVCache | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy follows the copy of the cache."""
        self.__dict__.update(state)
        if self._followed is not None:
            self._followed.followers.add(self)

    def prepare(self, cache: FixedKVCache, num_q_heads: int, num_lists: int, room: int) -> None:
        """Make the tensors, if there are none; a captured step must find them.

        Raises
        ------
        ValueError
            If there are none inside torch.compile.
        """
        if self.anchor_query is not None:
            return
        allowed = "an eager first step, or Policy.prepare_capture before"
        compiling = torch.compiler.is_compiling()
        require(not compiling, "selection cache", "a first step inside torch.compile", allowed)
        with torch.inference_mode(False):  # steps of any grad mode write to them
            batch, device = cache.batch, cache.device
            self._allocate(batch, num_q_heads, cache.head_dim, num_lists, device)
            self.lists = Lists(
                torch.full((batch, 1, num_lists, room), -1, dtype=torch.int32, device=device),
                torch.zeros((batch, 1, num_lists), dtype=torch.int32, device=device),
                torch.zeros((batch, 1, num_lists), device=device),
            )
        self._followed = cache
        cache.followers.add(self)

    def tensors(self) -> list[Tensor]:
        """Everything that steps write in place: for ``mark_static_address``."""
        if self.anchor_query is None or self.lists is None:
            return []
        kept = [self.lists.indices, self.lists.topk_length]
        return [self.anchor_query, self.age, self.expected_seqlens, self.known_nonfinite, *kept]

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
        """As SelectionCache, but always filled."""
        assert isinstance(cache, FixedKVCache)
        self.prepare(cache, q.shape[2], num_lists, room)
        return self._reuse_step(q, cache, dense_limit, reuse_counts, True)

    def store(self, lists: Lists, cache: KVCache) -> None:
        """As SelectionCache, in place."""
        assert self.lists is not None
        if lists.indices is not self.lists.indices:  # of rows that were dense
            self.lists.indices.copy_(lists.indices)
        self.lists.topk_length.copy_(lists.topk_length)

    def clear(self) -> None:
        """Make every list miss, in place."""
        if self.anchor_query is not None:
            self.expected_seqlens.fill_(-1)
