"""Logits that a model bounds before its softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(logits / softcap)``; None: as they are.

    What is not finite becomes NaN: the cap would make an ordinary number of an infinite logit.
    """
    if softcap is None:
        return logits
    return (softcap * (logits / softcap).tanh()).where(logits.isfinite(), torch.nan)
