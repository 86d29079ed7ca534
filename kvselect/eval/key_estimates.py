"""What ranks tokens or pages in place of the keys: sketches and bounds of several methods.

Each gives an estimate of the soft votes, so that all of them are judged by one measure
(`fidelity.py`). Plain formulas for study: kvselect's kernels run "none", "int8" and "int4" only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvselect.checks import require, require_choice
from kvselect.sketch import BLOCK_TOKENS, decode, encode

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "Scorer",
    "find_estimators",
    "group_votes",
    "high_plane",
    "soft_capped",
]

PLANES_FILTER = 8  # times topk that pass the high plane, METHODS 1.4
CHANNEL_SHARE = 8  # one channel in so many is kept: 16 of 128


def soft_capped(logits: Tensor, softcap: float) -> Tensor:
    """``softcap * tanh(logits / softcap)``; 0: as they are."""
    return softcap * (logits / softcap).tanh() if softcap else logits


def group_votes(logits: Tensor) -> Tensor:
    """Soft votes, summed over a group's heads: [..., group_size, units] to [..., units]."""
    return logits.softmax(-1).sum(-2)


# (q [queries, num_kv_heads, group_size, head_dim]) -> votes [queries, num_kv_heads, units]
Scorer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """One way to rank.

    Attributes
    ----------
    name : str
    page_tokens : int
        Tokens that are kept or dropped together.
    bytes_per_token : (head_dim, topk share) -> float
        Read per token and KV head to rank; keys and what is kept of them in 2 bytes. The share is
        topk over all tokens.
    prepare : (k, topk, scale, softcap) -> Scorer
        ``k`` [tokens, num_kv_heads, head_dim], whole blocks of 128.
    """

    name: str
    page_tokens: int
    bytes_per_token: Callable[[int, float], float]
    prepare: Callable[[Tensor, int, float, float], Scorer]


def _logits(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """[queries, num_kv_heads, group_size, units] of keys [units, num_kv_heads, head_dim]."""
    return soft_capped(scale * torch.einsum("qgjd,tgd->qgjt", q, k), softcap)


def _by_keys(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int, float, float], Scorer]:
    """Votes of stand-ins for the keys, [units, num_kv_heads, head_dim]."""

    def prepare(k: Tensor, topk: int, scale: float, softcap: float) -> Scorer:
        stand_in = make(k)
        return lambda q: group_votes(_logits(q, stand_in, scale, softcap))

    return prepare


def _blocks(k: Tensor) -> Tensor:
    """[num_blocks, num_kv_heads, 128, head_dim], as the codec takes them."""
    whole = k.shape[0] % BLOCK_TOKENS == 0
    require(whole, "tokens", k.shape[0], f"a multiple of {BLOCK_TOKENS}")
    return k.unflatten(0, (-1, BLOCK_TOKENS)).transpose(1, 2)  # type: ignore[no-untyped-call]


def _coded(sketch: str) -> Callable[[Tensor], Tensor]:
    def make(k: Tensor) -> Tensor:
        seen = decode(encode(_blocks(k), sketch), sketch, k.shape[-1])
        return seen.transpose(1, 2).flatten(0, 1).to(k.dtype)

    return make


def high_plane(k: Tensor) -> Tensor:
    """Keys as the two high bits of the int4 codes give them: the middle of the four codes that
    share these bits, ``lo + step * (4 * (code // 4) + 1.5)``."""
    blocks = _blocks(k).float()
    low, high = blocks.aminmax(dim=2, keepdim=True)
    step, lo = ((high - low) / 15).half().float(), low.half().float()
    code = ((blocks - lo) / step.where(step > 0, torch.ones(()))).round().clamp(0, 15)
    code = code.where(step > 0, torch.zeros(()))
    middle = lo + step * (4 * (code / 4).floor() + 1.5)
    return middle.transpose(1, 2).flatten(0, 1).to(k.dtype)


def _planes(k: Tensor, topk: int, scale: float, softcap: float) -> Scorer:
    """The high plane filters, the whole code ranks what passes."""
    coarse, fine = high_plane(k), _coded("int4")(k)

    def score(q: Tensor) -> Tensor:
        filtered = group_votes(_logits(q, coarse, scale, softcap))
        passed = filtered.topk(min(PLANES_FILTER * topk, k.shape[0])).indices
        votes = group_votes(_logits(q, fine, scale, softcap))
        return torch.zeros_like(votes).scatter(-1, passed, votes.gather(-1, passed))

    return score


def _pages(k: Tensor, page_tokens: int) -> Tensor:
    return k.unflatten(0, (-1, page_tokens))  # type: ignore[no-untyped-call]


def _bounds(k: Tensor, topk: int, scale: float, softcap: float) -> Scorer:
    """Quest: ``sum_d max(q_d * low_d, q_d * high_d)``, at least every logit of the page."""
    low, high = _pages(k, 16).aminmax(dim=1)

    def score(q: Tensor) -> Tensor:
        logits = torch.einsum("qgjd,tgd->qgjt", q.clamp(min=0), high)
        logits = logits + torch.einsum("qgjd,tgd->qgjt", q.clamp(max=0), low)
        return group_votes(soft_capped(scale * logits, softcap))

    return score


def _channels(k: Tensor, topk: int, scale: float, softcap: float) -> Scorer:
    """Double Sparsity: products over the channels whose keys are largest in the mean, chosen once
    per KV head (arXiv:2408.07092, by key)."""
    count = max(1, k.shape[-1] // CHANNEL_SHARE)
    picked = k.abs().mean(0).topk(count).indices  # [num_kv_heads, count]
    some = k.gather(2, picked.expand(k.shape[0], -1, -1))

    def score(q: Tensor) -> Tensor:
        own = q.gather(3, picked[:, None].expand(*q.shape[:3], -1))
        return group_votes(_logits(own, some, scale, softcap))

    return score


_HEADER = 4 / BLOCK_TOKENS  # steps and lows in fp16, bytes per channel and token

ESTIMATORS = {
    one.name: one
    for one in (
        Estimator(
            name="none",
            page_tokens=1,
            bytes_per_token=lambda dim, share: 2.0 * dim,
            prepare=_by_keys(lambda k: k),
        ),
        Estimator(
            name="int8",
            page_tokens=1,
            bytes_per_token=lambda dim, share: (1 + _HEADER) * dim,
            prepare=_by_keys(_coded("int8")),
        ),
        Estimator(
            name="int4",
            page_tokens=1,
            bytes_per_token=lambda dim, share: (0.5 + _HEADER) * dim,
            prepare=_by_keys(_coded("int4")),
        ),
        Estimator(
            name="int4 planes",
            page_tokens=1,
            bytes_per_token=lambda dim, share: (
                (0.25 + _HEADER + 0.25 * min(1.0, PLANES_FILTER * share)) * dim
            ),
            prepare=_planes,
        ),
        Estimator(
            name="high plane",
            page_tokens=1,
            bytes_per_token=lambda dim, share: (0.25 + _HEADER) * dim,
            prepare=_by_keys(high_plane),
        ),
        Estimator(
            name="channels",
            page_tokens=1,
            bytes_per_token=lambda dim, share: 2.0 * max(1, dim // CHANNEL_SHARE),
            prepare=_channels,
        ),
        Estimator(
            name="bounds 16",
            page_tokens=16,
            bytes_per_token=lambda dim, share: 2 * 2.0 * dim / 16,
            prepare=_bounds,
        ),
        Estimator(
            name="mean 16",
            page_tokens=16,
            bytes_per_token=lambda dim, share: 2.0 * dim / 16,
            prepare=_by_keys(lambda k: _pages(k, 16).mean(1)),
        ),
        Estimator(
            name="mean 64",
            page_tokens=64,
            bytes_per_token=lambda dim, share: 2.0 * dim / 64,
            prepare=_by_keys(lambda k: _pages(k, 64).mean(1)),
        ),
    )
}


def find_estimators(names: list[str]) -> list[Estimator]:
    """By their names.

    Raises
    ------
    ValueError
        Naming the first that is none.
    """
    for name in names:
        require_choice(name, "sketches", tuple(ESTIMATORS))
    return [ESTIMATORS[name] for name in names]
