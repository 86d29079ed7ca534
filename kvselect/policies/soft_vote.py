"""The soft vote: scores of tokens from the vectors that stand for a query block, heads added up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.policies.scoring_vectors import BlockVectors
from kvselect.policies.token_settings import VoteSettings, window_rule
from kvselect.queries import Queries
from kvselect.score import new_ranking, score_blocks
from kvselect.selection_cache import ReuseStep
from kvselect.tensor_parallel import num_ranks, sum_over_ranks

__all__ = ["Vote", "num_lists", "scores_are_mass", "soft_vote", "vote_scale"]


class Vote(NamedTuple):
    """Scores of all tokens for every query block of a call."""

    scores: Tensor  # [batch, num_blocks, num_lists, max_seqlen] float32
    # What all tokens of a list score together; None where scores are no shares of attention mass.
    total: float | Tensor | None
    num_nonfinite: Tensor  # tokens and vectors that were not finite
    ranking: Tensor | None = None  # `score_blocks`: what picking the settings' ``keep`` starts from


def num_lists(settings: VoteSettings, cache: KVCache) -> int:
    """1 where all heads share one list, else one per KV head."""
    return 1 if settings.scope == "layer" else cache.num_kv_heads


def vote_scale(settings: VoteSettings, queries: Queries) -> float:
    """Of the logits of the vote; attention keeps its own."""
    return queries.softmax_scale if settings.score_scale is None else settings.score_scale


def soft_vote(
    settings: VoteSettings,
    parts: list[BlockVectors],
    queries: Queries,
    cache: KVCache,
    hit: Tensor | None = None,
    exact: bool = False,
    rank: bool = False,
    reuse: ReuseStep | None = None,
) -> Vote:
    """``scores[g, i] = sum over vectors and heads h of g of exp(s[h, i] - lse[h])``.

    Parameters
    ----------
    parts : list of BlockVectors
        Of all blocks, as `scoring_vectors` gives them.
    hit : Tensor, [batch, num_lists], int32, or None
        Non-zero: this list is reused, nobody reads its scores.
    exact : bool
        From the keys, whatever the sketch.
    rank : bool
        Count on the way what picking ``settings.keep`` tokens starts from, where that can be done.
    reuse : ReuseStep or None
        Of a decode step: decide on the way which lists are reused, into ``hit``.

    Notes
    -----
    Source: TokenSelect, arXiv:2411.02886. One scan of the sketch, or the keys, per entry of
    ``parts``; one all-reduce with scope "layer" under tensor parallelism.
    """
    num_kv_heads, shared = cache.num_kv_heads, settings.scope == "layer"
    assert reuse is None or len(parts) == 1
    rule = window_rule(settings, queries.phase)
    ranking = None
    # With "block_end" tokens that a block does not see may be candidates: the vote counts none.
    if rank and len(parts) == 1 and not shared and rule != "block_end":
        ranking = new_ranking(parts[0].q, num_kv_heads)
    scores, counts = [], []
    for part in parts:
        offsets = queries.q_block_offsets
        if offsets is not None and len(parts) > 1:
            offsets = offsets[part.first : part.last + 1]
        part_scores, num_nonfinite = score_blocks(
            part.q,
            cache,
            cache_seqlens=queries.cache_seqlens,
            max_seqlen=queries.max_seqlen,
            q_block_offsets=offsets,
            seqlen_q=queries.seqlen_q,
            window_rule=rule,
            num_sink_tokens=settings.num_sink_tokens,
            num_recent_tokens=settings.num_recent_tokens,
            keep=settings.keep,
            scale=vote_scale(settings, queries),
            sketch=None if exact else settings.sketch,
            max_vote=settings.aggregate == "max_vote",
            normalise_candidates_only=settings.normalise_over == "candidates",
            q_local=part.q_local,
            rope=queries.rope if settings.positions == "compact" else None,
            hit=hit,
            softcap=queries.softcap,
            sink_logits=queries.sink_logits,
            ranking=ranking,
            reuse=reuse,
        )
        scores.append(part_scores)
        counts.append(num_nonfinite)

    votes, num_nonfinite = scores[0], counts[0]
    if len(parts) > 1:
        votes, num_nonfinite = torch.cat(scores, dim=1), torch.cat(counts, dim=1)
    heads = queries.q.shape[2] // (1 if shared else num_kv_heads)
    if shared:
        votes = sum_over_ranks(votes.sum(2, keepdim=True), queries.process_group)
        heads *= num_ranks(queries.process_group)
    total = _total_score(settings, parts, heads)
    if total is not None and queries.sink_logits is not None:
        total = votes.nansum(3)  # the sinks took the rest
    return Vote(votes, total, num_nonfinite, ranking)


def scores_are_mass(settings: VoteSettings) -> bool:
    """Whether scores are shares of attention mass."""
    by_attention = settings.score_scale is None and settings.normalise_over == "visible"
    return by_attention and settings.aggregate != "max_vote"


def _total_score(
    settings: VoteSettings, parts: list[BlockVectors], heads: int
) -> float | Tensor | None:
    """What all visible tokens of a list score together; a Tensor where blocks differ."""
    if not scores_are_mass(settings):
        return None
    if len(parts) == 1:
        return float(heads * parts[0].q.shape[2])
    totals = [float(heads * p.q.shape[2]) for p in parts for _ in range(p.first, p.last)]
    return torch.tensor(totals, device=parts[0].q.device)[:, None]
