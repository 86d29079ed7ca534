"""Rope: the table rotates as the float64 reference does, back again, and beyond its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import Rope, reference
from kvselect.testing import rel_err

LAYOUTS = [
    # head_dim, num_pairs, start, interleaved
    (32, 16, 0, False),
    (32, 16, 0, True),
    (64, 16, 0, False),
    (64, 8, 48, False),
    (64, 8, 48, True),
    (80, 5, 13, True),
]


def frequencies(num_pairs: int) -> Tensor:
    return 10_000.0 ** (-torch.arange(num_pairs) / num_pairs)


@pytest.mark.parametrize("head_dim, num_pairs, start, interleaved", LAYOUTS)
def test_rotates_as_the_reference_does(
    head_dim: int, num_pairs: int, start: int, interleaved: bool
) -> None:
    rope = Rope.from_frequencies(frequencies(num_pairs), 100, 1.3, start, interleaved)
    x = torch.randn(2, 5, 3, head_dim)
    positions = torch.randint(0, 100, (2, 5))
    expected = reference.rotate(x, positions[..., None], rope)
    got = rope.rotate(x, positions)
    assert got.dtype == torch.float32 and rel_err(got, expected) <= 2e-7
    assert rel_err(
        rope.rotate(x, positions[0]), reference.rotate(x, positions[:1, :, None], rope)
    ) < (2e-7)
    one = torch.full((2, 5), 42)
    assert torch.equal(rope.rotate(x, 42), rope.rotate(x, one))
    # Channels outside the rotated span stay as they are.
    assert torch.equal(got[..., :start], x[..., :start])
    stop = start + 2 * num_pairs
    assert torch.equal(got[..., stop:], x[..., stop:])


@pytest.mark.parametrize("head_dim, num_pairs, start, interleaved", LAYOUTS)
def test_unrotate_is_the_inverse(
    head_dim: int, num_pairs: int, start: int, interleaved: bool
) -> None:
    rope = Rope.from_frequencies(frequencies(num_pairs), 100, 1.3, start, interleaved)
    x, positions = torch.randn(2, 5, 3, head_dim), torch.randint(0, 100, (2, 5))
    assert rel_err(rope.unrotate(rope.rotate(x, positions), positions), x) <= 3e-7


def test_rotate_at_equals_the_table_and_goes_beyond_it() -> None:
    short, long = (Rope.from_frequencies(frequencies(16), n, 1.3) for n in (10, 5000))
    x, positions = torch.randn(2, 5, 3, 32), torch.randint(0, 5000, (2, 5))
    assert torch.equal(short.rotate_at(x, positions), long.rotate(x, positions))
    without = Rope(short.cos, short.sin)
    assert torch.equal(without.rotate_at(x, 7), short.rotate(x, 7))
    with pytest.raises(IndexError):
        without.rotate_at(x, 10)


def test_narrow_dtypes_are_rotated_in_float32() -> None:
    rope = Rope.from_frequencies(frequencies(16), 10)
    x = torch.randn(3, 2, 32).bfloat16()
    assert torch.equal(rope.rotate(x, 9), rope.rotate(x.float(), 9))


def test_fixed_factors_are_kept() -> None:
    rope = Rope.from_frequencies(frequencies(16), 100)
    own, other = rope.fixed_factors((5, 60), 32)
    assert rope.fixed_factors((5, 60), 32)[0] is own
    x = torch.randn(2, 1, 1, 3, 32)
    both = rope.turn(x, own, other)
    assert torch.equal(both[0], rope.rotate(x, 5)) and torch.equal(both[1], rope.rotate(x, 60))


def test_a_model_without_rotation() -> None:
    rope = Rope.from_frequencies(torch.empty(0), 10)
    x = torch.randn(3, 2, 32)
    assert rope.num_pairs == 0 and torch.equal(rope.rotate(x, 9), x)


def test_moves_to_a_device() -> None:
    rope = Rope.from_frequencies(frequencies(16), 10, start=3, interleaved=True).to("meta")
    assert rope.cos.device.type == rope.sin.device.type == "meta"
    assert rope.inv_freq is not None and rope.inv_freq.device.type == "meta"
    assert (rope.start, rope.interleaved, rope.num_positions) == (3, True, 10)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"cos": torch.zeros(4)}, ValueError, r"cos: got shape \(4,\), allowed: \[any, any\]"),
        ({"cos": torch.zeros(4, 8).double()}, TypeError, "cos: got torch.float64"),
        ({"sin": torch.zeros(4, 7)}, ValueError, r"sin: got shape \(4, 7\), allowed: \[4, 8\]"),
        ({"cos": torch.zeros(8, 8)[::2]}, ValueError, "cos: got .*, allowed: a contiguous tensor"),
        ({"start": -1}, ValueError, "start: got -1"),
        ({"interleaved": 1}, TypeError, "interleaved: got int 1, allowed: True or False"),
        ({"scaling": float("nan")}, ValueError, "scaling: got nan"),
        ({"inv_freq": torch.zeros(7)}, ValueError, r"inv_freq: got shape \(7,\), allowed: \[8\]"),
        ({"cos": torch.zeros(0, 8), "sin": torch.zeros(0, 8)}, ValueError, "num_positions: got 0"),
    ],
)
def test_bad_tables_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"cos": torch.zeros(4, 8), "sin": torch.zeros(4, 8)}
    with pytest.raises(error, match=message):
        Rope(**(good | change))


def test_more_channels_than_a_head_has() -> None:
    rope = Rope.from_frequencies(frequencies(16), 10)
    with pytest.raises(ValueError, match=r"head_dim: got 24, allowed: an int >= 32"):
        rope.rotate(torch.zeros(1, 24), 0)
    with pytest.raises(ValueError, match="num_positions: got 0, allowed: an int >= 1"):
        Rope.from_frequencies(frequencies(16), 0)
