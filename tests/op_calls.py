"""The ops by keyword, on a cache in any layout, beside what the reference needs for the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect.reference import PlainCache, QueryBlocks, SweepState, kv_append
from kvselect.testing import StoredKV, store

NONE = "none"  # sketch_format of a call without a sketch

# For tests of what is checked before any kernel runs.
ONE_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["scalar"], indirect=True)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Case:
    """One cache: `stored` for the ops, `plain` for the reference."""

    plain: PlainCache
    stored: StoredKV

    def cache_arguments(self) -> dict[str, Any]:
        return {
            "k_cache": self.stored.k_cache,
            "block_table": self.stored.block_table,
            "cache_seqlens": self.plain.cache_seqlens,
            "starts": self.plain.starts,
        }


def make_case(
    k: Tensor,
    v: Tensor,
    seqlens: Tensor,
    *,
    starts: Tensor | None = None,
    layout: str = "head_major",
    sketch: str | None = None,
) -> Case:
    """A cache of the first `seqlens` tokens of k, v [batch, seqlen, num_kv_heads, head_dim]."""
    empty = PlainCache(
        k=k[:, :0], v=v[:, :0], cache_seqlens=torch.zeros_like(seqlens), sketch_format=sketch
    )
    plain = kv_append(empty, k, v, seqlens)
    plain.starts = starts
    return Case(plain, store(k, v, seqlens, layout=layout, starts=starts))


def score(
    case: Case,
    q: Tensor,
    blocks: QueryBlocks,
    *,
    sketch: bool = False,
    max_seqlen_k: int | None = None,
    rope: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "q": q,
        "q_local": None,
        **case.cache_arguments(),
        "sketch": case.plain.sketch_data if sketch else None,
        "sketch_format": case.plain.sketch_format if sketch else NONE,
        **window_arguments(blocks),
        "keep": 0,
        "scale": q.shape[-1] ** -0.5,
        "normalise_candidates_only": False,
        "max_vote": False,
        **rope_arguments(rope),
        "hit": None,
        "max_seqlen_k": case.plain.k.shape[1] if max_seqlen_k is None else max_seqlen_k,
    }
    return torch.ops.kvselect.score_tokens(**(arguments | options))


def select(
    scores: Tensor,
    blocks: QueryBlocks,
    *,
    keep: int,
    pool_width: int = 1,
    width: int = 64,
    hit: Tensor | None = None,
    indices: Tensor | None = None,
    topk_length: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs start as rubbish, so that whatever the op leaves out is seen."""
    lists = tuple(scores.shape[:3])
    indices = torch.full((*lists, width), 12345, dtype=torch.int32) if indices is None else indices
    if topk_length is None:
        topk_length = torch.full(lists, 777, dtype=torch.int32)
    kept_score = torch.full(lists, -5.0)
    arguments: dict[str, Any] = {
        "scores": scores,
        "cache_seqlens": blocks.cache_seqlens,
        "starts": blocks.starts,
        **window_arguments(blocks),
        "keep": keep,
        "pool_width": pool_width,
        "hit": hit,
        "indices": indices,
        "topk_length": topk_length,
        "kept_score": kept_score,
    }
    torch.ops.kvselect.select_tokens(**(arguments | options))
    return indices, topk_length, kept_score


def attend(
    case: Case,
    q: Tensor,
    indices: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    q_block_offsets: Tensor | None = None,
    rope: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "q": q,
        **case.cache_arguments(),
        "v_cache": case.stored.v_cache,
        "indices": indices,
        "topk_length": topk_length,
        "q_block_offsets": q_block_offsets,
        "softmax_scale": q.shape[-1] ** -0.5,
        **rope_arguments(rope),
    }
    return torch.ops.kvselect.sparse_attention(**(arguments | options))


def mass(
    case: Case,
    q: Tensor,
    indices: Tensor,
    topk_length: Tensor,
    *,
    q_block_offsets: Tensor | None = None,
    **options: Any,
) -> Tensor:
    arguments: dict[str, Any] = {
        "q": q,
        **case.cache_arguments(),
        "indices": indices,
        "topk_length": topk_length,
        "q_block_offsets": q_block_offsets,
        "softmax_scale": q.shape[-1] ** -0.5,
        "max_seqlen_k": case.plain.k.shape[1],
    }
    return torch.ops.kvselect.recovered_mass(**(arguments | options))


def window_arguments(blocks: QueryBlocks) -> dict[str, Any]:
    return {
        "q_block_offsets": blocks.offsets,
        "seqlen_q": blocks.seqlen_q,
        "window_rule": blocks.window_rule,
        "num_sink_tokens": blocks.num_sink_tokens,
        "num_recent_tokens": blocks.num_recent_tokens,
    }


def rope_arguments(rope: Any) -> dict[str, Any]:
    return {
        "cos": None if rope is None else rope.cos,
        "sin": None if rope is None else rope.sin,
        "rope_start": 0 if rope is None else rope.start,
        "rope_interleaved": False if rope is None else rope.interleaved,
    }


def sweep(
    case: Case,
    q: Tensor,
    blocks: QueryBlocks,
    state: SweepState,
    *,
    keep: int,
    sketch: bool = False,
    width: int = 448,
    rope: Any = None,
    indices: Tensor | None = None,
    topk_length: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """indices, topk_length, kept_score, num_seen, num_nonfinite; the state is changed."""
    lists = tuple(state.next_segment.shape)
    indices = torch.full((*lists, width), 12345, dtype=torch.int32) if indices is None else indices
    if topk_length is None:
        topk_length = torch.full(lists, 777, dtype=torch.int32)
    kept_score = torch.full(lists, -5.0)
    arguments: dict[str, Any] = {
        "q": q,
        "q_local": None,
        **case.cache_arguments(),
        "sketch": case.plain.sketch_data if sketch else None,
        "sketch_format": case.plain.sketch_format if sketch else NONE,
        "num_sink_tokens": blocks.num_sink_tokens,
        "num_recent_tokens": blocks.num_recent_tokens,
        "keep": keep,
        "scale": q.shape[-1] ** -0.5,
        "normalise_candidates_only": False,
        **rope_arguments(rope),
        "hit": None,
        "scan_all": None,
        **state._asdict(),
        "indices": indices,
        "topk_length": topk_length,
        "kept_score": kept_score,
    }
    num_seen, num_nonfinite = torch.ops.kvselect.rolling_sweep(**(arguments | options))
    return indices, topk_length, kept_score, num_seen, num_nonfinite
