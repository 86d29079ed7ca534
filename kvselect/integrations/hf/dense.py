"""Dense attention for layers and calls that do not select: SDPA, masked some queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvselect.checks import require
from kvselect.integrations.hf.masks import KeyRange, visible_block
from kvselect.rope import Rope

MASK_BYTES = 1 << 26
"""Largest boolean mask made at once [bytes]; longer calls run in runs of queries."""


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: KeyRange | Tensor,
    softmax_scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention over every key that the mask allows, by transformers' own SDPA function.

    Parameters
    ----------
    module : nn.Module
        The attention module (its ``num_key_value_groups``).
    query : Tensor, [batch, num_q_heads, seqlen_q, head_dim]
    key, value : Tensor, [batch, num_kv_heads, seqlen_k, head_dim]
    keys : KeyRange, or Tensor [.., .., seqlen_q, seqlen_k] bool or additive float
        The latter is somebody else's mask, used as it is.
    sliding_window : int or None
        Keys that a query sees, itself included.
    softcap : float or None
        Logits become ``softcap * tanh(logits / softcap)``; SDPA knows no such thing, so they are
        formed here.
    sink_logits : Tensor, [num_q_heads], float32, or None
        One more logit per head in the denominator; as above.

    Returns
    -------
    Tensor, [batch, seqlen_q, num_q_heads, head_dim], contiguous; 0 where a query sees nothing
    """
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    batch = query.shape[0]
    plain = softcap is None and sink_logits is None
    if isinstance(keys, Tensor) and plain:
        return _sdpa(module, query, key, value, keys[..., :seqlen_k], softmax_scale)
    if (
        plain
        and isinstance(keys, KeyRange)
        and keys.validity is None
        and sliding_window is None
        and seqlen_q == seqlen_k
        and not bool(keys.starts.any())
    ):
        return _sdpa(module, query, key, value, None, softmax_scale)
    bytes_per_row = batch * seqlen_k * (1 if plain else 4 * query.shape[1])
    rows = max(1, MASK_BYTES // max(bytes_per_row, 1))
    parts = []
    for begin in range(0, seqlen_q, rows):
        end = min(begin + rows, seqlen_q)
        if isinstance(keys, Tensor):
            every_row = keys.shape[-2] == 1
            visible = keys[..., 0 if every_row else begin : 1 if every_row else end, :seqlen_k]
        else:
            visible = visible_block(keys, seqlen_q, seqlen_k, begin, end, sliding_window)
        q = query[:, :, begin:end]
        if plain:
            parts.append(_sdpa(module, q, key, value, visible, softmax_scale))
        else:
            parts.append(
                _modified_softmax(q, key, value, visible, softmax_scale, softcap, sink_logits)
            )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def rotate_by_index(x: Tensor, keys: KeyRange, rope: Rope) -> Tensor:
    """Un-rotated queries or keys as they are at their index: the number of valid keys before them.

    Parameters
    ----------
    x : Tensor, [batch, heads, tokens, head_dim]
        The keys, all that are shown, or the queries of the last ``tokens`` of each row.
    keys : KeyRange
        With ``validity``.

    Raises
    ------
    ValueError
        If an index lies beyond the table, which ends at the model's trained length.
    """
    assert keys.validity is not None
    valid = keys.validity.clone()
    place = torch.arange(valid.shape[1], device=valid.device)
    valid &= (place >= keys.starts[:, None]) & (place < keys.ends[:, None])
    index = valid.cumsum(-1) - valid.long()
    if x.shape[2] < valid.shape[1]:  # a static cache has room after the newest token
        newest = keys.ends[:, None] + torch.arange(-x.shape[2], 0, device=valid.device)
        index = index.gather(1, newest.clamp(min=0))
    longest = int(index.max()) + 1
    allowed = (
        f"at most {rope.num_positions} (positions='compact' runs dense with holes in the padding)"
    )
    require(longest <= rope.num_positions, "tokens in a row", longest, allowed)
    return rope.rotate(x.transpose(1, 2), index).transpose(1, 2).to(x.dtype)


def _modified_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    softmax_scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """`dense_attention` of some queries, logit by logit in float32."""
    num_kv_heads = key.shape[1]
    q = torch.unflatten(
        query.float(), 1, (num_kv_heads, -1)
    )  # [batch, kv_head, group, query, channel]
    logits = softmax_scale * (q @ key.float().unsqueeze(2).mT)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if mask.shape[1] > 1:
        mask = torch.unflatten(mask, 1, (num_kv_heads, -1))
    else:
        mask = mask.unsqueeze(2)
    logits = (
        logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    )
    lse = logits.logsumexp(-1, keepdim=True)
    if sink_logits is not None:
        lse = lse.logaddexp(sink_logits.view(num_kv_heads, -1, 1, 1))
    # Of -inf - -inf only: a query without keys, and without a sink.
    weights = (logits - lse).exp().masked_fill(lse == -torch.inf, 0.0)
    out = weights @ value.float().unsqueeze(2)
    return out.flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous()


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    out: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, mask, dropout=0.0, scaling=softmax_scale, is_causal=mask is None
    )[0]
    return out
