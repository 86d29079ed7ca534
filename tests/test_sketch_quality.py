"""What a sketch may lose: recall, kept mass and the heaviest miss on synthetic keys (simulated).

The bars are those that the default setting leans on: int4 with 1.5 times topk finds at least 99.5 %
of the exact top-k, int4 with 1.25 times topk keeps at least the mass of the exact top-k, and no
missed token scores more than 1.5 times the exact threshold.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from op_calls import Case, int32, make_case, score, select
from torch import Tensor

from kvselect.reference import QueryBlocks
from kvselect.testing import structured_keys

pytestmark = pytest.mark.usefixtures("implementation")

SEQLEN, SINKS, RECENT = 8192, 64, 128
NUM_KV_HEADS, GROUP_SIZE = 2, 4


@cache
def structured(*, head_dim: int, rotated: bool, gaussian: bool, seed: int) -> tuple[Tensor, Tensor]:
    if gaussian:
        generator = torch.Generator().manual_seed(seed)
        k = torch.randn(SEQLEN, NUM_KV_HEADS, head_dim, generator=generator)
        q = 2.2 * torch.randn(NUM_KV_HEADS * GROUP_SIZE, head_dim, generator=generator)
        return q, k
    return structured_keys(SEQLEN, NUM_KV_HEADS, GROUP_SIZE, head_dim, rotated=rotated, seed=seed)


@cache
def structured_case(sketch: str, **keys: Any) -> tuple[Tensor, Case]:
    q, k = structured(**keys)
    return q, make_case(k[None], k[None], int32(SEQLEN), sketch=sketch)


class Scored:
    """Exact and sketched scores of one synthetic layer, [num_kv_heads, seqlen]."""

    def __init__(self, sketch: str, **keys: Any) -> None:
        q, case = structured_case(sketch, **keys)
        seqlens = int32(SEQLEN)
        self.blocks = QueryBlocks(
            cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=SINKS, num_recent_tokens=RECENT
        )
        vectors = q[None, None, None]
        self.exact = score(case, vectors, self.blocks)[0][0, 0]
        self.sketched = score(case, vectors, self.blocks, sketch=True)[0][0, 0]

    def picked(self, scores: Tensor, keep: int) -> Tensor:
        """Mask [num_kv_heads, seqlen] of the candidates that the op picks."""
        indices, _, _ = select(
            scores[None, None], self.blocks, keep=keep, width=SINKS + keep + RECENT
        )
        mask = torch.zeros(NUM_KV_HEADS, SEQLEN, dtype=torch.bool)
        mask.scatter_(1, indices[0, 0].long(), True)
        mask[:, :SINKS] = mask[:, SEQLEN - RECENT :] = False
        assert (mask.sum(-1) == keep).all()
        return mask


KEYS = {
    "rotated": {"head_dim": 128, "rotated": True, "gaussian": False},
    "unrotated": {"head_dim": 128, "rotated": False, "gaussian": False},
    "rotated_64": {"head_dim": 64, "rotated": True, "gaussian": False},
}


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("topk", [128, 512])
def test_int4_finds_the_exact_top_k(keys: str, topk: int) -> None:
    found = wanted = 0
    for seed in (1, 2):
        scored = Scored("int4", **KEYS[keys], seed=seed)
        exact = scored.picked(scored.exact, topk)
        threshold = scored.exact.masked_fill(~exact, torch.inf).amin(-1)

        kept = scored.picked(scored.sketched, topk * 3 // 2)
        found, wanted = found + int((exact & kept).sum()), wanted + int(exact.sum())
        missed = scored.exact.masked_fill(~exact | kept, 0.0).amax(-1)
        assert (missed <= 1.5 * threshold).all()

        quarter_more = scored.picked(scored.sketched, topk * 5 // 4)
        mass = (scored.exact * quarter_more).sum(-1)
        assert (mass >= (scored.exact * exact).sum(-1)).all()
    assert found >= 0.995 * wanted


def test_int8_is_nearly_the_exact_top_k_without_more() -> None:
    scored = Scored("int8", **KEYS["rotated"], seed=3)
    exact, kept = (scored.picked(x, 512) for x in (scored.exact, scored.sketched))
    assert (exact & kept).sum() >= 0.98 * exact.sum()
    assert (scored.exact * kept).sum() >= 0.9999 * (scored.exact * exact).sum()


def test_plain_gaussian_keys() -> None:
    """No structure to help the sketch, and still within a hair of the bars."""
    scored = Scored("int4", head_dim=128, rotated=False, gaussian=True, seed=4)
    exact = scored.picked(scored.exact, 512)
    threshold = scored.exact.masked_fill(~exact, torch.inf).amin(-1)
    kept = scored.picked(scored.sketched, 768)
    assert (exact & kept).sum() >= 0.99 * exact.sum()
    assert (scored.exact.masked_fill(~exact | kept, 0.0).amax(-1) <= 1.5 * threshold).all()
    quarter_more = scored.picked(scored.sketched, 640)
    assert (scored.exact * quarter_more).sum() >= (scored.exact * exact).sum()


@pytest.mark.parametrize(
    "places",
    [[200], [1023, 1024], [3071, 3072, 6143], [500, 2000, 3500, 5000], list(range(4080, 4112))],
    ids=["one", "straddling", "three_borders", "isolated", "thirty_two"],
)
def test_planted_needles_are_never_missed(places: list[int]) -> None:
    """Tokens that a query is made for, wherever they lie among blocks, at topk 512."""
    q, k = structured(head_dim=128, rotated=False, gaussian=False, seed=5)
    k = k.clone()
    for g in range(NUM_KV_HEADS):
        direction = q[g * GROUP_SIZE]
        logits = k[:, g] @ direction
        needed = (logits.max() - logits[places]).clamp_min(0.0)  # as heavy as the heaviest
        k[places, g] += needed[:, None] * direction / direction.square().sum()
    seqlens = int32(SEQLEN)
    case = make_case(k[None], k[None], seqlens, sketch="int4")
    blocks = QueryBlocks(
        cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=SINKS, num_recent_tokens=RECENT
    )
    scores = score(case, q[None, None, None], blocks, sketch=True)[0]
    indices, _, _ = select(scores, blocks, keep=512, width=1024)
    for g in range(NUM_KV_HEADS):
        assert torch.isin(torch.tensor(places), indices[0, 0, g].long()).all()
