"""Selection: the tokens that attention reads, as ascending lists; and how scores become one."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.checks import require, require_float, require_int, require_tensor

__all__ = ["Selection", "num_kept", "select_tokens"]

LIST_ALIGNMENT = 64  # entries; lists start on cache lines and vector kernels read whole ones


@dataclass(slots=True, eq=False)
class Selection:
    """Sinks, picked and recent tokens of each row, query block and KV head.

    Parameters
    ----------
    indices : Tensor, int32, [batch, num_kv_heads, width] or [batch, num_blocks, num_kv_heads,
    width]
        Token positions, ascending, -1 pads. The head axis has stride 0 where all heads share one
        list.
    topk_length : Tensor, int32, [batch, num_kv_heads] or [batch, num_blocks, num_kv_heads]
        Valid entries of each list.
    q_block_offsets : Tensor, [num_blocks + 1], int32, or None
        First query of each block; needed by the forms with ``num_blocks``.
    kept_score : Tensor, float32, shape of ``topk_length``, or None
        Sum of the scores of all listed tokens; NaN where a list was reused.
    total_score : float, Tensor that broadcasts to ``kept_score``, or None
        What all visible tokens of a list score together; None where scores are not shares of
        attention mass.
    hit : Tensor, int32, [batch, num_lists], or None
        Non-zero where the selection cache was reused.
    """

    indices: Tensor
    topk_length: Tensor
    q_block_offsets: Tensor | None = None
    kept_score: Tensor | None = None
    total_score: float | Tensor | None = None
    hit: Tensor | None = None

    @property
    def kept_mass(self) -> Tensor | None:
        """Mean over a list's query heads of the attention mass that it holds, in [0, 1].

        float32, shape of ``topk_length``; NaN where a list was reused, None where scores do not
        say. Measured with the scoring queries and, with a sketch, with its approximate logits:
        `recovered_mass` gives the exact figure.
        """
        if self.kept_score is None or self.total_score is None:
            return None
        return self.kept_score / self.total_score

    def with_blocks(self) -> tuple[Tensor, Tensor]:
        """``indices`` and ``topk_length`` with the ``num_blocks`` axis, as the ops take them."""
        if self.indices.dim() == 4:
            return self.indices, self.topk_length
        return self.indices.unsqueeze(1), self.topk_length.unsqueeze(1)


def num_kept(topk: int, overselect: float) -> int:
    """Tokens picked by score: ``ceil(overselect * topk)``."""
    return ceil(overselect * topk)


def list_width(num_tokens: int) -> int:
    """Entries of lists that must hold ``num_tokens``: up to a multiple of 64."""
    return max(-(-num_tokens // LIST_ALIGNMENT), 1) * LIST_ALIGNMENT


class Lists(NamedTuple):
    """Lists as the ops write them; `num_lists` is 1 where all heads share one."""

    indices: Tensor  # [batch, num_blocks, num_lists, width] int32
    topk_length: Tensor  # [batch, num_blocks, num_lists] int32
    kept_score: Tensor  # [batch, num_blocks, num_lists] float32


def select_blocks(
    scores: Tensor,
    *,
    cache_seqlens: Tensor,
    starts: Tensor | None,
    q_block_offsets: Tensor | None,
    seqlen_q: int,
    window_rule: str,
    num_sink_tokens: int,
    num_recent_tokens: int,
    keep: int,
    width: int,
    pool_width: int = 1,
    hit: Tensor | None = None,
    reused: Lists | None = None,
    ranking: Tensor | None = None,
) -> Lists:
    """Lists of all query blocks of a call; the op itself, with checked arguments.

    Parameters
    ----------
    scores : Tensor, [batch, num_blocks, num_lists, seqlen_k], float32
    width : int
        Entries per list; room for the longest.
    hit : Tensor, [batch, num_lists], int32, or None
        Non-zero: the row's newest token joins the list of ``reused``, in place.
    reused : Lists or None
        The lists of the last step, whose ``indices`` are written to; None: new ones.
    ranking : Tensor or None
        What `score_blocks` filled with these scores, blocks and ``keep``; used up. Needs
        ``pool_width=1``.
    """
    batch, num_blocks, num_lists, _ = scores.shape
    shape, device = (batch, num_blocks, num_lists), scores.device
    kept_score = torch.empty(shape, dtype=torch.float32, device=device)
    if reused is None:
        indices = torch.empty((*shape, width), dtype=torch.int32, device=device)
        topk_length = torch.empty(shape, dtype=torch.int32, device=device)
    else:  # the counts of the last step stay as they were: somebody may look at them later
        indices, topk_length = reused.indices, reused.topk_length.clone()
    torch.ops.kvselect.select_tokens.default(
        scores,
        cache_seqlens,
        starts,
        q_block_offsets,
        seqlen_q,
        window_rule,
        num_sink_tokens,
        num_recent_tokens,
        keep,
        pool_width,
        hit,
        indices,
        topk_length,
        kept_score,
        ranking,
    )
    return Lists(indices, topk_length, kept_score)


def select_tokens(
    scores: Tensor,
    cache_seqlens: Tensor,
    *,
    topk: int,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    overselect: float = 1.0,
    pool_width: int = 1,
    starts: Tensor | None = None,
) -> Selection:
    """Sinks, the best-scored candidates and recent tokens, one ascending list per row of scores.

    Candidates are ``[start + num_sink_tokens, cache_seqlens - num_recent_tokens)``; the
    ``ceil(overselect * topk)`` best are picked, ordered by (score descending, position ascending);
    all of them where there are fewer. With ``pool_width > 1`` a candidate ranks by the largest
    score within ``pool_width // 2`` candidates of it, then by its own. A token whose score is NaN
    or infinite is never listed.

    Parameters
    ----------
    scores : Tensor, [batch, num_kv_heads, seqlen_k], float32
        From `score_tokens`. One row for all heads, [batch, 1, seqlen_k], gives one list.
    cache_seqlens : Tensor, [batch], int32
        Tokens of each row, at most ``seqlen_k``.
    topk, num_sink_tokens, num_recent_tokens : int
        Tokens; ``topk`` may exceed the row.
    overselect : float >= 1
        Covers the ranking noise of a sketch; 1.5 for int4.
    pool_width : int, odd
        1: off.
    starts : Tensor, [batch], int32, or None
        First real token of each row.

    Returns
    -------
    Selection
        ``kept_score`` is set; ``kept_mass`` is not: these scores may be anything.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype or setting is not one of these.

    Notes
    -----
    Exact: no buffer truncates, ties are decided by position, and the same bits come out on every
    run.
    """
    require_tensor(scores, "scores", (None, None, None), (torch.float32,))
    batch, _, seqlen_k = scores.shape
    require_tensor(cache_seqlens, "cache_seqlens", (batch,), (torch.int32,), scores.device)
    if starts is not None:
        require_tensor(starts, "starts", (batch,), (torch.int32,), scores.device)
    require_int(topk, "topk", 1)
    require_int(num_sink_tokens, "num_sink_tokens", 0)
    require_int(num_recent_tokens, "num_recent_tokens", 0)
    overselect = require_float(overselect, "overselect", "a float >= 1")
    require(overselect >= 1.0, "overselect", overselect, "a float >= 1")
    require_pool_width(pool_width)
    keep = num_kept(topk, overselect)
    width = list_width(min(num_sink_tokens + keep + num_recent_tokens, seqlen_k))
    lists = select_blocks(
        scores.unsqueeze(1),
        cache_seqlens=cache_seqlens.contiguous(),
        starts=None if starts is None else starts.contiguous(),
        q_block_offsets=None,
        seqlen_q=1,
        window_rule="decode",
        num_sink_tokens=num_sink_tokens,
        num_recent_tokens=num_recent_tokens,
        keep=keep,
        pool_width=pool_width,
        width=width,
    )
    return Selection(
        lists.indices[:, 0], lists.topk_length[:, 0], kept_score=lists.kept_score[:, 0]
    )


def require_pool_width(pool_width: int) -> None:
    """The one check of a pool width: an even window has no centre."""
    require_int(pool_width, "pool_width", 1, "an odd int >= 1")
    require(pool_width % 2 == 1, "pool_width", pool_width, "an odd int >= 1")
