"""Ideal Quest (arXiv:2406.10774): whole pages picked by an upper bound of their logits.

Per page of 16 tokens and KV head the elementwise minimum and maximum of the keys are kept as one
contiguous table, and a step is ``bounds -> top pages -> attention``. The peer is not handicapped:
bounds of a whole group are one matrix product (`bounds` writes them as one), pages are shared by
the group, and attention is kvselect's own. Bounds can be scored by torch or by kvselect's own scan,
which takes the table for keys of twice the head_dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvselect.attention import sparse_attention
from kvselect.cache import KVCache
from kvselect.checks import HEAD_DIMS, require
from kvselect.score import score_tokens
from kvselect.selection import LIST_ALIGNMENT, Selection, select_tokens

__all__ = ["PAGE_TOKENS", "Quest", "Scorer", "page_bounds", "signed_parts"]

PAGE_TOKENS = 16
MIN_PAGES = 3

Scorer = Literal["kvselect", "torch"]


def page_bounds(k: Tensor) -> Tensor:
    """Largest and smallest key of whole pages, channel by channel.

    Parameters
    ----------
    k : Tensor, [num_kv_heads, num_pages * 16, head_dim]

    Returns
    -------
    Tensor, [num_kv_heads, num_pages, 2 * head_dim], contiguous: maxima, then minima
    """
    low, high = torch.unflatten(k, 1, (-1, PAGE_TOKENS)).aminmax(dim=2)
    return torch.cat([high, low], dim=-1)


def signed_parts(q: Tensor) -> Tensor:
    """``[max(q, 0), min(q, 0)]`` along the last dim: its product with `page_bounds` is
    ``sum_d max(q_d * low_d, q_d * high_d)``, at least every logit of the page."""
    return torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)


class Quest:
    """The method over one full cache; the cache must not change afterwards.

    The ``num_pages - 1`` best pages are picked per KV head, ordered by the softmax over pages of
    their bounds summed over the group; the last page, whole or not, is always kept.

    Parameters
    ----------
    cache : KVCache
        Contiguous, batch 1.
    scorer : "kvselect" or "torch"
        "kvselect" needs a head_dim whose double kvselect runs.
    """

    def __init__(self, cache: KVCache, scorer: Scorer) -> None:
        num_tokens, heads, dim = cache.max_seqlen, cache.num_kv_heads, cache.head_dim
        self._cache, self._scorer, self._heads = cache, scorer, heads
        self.num_pages = -(-num_tokens // PAGE_TOKENS)
        require(cache.batch == 1, "batch", cache.batch, "1 (Quest as it is re-created here)")
        require(self.num_pages >= MIN_PAGES, "tokens", num_tokens, "at least three pages of 16")
        self._first_of_last = (self.num_pages - 1) * PAGE_TOKENS
        whole = cache.k[0, : self._first_of_last].transpose(0, 1)
        self.bounds = page_bounds(whole)
        self._scale = dim**-0.5
        self._table: KVCache | None = None
        if scorer == "kvselect":
            allowed = " or ".join(str(d // 2) for d in HEAD_DIMS if d % 2 == 0)
            require(2 * dim in HEAD_DIMS, "head-dim", dim, f"{allowed} (bounds scored by kvselect)")
            capacity = self.num_pages - 1
            self._table = KVCache(
                1,
                heads,
                2 * dim,
                dtype=cache.dtype,
                device=cache.device,
                capacity=capacity,
                sketch=None,
            )
            rows = self.bounds.transpose(0, 1)[None]
            self._table.append(rows, torch.zeros_like(rows))

    @staticmethod
    def can_score_with_kvselect(head_dim: int) -> bool:
        return 2 * head_dim in HEAD_DIMS

    @property
    def metadata_bytes(self) -> int:
        """What one step reads before it attends."""
        return self.bounds.numel() * self.bounds.element_size()

    def select(self, q: Tensor, num_pages: int) -> Selection:
        """The best ``num_pages - 1`` pages and the last one.

        Parameters
        ----------
        q : Tensor, [1, 1, num_q_heads, head_dim]
        num_pages : int, at least 3, at most `num_pages`
        """
        picked = self._pick(signed_parts(q), num_pages - 1)
        width = num_pages * PAGE_TOKENS
        aligned = -(-width // LIST_ALIGNMENT) * LIST_ALIGNMENT
        indices = picked.new_full((1, self._heads, aligned), -1)
        within = torch.arange(PAGE_TOKENS, dtype=torch.int32, device=picked.device)
        indices[0, :, : width - PAGE_TOKENS] = (picked[..., None] * PAGE_TOKENS + within).flatten(1)
        tail = self._cache.max_seqlen - self._first_of_last
        begin = width - PAGE_TOKENS
        indices[0, :, begin : begin + tail] = self._first_of_last + within[:tail]
        length = picked.new_full((1, self._heads), begin + tail)
        return Selection(indices, length)

    def step(self, q: Tensor, num_pages: int) -> Tensor:
        """One decode step, selection included: [1, 1, num_q_heads, head_dim]."""
        return sparse_attention(q, self._cache, self.select(q, num_pages))[0]

    def scores(self, parts: Tensor) -> Tensor:
        """Votes for whole pages, [num_kv_heads, num_pages - 1] float32, by torch."""
        folded = parts.view(self._heads, -1, parts.shape[-1])
        logits = (folded @ self.bounds.transpose(1, 2)).float() * self._scale
        return torch.softmax(logits, -1).sum(1)

    def _pick(self, parts: Tensor, count: int) -> Tensor:
        """Pages per KV head, ascending, [num_kv_heads, count] int32."""
        if self._table is None:
            best = self.scores(parts).topk(count, -1, sorted=False).indices
            return best.sort(-1).values.int()
        votes = score_tokens(parts, self._table, softmax_scale=self._scale)
        picked = select_tokens(votes, self._table.cache_seqlens, topk=count)
        return picked.indices[0, :, :count]
