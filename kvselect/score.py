"""Scores: how much each cached token matters to a query, as soft votes per KV head or per layer."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from kvselect import ops  # noqa: F401  registers torch.ops.kvselect
from kvselect.arguments import (
    raise_if_not_finite,
    require_queries,
    require_sink_logits,
    require_softcap,
    require_softmax_scale,
)
from kvselect.cache import KVCache
from kvselect.checks import require, require_bool, require_choice, require_int
from kvselect.rope import Rope
from kvselect.selection_cache import ReuseStep
from kvselect.sketch import op_format

__all__ = ["new_ranking", "score_tokens"]

RANKING_WORDS = 8 + 4096  # csrc/include/kvselect/ranking.h
MAX_RANKED_COLUMNS = 16  # kMaxKeptColumns of csrc/cuda/score_tokens.cu

SCOPES = ("kv_head", "layer")
VOTES = ("sum_vote", "max_vote")


def score_tokens(
    q: Tensor,
    cache: KVCache,
    *,
    scope: str = "kv_head",
    source: str | None = None,
    softmax_scale: float | None = None,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    aggregate: str = "sum_vote",
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    check_finite: bool = False,
) -> Tensor:
    """Attention mass that the query heads of each KV head put on each cached token.

    ``scores[g, i] = sum over queries and h of group g of exp(s[h, i] - logsumexp_j s[h, j])`` with
    ``s[h, i] = softmax_scale * q[h] . k[g, i]``, over all stored tokens of the row.

    Parameters
    ----------
    q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
        The cache's dtype and device. All queries see the whole row, whatever their number.
    cache : KVCache
    scope : "kv_head" or "layer"
        "layer": every head gets the sum over all heads (head stride 0).
    source : "sketch", "keys" or None
        What candidates are scored from. None: the sketch where the cache has one, its keys
        otherwise. Tokens of blocks that are not whole yet are scored from the keys in any case.
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    num_sink_tokens, num_recent_tokens : int
        Tokens at either end that are scored from exact keys.
    aggregate : "sum_vote" or "max_vote"
        How the votes of several queries combine.
    softcap : float or None
        Given, a logit ``x`` becomes ``softcap * tanh(x / softcap)``.
    sink_logits : Tensor, [num_q_heads], float32, or None
        One more logit per head in the normaliser: what it takes, no token gets.
    check_finite : bool
        Raise if a query, or any token ever appended, holds NaN or inf (reads a flag back from the
        device).

    Returns
    -------
    Tensor, [batch, num_kv_heads, max_seqlen], float32
        0 where a row has no token; NaN for a token whose logit is not finite (`select_tokens` never
        lists it).

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes, devices or settings do not fit, or the sketch is asked for and there is
        none.

    Notes
    -----
    Source: the soft vote of TokenSelect, arXiv:2411.02886, with scaled logits, all visible tokens
    in the normaliser and the head map of the weights (docs/design.md). Cost: reads the sketch (68
    bytes per token and KV head for int4 at head_dim 128) or the keys; memory-bound.
    """
    require_queries(q, cache)
    require(q.shape[1] >= 1, "seqlen_q", q.shape[1], "an int >= 1")
    require_choice(scope, "scope", SCOPES)
    require_choice(source, "source", ("sketch", "keys", None))
    scale = require_softmax_scale(softmax_scale, cache.head_dim)
    require_int(num_sink_tokens, "num_sink_tokens", 0)
    require_int(num_recent_tokens, "num_recent_tokens", 0)
    require_choice(aggregate, "aggregate", VOTES)
    cap = require_softcap(softcap)
    require_sink_logits(sink_logits, q.shape[2], cache)
    require_bool(check_finite, "check_finite")
    if source == "sketch":
        allowed = "'keys' or None: the cache was made with sketch=None"
        require(cache.sketch_format is not None, "source", source, allowed)
    if check_finite:
        raise_if_not_finite(q, cache)
    sketch = None if source == "keys" else cache.sketch_format
    if sketch is not None:
        cache.require_window(num_sink_tokens, num_recent_tokens)
    with cache.whole_rows() if sketch is None else nullcontext():
        scores, _ = score_blocks(
            q.contiguous().unsqueeze(1),
            cache,
            cache_seqlens=cache.cache_seqlens,
            max_seqlen=cache.max_seqlen,
            q_block_offsets=None,
            seqlen_q=1,
            window_rule="decode",
            num_sink_tokens=num_sink_tokens,
            num_recent_tokens=num_recent_tokens,
            keep=0,
            scale=scale,
            sketch=sketch,
            max_vote=aggregate == "max_vote",
            softcap=cap,
            sink_logits=sink_logits,
        )
    if scope == "layer":
        return scores.sum(2).expand(-1, cache.num_kv_heads, -1)
    return scores[:, 0]


def new_ranking(q: Tensor, num_kv_heads: int) -> Tensor | None:
    """Room for what the vote counts on its way, so that the selection need not.

    None on a CPU, and where a list has more than 16 columns (scoring vectors times query heads, by
    fours): in prefill, mostly. The kernel that votes for them has no registers left.

    Parameters
    ----------
    q : Tensor
        As `score_blocks` takes it; a list per KV head.
    """
    batch, num_blocks, num_vectors, num_q_heads, _ = q.shape
    columns = num_vectors * -(-(num_q_heads // num_kv_heads) // 4) * 4
    if q.device.type != "cuda" or columns > MAX_RANKED_COLUMNS:
        return None
    shape = (batch, num_blocks, num_kv_heads, RANKING_WORDS)
    return torch.empty(shape, dtype=torch.int32, device=q.device)


def score_blocks(
    q: Tensor,
    cache: KVCache,
    *,
    cache_seqlens: Tensor,
    max_seqlen: int,
    q_block_offsets: Tensor | None,
    seqlen_q: int,
    window_rule: str,
    num_sink_tokens: int,
    num_recent_tokens: int,
    keep: int,
    scale: float,
    sketch: str | None,
    max_vote: bool = False,
    normalise_candidates_only: bool = False,
    q_local: Tensor | None = None,
    rope: Rope | None = None,
    hit: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    ranking: Tensor | None = None,
    reuse: ReuseStep | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of all query blocks of a call in one scan; the op itself, with checked arguments.

    Parameters
    ----------
    q, q_local : Tensor, [batch, num_blocks, num_vectors, num_q_heads, head_dim], contiguous
        Scoring vectors for the candidates, any dtype of a cache; for sinks and recent tokens,
        float32 (None: the same).
    sketch : str or None
        Format to scan; None: the keys.
    rope : Rope or None
        Given: "compact" positions, see csrc/include/kvselect/score_tokens.h.
    hit : Tensor, [batch, num_lists], int32, or None
        Non-zero: this list is reused, its scores are left as they are. One list may serve all
        heads.
    softcap, sink_logits : float, Tensor [num_q_heads] or None
        As `Queries` has them.
    ranking : Tensor or None
        From `new_ranking`: filled for `select_blocks` to pick ``keep`` tokens per KV head from;
        not with ``window_rule="block_end"``.
    reuse : ReuseStep or None
        Given, the call first decides which lists are reused, into ``hit``.

    Returns
    -------
    scores : Tensor, [batch, num_blocks, num_kv_heads, max_seqlen], float32
    num_nonfinite : Tensor, [batch, num_blocks, num_kv_heads], int64
        Tokens and query vectors that were not finite.
    """
    cos, sin, start, interleaved = None, None, 0, False
    if rope is not None:
        cos, sin, start, interleaved = rope.cos, rope.sin, rope.start, rope.interleaved
    op = torch.ops.kvselect.score_tokens
    scores, _, num_nonfinite = (op.default if reuse is None else op.reuse)(
        q,
        q_local,
        cache.k_pages if sketch is None else cache.scored_k_pages,
        cache.block_table,
        cache_seqlens,
        cache.starts,
        None if sketch is None else cache.sketch_data,
        op_format(sketch),
        q_block_offsets,
        seqlen_q,
        window_rule,
        num_sink_tokens,
        num_recent_tokens,
        keep,
        scale,
        normalise_candidates_only,
        max_vote,
        cos,
        sin,
        start,
        interleaved,
        hit,
        max_seqlen,
        softcap,
        sink_logits,
        ranking,
        sketch is not None and cache.sketch_in_pages,
        *(() if reuse is None else reuse[:-1]),
    )
    return scores, num_nonfinite
