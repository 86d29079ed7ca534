"""AdaSpa: blocks by exact mass, budgets by head, in prefill and where attention repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvselect import AdaSpa, Dense, KVCache, block_mass, decode_step, prefill, reference
from kvselect.block_masks import (
    BlockMask,
    apportioned_blocks,
    head_recall,
    head_recall_split,
    largest_blocks,
    needed_shares,
)
from kvselect.reference.block_masks import apportioned, needed_share
from kvselect.reference.block_masks import head_recall_split as plain_split
from kvselect.reference.block_masks import largest_blocks as plain_blocks
from kvselect.repeated_attention import RepeatedAttention
from kvselect.testing import make_qkv, rel_err

DIM, HEADS = 32, 2


def filled(
    seqlens: tuple[int, ...],
    seqlen_q: int,
    group: int = 2,
    starts: list[int] | None = None,
    page: int | None = None,
) -> tuple[Tensor, KVCache]:
    q, k, v = make_qkv(len(seqlens), seqlen_q, max(seqlens), group * HEADS, HEADS, DIM, seed=3)
    cache = KVCache(len(seqlens), HEADS, DIM, sketch=None, page_block_size=page)
    if starts is not None:
        cache.set_starts(starts)
    cache.append(k, v, list(seqlens))
    return q, cache


def small(**changes: Any) -> AdaSpa:
    options: dict[str, Any] = {
        "block_size": 16,
        "row_stride": 1,
        "num_sink_tokens": 16,
        "num_recent_tokens": 16,
        "dense_prefill_tokens": 0,
    }
    return AdaSpa(**(options | changes))


# ---- choosing


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 19), sparsity=st.floats(0.34, 0.97))
def test_choices_are_the_references(seed: int, width: int, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few values, so that there are ties.
    mass = torch.randint(0, 4, (2, 3, 4, width), generator=generator).float()
    mass[0, 0, 0, 0] = torch.nan
    visible = torch.randint(0, width + 1, (2, 4), generator=generator)
    seen = torch.arange(width) < visible[..., None]
    must = (torch.rand(2, 4, width, generator=generator) < 0.1) & seen
    per_head = torch.rand(2, 3, generator=generator) * sparsity
    mass = mass.masked_fill(~seen[:, None], 0.0)
    kept = largest_blocks(mass, per_head, visible, must)
    wanted = plain_blocks(mass, per_head, visible, must)
    for row in range(2):
        for head in range(3):
            for block in range(4):
                got = set(kept[row, head, block].nonzero()[:, 0].tolist())
                assert got == wanted[row][head][block]
    recall = torch.randint(0, 5, (2, 7), generator=generator) / 4
    split = head_recall_split(recall, sparsity, 0.5)
    for row in range(2):
        assert split[row].tolist() == pytest.approx(
            plain_split(recall[row].tolist(), sparsity, 0.5)
        )
    assert torch.allclose(split.mean(1), torch.tensor(sparsity).expand(2), atol=1e-6)
    packed = BlockMask.pack(kept, recall)
    assert torch.equal(packed.unpack(), kept) and packed.bits.shape[-1] == -(-width // 8)


def test_two_heads_that_both_recall_enough_do_not_overlap() -> None:
    split = head_recall_split(torch.tensor([[0.9, 0.95, 0.99]]), 0.8, 0.5)
    assert split[0].tolist() == pytest.approx([0.7, 0.8, 0.9])


def test_split_raises_the_least_recall_at_equal_total() -> None:
    """One head attends to few blocks, one to many: the first gives to the second."""
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(1, 2, 8, 40, generator=generator)
    mass[0, 0, :, 4:] *= 0.001
    visible, must = torch.full((1, 8), 40), torch.zeros(1, 8, 40, dtype=torch.bool)
    equal = small(recall_threshold=None).search(mass, visible, must)
    split = small(recall_threshold=0.8).search(mass, visible, must)
    assert equal.unpack().sum() == split.unpack().sum()
    assert split.recall.min() > equal.recall.min() + 0.05


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 12),
    sparsity=st.floats(0.34, 0.97),
    recall=st.sampled_from([0.3, 0.8, 0.99]),
)
def test_shares_in_proportion_are_the_references(
    seed: int, width: int, sparsity: float, recall: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.randint(0, 4, (2, 3, 4, width), generator=generator).float()
    mass[0, 0] = 0.0  # a head of which nothing was searched
    visible = torch.randint(0, width + 1, (2, 4), generator=generator)
    seen = torch.arange(width) < visible[..., None]
    must = (torch.rand(2, 4, width, generator=generator) < 0.1) & seen
    mass = mass.masked_fill(~seen[:, None], 0.0)
    need = needed_shares(mass, visible, must, recall)
    for row in range(2):
        for head in range(3):
            lines, own = mass[row, head].tolist(), (visible[row].tolist(), must[row].tolist())
            assert float(need[row, head]) == pytest.approx(needed_share(lines, *own, recall))
    none = torch.zeros_like(must)
    kept = apportioned_blocks(mass, need, sparsity, visible, none)
    uniform = largest_blocks(mass, torch.full((2, 3), sparsity), visible, none)
    assert torch.equal(kept.sum((1, 3)), uniform.sum((1, 3)))  # of all heads, in every q block
    for row in range(2):
        for block in range(4):
            total = int(uniform[row, :, block].sum())
            wanted = apportioned(need[row].tolist(), total, int(visible[row, block]))
            assert kept[row, :, block].sum(1).tolist() == wanted
    with_must = apportioned_blocks(mass, need, sparsity, visible, must)
    assert with_must[must[:, None].expand_as(mass)].all()


def heads_that(differ: str, seed: int) -> Tensor:
    """Masses [1, 8, 8, 40] of blocks; a head's sharpness is the scale of its logits."""
    generator = torch.Generator().manual_seed(seed)
    if differ == "are of drawn keys":
        q = torch.randn(1, 128, 8, DIM, generator=generator) * torch.linspace(0.5, 4, 8)[:, None]
        k = torch.randn(1, 640, HEADS, DIM, generator=generator)
        k += 2 * torch.randn(1, 40, HEADS, DIM, generator=generator).repeat_interleave(16, 1)
        return block_mass(q, k, q_block_size=16, kv_block_size=16, causal=False)
    sharpness = {
        "differ by degrees": torch.linspace(0.3, 4, 8),
        "differ in one broad head": torch.tensor([4.0, 4, 4, 0.3, 4, 4, 4, 4]),
        "differ in one sharp head": torch.tensor([0.5, 0.5, 0.5, 6, 0.5, 0.5, 0.5, 0.5]),
        "are alike": torch.full((8,), 2.0),
    }[differ]
    drawn = torch.randn(1, 8, 8, 40, generator=generator)
    return (drawn * sharpness[:, None, None]).softmax(-1)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize(
    "differ",
    [
        "differ by degrees",
        "differ in one broad head",
        "differ in one sharp head",
        "are alike",
        "are of drawn keys",
    ],
)
def test_proportional_split_leaves_no_head_worse_off(differ: str, sparsity: float) -> None:
    """The least recall of a head at equal total, against two levels and against equal heads."""
    visible, must = torch.full((1, 8), 40), torch.zeros(1, 8, 40, dtype=torch.bool)
    ways: dict[str, dict[str, Any]] = {
        "equal": {"recall_threshold": None},
        "two levels": {},
        "proportional": {"head_split": "proportional"},
    }
    least, mean = {}, {}
    for name, changes in ways.items():
        masks = [
            small(sparsity=sparsity, **changes).search(heads_that(differ, seed), visible, must)
            for seed in range(3)
        ]
        assert all(int(mask.unpack().sum()) == round(2560 * (1 - sparsity)) for mask in masks)
        least[name] = sum(float(mask.recall.min()) for mask in masks) / 3
        mean[name] = sum(float(mask.recall.mean()) for mask in masks) / 3
    print(f"heads that {differ}, sparsity {sparsity}: least recall {least}, mean {mean}")
    assert least["proportional"] >= least["two levels"] - 1e-3
    if differ != "differ in one sharp head" and differ != "are alike":
        assert least["proportional"] > least["two levels"] + 0.05


def test_no_estimator_recalls_more_than_exact_mass() -> None:
    """At equal blocks per row: mean keys, bounds from minima and maxima, a random guess."""
    q, k, _ = make_qkv(2, 64, 256, 2 * HEADS, HEADS, DIM, seed=9)
    mass = block_mass(q, k, q_block_size=16, kv_block_size=16, causal=False)
    sparsity, visible = torch.full((2, 4), 0.7), torch.full((2, 4), 16)
    must = torch.zeros(2, 4, 16, dtype=torch.bool)
    blocks = k.view(2, 16, 16, HEADS, DIM).repeat_interleave(2, 3)
    queries = q.view(2, 4, 16, 2 * HEADS, DIM).mean(2)
    low, high = blocks.amin(2), blocks.amax(2)
    bound = torch.maximum(queries[:, :, None] * low[:, None], queries[:, :, None] * high[:, None])
    estimates = {
        "mean key": torch.einsum("bphd,bjhd->bhpj", queries, blocks.mean(2)),
        "upper bound": bound.sum(-1).permute(0, 3, 1, 2),
        "random": torch.rand(mass.shape, generator=torch.Generator().manual_seed(1)),
    }
    best = head_recall(mass, largest_blocks(mass, sparsity, visible, must))
    for name, estimate in estimates.items():
        kept = largest_blocks(estimate.contiguous(), sparsity, visible, must)
        assert (best >= head_recall(mass, kept)).all(), name


# ---- prefill


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_everything_kept_is_dense(group: int) -> None:
    """As many recent tokens as there are: every block is mandatory."""
    q, cache = filled((130, 97, 20), 97, group, starts=[0, 5, 3])
    policy = small(num_recent_tokens=200)
    out, lse = prefill(q, cache, policy, policy.new_state(cache))
    wanted, wanted_lse = prefill(q, cache, Dense(), Dense().new_state(cache))
    assert rel_err(out, wanted) <= 3e-6 and rel_err(lse, wanted_lse) <= 2e-6
    step, _ = decode_step(q[:, -1:].contiguous(), cache, policy, policy.new_state(cache))
    wanted = reference.sparse_attention(q[:, -1:], cache)[0]
    assert rel_err(step, wanted) <= 2e-6


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("starts", [None, [0, 9]])
def test_prefill_attends_to_the_blocks_of_most_mass(
    page: int | None, starts: list[int] | None
) -> None:
    q, cache = filled((200, 170), 120, starts=starts, page=page)
    policy = small(sparsity=0.5, recall_threshold=None)
    state = policy.new_state(cache)
    out, lse = prefill(q, cache, policy, state)
    for row in range(2):
        start = starts[row] if starts else 0
        k, v = (x[row : row + 1, start:] for x in (cache.k, cache.v))
        seqlen = cache.lengths[row] - start
        one = {"q_block_size": 16, "kv_block_size": 16}
        lengths = torch.tensor([seqlen], dtype=torch.int32)
        mass = reference.block_mass(q[row : row + 1], k, cache_seqlens=lengths, **one)
        begins = torch.arange(0, 120, 16)
        first, last = seqlen - 120 + begins, seqlen - 120 + (begins + 15).clamp(max=119)
        place = torch.arange(mass.shape[3])
        must = (place >= (first[:, None] - 16) // 16) | (place == 0)
        visible = (last // 16 + 1)[None]
        must &= place < visible[0, :, None]
        kept = plain_blocks(mass, torch.full((1, 4), 0.5), visible, must[None])
        mask = torch.zeros(mass.shape, dtype=torch.bool)
        for head in range(4):
            for block in range(mass.shape[2]):
                mask[0, head, block, list(kept[0][head][block])] = True
        wanted = reference.block_sparse_attention(
            q[row : row + 1], k, v, mask, cache_seqlens=lengths, **one
        )
        assert rel_err(out[row : row + 1], wanted[0]) <= 3e-6
        assert rel_err(lse[row : row + 1], wanted[1]) <= 2e-6
    counts = state.prefill.to_dict()
    assert 0.4 < counts["tokens_attended"] / counts["tokens_visible"] < 0.9
    assert 0.5 < counts["kept_mass"] < 1.0


def test_short_contexts_and_decode_are_dense() -> None:
    q, cache = filled((200,), 200)
    policy = small(dense_prefill_tokens=64)
    state = policy.new_state(cache)
    out, _ = prefill(q, cache, policy, state)
    wanted = reference.sparse_attention(q, cache)[0]
    assert rel_err(out[:, :56], wanted[:, :56]) <= 3e-6
    assert rel_err(out[:, 80:], wanted[:, 80:]) > 1e-3
    assert state.prefill.num_dense_calls == 1 and state.prefill.num_calls == 2


def test_sink_logits_softcap_and_scale() -> None:
    q, cache = filled((90,), 40)
    options: dict[str, Any] = {
        "sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "softcap": 4.0,
        "softmax_scale": 0.4,
    }
    policy = small(num_recent_tokens=100)
    out, lse = prefill(q, cache, policy, policy.new_state(cache), **options)
    wanted, wanted_lse = reference.sparse_attention(q, cache, **options)
    assert rel_err(out, wanted) <= 3e-6 and rel_err(lse, wanted_lse) <= 2e-6


def test_sampled_rows_cost_little_recall() -> None:
    q, cache = filled((512,), 512)
    kept = []
    for stride in (1, 8):
        policy = small(row_stride=stride, recall_threshold=None)
        state = policy.new_state(cache)
        out, _ = prefill(q, cache, policy, state)
        assert out.isfinite().all()
        kept.append(state.prefill.kept_mass)
    assert kept[0] is not None and kept[1] is not None and kept[1] > 0.8 * kept[0]


# ---- attention that repeats


def repeated(**changes: Any) -> tuple[RepeatedAttention, Tensor, Tensor, Tensor]:
    q, k, v = make_qkv(1, 200, 200, 4, HEADS, DIM, seed=1)
    options: dict[str, Any] = {"policy": small(sparsity=0.5), "search_at": (2,)} | changes
    return RepeatedAttention(**options), q, k, v


@pytest.mark.parametrize("keep_lse", [False, True])
def test_dense_then_search_then_the_same_mask(keep_lse: bool) -> None:
    attention, q, k, v = repeated(keep_lse=keep_lse, search_at=(2, 4))
    everything = torch.ones(4, 13, 13, dtype=torch.bool)
    sizes: dict[str, Any] = {"q_block_size": 16, "kv_block_size": 16, "causal": False}
    dense = reference.block_sparse_attention(q, k, v, everything, **sizes)[0]
    for _ in range(2):
        assert rel_err(attention(q, k, v)[0], dense) <= 3e-6
    assert attention.mask is None
    attention(q, k, v)
    mask = attention.mask
    assert mask is not None and attention.num_searches == 1
    out, lse = attention(-q, k, v)  # other inputs, the same blocks
    wanted = reference.block_sparse_attention(-q, k, v, mask.unpack(), **sizes)
    assert rel_err(out, wanted[0]) <= 3e-6 and rel_err(lse, wanted[1]) <= 2e-6
    assert attention.mask is mask
    attention(q, k, v)  # the same queries: the same normalisers, kept or not
    assert attention.mask is not mask and attention.num_searches == 2
    assert torch.equal(attention.mask.bits, mask.bits) and attention.num_calls == 5


def test_mandatory_spans_are_kept() -> None:
    attention, q, k, v = repeated(mandatory_tokens=[(17, 33), (150, 151)], search_at=(0,))
    attention(q, k, v)
    assert attention.mask is not None
    assert attention.mask.unpack()[..., [1, 2, 9]].all()


def test_a_mask_that_fell_behind_is_searched_anew() -> None:
    attention, q, k, v = repeated(search_at=(0,), refresh_share=0.9, check_stride=16)
    for _ in range(3):
        attention(q, k, v)
    assert attention.num_searches == 1 and attention.num_refreshes == 0
    attention(-q, k, v)
    assert attention.num_searches == 2 and attention.num_refreshes == 1


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"sparsity": 0.3}, ValueError, r"sparsity: got 0.3, allowed: a float in \[1/3, 1\)"),
        ({"sparsity": 1.0}, ValueError, "sparsity: got"),
        ({"block_size": 48}, ValueError, "block_size: got 48, allowed: 16, 32, 64, 128"),
        ({"block_size": 64.0}, TypeError, "block_size: got float"),
        ({"recall_threshold": 1.5}, ValueError, "recall_threshold: got"),
        ({"head_split": "even"}, ValueError, "head_split: got 'even', allowed: 'two_level' or"),
        (
            {"head_split": "proportional", "recall_threshold": None},
            ValueError,
            r"recall_threshold: got None, allowed: a float in \(0, 1\) with head_split='propor",
        ),
        (
            {"head_split": "proportional", "recall_threshold": 1.0},
            ValueError,
            "recall_threshold: got 1.0, allowed: a float in",
        ),
        ({"row_stride": 0}, ValueError, "row_stride: got 0"),
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens: got -1"),
        ({"num_recent_tokens": -1}, ValueError, "num_recent_tokens: got -1"),
        ({"dense_prefill_tokens": -1}, ValueError, "dense_prefill_tokens: got -1"),
        ({"chunk_size": 0}, ValueError, "chunk_size: got 0"),
    ],
)
def test_every_bound_is_checked(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AdaSpa(**changes)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"policy": Dense()}, TypeError, "policy: got Dense"),
        ({"search_at": ()}, ValueError, "search_at: got"),
        ({"search_at": (3, 2)}, ValueError, "search_at: got"),
        ({"mandatory_tokens": [(3, 3)]}, ValueError, "mandatory_tokens: got"),
        ({"refresh_share": 2.0}, ValueError, "refresh_share: got 2.0"),
        ({"check_stride": 0}, ValueError, "check_stride: got 0"),
    ],
)
def test_bounds_of_repeated_attention(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        repeated(**changes)


def test_calls_must_be_alike_and_spans_inside() -> None:
    attention, q, k, v = repeated(search_at=(0,))
    attention(q, k, v)
    with pytest.raises(ValueError, match=r"q, k: got \(1, 199"):
        attention(q[:, :199], k, v)
    attention, q, k, v = repeated(search_at=(0,), mandatory_tokens=[(0, 201)])
    with pytest.raises(ValueError, match=r"mandatory_tokens: got \(0, 201\), allowed: ends <= 200"):
        attention(q, k, v)
    with pytest.raises(ValueError, match=r"sparsity: got 0.2, allowed: a float in \[1/3"):
        head_recall_split(torch.ones(1, 2), 0.2, 0.5)
