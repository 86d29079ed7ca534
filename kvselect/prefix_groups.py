"""A batch of groups: each has a prefix of its own, which is stored and read once for its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.arguments import (
    require_queries,
    require_sink_logits,
    require_softcap,
    require_softmax_scale,
)
from kvselect.attention import sparse_attention
from kvselect.cache import KVCache
from kvselect.checks import require, require_type
from kvselect.selection import Selection
from kvselect.shared_prefix import SharedPrefix, attend_prefix, join_parts, num_prefix_passes

__all__ = ["PrefixGroups", "PrefixReads"]


class PrefixReads(NamedTuple):
    """Tokens of prefixes per KV head that a call reads: as groups, and as separate rows would."""

    shared: int
    separate: int


class PrefixGroups:
    """Which shared prefix each row of a batch begins with.

    Parameters
    ----------
    prefixes : sequence of KVCache, one row each
        Alike in KV heads, head_dim, dtype and device.
    rows : sequence of int, [batch]
        Index into ``prefixes`` of every row; -1: it shares nothing.

    Raises
    ------
    ValueError, TypeError
        If a prefix is nobody's, padded, or unlike the others.

    Notes
    -----
    Source: BatchLLM, arXiv:2412.03594; `plan_prefixes` finds the groups.
    """

    def __init__(self, prefixes: Sequence[KVCache], rows: Sequence[int]) -> None:
        rows = list(rows)
        kinds = set()
        for number, cache in enumerate(prefixes):
            require_type(cache, KVCache, f"prefixes[{number}]", "a kvselect.KVCache")
            kinds.add((cache.num_kv_heads, cache.head_dim, cache.dtype, cache.device))
        allowed = "one (num_kv_heads, head_dim, dtype, device)"
        require(len(kinds) <= 1, "prefixes", sorted(map(str, kinds)), allowed)
        for row, prefix in enumerate(rows):
            allowed = f"-1..{len(prefixes) - 1}"
            require(-1 <= prefix < len(prefixes), f"rows[{row}]", prefix, allowed)
        idle = [number for number in range(len(prefixes)) if number not in rows]
        require(not idle, "rows", f"none with prefix {idle}", "a row or more for every prefix")
        self._prefixes = [SharedPrefix(cache, rows.count(n)) for n, cache in enumerate(prefixes)]
        self._num_tokens = max((cache.max_seqlen for cache in prefixes), default=0)
        self._rows = rows
        self._index: list[Tensor] | None = None

    @property
    def batch(self) -> int:
        return len(self._rows)

    @property
    def num_prefixes(self) -> int:
        """Those that have members still."""
        return len(self._prefixes)

    @property
    def num_tokens(self) -> int:
        """Of the longest prefix, whether or not it has members still."""
        return self._num_tokens

    @property
    def row_tokens(self) -> list[int]:
        """Length of each row's prefix, [batch]."""
        return [self._prefixes[n].num_tokens if n >= 0 else 0 for n in self._rows]

    def rows_of(self, number: int) -> list[int]:
        """Rows of the prefix of this number, ascending."""
        return [row for row, n in enumerate(self._rows) if n == number]

    @property
    def nbytes(self) -> int:
        """Bytes held, with room not yet used."""
        return sum(prefix.cache.nbytes for prefix in self._prefixes)

    @property
    def separate_nbytes(self) -> int:
        """What the rows would hold with a prefix each."""
        return sum(prefix.num_members * prefix.cache.nbytes for prefix in self._prefixes)

    def take_rows(self, index: Sequence[int]) -> None:
        """Rows become ``rows[index]``; a prefix whose last row is gone is freed.

        Raises
        ------
        ValueError
            If an entry is no row.
        """
        for row in index:
            require(0 <= row < self.batch, "index", row, f"rows 0..{self.batch - 1}")
        rows = [self._rows[row] for row in index]
        kept = [n for n in range(len(self._prefixes)) if n in rows]
        for number, prefix in enumerate(self._prefixes):
            change = rows.count(number) - prefix.num_members
            if change > 0:
                prefix.join(change)
            elif change < 0:
                prefix.leave(-change)
        place = {-1: -1} | {n: i for i, n in enumerate(kept)}
        self._prefixes = [self._prefixes[n] for n in kept]
        self._rows = [place[n] for n in rows]
        self._index = None

    def prefixes(self) -> list[tuple[SharedPrefix, Tensor]]:
        """Every prefix and its rows, int64."""
        if self._index is None:
            self._index = []
            for number, prefix in enumerate(self._prefixes):
                rows = self.rows_of(number)
                with torch.inference_mode(False):  # kept: it must serve calls of any grad mode
                    self._index.append(torch.tensor(rows, device=prefix.cache.device))
        return list(zip(self._prefixes, self._index))

    def attend(
        self,
        q: Tensor,
        private: KVCache,
        selections: Sequence[Selection | None] | None = None,
        *,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`SharedPrefix.attend` of every group; rows without a prefix attend to their own tokens.

        Parameters
        ----------
        q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
        private : KVCache, ``batch`` rows
            What follows the prefixes, the queries' own tokens among it.
        selections : sequence of Selection (one row) or None, [num_prefixes], or None
            Of each prefix; None: all of it.
        softmax_scale, softcap, sink_logits
            As in `sparse_attention`.

        Returns
        -------
        out : Tensor, [batch, seqlen_q, num_q_heads, head_dim], dtype of ``q``; 0 where a query
        sees nothing
        lse : Tensor, [batch, seqlen_q, num_q_heads], float32, natural log; -inf there

        Raises
        ------
        ValueError, TypeError
            If shapes, dtypes or devices do not agree.
        """
        require_queries(q, private)
        require(private.batch == self.batch, "private.batch", private.batch, f"{self.batch} (rows)")
        scale = require_softmax_scale(softmax_scale, private.head_dim)
        require_softcap(softcap)
        require_sink_logits(sink_logits, q.shape[2], private)
        given = [None] * self.num_prefixes if selections is None else list(selections)
        allowed = f"{self.num_prefixes} entries, one per prefix"
        require(len(given) == self.num_prefixes, "selections", len(given), allowed)
        groups = self.prefixes()
        for prefix, _ in groups:
            cache = prefix.cache
            shape = (cache.num_kv_heads, cache.head_dim, cache.dtype, cache.device)
            got = (private.num_kv_heads, private.head_dim, private.dtype, private.device)
            require(
                got == shape, "private (num_kv_heads, head_dim, dtype, device)", got, str(shape)
            )
        options = {"softmax_scale": scale, "softcap": softcap, "sink_logits": sink_logits}
        own = sparse_attention(q, private, **options)  # type: ignore[arg-type]
        if not groups:
            return own
        if len(groups) == 1 and groups[0][0].num_members == self.batch:
            shared = attend_prefix(q, groups[0][0].cache, given[0], scale, softcap)
            return join_parts(q, private, shared, own)
        out, lse = torch.zeros_like(q), torch.full_like(own[1], -torch.inf)
        for (prefix, rows), selection in zip(groups, given):
            part = attend_prefix(q[rows], prefix.cache, selection, scale, softcap)
            out[rows], lse[rows] = part
        return join_parts(q, private, (out, lse), own)

    def reads(self, seqlen_q: int, group_size: int) -> PrefixReads:
        """Of a call of ``seqlen_q`` queries, ``group_size`` query heads per KV head, without lists.

        Separate rows read their prefix once per 128 queries.
        """
        shared = separate = 0
        for prefix in self._prefixes:
            rows = prefix.num_members * seqlen_q * group_size
            by_token = prefix.cache.device.type != "cpu"
            shared += num_prefix_passes(rows, by_token) * prefix.num_tokens
            separate += prefix.num_members * -(-seqlen_q // 128) * prefix.num_tokens
        return PrefixReads(shared, separate)
