"""Prefill of METHODS as a loop: one row, one block, one group of queries at a time, in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kvselect import KVCache, Rope, Selection, TokenSelect, reference
from kvselect.prefill import query_blocks
from kvselect.reference import BlockRange, PlainCache, QueryBlocks


def row_of(cache: KVCache, row: int, length: int) -> PlainCache:
    """The first ``length`` tokens of one row, as a cache of its own."""
    return PlainCache(
        k=cache.k[row : row + 1, :length],
        v=cache.v[row : row + 1, :length],
        cache_seqlens=torch.tensor([length], dtype=torch.int32),
        starts=None if cache.starts is None else cache.starts[row : row + 1],
        sketch_format=cache.sketch_format,
        sketch_data=None if cache.sketch_data is None else cache.sketch_data[row : row + 1],
    )


def groups_of(queries: Tensor, query_groups: int) -> list[Tensor]:
    count = min(query_groups, len(queries))
    bounds = [len(queries) * group // count for group in range(count + 1)]
    return [queries[begin:end] for begin, end in itertools.pairwise(bounds)]


def scoring_vectors(
    policy: TokenSelect, q: Tensor, q_unrotated: Tensor | None, at: BlockRange, rope: Rope | None
) -> tuple[Tensor, Tensor]:
    """What scores for a block of queries [m, heads, head_dim]: for candidates, for the rest."""
    groups = 1 if policy.aggregate == "mean" else policy.query_groups
    middle = (at.begin + at.end - 1) // 2
    if policy.positions == "original":
        if policy.average_queries == "after_rope" or rope is None:
            vectors = torch.stack([g.double().mean(0) for g in groups_of(q, groups)])
        else:
            assert q_unrotated is not None
            means = torch.stack([g.double().mean(0) for g in groups_of(q_unrotated, groups)])
            vectors = reference.rotate(means, torch.tensor(middle - at.start), rope)
        return vectors, vectors

    assert rope is not None
    window_rank = at.sink_end - at.start + min(policy.keep, at.num_candidates)
    recent = policy.num_recent_tokens
    if policy.average_queries == "before_rope":
        means = torch.stack([g.double().mean(0) for g in groups_of(q, groups)])
        rank = torch.tensor(window_rank + middle - at.window_start)
        return reference.rotate(means, torch.tensor(recent), rope), reference.rotate(
            means, rank, rope
        )
    rows = torch.arange(len(q))[:, None]
    far = reference.rotate(q, recent + rows, rope)
    near = reference.rotate(q, window_rank + at.begin - at.window_start + rows, rope)
    return (
        torch.stack([g.mean(0) for g in groups_of(far, groups)]),
        torch.stack([g.mean(0) for g in groups_of(near, groups)]),
    )


def expected_prefill(
    q: Tensor,
    cache: KVCache,
    policy: TokenSelect,
    q_unrotated: Tensor | None = None,
    rope: Rope | None = None,
) -> tuple[Tensor, list[list[set[int]]]]:
    """Output of a prefill call, and the list of each KV head by (row, block).

    Blocks that see nothing before them have no list worth comparing: an empty set.
    """
    batch, seqlen_q = q.shape[:2]
    offsets = query_blocks(seqlen_q, policy)
    num_kv_heads = cache.num_kv_heads
    compact = rope if policy.positions == "compact" else None
    out = torch.zeros(q.shape, dtype=torch.float64)
    lists: list[list[set[int]]] = []
    for row in range(batch):
        for begin, end in itertools.pairwise(offsets):
            length = cache.lengths[row] - (seqlen_q - end)
            if length <= 0:
                lists.append([set()] * num_kv_heads)
                continue
            one = row_of(cache, row, length)
            blocks = QueryBlocks(
                cache_seqlens=one.cache_seqlens,
                seqlen_q=end - begin,
                starts=one.starts,
                window_rule=policy.window_anchor,
                num_sink_tokens=policy.num_sink_tokens,
                num_recent_tokens=policy.num_recent_tokens,
            )
            at = blocks.range(0, 0)
            unrotated = None if q_unrotated is None else q_unrotated[row, begin:end]
            far, near = scoring_vectors(policy, q[row, begin:end], unrotated, at, rope)
            scale = q.shape[-1] ** -0.5 if policy.score_scale is None else policy.score_scale
            votes = reference.score_query_blocks(
                far[None, None],
                one,
                blocks,
                softmax_scale=scale,
                q_local=near[None, None],
                source="keys" if policy.sketch is None else "sketch",
                keep=policy.keep,
                normalise_candidates_only=policy.normalise_over == "candidates",
                max_vote=policy.aggregate == "max_vote",
                rope=compact,
            ).scores
            if policy.scope == "layer":
                votes = votes.sum(2, keepdim=True).expand(-1, -1, num_kv_heads, -1)
            picked = reference.select_query_blocks(
                votes, blocks, keep=policy.keep, pool_width=policy.pool_width
            )
            dense = at.end - at.start <= policy.dense_limit(compact)
            selection = None
            if not dense:
                selection = Selection(picked.indices[:, 0], picked.topk_length[:, 0])
            out[row, begin:end] = reference.sparse_attention(
                q[row : row + 1, begin:end], one, selection, rope=compact
            )[0][0]
            chosen = [
                set(picked.indices[0, 0, g, : int(picked.topk_length[0, 0, g])].tolist())
                for g in range(num_kv_heads)
            ]
            everything = set(range(at.start, at.end))
            lists.append([everything] * num_kv_heads if dense else chosen)
    return out, lists
