"""The one message form: what was got, and what is allowed."""

from __future__ import annotations

import pytest
import torch

from kvselect.checks import (
    UnsupportedModelError,
    require,
    require_bool,
    require_choice,
    require_float,
    require_int,
    require_tensor,
    require_type,
)


def test_require() -> None:
    require(True, "topk", 3, "an int >= 1")
    with pytest.raises(ValueError, match=r"^topk: got 0, allowed: an int >= 1$"):
        require(False, "topk", 0, "an int >= 1")
    assert issubclass(UnsupportedModelError, ValueError)


def test_types() -> None:
    require_type(3, int, "n")
    require_type(3, (int, str), "n")
    with pytest.raises(TypeError, match=r"^n: got str '3', allowed: int or float$"):
        require_type("3", (int, float), "n")
    with pytest.raises(TypeError, match=r"^n: got a list, allowed: int$"):
        require_type(list(range(100)), int, "n")
    with pytest.raises(TypeError, match=r"^n: got bool True, allowed: int$"):
        require_type(True, int, "n")
    require_type(True, bool, "n")


def test_numbers() -> None:
    require_int(0, "n", 0)
    assert require_float(3, "x", "a float") == 3.0
    with pytest.raises(ValueError, match=r"^n: got -1, allowed: an int >= 0$"):
        require_int(-1, "n", 0)
    with pytest.raises(ValueError, match=r"^x: got nan, allowed: a float$"):
        require_float(float("nan"), "x", "a float")
    with pytest.raises(TypeError, match=r"^x: got bool True, allowed: a float$"):
        require_float(True, "x", "a float")
    with pytest.raises(TypeError, match=r"^flag: got int 1, allowed: True or False$"):
        require_bool(1, "flag")


def test_choices() -> None:
    require_choice("a", "x", ("a", None))
    require_choice(None, "x", ("a", None))
    with pytest.raises(ValueError, match=r"^x: got 'b', allowed: 'a' or None$"):
        require_choice("b", "x", ("a", None))
    with pytest.raises(ValueError, match=r"^x: got None, allowed: 'a'$"):
        require_choice(None, "x", ("a",))


def test_tensors() -> None:
    floats = (torch.float32,)
    require_tensor(torch.zeros(2, 3), "x", (None, 3), floats)
    require_tensor(torch.zeros(3, 2).T, "x", (2, 3), floats, contiguous_last_dim=False)
    require_tensor(torch.zeros(0, 1)[:, ::1], "x", (0, 1), floats)
    with pytest.raises(ValueError, match=r"^x: got shape \(2, 3\), allowed: \[any, 4\]$"):
        require_tensor(torch.zeros(2, 3), "x", (None, 4), floats)
    with pytest.raises(TypeError, match=r"^x: got torch.int64, allowed: torch.float32$"):
        require_tensor(torch.zeros(2, dtype=torch.int64), "x", (2,), floats)
    with pytest.raises(ValueError, match=r"^x: got device meta, allowed: cpu$"):
        require_tensor(torch.zeros(2, device="meta"), "x", (2,), floats, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^x: got a last dim of stride 2, allowed: 1"):
        require_tensor(torch.zeros(3, 2).T, "x", (2, 3), floats)
    with pytest.raises(TypeError, match=r"^x: got int 3, allowed: a torch.Tensor$"):
        require_tensor(3, "x", (2,), floats)
