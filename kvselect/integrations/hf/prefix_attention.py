"""Attention of a layer whose rows share prefixes: what policies do there, and what it reads."""

from __future__ import annotations

from torch import Tensor

from kvselect.checks import require
from kvselect.integrations.hf.head_dims import filled_up
from kvselect.integrations.hf.masks import KeyRange
from kvselect.integrations.hf.plan import LayerPlan
from kvselect.integrations.hf.prefix_layer import KVSelectPrefixLayer
from kvselect.policies.base import Policy
from kvselect.policies.dense import Dense
from kvselect.prefill import query_blocks


def require_shareable(policy: Policy) -> None:
    """Refuse policies that would have to select for every row by itself.

    Raises
    ------
    ValueError
        With the reason.
    """
    allowed = (
        "Dense with shared prefixes: lists of single rows would read the prefix once per row again "
        "(kvselect.shared_prefix.select_shared makes one for a group)"
    )
    require(isinstance(policy, Dense), "policy", type(policy).__name__, allowed)


def attend_prefixes(
    plan: LayerPlan,
    layer: KVSelectPrefixLayer,
    query: Tensor,
    value: Tensor,
    keys: KeyRange | Tensor,
    softmax_scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Exact attention over every row's prefix, read once per group, and its own tokens.

    Parameters
    ----------
    query : Tensor, [batch, num_q_heads, seqlen_q, head_dim]
    value : Tensor, [batch, num_kv_heads, num_own_tokens, head_dim]
    keys : KeyRange
        Of the rows' own tokens.

    Returns
    -------
    Tensor, [batch, seqlen_q, num_q_heads, head_dim], contiguous

    Raises
    ------
    ValueError
        For padding with holes, masks of somebody else, windows, and policies that select.
    """
    cache = layer.cache
    assert cache is not None and plan.policy is not None
    require_shareable(plan.policy)
    left_padded = isinstance(keys, KeyRange) and keys.validity is None
    allowed = "left padding between the prefix and a row's own tokens"
    require(left_padded, "attention_mask", "holes in the padding, or a 4-D mask", allowed)
    require(sliding_window is None, "sliding_window", sliding_window, "None with shared prefixes")
    q = filled_up(query.transpose(1, 2), cache.head_dim)
    _count(plan, layer, q)
    out, _ = layer.groups.attend(
        q, cache, softmax_scale=softmax_scale, softcap=softcap, sink_logits=sink_logits
    )
    return out[..., : value.shape[-1]].contiguous()


def _count(plan: LayerPlan, layer: KVSelectPrefixLayer, q: Tensor) -> None:
    cache, groups, policy = layer.cache, layer.groups, plan.policy
    assert cache is not None and policy is not None
    seqlen_q, step = q.shape[1], q.shape[1] == 1
    visible = 0
    for offset in query_blocks(seqlen_q, policy)[1:]:
        for prefix, own in zip(groups.row_tokens, cache.num_real_tokens):
            seen = max(own - seqlen_q + offset, 0)
            visible += prefix + seen if seen else 0
    plan.statistics[step].record_dense(visible * cache.num_kv_heads)
    plan.nonfinite = cache.num_nonfinite
    reads = groups.reads(seqlen_q, q.shape[2] // cache.num_kv_heads, q.device.type)
    counts = plan.prefix_counts
    counts.saved_tokens += (reads.separate - reads.shared) * cache.num_kv_heads
    counts.held_bytes = groups.nbytes
    counts.separate_held_bytes = groups.separate_nbytes
    if step:
        plan.num_lists += cache.batch * cache.num_kv_heads
        plan.num_steps += 1
        counts.num_steps += 1
        counts.step_tokens += reads.shared
        counts.separate_step_tokens += reads.separate
