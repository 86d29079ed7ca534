"""Checks of what every function of a layer is given: queries, scale, rotation and lists."""

from __future__ import annotations

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.checks import (
    require,
    require_float,
    require_scale,
    require_tensor,
    require_type,
)
from kvselect.rope import Rope
from kvselect.selection import Selection

__all__ = [
    "raise_if_not_finite",
    "require_compact_rope",
    "require_queries",
    "require_rope",
    "require_selection",
    "require_sink_logits",
    "require_softcap",
    "require_softmax_scale",
]


def require_queries(q: object, cache: object) -> None:
    """``q`` is [batch, seqlen_q, num_q_heads, head_dim] of this cache, whole groups of heads."""
    require_type(cache, KVCache, "cache", "a kvselect.KVCache")
    assert isinstance(cache, KVCache)
    require_tensor(q, "q", (cache.batch, None, None, cache.head_dim), (cache.dtype,), cache.device)
    assert isinstance(q, Tensor)
    tracked = q.requires_grad and torch.is_grad_enabled()
    allowed = "no gradient: the ops have none (use torch.no_grad() or q.detach())"
    require(not tracked, "q", "a tensor that requires grad", allowed)
    num_q_heads, num_kv_heads = q.shape[2], cache.num_kv_heads
    if num_q_heads == 0 or num_q_heads % num_kv_heads:
        allowed = f"a multiple of num_kv_heads = {num_kv_heads}"
        require(False, "num_q_heads", num_q_heads, allowed)


def require_softmax_scale(softmax_scale: float | None, head_dim: int) -> float:
    """The scale to use; None stands for ``head_dim ** -0.5``."""
    if softmax_scale is None:
        return float(head_dim**-0.5)
    return require_scale(softmax_scale, "softmax_scale")


def require_softcap(softcap: float | None) -> float:
    """The cap as the ops take it: 0 stands for None."""
    if softcap is None:
        return 0.0
    allowed = "None or a float in 1e-6 .. 1e6"
    cap = require_float(softcap, "softcap", allowed)
    require(1e-6 <= cap <= 1e6, "softcap", softcap, allowed)
    return cap


def require_sink_logits(sink_logits: object, num_q_heads: int, cache: KVCache) -> None:
    """``sink_logits`` is None, or one float32 number per query head where the cache lies."""
    if sink_logits is not None:
        require_tensor(sink_logits, "sink_logits", (num_q_heads,), (torch.float32,), cache.device)


def require_rope(rope: object, cache: KVCache) -> None:
    """``rope`` is None, or lies where the cache lies and rotates channels that it has."""
    if rope is None:
        return
    require_type(rope, Rope, "rope", "a kvselect.Rope or None")
    assert isinstance(rope, Rope)
    require(rope.cos.device == cache.device, "rope", rope.cos.device, f"device {cache.device}")
    stop = rope.start + 2 * rope.num_pairs
    require(stop <= cache.head_dim, "rope", f"rotated channels to {stop}", f"<= {cache.head_dim}")


def require_compact_rope(rope: Rope | None, capacity: int) -> None:
    """Compact positions need the model's rotation, with a position for every rank of a list."""
    if rope is None:
        raise ValueError(
            "rope: got None, allowed: a kvselect.Rope (positions='compact' rotates keys by rank; a "
            "layer without RoPE wants positions='original')"
        )
    allowed = f"at most {rope.num_positions} (positions of rope) with positions='compact'"
    require(capacity <= rope.num_positions, "capacity", capacity, allowed)


def require_selection(selection: object, cache: KVCache, seqlen_q: int) -> None:
    """``selection`` has lists for every row, block and KV head of this call."""
    require_type(selection, Selection, "selection", "a kvselect.Selection")
    assert isinstance(selection, Selection)
    offsets = selection.q_block_offsets
    shape: tuple[int, ...] = (cache.batch, cache.num_kv_heads)
    if offsets is not None:
        require_tensor(offsets, "q_block_offsets", (None,), (torch.int32,), cache.device)
        shape = (cache.batch, max(offsets.shape[0] - 1, 0), cache.num_kv_heads)
    elif isinstance(selection.indices, Tensor) and selection.indices.dim() == 4:
        shape = (cache.batch, 1, cache.num_kv_heads)
    integers = (torch.int32,)
    require_tensor(selection.indices, "indices", (*shape, None), integers, cache.device)
    require_tensor(
        selection.topk_length,
        "topk_length",
        shape,
        integers,
        cache.device,
        contiguous_last_dim=False,
    )
    require(seqlen_q > 0 or offsets is None, "seqlen_q", seqlen_q, "an int >= 1 with query blocks")


def raise_if_not_finite(q: Tensor, cache: KVCache) -> None:
    """ValueError naming how many queries or cached tokens hold NaN or inf, and where.

    The one place where the functional API reads these flags back from the device.
    """
    bad_queries = (~q.isfinite()).any(-1).sum(1)
    for name, what, counts in (
        ("q", "queries", bad_queries),
        ("cache", "appended tokens", cache.num_nonfinite),
    ):
        places = counts.nonzero().tolist()
        if places:
            row, head = places[0]
            total = int(counts.sum())
            got = f"{total} {what} with NaN or inf (first in row {row}, head {head})"
            raise ValueError(f"{name}: got {got}, allowed: finite values")
