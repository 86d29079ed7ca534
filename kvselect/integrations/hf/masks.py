"""What each query may see, in a form whose size never grows with queries times keys.

``key_range_mask`` is registered with transformers as the mask function of the name "kvselect";
``read_mask`` turns what arrives at the attention function back into words; ``visible_block`` spells
it out as a boolean mask for a few queries at a time, for layers that run dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

MaskKind = Literal["causal", "sliding", "foreign"]


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Which keys exist for each row; causality and a sliding window come on top.

    Attributes
    ----------
    starts : Tensor, [batch], int32, contiguous
        First valid key: left padding ends here and sinks count from here [tokens].
    ends : Tensor, [batch], int32
        Number of keys written. Never taken from the keys' shape: a static cache shows its whole
        capacity.
    validity : Tensor, [batch, seqlen_k], bool, or None
        Given only when padding has holes (right or middle padding): which keys count.
    """

    starts: Tensor
    ends: Tensor
    validity: Tensor | None


def mask_kind(mask_function: Callable[..., Any]) -> MaskKind:
    """Recognise the pattern that transformers asks for.

    The composed patterns are anonymous closures, so the sliding one is recognised by its parts:
    exactly a sliding-window overlay and the causal function. Everything else (chunked, packed,
    bidirectional, user overlays) is foreign. tests/test_hf_masks.py guards this reading against
    changes in transformers.
    """
    if mask_function is causal_mask_function:
        return "causal"
    if getattr(mask_function, "__qualname__", "").startswith("and_masks."):
        closure: tuple[Any, ...] = getattr(mask_function, "__closure__", None) or ()
        parts = closure[0].cell_contents if len(closure) == 1 else ()
        if (
            isinstance(parts, tuple)
            and len(parts) == 2
            and getattr(parts[0], "__qualname__", "").startswith("sliding_window_overlay.")
            and parts[1] is causal_mask_function
        ):
            return "sliding"
    return "foreign"


def key_range_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """Mask function of the attention name "kvselect": the range of keys of each row.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
        Sizes of this call [tokens].
    q_offset : int or Tensor, 0-d
        Tokens before the first query; a device tensor for static caches.
    kv_offset : int
        Position of the first key that the cache layer shows: sliding layers forget the rest, and
        `KVSelectPrefixLayer` keeps a shared prefix apart, of which a causal range says nothing.
    mask_function : callable
        The pattern; see `mask_kind`.
    attention_mask : Tensor, [batch, width], bool, or None
        True for real tokens.

    Returns
    -------
    Tensor
        int32 ``[batch, 1, 1, 2]``: start and end of each row in coordinates of the shown keys; or
        int32 ``[batch, 1, 1, 2 + kv_length]``: the same, then the validity of each key; or, for a
        foreign pattern, bool ``[batch, 1, q_length, kv_length]``.

    Notes
    -----
    The result has four dimensions because ``generate`` may build it before the forward pass, which
    lets only 4-D masks through untouched; it is int32 because boolean and float masks of any shape
    may come from elsewhere. Off the CPU, holes are looked for only when ``q_length > 1``: that
    reads one flag back from the device, which a decode step must not do. The cache layer remembers
    the holes of its rows (`KVSelectLayer.validity`).
    """
    kind = mask_kind(mask_function)
    if kind == "foreign":
        kwargs["allow_is_causal_skip"] = (
            False  # never None: a missing mask would be read as "nothing is masked"
        )
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **kwargs,
        )
    end = q_offset + q_length - kv_offset
    if attention_mask is None:
        if isinstance(end, int):  # filled on the device: copies nothing to it
            ends = torch.full((batch_size,), end, dtype=torch.int32, device=device)
        else:
            ends = end.to(torch.int32).reshape(1).expand(batch_size)
        return _pack(torch.zeros_like(ends), ends, None)

    if kind == "causal" and kv_offset:  # padding lies between the prefix and a row's own tokens
        attention_mask = attention_mask[:, kv_offset:]
        q_offset, kv_offset = q_offset - kv_offset, 0
    width = attention_mask.shape[-1]
    # argmax says 0 for a row without a real token, which in chunked prefill may well be all padding
    # so far.
    first = torch.where(attention_mask.any(-1), attention_mask.int().argmax(-1), width)
    starts = (first - kv_offset).clamp(min=0).to(torch.int32)
    ends = torch.zeros_like(starts) + end
    too_short = isinstance(q_offset, int) and width < q_offset + q_length
    wide = (
        kind == "sliding"
        or too_short
        or (
            (q_length > 1 or attention_mask.device.type == "cpu")
            and _has_holes(attention_mask, first, q_offset, q_length)
        )
    )
    if not wide:
        return _pack(starts, ends, None)
    shown = attention_mask[:, kv_offset : kv_offset + kv_length]
    return _pack(starts, ends, torch.nn.functional.pad(shown, (0, kv_length - shown.shape[-1])))


def _has_holes(
    attention_mask: Tensor, first: Tensor, q_offset: int | Tensor, q_length: int
) -> bool:
    """Whether any row has padding after its first real token (one read-back)."""
    end = q_offset + q_length if isinstance(q_offset, int) else attention_mask.shape[-1]
    real = attention_mask[:, :end]
    return bool((real.sum(-1) != (real.shape[-1] - first).clamp(min=0)).any())


def _pack(starts: Tensor, ends: Tensor, validity: Tensor | None) -> Tensor:
    bounds = torch.stack((starts, ends), dim=-1)
    parts = bounds if validity is None else torch.cat((bounds, validity.to(torch.int32)), dim=-1)
    return parts[:, None, None, :]


def read_mask(attention_mask: Tensor | None) -> KeyRange | Tensor:
    """The key range that a mask carries, or the mask itself where it is not one of ours.

    Raises
    ------
    TypeError
        If the mask is not a 4-D tensor: then our mask function was not asked, and padding would be
        ignored.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
        shape = getattr(attention_mask, "shape", None)
        got = type(attention_mask).__name__ if shape is None else f"shape {tuple(shape)}"
        allowed = "what the mask function of the name kvselect gives, or a 4-D bool or float tensor"
        raise TypeError(f"attention_mask: got {got}, allowed: {allowed}")
    if attention_mask.dtype != torch.int32 or attention_mask.shape[1:3] != (1, 1):
        return attention_mask
    rows = attention_mask[:, 0, 0]
    validity = rows[:, 2:].bool() if rows.shape[-1] > 2 else None
    return KeyRange(starts=rows[:, 0].contiguous(), ends=rows[:, 1], validity=validity)


def visible_block(
    keys: KeyRange,
    seqlen_q: int,
    seqlen_k: int,
    begin: int,
    end: int,
    sliding_window: int | None = None,
) -> Tensor:
    """Which keys the queries ``[begin, end)`` of a call see.

    Returns
    -------
    Tensor, [batch, 1, end - begin, seqlen_k], bool
        True where ``start <= key <= position of the query``, the key counts, and it lies in the
        sliding window.
    """
    device = keys.starts.device
    key = torch.arange(seqlen_k, dtype=torch.int32, device=device)
    query = torch.arange(begin - seqlen_q, end - seqlen_q, dtype=torch.int32, device=device)
    position = (keys.ends[:, None] + query)[:, :, None]
    visible = (key <= position) & (key >= keys.starts[:, None, None])
    if sliding_window is not None:
        visible &= key > position - sliding_window
    if keys.validity is not None:
        visible &= keys.validity[:, None, :]
    return visible[:, None]
