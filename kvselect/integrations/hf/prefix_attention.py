"""Attention of a layer whose rows share prefixes: what policies do there, and what it reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvselect.checks import require
from kvselect.integrations.hf.head_dims import filled_up
from kvselect.integrations.hf.masks import KeyRange
from kvselect.integrations.hf.plan import LayerPlan, StackPlan
from kvselect.integrations.hf.prefix_layer import KVSelectPrefixLayer
from kvselect.policies.base import settled
from kvselect.policies.dense import Dense
from kvselect.policies.token_select import TokenSelect
from kvselect.prefill import query_blocks
from kvselect.selection import Selection
from kvselect.shared_prefix import SharedSelection, num_prefix_passes, select_shared

# Settings of TokenSelect that a list for a group has no form of, and why.
WANTED: dict[str, tuple[Any, str]] = {
    "positions": ("original", "ranks differ from row to row"),
    "dense_prefill": (True, "query blocks of several rows share no list"),
    "scope": ("kv_head", "a shared list is made per KV head"),
    "layer_budget": ("fixed", "a shared list has one size"),
    "mass_target": (None, "a shared list has one size"),
    "similarity_threshold": (None, "a shared list is made anew at every step"),
    "num_segments": (None, "a shared list is made anew at every step"),
    "pool_width": (1, "a shared list has no pooled scores"),
    "score_scale": (None, "scores are shares of attention"),
    "normalise_over": ("visible", "scores are shares of attention"),
}


def require_shareable(plan: StackPlan) -> None:
    """Refuse policies that would have to select for every row by itself.

    Raises
    ------
    ValueError
        With the reason.
    """
    policy: Any = plan.policy
    if not isinstance(policy, Dense):
        allowed = (
            "Dense or TokenSelect with shared prefixes: lists of single rows would read the prefix "
            "once per row again, and no other method has a list for a group"
        )
        require(isinstance(policy, TokenSelect), "policy", type(policy).__name__, allowed)
        for name, (wanted, why) in WANTED.items():
            value = getattr(policy, name)
            require(value == wanted, name, value, f"{wanted!r} with shared prefixes ({why})")
    audited = any(layer.audit_every is not None for layer in plan.layers)
    require(not audited, "audit_every", "an int", "None with shared prefixes")


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
    """Attention over every row's prefix, read once per group, and its own tokens.

    Exact over all of both, but in the decode steps of a policy that selects: these attend to what
    the group selects of its prefix (`select_shared`, by union).

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
        For a window.
    """
    cache = layer.cache
    assert cache is not None
    assert isinstance(keys, KeyRange) and keys.validity is None  # the hook let nothing else through
    require(sliding_window is None, "sliding_window", sliding_window, "None with shared prefixes")
    q = filled_up(query.transpose(1, 2), cache.head_dim)
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "sink_logits": sink_logits,
    }
    chosen = _select(plan, layer, q, options)
    _count(plan, layer, q, chosen)
    lists = [None if found is None else found.selection for found in chosen]
    out, _ = layer.groups.attend(q, cache, lists, **options)
    return out[..., : value.shape[-1]].contiguous()


def _select(
    plan: LayerPlan, layer: KVSelectPrefixLayer, q: Tensor, options: dict[str, Any]
) -> list[SharedSelection | None]:
    """What each group attends to of its prefix; None: all of it.

    The window of the last ``num_recent_tokens`` reaches into the prefix as far as a row's own
    tokens do not fill it.
    """
    policy, cache, groups = plan.policy, layer.cache, layer.groups.prefixes()
    assert cache is not None
    if not plan.selects or not isinstance(policy, TokenSelect) or q.shape[1] > 1:
        return [None] * len(groups)
    crossover = plan.crossovers.get(q.shape[2])
    in_use = policy if crossover is None else settled(policy, crossover)
    assert isinstance(in_use, TokenSelect)
    limit = in_use.dense_limit(None)
    own = cache.num_real_tokens
    chosen: list[SharedSelection | None] = []
    for number, (prefix, rows) in enumerate(groups):
        counts = [own[row] for row in layer.groups.rows_of(number)]
        num_tokens = prefix.num_tokens
        recent = min(max(policy.num_recent_tokens - min(counts), 0), num_tokens)
        sinks = min(policy.num_sink_tokens, num_tokens - recent)
        short = num_tokens + max(counts) <= limit
        if short or num_tokens <= sinks + policy.keep + recent:
            chosen.append(None)
            continue
        chosen.append(
            select_shared(
                q[rows],
                prefix,
                topk=policy.keep,
                num_sink_tokens=sinks,
                num_recent_tokens=recent,
                **options,
            )
        )
    return chosen


def _count(
    plan: LayerPlan,
    layer: KVSelectPrefixLayer,
    q: Tensor,
    chosen: list[SharedSelection | None],
) -> None:
    """Record what the call attends to and reads; reads nothing back from the device."""
    cache, groups, policy = layer.cache, layer.groups, plan.policy
    assert cache is not None and policy is not None
    heads, seqlen_q = cache.num_kv_heads, q.shape[1]
    step = seqlen_q == 1
    group_size = q.shape[2] // heads
    visible = 0
    for offset in query_blocks(seqlen_q, policy)[1:]:
        for before, own in zip(groups.row_tokens, cache.num_real_tokens):
            seen = max(own - seqlen_q + offset, 0)
            visible += before + seen if seen else 0
    statistics = plan.statistics[step]
    plan.nonfinite = cache.num_nonfinite
    counts = plan.prefix_counts
    counts.held_bytes, counts.separate_held_bytes = groups.nbytes, groups.separate_nbytes
    reads = groups.reads(seqlen_q, group_size)
    shared: int | Tensor = reads.shared * heads
    separate: int | Tensor = reads.separate * heads
    attended = separate
    if any(found is not None for found in chosen):
        attended_rows = cache.cache_seqlens[:, None].expand(-1, heads).clone()
        if cache.starts is not None:
            attended_rows -= cache.starts[:, None]
        shared = separate = attended = scanned = 0
        for found, (prefix, rows) in zip(chosen, groups.prefixes()):
            members = prefix.num_members
            if found is None:
                passes = num_prefix_passes(members * group_size, q.device.type != "cpu")
                attended_rows[rows] += prefix.num_tokens
                shared = shared + passes * prefix.num_tokens * heads
                separate = separate + members * prefix.num_tokens * heads
                attended = attended + members * prefix.num_tokens * heads
                continue
            scanned += members * prefix.num_tokens * heads
            size = found.union_size
            attended_rows[rows] += size.int()
            shared = shared + num_prefix_passes(members * group_size, True) * size.sum()
            separate = separate + found.picked.sum()
            attended = attended + members * size.sum()
        lists = Selection(attended_rows, attended_rows)
        statistics.record_selection(lists, visible * heads, False, tokens_scanned=scanned)
    else:
        statistics.record_dense(visible * heads)
    counts.saved_tokens = counts.saved_tokens + (attended - shared)
    if step:
        plan.num_lists += cache.batch * heads
        plan.num_steps += 1
        counts.num_steps += 1
        counts.step_tokens = counts.step_tokens + shared
        counts.separate_step_tokens = counts.separate_step_tokens + separate
