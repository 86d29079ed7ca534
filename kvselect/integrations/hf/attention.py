"""The attention function that is registered with transformers under the name "kvselect"."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.decode import decode_step
from kvselect.integrations.hf.attached_layer import AttachedLayer
from kvselect.integrations.hf.cache_layer import KVSelectLayer
from kvselect.integrations.hf.dense import dense_attention, rotate_by_index
from kvselect.integrations.hf.evicting_layer import KVSelectEvictingLayer
from kvselect.integrations.hf.head_dims import filled_up, stored_head_dim
from kvselect.integrations.hf.masks import KeyRange
from kvselect.integrations.hf.plan import LayerContext, LayerPlan
from kvselect.integrations.hf.prefix_attention import attend_prefixes
from kvselect.integrations.hf.prefix_layer import KVSelectPrefixLayer
from kvselect.integrations.hf.shared_stack import join_stack
from kvselect.integrations.hf.static_layer import KVSelectStaticLayer
from kvselect.integrations.hf.tiered_layer import KVSelectTieredLayer
from kvselect.policies.base import PolicyState
from kvselect.prefill import prefill, selects_stepwise
from kvselect.rope import Rope

QUERIES_AT_ONCE = 2048
"""Queries that are rotated back at once in prefill: bounds the float32 copies."""


class SoftmaxOptions(TypedDict):
    """What a model adds to its softmax, as `dense_attention` takes it."""

    sliding_window: int | None
    softcap: float | None
    sink_logits: Tensor | None


def kvselect_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kvselect: LayerContext | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer call, as transformers asks for it.

    Parameters
    ----------
    query : Tensor, [batch, num_q_heads, seqlen_q, head_dim]
        A transposed view; rotated, unless the layer rotates for itself (compact positions).
    key, value : Tensor, [batch, num_kv_heads, seqlen_k, head_dim]
        The whole context, as the cache's ``update`` returned it.
    attention_mask : Tensor
        From `key_range_mask`, or a 4-D mask of somebody else.
    kvselect : LayerContext
        From `attention_pre_hook`; without it nobody attached.
    scaling : float or None
        None: ``module.scaling``.
    sliding_window : int or None
        Keys that a query sees, itself included.
    softcap : float or None
        Logits become ``softcap * tanh(logits / softcap)``.
    s_aux : Tensor, [num_q_heads], or None
        Sink logits: one more per head, in the denominator only.

    Returns
    -------
    out : Tensor, [batch, seqlen_q, num_q_heads, head_dim], contiguous
    weights : None

    Raises
    ------
    ValueError
        If the model is not attached or trains, for dropout, and for a bias of the logits.
    """
    if kvselect is None:
        raise ValueError(
            "attn_implementation: got 'kvselect', allowed: a model with a policy: call "
            "kvselect.attach(model, policy) (a model that shares its configuration object with an "
            "attached one needs a copy of it)"
        )
    softmax_scale: float = module.scaling if scaling is None else scaling  # type: ignore[assignment]
    require(position_bias is None, "position_bias", "a tensor", "None")
    sink_logits = None if s_aux is None else s_aux.detach().float().flatten()
    options = SoftmaxOptions(
        sliding_window=sliding_window, softcap=softcap, sink_logits=sink_logits
    )
    if kvselect.plan.stack.recorder is not None:
        recorder = kvselect.plan.stack.recorder
        return recorder(
            module, query, key, value, attention_mask, kvselect, softmax_scale, options
        ), None
    require(dropout == 0.0, "dropout", dropout, "0 (kvselect does not train: model.eval())")
    arguments = (module, query, key, value, attention_mask, kvselect, softmax_scale, options)
    if not (torch.is_grad_enabled() and query.requires_grad):
        return _attend(*arguments), None
    require(
        not module.training, "model.training", True, "False (kvselect does not train: model.eval())"
    )
    with torch.no_grad():
        out = _attend(*arguments)
    out = _ForwardOnly.apply(out, query)  # type: ignore[no-untyped-call]
    return out, None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    context: LayerContext,
    softmax_scale: float,
    options: SoftmaxOptions,
) -> Tensor:
    plan, layer = context.plan, context.layer
    stack = plan.stack
    keys = stack.mask(attention_mask)
    if isinstance(layer, KVSelectPrefixLayer):
        return attend_prefixes(plan, layer, query, value, keys, softmax_scale, **options)
    if isinstance(layer, AttachedLayer) and isinstance(keys, KeyRange):
        if query.shape[2] > 1 or keys.validity is not None:
            _remember_validity(layer, keys)
        elif layer.validity is not None:
            keys = KeyRange(keys.starts, keys.ends, layer.validity_of(key.shape[2]))
    elif (
        isinstance(keys, KeyRange)
        and keys.validity is not None
        and layer is not None
        and not plan.slides
    ):
        allowed = "left padding, or a cache of plain dynamic layers"
        require(
            False, "attention_mask", f"holes in the padding with a {type(layer).__name__}", allowed
        )
    if plan.reason is None:
        reason = _why_dense(keys, layer)
        if reason is None:
            assert isinstance(keys, KeyRange)
            return _select(query, key, value, context, keys, softmax_scale, options)
        plan.ran_dense(reason)
        if isinstance(layer, KVSelectEvictingLayer) and layer.has_dropped:
            allowed = "a call that the policy can serve: tokens were dropped from the cache"
            require(False, "past_key_values", reason, allowed)
        if isinstance(layer, KVSelectTieredLayer):
            assert layer.cache is not None
            layer.cache.drop_whole_rows()
            key, value = key.to(query.device), value.to(query.device)
        if plan.rotates_itself:
            assert isinstance(keys, KeyRange)  # the hook let nothing else through
            rope = stack.table(plan, key.shape[2], key.device)
            query = rotate_by_index(query, keys, rope)
            key = rotate_by_index(key, keys, rope)
    return dense_attention(module, query, key, value, keys, softmax_scale, **options)


def _why_dense(keys: KeyRange | Tensor, layer: Any) -> str | None:
    """What keeps a selecting layer from selecting in this call."""
    if isinstance(keys, Tensor):
        return "a 4-D attention mask"
    if keys.validity is not None:
        return "padding with holes (right or middle padding)"
    if layer is not None and not isinstance(layer, AttachedLayer):
        filled = " filled before attach" if type(layer).__name__ == "DynamicLayer" else ""
        return f"a cache layer {type(layer).__name__}{filled}"
    return None


def _select(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: LayerContext,
    keys: KeyRange,
    softmax_scale: float,
    options: SoftmaxOptions,
) -> Tensor:
    """One decode step or prefill call through the attached policy."""
    plan, layer, policy = context.plan, context.layer, context.plan.policy
    assert policy is not None
    if isinstance(layer, KVSelectStaticLayer):
        return _select_static(query, value, context, layer, softmax_scale, options)
    if isinstance(layer, KVSelectLayer):
        assert layer.cache is not None
        cache = layer.cache
        state = layer.state(plan.index, policy, plan.statistics, plan.crossovers)
    else:  # no cache, or one of latents: the state lasts one call
        cache = _one_call_cache(key, value, keys, policy.required_sketch)
        state = policy.new_state(cache, plan.crossovers)
        state.prefill, state.decode = plan.statistics
    if policy.flows_between_layers and state.stack is None:
        join_stack(state, plan, context.cache)
    plan.nonfinite = cache.num_nonfinite
    call = _Call(cache, state, softmax_scale, options)
    out = _attend_call(plan, query, call, context, cache.max_seqlen)
    return out[..., : value.shape[-1]].contiguous()


class _Call(NamedTuple):
    """What one call of a selecting layer works on."""

    cache: KVCache
    state: PolicyState
    softmax_scale: float
    options: SoftmaxOptions


def _select_static(
    query: Tensor,
    value: Tensor,
    context: LayerContext,
    layer: KVSelectStaticLayer,
    softmax_scale: float,
    options: SoftmaxOptions,
) -> Tensor:
    """The same on a cache of fixed room: decode steps never ask the host how long a row is."""
    plan, policy, cache = context.plan, context.plan.policy, layer.cache
    assert policy is not None and cache is not None
    allowed = "a policy whose layers share nothing with a static cache (it cannot be captured)"
    require(not policy.flows_between_layers, "policy", type(policy).__name__, allowed)
    num_segments = getattr(policy, "num_segments", None)
    allowed = "None with a static cache (its pools and audits cannot be captured)"
    require(num_segments is None, "num_segments", num_segments, allowed)
    allowed = "None with a static cache (whether one is due cannot be captured)"
    require(plan.audit_every is None, "audit_every", plan.audit_every, allowed)
    captured = layer.captured(plan)
    # The host counts calls of several tokens, for which it reads the lengths.
    decode = captured if query.shape[2] == 1 else plan.statistics[1]
    state = layer.state(plan.index, policy, (plan.statistics[0], decode), {})
    call = _Call(cache, state, softmax_scale, options)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        plan.count_later(captured)
        for tensor in policy.prepare_capture(state, cache, query.shape[1], None):
            torch._dynamo.mark_static_address(tensor)
    if query.shape[2] > 1:
        allowed = "calls of one token (disable_compile=True where prefill is chunked)"
        require(not compiling, "compiled static cache", f"{query.shape[2]} tokens", allowed)
        plan.nonfinite = cache.num_nonfinite
        with cache.known_lengths():
            out = _attend_call(plan, query, call, context, cache.capacity)
    else:
        q = filled_up(query.transpose(1, 2), cache.head_dim)
        if plan.rotates_itself:
            rope: Rope | None = plan.stack.table(
                plan, max(policy.num_positions, cache.capacity), q.device
            )
            q_unrotated = None
        else:
            q_unrotated, rope = _before_rotation(plan, q, context)
        out, _ = decode_step(
            q,
            cache,
            policy,
            state,
            q_unrotated=q_unrotated,
            rope=rope,
            softmax_scale=softmax_scale,
            softcap=options["softcap"],
            sink_logits=options["sink_logits"],
            process_group=plan.stack.process_group,
        )
    return out[..., : value.shape[-1]].contiguous()


def _attend_call(
    plan: LayerPlan, query: Tensor, call: _Call, context: LayerContext, room: int
) -> Tensor:
    """A decode step or prefill call of whatever cache; ``room``: the longest row it can have."""
    cache, state, policy = call.cache, call.state, plan.policy
    assert policy is not None
    q = filled_up(query.transpose(1, 2), cache.head_dim)
    seqlen_q = q.shape[1]
    filled = cache.max_seqlen > seqlen_q
    stepwise = selects_stepwise(policy, seqlen_q, cache.max_seqlen)
    if stepwise:
        plan.num_lists += cache.batch * cache.num_kv_heads * seqlen_q

    rope, q_unrotated = None, None
    if plan.rotates_itself:
        rope = plan.stack.table(plan, max(policy.num_positions, room), q.device)
    elif filled and seqlen_q == 1:
        q_unrotated, rope = _before_rotation(plan, q, context)
    elif "prefill" in plan.needs_unrotated and not stepwise:
        longest = max(cache.num_real_tokens)
        if not policy.is_dense("prefill", longest - 1, longest, None):
            q_unrotated = _rotated_back(plan, q, cache)
            rope = plan.stack.table(plan, 1, q.device)

    options: dict[str, Any] = {
        "q_unrotated": q_unrotated,
        "rope": rope,
        "softmax_scale": call.softmax_scale,
        "softcap": call.options["softcap"],
        "sink_logits": call.options["sink_logits"],
        "process_group": plan.stack.process_group,
    }
    if not (filled and seqlen_q == 1):
        return prefill(q, cache, policy, state, **options)[0]
    plan.num_steps += 1
    due = plan.audit_every is not None and plan.num_steps % plan.audit_every == 0
    return decode_step(q, cache, policy, state, audit=due, **options)[0]


def _before_rotation(
    plan: LayerPlan, q: Tensor, context: LayerContext
) -> tuple[Tensor | None, Rope | None]:
    """A decode step's query before RoPE and the layer's rotation, if the policy asks for them."""
    if "decode" not in plan.needs_unrotated:
        return None, None
    assert context.cos is not None and context.sin is not None
    q_unrotated = plan.stack.unrotate(plan, q, context.cos, context.sin).to(q.dtype)
    return q_unrotated, plan.stack.table(plan, 1, q.device)


def _remember_validity(layer: AttachedLayer, keys: KeyRange) -> None:
    """Keep which keys count: a decode step's mask says only where a row begins.

    Of a static cache only the tokens that are there: the mask has its whole room.
    """
    if torch.compiler.is_compiling():
        return
    validity = keys.validity
    if validity is not None and isinstance(layer, KVSelectStaticLayer):
        validity = validity[:, : int(keys.ends[0])]
    layer.validity = validity


def _one_call_cache(key: Tensor, value: Tensor, keys: KeyRange, sketch: str | None) -> KVCache:
    """A cache for a call without one: ``key`` and ``value`` are all there is."""
    batch, num_kv_heads, seqlen_k = key.shape[:3]
    head_dim = stored_head_dim(key.shape[-1], value.shape[-1])
    assert head_dim is not None  # attach refused the layer otherwise
    cache = KVCache(
        batch,
        num_kv_heads,
        head_dim,
        dtype=key.dtype,
        device=key.device,
        capacity=seqlen_k,
        sketch=sketch,
    )
    cache.set_starts(keys.starts)
    k, v = (filled_up(x, head_dim).transpose(1, 2) for x in (key, value))
    cache.append(k, v)
    return cache


def _rotated_back(plan: LayerPlan, q: Tensor, cache: KVCache) -> Tensor:
    """The queries of a prefill call before RoPE, in their dtype.

    By index, not by position_ids: the policy rotates block means to their index, and the two must
    cancel for the means to meet the rotated keys, whatever positions a row starts at.
    """
    inverse = plan.stack.inverse(plan, q.device)
    seqlen_q = q.shape[1]
    index = torch.arange(cache.max_seqlen - seqlen_q, cache.max_seqlen, device=q.device)[None]
    if cache.starts is not None:
        index = index - cache.starts[:, None]
    back = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for begin in range(0, seqlen_q, QUERIES_AT_ONCE):
        part = slice(begin, begin + QUERIES_AT_ONCE)
        back[:, part] = inverse.rotate_at(q[:, part], -index[:, part])
    return back


class _ForwardOnly(torch.autograd.Function):
    """Passes the result on and refuses to differentiate: our ops have no gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "backward: got a gradient through kvselect attention, allowed: forward only (call "
            "handle.detach() to train)"
        )
