"""How much each cached token matters to a block of queries: soft votes per KV head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.reference.cache import CacheLike, sketched_keys
from kvselect.reference.query_blocks import QueryBlocks
from kvselect.reference.rotation import RopeTable, rotate
from kvselect.reference.soft_cap import soft_capped


class BlockScores(NamedTuple):
    """What score_query_blocks gives; float64 and int64."""

    scores: Tensor  # [batch, num_blocks, num_kv_heads, max_seqlen]
    lse: Tensor  # [batch, num_blocks, num_vectors, num_q_heads]
    num_nonfinite: Tensor  # [batch, num_blocks, num_kv_heads]


def score_query_blocks(
    q: Tensor,
    cache: CacheLike,
    blocks: QueryBlocks,
    *,
    softmax_scale: float,
    q_local: Tensor | None = None,
    source: str = "keys",
    keep: int = 0,
    normalise_candidates_only: bool = False,
    max_vote: bool = False,
    rope: RopeTable | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> BlockScores:
    """Score every visible token for every block: ``scores[g, i] = sum_h exp(s[h, i] - lse[h])``.

    ``s[h, i] = softmax_scale * q[h] . k[h // group_size, i]`` and ``lse[h] = logsumexp_i s[h, i]``
    over the visible tokens, sinks and recent ones included. Each vector votes with a softmax of its
    own; the votes of the vectors are added.

    Parameters
    ----------
    q : Tensor, [batch, num_blocks, num_vectors, num_q_heads, head_dim]
        Meets the candidates.
    cache : CacheLike
    blocks : QueryBlocks
    softmax_scale : float
    q_local : Tensor or None, shape of q
        Meets sinks and recent tokens; None: q.
    source : {"keys", "sketch"}
        "sketch": candidates are scored from what the sketch says of them. Sinks, recent tokens and
        tokens of blocks without codes always use their exact keys.
    keep : int
        Candidates that will be picked; matters to ``rope`` only. [tokens]
    normalise_candidates_only : bool
        ``lse`` and scores over the visible candidates alone (the published TokenSelect). Sinks and
        recent tokens are still looked at, for what is not finite.
    max_vote : bool
        The largest vote of the vectors instead of their sum.
    rope : RopeTable or None
        Keys are stored before RoPE ("compact" positions): a sink's key rotates to its rank, a
        recent one's to ``num_sinks + min(keep, num_candidates)`` plus its offset in the window.
        Candidates stay as they are; the caller has rotated q to one fixed distance.
    softcap : float or None
        Given, a logit ``x`` becomes ``softcap * tanh(x / softcap)``.
    sink_logits : Tensor, [num_q_heads], or None
        One more logit per head in ``lse``, unless that is the candidates' alone.

    Returns
    -------
    BlockScores
        0 where not visible. A query vector of a head that holds NaN or inf has weight 0, lse -inf,
        and counts once in num_nonfinite. A token that makes a finite vector's logit NaN or inf has
        score NaN and weight 0, and counts once per KV head; so does a token of the block itself
        (``[visible_end, end)``, which has no score) whose key is not finite.
    """
    batch, num_blocks, num_vectors, num_q_heads, _ = q.shape
    num_kv_heads, max_seqlen = cache.k.shape[2], cache.k.shape[1]
    group_size = num_q_heads // num_kv_heads
    q_local = q if q_local is None else q_local
    scores = torch.zeros(batch, num_blocks, num_kv_heads, max_seqlen, dtype=torch.float64)
    lse = torch.full((batch, num_blocks, num_vectors, num_q_heads), -torch.inf, dtype=torch.float64)
    num_nonfinite = torch.zeros(batch, num_blocks, num_kv_heads, dtype=torch.int64)

    for row in range(batch):
        seqlen = blocks.seqlen(row)
        for g in range(num_kv_heads):
            exact = cache.k[row, :seqlen, g].double()
            far = sketched_keys(cache, row, g) if source == "sketch" else exact
            for block in range(num_blocks):
                at = blocks.range(row, block)
                local = exact
                if rope is not None:
                    window_rank = at.sink_end - at.start + min(keep, at.num_candidates)
                    ranks = torch.zeros(seqlen, dtype=torch.int64)
                    ranks[at.start : at.sink_end] = torch.arange(at.sink_end - at.start)
                    ranks[at.window_start : at.end] = window_rank + torch.arange(
                        at.end - at.window_start
                    )
                    local = rotate(exact, ranks, rope)
                is_candidate = torch.zeros(seqlen, dtype=torch.bool)
                is_candidate[at.sink_end : at.window_start] = True
                visible = torch.zeros(seqlen, dtype=torch.bool)
                visible[at.start : at.visible_end] = True
                counted = visible & is_candidate if normalise_candidates_only else visible

                votes = []
                bad = torch.zeros(seqlen, dtype=torch.bool)
                for vector in range(num_vectors):
                    vote = torch.zeros(seqlen, dtype=torch.float64)
                    for h in range(g * group_size, (g + 1) * group_size):
                        query = q[row, block, vector, h].double()
                        query_local = q_local[row, block, vector, h].double()
                        if not (query.isfinite().all() and query_local.isfinite().all()):
                            num_nonfinite[row, block, g] += 1
                            continue
                        logits = torch.where(is_candidate, far @ query, local @ query_local)
                        logits = softmax_scale * logits
                        bad |= visible & ~logits.isfinite()
                        logits = soft_capped(logits, softcap)
                        logits = logits.where(counted & logits.isfinite(), -torch.inf)
                        total = logits.logsumexp(0)
                        if (
                            sink_logits is not None
                            and not normalise_candidates_only
                            and counted.any()
                        ):
                            total = total.logaddexp(sink_logits[h].double())
                        lse[row, block, vector, h] = total
                        if lse[row, block, vector, h] > -torch.inf:
                            vote += (logits - lse[row, block, vector, h]).exp()
                    votes.append(vote)
                together = torch.stack(votes)
                score = together.amax(0) if max_vote else together.sum(0)
                own = torch.zeros(seqlen, dtype=torch.bool)
                own[at.visible_end : at.end] = True  # the block's own tokens have no score
                bad |= own & ~exact.isfinite().all(-1)
                scores[row, block, g, :seqlen] = score.where(~bad, torch.nan)
                num_nonfinite[row, block, g] += bad.sum()
    return BlockScores(scores, lse, num_nonfinite)


def score_tokens(
    q: Tensor,
    cache: CacheLike,
    *,
    scope: str = "kv_head",
    source: str | None = None,
    softmax_scale: float | None = None,
    num_sink_tokens: int = 0,
    num_recent_tokens: int = 0,
    aggregate: str = "sum_vote",
) -> Tensor:
    """Scores of the cached tokens for the given queries, which all see the whole cache.

    Parameters
    ----------
    q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
        Each query votes with a softmax of its own.
    cache : CacheLike
    scope : {"kv_head", "layer"}
        "layer": the sum of the KV heads' scores, shown to every head.
    source : {"sketch", "keys"} or None
        What candidates are scored from. None: the sketch where the cache has one, else its keys.
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    num_sink_tokens, num_recent_tokens : int
        Tokens at either end that are scored from exact keys whatever the source. [tokens]
    aggregate : {"sum_vote", "max_vote"}

    Returns
    -------
    Tensor, [batch, num_kv_heads, max_seqlen], float64
    """
    blocks = QueryBlocks(
        cache_seqlens=cache.cache_seqlens,
        seqlen_q=q.shape[1],
        starts=cache.starts,
        num_sink_tokens=num_sink_tokens,
        num_recent_tokens=num_recent_tokens,
    )
    scores = score_query_blocks(
        q[:, None],
        cache,
        blocks,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        source="keys" if source == "keys" else "sketch",
        max_vote=aggregate == "max_vote",
    ).scores[:, 0]
    if scope == "layer":
        return scores.sum(1, keepdim=True).expand(scores.shape)
    return scores
