"""recovered_mass: the share of dense attention that a selection holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import ONE_IMPLEMENTATION, Case, int32, make_case, mass, select
from torch import Tensor

from kvselect import reference
from kvselect.reference import QueryBlocks
from kvselect.selection import Selection
from kvselect.testing import LAYOUTS, make_qkv, non_contiguous, rel_err

pytestmark = pytest.mark.usefixtures("implementation")

# A ratio of float32 sums of exponentials, whatever dtype the keys have.
TOLERANCE = 4e-6


def random_lists(case: Case, seqlen_q: int, offsets: Tensor | None, seed: int = 0) -> Any:
    """Half of each row's tokens, drawn anew per block and head."""
    seqlens = case.plain.cache_seqlens
    num_blocks = 1 if offsets is None else len(offsets) - 1
    shape = (len(seqlens), num_blocks, case.plain.k.shape[2], case.plain.k.shape[1])
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    blocks = QueryBlocks(
        cache_seqlens=seqlens, seqlen_q=seqlen_q, starts=case.plain.starts, offsets=offsets
    )
    return select(scores, blocks, keep=shape[-1] // 2, width=shape[-1])[:2]


def assert_equals_reference(
    case: Case, q: Tensor, offsets: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    indices, topk_length = random_lists(case, q.shape[1], offsets)
    got = mass(case, q, indices, topk_length, q_block_offsets=offsets, softcap=softcap or 0.0)
    selection = Selection(indices=indices, topk_length=topk_length, q_block_offsets=offsets)
    expected = reference.recovered_mass(q, case.plain, selection, softcap=softcap)
    assert got.dtype == torch.float32
    assert (got >= 0).all() and (got <= 1).all()
    assert rel_err(got, expected) <= TOLERANCE
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 192, 256, 512])
def test_decode(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(4, 1, 97, 6, 2, head_dim, dtype=dtype)
    got = assert_equals_reference(make_case(k, v, int32(97, 0, 1, 70)), q)
    assert (got[1] == 1).all()  # nothing visible, nothing lost


def test_capped_logits() -> None:
    q, k, v = make_qkv(2, 20, 60, 4, 2, 64)
    case = make_case(k, v, int32(60, 25))
    plain = assert_equals_reference(case, 3 * q, int32(0, 6, 20))
    capped = assert_equals_reference(case, 3 * q, int32(0, 6, 20), softcap=1.0)
    assert rel_err(capped, plain) > 0.05


@pytest.mark.parametrize("group_size", [1, 4, 7, 8])
def test_prefill_blocks(group_size: int) -> None:
    q, k, v = make_qkv(3, 20, 60, 2 * group_size, 2, 64)
    case = make_case(k, v, int32(60, 25, 11), starts=int32(0, 9, 3))
    assert_equals_reference(case, q, int32(0, 6, 6, 7, 20))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_strides_give_the_same_bits(layout: str) -> None:
    q, k, v = make_qkv(2, 4, 70, 8, 2, 64, dtype=torch.bfloat16)
    seqlens, starts = int32(70, 41), int32(0, 20)
    case = make_case(k, v, seqlens, starts=starts, layout=layout)
    indices, lengths = random_lists(case, 4, None)
    got = mass(case, non_contiguous(q), non_contiguous(indices), non_contiguous(lengths))
    plain = make_case(k, v, seqlens, starts=starts)
    assert torch.equal(got, mass(plain, q, indices, lengths))


def test_everything_selected_is_all_the_mass() -> None:
    q, k, v = make_qkv(1, 5, 64, 4, 2, 64)
    case = make_case(k, v, int32(64))
    indices = torch.arange(64, dtype=torch.int32).expand(1, 1, 2, 64)
    got = mass(case, q, indices, torch.full((1, 1, 2), 64, dtype=torch.int32))
    assert rel_err(got, torch.ones_like(got)) <= 1e-6
    assert (got <= 1).all()


def test_nothing_selected_is_no_mass() -> None:
    q, k, v = make_qkv(1, 1, 64, 4, 2, 64)
    indices = torch.full((1, 1, 2, 3), -1, dtype=torch.int32)
    got = mass(make_case(k, v, int32(64)), q, indices, torch.zeros(1, 1, 2, dtype=torch.int32))
    assert (got == 0).all()


def test_later_tokens_do_not_count() -> None:
    """Entries behind a query's own position are not part of its attention."""
    q, k, v = make_qkv(1, 3, 30, 2, 2, 64)
    indices = int32(5, 27, 28, 29).expand(1, 1, 2, 4)
    case = make_case(k, v, int32(30))
    got = mass(case, q, indices, torch.full((1, 1, 2), 4, dtype=torch.int32))
    fewer = mass(case, q, indices, torch.full((1, 1, 2), 2, dtype=torch.int32))
    assert torch.equal(got[:, 0], fewer[:, 0])
    assert (got[:, 2] > fewer[:, 2]).all()


def bad_call(**change: Any) -> None:
    q, k, v = make_qkv(2, 4, 40, 4, 2, 64)
    case = make_case(k, v, int32(40, 20))
    indices, lengths = random_lists(case, 4, None)
    arguments: dict[str, Any] = {"q": q, "indices": indices, "topk_length": lengths} | change
    mass(case, **arguments)


LISTS = torch.zeros(2, 1, 2, 4, dtype=torch.int32)
LENGTHS = torch.ones(2, 1, 2, dtype=torch.int32)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"max_seqlen_k": -1}, "max_seqlen_k: got -1, allowed: an int >= 0"),
    ({"max_seqlen_k": 39}, r"max_seqlen_k: got 39, allowed: at least cache_seqlens\[0\] = 40"),
    ({"q": torch.zeros(2, 4, 64)}, r"q: got shape \[2, 4, 64\], allowed: \[batch, seqlen_q, num_"),
    ({"q": torch.zeros(2, 4, 4, 64).half()}, "q: got float16, allowed: float32"),
    ({"q": torch.zeros(2, 4, 64, 4).mT}, "q: got strides .*1 in the last dimension"),
    ({"q": torch.zeros(2, 4, 3, 64)}, "num_q_heads: got 3, allowed: a multiple of num_kv_heads"),
    ({"q_block_offsets": int32(0, 3)}, r"q_block_offsets: got 0\.\.3, allowed: 0\.\.4"),
    ({"q_block_offsets": int32(1, 4)}, r"q_block_offsets: got 1\.\.4, allowed: 0\.\.4"),
    ({"indices": LISTS.long(), "topk_length": LENGTHS}, "indices: got int64, allowed: int32"),
    ({"indices": LISTS[:, :, :1], "topk_length": LENGTHS}, r"indices: got shape \[2, 1, 1, 4\]"),
    ({"topk_length": LENGTHS.long()}, "topk_length: got int64, allowed: int32"),
    ({"topk_length": LENGTHS[:1]}, r"topk_length: got shape \[1, 1, 2\]"),
    ({"topk_length": 99 * LENGTHS}, r"topk_length: got 99 at \[0, 0, 0\], allowed: 0\.\.40"),
    ({"topk_length": -LENGTHS}, r"topk_length: got -1 at \[0, 0, 0\], allowed: 0\.\.40"),
    ({"indices": LISTS + 40, "topk_length": LENGTHS}, r"indices: got 40 at \[0, 0, 0, 0\]"),
    ({"indices": LISTS - 1, "topk_length": LENGTHS}, r"indices: got -1 at \[0, 0, 0, 0\], allowed"),
    ({"indices": LISTS, "topk_length": 2 * LENGTHS}, r"indices: got 0 at \[0, 0, 0, 1\], allowed"),
]


@ONE_IMPLEMENTATION
@pytest.mark.parametrize("change, message", ERRORS, ids=[e[1][:44] for e in ERRORS])
def test_error_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_call(**change)
