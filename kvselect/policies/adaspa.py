"""AdaSpa: keep the KV blocks that exactly hold the most attention, head by head (2502.21079)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvselect.attention import attend_queries, with_sinks
from kvselect.block_masks import (
    BlockMask,
    apportioned_blocks,
    head_recall,
    head_recall_split,
    largest_blocks,
    needed_shares,
)
from kvselect.block_sparse import BLOCK_SIZES, block_mass, block_sparse_attention
from kvselect.cache import KVCache
from kvselect.checks import require, require_choice, require_float, require_int, require_type
from kvselect.policies.base import Policy, PolicyState, register_policy, visible_tokens
from kvselect.queries import Phase, Queries
from kvselect.rope import Rope
from kvselect.selection import Selection

__all__ = ["AdaSpa"]


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class AdaSpa(Policy):
    """Block-sparse prefill by exact block mass; decode steps are dense.

    ``W[h, P, Q] = sum over sampled t in P, j in Q of exp(s[h, t, j] - lse[h, t])``; every block
    ``P`` of queries keeps its ``1 - sparsity`` largest of the blocks ``Q`` that it sees, sinks and
    the blocks of its own and recent tokens among them. Heads share out their blocks: those that
    recall more than ``recall_threshold`` of their mass give to as many that recall least
    (`head_recall_split`), or each has in proportion to what it needs for that recall
    (`apportioned_blocks`).

    Attention that repeats over like inputs without a causal mask: `RepeatedAttention`.

    Parameters
    ----------
    sparsity : float in [1/3, 1)
        Share of the visible blocks that is left out, mean over the heads.
    block_size : int
        [tokens] of queries and of keys; 16, 32, 64 or 128.
    recall_threshold : float in [0, 1] or None
        None: every head has the same sparsity.
    head_split : "two_level" or "proportional"
        How heads share out their blocks; "proportional" wants a ``recall_threshold`` in (0, 1).
    row_stride : int
        Every so many queries of a block are searched, the last one among them; 1: all.
    num_sink_tokens, num_recent_tokens : int
        Tokens at either end whose blocks are kept; the recent ones count from the block's first
        query.
    dense_prefill_tokens : int
        Queries that see at most so many tokens are dense.
    chunk_size : int
        Queries that are searched at once; heads are compared within a chunk.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: Xia et al., arXiv:2502.21079: 1.78 times dense on HunyuanVideo at PSNR 29.07, sparsity
    0.8 (A100). The ops' CUDA kernels have not run. Of a paged cache keys and values are gathered
    per call.
    """

    phases: ClassVar[frozenset[str]] = frozenset({"prefill"})
    revocable: ClassVar[bool] = True
    query_aware: ClassVar[bool] = True
    persistent: ClassVar[bool] = False

    sparsity: float = 0.8
    block_size: int = 64
    recall_threshold: float | None = 0.8
    head_split: Literal["two_level", "proportional"] = "two_level"
    row_stride: int = 16
    num_sink_tokens: int = 64
    num_recent_tokens: int = 64
    dense_prefill_tokens: int = 1024
    chunk_size: int = 2048

    def __post_init__(self) -> None:
        sparsity = require_float(self.sparsity, "sparsity", "a float in [1/3, 1)")
        require(1 / 3 <= sparsity < 1.0, "sparsity", sparsity, "a float in [1/3, 1)")
        allowed = ", ".join(map(str, BLOCK_SIZES))
        require_type(self.block_size, int, "block_size", allowed)
        require(self.block_size in BLOCK_SIZES, "block_size", self.block_size, allowed)
        if self.recall_threshold is not None:
            allowed = "None or a float in [0, 1]"
            threshold = require_float(self.recall_threshold, "recall_threshold", allowed)
            require(0.0 <= threshold <= 1.0, "recall_threshold", threshold, allowed)
        require_choice(self.head_split, "head_split", ("two_level", "proportional"))
        if self.head_split == "proportional":
            allowed = "a float in (0, 1) with head_split='proportional' (needs are for this recall)"
            bounded = self.recall_threshold not in (None, 0.0, 1.0)
            require(bounded, "recall_threshold", self.recall_threshold, allowed)
        require_int(self.row_stride, "row_stride", 1)
        require_int(self.num_sink_tokens, "num_sink_tokens", 0)
        require_int(self.num_recent_tokens, "num_recent_tokens", 0)
        require_int(self.dense_prefill_tokens, "dense_prefill_tokens", 0)
        require_int(self.chunk_size, "chunk_size", 1)

    @property
    def q_block_size(self) -> int:
        return self.block_size

    @property
    def needs_all_heads(self) -> str | None:
        if self.recall_threshold is None:
            return None
        return "recall_threshold compares all heads; None does not"

    @property
    def reads_unlisted(self) -> str:
        return "its decode steps are dense"

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        return phase == "decode" or end <= self.dense_prefill_tokens

    def search(self, mass: Tensor, num_visible: Tensor, mandatory: Tensor) -> BlockMask:
        """The mask that ``mass`` asks for; arguments as in `largest_blocks`."""
        if self.recall_threshold is not None and self.head_split == "proportional":
            need = needed_shares(mass, num_visible, mandatory, self.recall_threshold)
            kept = apportioned_blocks(mass, need, self.sparsity, num_visible, mandatory)
            return BlockMask.pack(kept, head_recall(mass, kept))
        sparsity = torch.full(mass.shape[:2], self.sparsity, device=mass.device)
        kept = largest_blocks(mass, sparsity, num_visible, mandatory)
        recall = head_recall(mass, kept)
        if self.recall_threshold is not None:
            sparsity = head_recall_split(recall, self.sparsity, self.recall_threshold)
            kept = largest_blocks(mass, sparsity, num_visible, mandatory)
            recall = head_recall(mass, kept)
        return BlockMask.pack(kept, recall)

    def select(
        self, state: PolicyState, queries: Queries, cache: KVCache
    ) -> Selection | BlockMask | None:
        """The blocks that each block of queries keeps; None: every visible token."""
        visible = visible_tokens(queries, cache)
        end = max(cache.num_real_tokens, default=0) - queries.num_later_tokens
        if self.is_dense(queries.phase, 0, end, None):
            state.statistics(queries.phase).record_dense(visible)
            return None
        q = queries.q
        k, _, seqlens = _without_padding(queries, cache)
        mass = block_mass(
            q, k, cache_seqlens=seqlens, row_stride=self.row_stride, **self._options(queries)
        )
        begins = torch.arange(0, q.shape[1], self.block_size, device=q.device)
        first = (seqlens - q.shape[1])[:, None] + begins
        last = (seqlens - q.shape[1])[:, None] + (begins + self.block_size).clamp(max=q.shape[1])
        num_visible = (last - 1).div(self.block_size, rounding_mode="floor") + 1
        num_visible = num_visible.clamp(min=0)
        window = (first - self.num_recent_tokens).div(self.block_size, rounding_mode="floor")
        place = torch.arange(mass.shape[3], device=q.device)
        kept = (place >= window[..., None]) | (place * self.block_size < self.num_sink_tokens)
        mask = self.search(mass, num_visible, kept & (place < num_visible[..., None]))
        self._count(state, queries, cache, mask, num_visible, visible)
        return mask

    def _count(
        self,
        state: PolicyState,
        queries: Queries,
        cache: KVCache,
        mask: BlockMask,
        num_visible: Tensor,
        visible: int,
    ) -> None:
        """Tokens attended as if each KV head read the mean of its query heads' blocks."""
        blocks = num_visible.sum() * queries.q.shape[2]
        share = float(mask.unpack().sum() / blocks.clamp(min=1))
        state.statistics(queries.phase).add(
            num_calls=1,
            num_dense_calls=0,
            tokens_visible=visible,
            tokens_attended=round(share * visible),
            tokens_scanned=visible,
            mass_sum=float(mask.recall.sum()),
            mass_count=mask.recall.numel(),
            num_nonfinite=0,
        )

    def attend(
        self, queries: Queries, cache: KVCache, selection: Selection | BlockMask | None
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(selection, BlockMask):
            return attend_queries(queries, cache, selection, None)
        queries.kernels.append("block_sparse_attention")
        k, v, seqlens = _without_padding(queries, cache)
        out, lse = block_sparse_attention(
            queries.q, k, v, selection.unpack(), cache_seqlens=seqlens, **self._options(queries)
        )
        if queries.sink_logits is not None:
            return with_sinks(out, lse, queries.sink_logits)
        return out, lse

    def _options(self, queries: Queries) -> dict[str, Any]:
        return {
            "q_block_size": self.block_size,
            "kv_block_size": self.block_size,
            "softmax_scale": queries.softmax_scale,
            "softcap": queries.softcap or None,
        }


def _without_padding(queries: Queries, cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and their number per row, the first real token of each row first.

    A copy where rows are padded: the ops take none.
    """
    k, v, seqlens = cache.k, cache.v, queries.cache_seqlens
    if cache.starts is None:
        return k, v, seqlens
    place = cache.starts[:, None] + torch.arange(k.shape[1], device=k.device)
    place = place.clamp(max=max(k.shape[1] - 1, 0))[:, :, None, None].expand_as(k)
    return k.gather(1, place), v.gather(1, place), (seqlens - cache.starts).clamp(min=0)
