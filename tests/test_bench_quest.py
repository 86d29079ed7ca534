"""Ideal Quest: its bounds bound, its lists are whole pages, both scorers pick alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvselect import KVCache, recovered_mass, reference
from kvselect.bench.quest import PAGE_TOKENS, Quest, Scorer, page_bounds, signed_parts
from kvselect.testing import TOLERANCE, make_qkv, rel_err

SCORERS: tuple[Scorer, ...] = ("kvselect", "torch")


@settings(deadline=None, max_examples=40)
@given(
    pages=st.integers(1, 4),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 8, 33]),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 2**31),
)
def test_a_bound_is_at_least_every_logit_of_its_page(
    pages: int, heads: int, head_dim: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = scale * torch.randn(heads, pages * PAGE_TOKENS, head_dim, generator=generator)
    q = torch.randn(heads, 4, head_dim, generator=generator)
    k, q = k.double(), q.double()
    bounds = signed_parts(q) @ page_bounds(k).transpose(1, 2)
    logits = torch.unflatten(q @ k.transpose(1, 2), -1, (pages, PAGE_TOKENS))
    slack = 1e-12 * scale * head_dim
    assert bool((bounds[..., None] >= logits - slack).all())
    # Not any bound: the published one, met by a page of equal keys.
    equal = k[:, :1].expand(-1, PAGE_TOKENS, -1)
    tight = signed_parts(q) @ page_bounds(equal).transpose(1, 2)
    assert rel_err(tight, q @ equal[:, :1].transpose(1, 2)) <= 1e-12


def filled(num_tokens: int, head_dim: int = 32) -> tuple[Tensor, KVCache]:
    q, k, v = make_qkv(1, 1, num_tokens, 8, 2, head_dim)
    cache = KVCache(1, 2, head_dim, capacity=num_tokens, sketch=None)
    cache.append(k, v)
    return q, cache


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("num_tokens", [48, 49, 63, 64, 161])
@pytest.mark.parametrize("num_pages", [3, 4])
def test_lists_are_whole_pages_and_the_last_one(
    scorer: Scorer, num_tokens: int, num_pages: int
) -> None:
    q, cache = filled(num_tokens)
    quest = Quest(cache, scorer)
    num_pages = min(num_pages, quest.num_pages)
    selection = quest.select(q, num_pages)
    last = range(16 * ((num_tokens - 1) // 16), num_tokens)
    for head in range(2):
        count = int(selection.topk_length[0, head])
        listed = selection.indices[0, head, :count].tolist()
        assert bool((selection.indices[0, head, count:] == -1).all())
        assert count == 16 * (num_pages - 1) + len(last)
        assert listed == sorted(set(listed)) and listed[-len(last) :] == list(last)
        pages = listed[: -len(last)]
        assert all(pages[at] % 16 == at % 16 for at in range(len(pages)))


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_pages_picked_are_the_best(scorer: Scorer) -> None:
    """Against the published definition, in float64 and page by page."""
    q, cache = filled(16 * 20)
    k = cache.k[0].double()
    rows = q[0, 0].double().view(2, 4, 32)
    for head in range(2):
        votes = torch.zeros(19, dtype=torch.float64)
        for row in rows[head]:
            bound = []
            for page in range(19):
                keys = k[16 * page : 16 * page + 16, head]
                low, high = keys.amin(0), keys.amax(0)
                bound.append(32**-0.5 * torch.maximum(row * low, row * high).sum())
            votes += torch.softmax(torch.stack(bound), 0)
        best = sorted(votes.topk(6).indices.tolist())
        selection = Quest(cache, scorer).select(q, 7)
        pages = selection.indices[0, head, : 16 * 6 : 16] // 16
        assert pages.tolist() == best


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_step_is_attention_over_its_list(scorer: Scorer) -> None:
    q, cache = filled(333)
    quest = Quest(cache, scorer)
    expected, _ = reference.sparse_attention(q, cache, quest.select(q, 5))
    assert rel_err(quest.step(q, 5), expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("scorer", SCORERS)
def test_all_pages_are_dense_attention(scorer: Scorer) -> None:
    q, cache = filled(90)
    quest = Quest(cache, scorer)
    expected, _ = reference.sparse_attention(q, cache)
    assert rel_err(quest.step(q, quest.num_pages), expected) <= TOLERANCE[torch.float32]


def test_more_pages_keep_more_mass() -> None:
    q, cache = filled(640)
    quest = Quest(cache, "torch")
    masses = [float(recovered_mass(q, cache, quest.select(q, n)).mean()) for n in range(3, 41)]
    assert masses == sorted(masses) and masses[-1] == pytest.approx(1.0, abs=1e-5)


def test_what_a_step_reads_first_is_two_vectors_per_whole_page() -> None:
    _, cache = filled(16 * 7 + 1)
    assert Quest(cache, "torch").metadata_bytes == 7 * 2 * 2 * 32 * 4


def test_refusals() -> None:
    _, short = filled(32)
    with pytest.raises(ValueError, match="tokens: got 32, allowed: at least three pages of 16"):
        Quest(short, "torch")
    _, wide = filled(64, head_dim=160)
    assert not Quest.can_score_with_kvselect(160)
    with pytest.raises(ValueError, match="head-dim: got 160, allowed: 16 or 32 or 40 or 48 or 64"):
        Quest(wide, "kvselect")
