"""list_blocks: chosen blocks and a window of blocks become lists of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_calls import ONE_IMPLEMENTATION, int32

from kvselect import reference
from kvselect.testing import non_contiguous

pytestmark = pytest.mark.usefixtures("implementation")


def call(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.kvselect.list_blocks(**arguments)
    return found


def draw(
    seed: int,
    *,
    batch: int = 2,
    num_query_blocks: int = 1,
    num_kv_heads: int = 3,
    num_lists: int = 3,
    num_blocks: int = 9,
    block_size: int = 16,
    num_picked: int = 4,
    num_window_blocks: int = 2,
    padded: bool = False,
) -> dict[str, Any]:
    """Picked blocks before a window that begins anywhere, every eighth token not finite."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = batch * num_query_blocks
    first = torch.randint(num_blocks + 1, (num_rows,), generator=generator, dtype=torch.int32)
    picked = torch.full((num_rows, num_lists, num_picked), -1, dtype=torch.int32)
    for row in range(num_rows):
        for part in range(num_lists):
            found = torch.randperm(int(first[row]), generator=generator)[:num_picked].sort().values
            picked[row, part, : len(found)] = found.int()
    longest = num_blocks * block_size
    return {
        "picked": picked,
        "first_block": first,
        "end": torch.randint(longest + 1, (num_rows,), generator=generator, dtype=torch.int32),
        "starts": int32(*range(3, 3 + batch)) if padded else None,
        "finite": torch.rand(batch, num_kv_heads, num_blocks, block_size, generator=generator)
        > 0.125,
        "num_window_blocks": num_window_blocks,
        "width": (num_picked + num_window_blocks) * block_size,
    }


def assert_as_specified(arguments: dict[str, Any]) -> None:
    expected = reference.list_blocks(**arguments)
    for got, want in zip(call(**arguments), expected, strict=True):
        assert got.dtype == torch.int32 and got.is_contiguous() and torch.equal(got, want)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_query_blocks", [1, 3])
@pytest.mark.parametrize("num_lists", [1, 3])
@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_equals_reference(
    block_size: int, num_lists: int, num_query_blocks: int, padded: bool
) -> None:
    sizes = {"block_size": block_size, "num_lists": num_lists}
    assert_as_specified(draw(3, num_query_blocks=num_query_blocks, padded=padded, **sizes))


def test_a_list_for_all_heads_leaves_out_what_any_head_has_not() -> None:
    arguments = draw(1, num_lists=1, num_picked=9)
    arguments |= {"first_block": int32(9, 9), "end": int32(144, 144)}
    arguments["picked"] = torch.arange(9, dtype=torch.int32).expand(2, 1, 9).contiguous()
    indices, count = call(**arguments)
    for row in range(2):
        found = indices[row, 0, : int(count[row, 0])].long()
        assert torch.equal(found, arguments["finite"][row].all(0).flatten().nonzero().flatten())


def test_what_does_not_fit_is_not_listed() -> None:
    whole = draw(2, num_picked=6)
    width = int(reference.list_blocks(**whole)[1].max()) - 1
    assert width > 20
    assert_as_specified(whole | {"width": width})
    assert_as_specified(whole | {"width": 0})


def test_empty() -> None:
    assert_as_specified(draw(4, num_picked=0))
    assert_as_specified(draw(4, num_window_blocks=0))
    indices, count = call(**(draw(4, batch=0) | {"first_block": int32(), "end": int32()}))
    assert indices.shape == (0, 3, 96) and count.shape == (0, 3)


def test_strides() -> None:
    arguments = draw(5)
    expected = call(**arguments)
    for name in ("picked", "finite"):
        got = call(**(arguments | {name: non_contiguous(arguments[name])}))
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@ONE_IMPLEMENTATION
@given(seed=st.integers(0, 1 << 30), sizes=st.data())
def test_any_case(seed: int, sizes: st.DataObject) -> None:
    counts = {
        name: sizes.draw(st.integers(low, high), label=name)
        for name, low, high in (
            ("batch", 1, 3),
            ("num_query_blocks", 1, 3),
            ("num_blocks", 1, 12),
            ("block_size", 1, 40),
            ("num_picked", 0, 6),
            ("num_window_blocks", 0, 5),
        )
    }
    arguments = draw(seed, padded=sizes.draw(st.booleans()), **counts)
    assert_as_specified(arguments)


@ONE_IMPLEMENTATION
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picked": torch.zeros(2, 3, 4)}, "picked: got float32, allowed: int32"),
        (
            {"picked": torch.zeros(2, 3, dtype=torch.int32)},
            r"picked: got shape \[2, 3\], allowed: \[num_rows, num_lists, num_picked\]",
        ),
        (
            {"picked": torch.zeros(2, 2, 4, dtype=torch.int32)},
            "picked: got num_lists 2, allowed: 1 or finite's num_kv_heads 3",
        ),
        (
            {"picked": torch.zeros(3, 3, 4, dtype=torch.int32)},
            "picked: got num_rows 3, allowed: a multiple of finite's batch 2",
        ),
        ({"first_block": int32(1)}, "first_block: got "),
        ({"end": torch.zeros(2)}, "end: got float32, allowed: int32"),
        ({"starts": int32(1, 2, 3)}, "starts: got "),
        ({"finite": torch.ones(2, 3, 9, 16)}, "finite: got float32, allowed: bool"),
        (
            {"finite": torch.ones(2, 9, 16, dtype=torch.bool)},
            r"finite: got shape \[2, 9, 16\], allowed: \[batch, num_kv_heads",
        ),
        ({"num_window_blocks": -1}, "num_window_blocks: got -1, allowed: an int >= 0"),
        ({"width": -1}, "width: got -1, allowed: an int >= 0"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**(draw(0) | change))
