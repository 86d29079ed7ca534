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

    Returns
    -------
    Tensor, [batch, seqlen_q, num_q_heads, head_dim], contiguous; 0 where a query sees nothing
    """
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if isinstance(keys, Tensor):
        return _sdpa(module, query, key, value, keys[..., :seqlen_k], softmax_scale)
    if (
        keys.validity is None
        and sliding_window is None
        and seqlen_q == seqlen_k
        and not bool(keys.starts.any())
    ):
        return _sdpa(module, query, key, value, None, softmax_scale)
    rows = max(1, MASK_BYTES // (query.shape[0] * seqlen_k))
    parts = []
    for begin in range(0, seqlen_q, rows):
        end = min(begin + rows, seqlen_q)
        visible = visible_block(keys, seqlen_q, seqlen_k, begin, end, sliding_window)
        parts.append(_sdpa(module, query[:, :, begin:end], key, value, visible, softmax_scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def rotate_by_index(x: Tensor, keys: KeyRange, rope: Rope) -> Tensor:
    """Un-rotated queries or keys as they are at their index: the number of valid keys before them.

    Parameters
    ----------
    x : Tensor, [batch, heads, tokens, head_dim]
        The last ``tokens`` of each row's ``seqlen_k`` keys.
    keys : KeyRange
        With ``validity``.

    Raises
    ------
    ValueError
        If an index lies beyond the table, which ends at the model's trained length.
    """
    assert keys.validity is not None
    valid = keys.validity.clone()
    valid &= torch.arange(valid.shape[1], device=valid.device) >= keys.starts[:, None]
    index = (valid.cumsum(-1) - valid.long())[:, -x.shape[2] :]
    longest = int(index.max()) + 1
    allowed = (
        f"at most {rope.num_positions} (positions='compact' runs dense with holes in the padding)"
    )
    require(longest <= rope.num_positions, "tokens in a row", longest, allowed)
    return rope.rotate(x.transpose(1, 2), index).transpose(1, 2).to(x.dtype)


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
