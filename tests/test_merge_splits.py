"""merge_splits against the float64 reference, and attention over parts against the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from op_calls import ONE_IMPLEMENTATION, attend, int32, make_case
from torch import Tensor

from kvselect import reference
from kvselect.testing import TOLERANCE, make_qkv, non_contiguous, rel_err

pytestmark = pytest.mark.usefixtures("implementation")
merge = torch.ops.kvselect.merge_splits


def partials(num_splits: int, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(num_splits, *shape, generator=generator)
    return out, 5.0 * torch.randn(num_splits, *shape[:-1], generator=generator)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 17])
@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 7, 64), (2, 80), (2, 3, 4, 96), (5, 1), (33,)])
def test_equals_reference(num_splits: int, shape: tuple[int, ...]) -> None:
    out, lse = partials(num_splits, *shape)
    got, expected = merge(out, lse), reference.merge_splits(out, lse)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float32 and x.is_contiguous()
        assert rel_err(x, y) <= TOLERANCE[torch.float32]


def test_empty_splits_are_not_read() -> None:
    out, lse = partials(4, 6, 64)
    lse[1] = lse[2, 3] = -torch.inf
    out[1] = out[2, 3] = torch.nan
    lse[:, 5] = -torch.inf
    got, expected = merge(out, lse), reference.merge_splits(out, lse)
    for x, y in zip(got, expected, strict=True):
        assert rel_err(x, y) <= TOLERANCE[torch.float32]
    assert (got[0][5] == 0).all() and got[1][5] == -torch.inf


def test_large_and_far_apart() -> None:
    out, lse = partials(3, 4, 64)
    lse[:, 0] += 1e4
    lse[:, 1] -= 1e4
    lse[0, 2] = 300.0
    got, expected = merge(out, lse), reference.merge_splits(out, lse)
    for x, y in zip(got, expected, strict=True):
        assert rel_err(x, y) <= TOLERANCE[torch.float32]


def test_no_rows() -> None:
    out, lse = merge(torch.zeros(3, 0, 64), torch.zeros(3, 0))
    assert out.shape == (0, 64) and lse.shape == (0,)


def test_any_strides() -> None:
    out, lse = partials(3, 4, 5, 64)
    expected = merge(out, lse)
    got = merge(non_contiguous(out).transpose(1, 2), non_contiguous(lse).transpose(1, 2))
    assert torch.equal(got[0], expected[0].transpose(0, 1))
    assert torch.equal(got[1], expected[1].T)


@pytest.mark.parametrize("cuts", [(0, 90), (0, 1, 90), (0, 30, 31, 64, 90), (0, 0, 50, 50, 90)])
def test_parts_of_a_context_make_the_whole(cuts: tuple[int, ...]) -> None:
    seqlens = int32(90)
    q, k, v = make_qkv(1, 1, 90, 8, 2, 64)
    case = make_case(k, v, seqlens)
    parts = []
    for first, last in pairwise(cuts):
        indices = torch.arange(first, last, dtype=torch.int32).expand(1, 1, 2, last - first)
        lengths = torch.full((1, 1, 2), last - first, dtype=torch.int32)
        parts.append(attend(case, q, indices, lengths))
    out, lse = merge(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    whole = attend(case, q)
    assert rel_err(out, whole[0]) <= 2 * TOLERANCE[torch.float32]  # two float32 results
    assert rel_err(lse, whole[1]) <= 2 * TOLERANCE[torch.float32]


@ONE_IMPLEMENTATION
@pytest.mark.parametrize(
    "out, lse, message",
    [
        (torch.zeros(2, 3, 4).double(), torch.zeros(2, 3), "partial_out: got float64"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).half(), "partial_lse: got float16"),
        (torch.zeros(4), torch.zeros(()), r"partial_out: got 1 dimensions, allowed: \[num_splits"),
        (torch.zeros(0, 3, 4), torch.zeros(0, 3), "partial_out: got num_splits 0, allowed: an int"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), "partial_lse: got 3 dimensions, allowed: 2"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), "partial_lse: got size 4 in dimension 1"),
    ],
)
def test_error_messages(out: Tensor, lse: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(out, lse)


@pytest.mark.parametrize("lse", [[torch.nan], [torch.nan, -torch.inf], [0.0, torch.nan]])
def test_a_part_that_is_not_a_number_shows(cpu_implementation: str, lse: list[float]) -> None:
    out, merged = torch.ops.kvselect.merge_splits(
        torch.ones(len(lse), 1, 32), torch.tensor(lse)[:, None]
    )
    assert out.isnan().all() and merged.isnan().all()
