"""The one way in which kvselect's Python reports bad input: what was got, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

__all__ = [
    "HEAD_DIMS",
    "STORAGE_DTYPES",
    "UnsupportedModelError",
    "require",
    "require_bool",
    "require_choice",
    "require_float",
    "require_int",
    "require_tensor",
    "require_type",
]

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of queries, keys and values
HEAD_DIMS = (32, 64, 80, 96, 128, 160, 192, 256, 512)


class UnsupportedModelError(ValueError):
    """A model that kvselect cannot attach to; the message names the module and the reason."""


def require(condition: bool, name: str, got: object, allowed: str) -> None:
    """Raise ValueError with the one message form used by the whole package.

    Parameters
    ----------
    condition : bool
        What must hold.
    name : str
        The argument, as the caller wrote it.
    got : object
        Its value, shown by ``repr``.
    allowed : str
        What would have been accepted.
    """
    if not condition:
        raise ValueError(f"{name}: got {got!r}, allowed: {allowed}")


def require_type(
    value: object, types: type | tuple[type, ...], name: str, allowed: str | None = None
) -> None:
    """Raise TypeError unless ``value`` is an instance of ``types``.

    ``bool`` does not pass for ``int`` or ``float`` unless ``bool`` itself is among ``types``.
    """
    if isinstance(value, types) and not isinstance(value, bool):
        return
    types = types if isinstance(types, tuple) else (types,)
    if isinstance(value, bool) and bool not in types:
        matches = object in types
    else:
        matches = isinstance(value, types)
    if not matches:
        allowed = allowed or " or ".join(t.__name__ for t in types)
        raise TypeError(f"{name}: got {_shown(value)}, allowed: {allowed}")


def _shown(value: object) -> str:
    """Type and value, the value only where it is short enough to help."""
    text = repr(value)
    kind = type(value).__name__
    return f"{kind} {text}" if len(text) <= 60 and "\n" not in text else f"a {kind}"


def require_int(value: object, name: str, minimum: int, allowed: str | None = None) -> None:
    """TypeError unless an int, ValueError unless at least ``minimum`` and below 2^31 (int32)."""
    allowed = allowed or f"an int >= {minimum}"
    require_type(value, int, name, allowed)
    assert isinstance(value, int)
    require(value >= minimum, name, value, allowed)
    require(value < 2**31, name, value, f"{allowed}, below 2^31")


def require_float(value: object, name: str, allowed: str) -> float:
    """TypeError unless a real number, ValueError unless finite; returns it as a float."""
    require_type(value, (int, float), name, allowed)
    assert isinstance(value, (int, float))
    require(isfinite(value), name, value, allowed)
    return float(value)


def require_scale(value: object, name: str) -> float:
    """A scale of logits that float32 holds as neither 0 nor inf; returns it as a float."""
    allowed = "None or a float > 0"
    scale = require_float(value, name, allowed)
    require(scale > 0.0, name, value, allowed)
    require(1.2e-38 < scale < 3.4e38, name, value, f"{allowed} that float32 can hold")
    return scale


def require_bool(value: object, name: str) -> None:
    """TypeError unless True or False."""
    require_type(value, bool, name, "True or False")


def require_choice(value: object, name: str, choices: Sequence[str | None]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    require(
        any(value is c or (isinstance(value, str) and value == c) for c in choices),
        name,
        value,
        " or ".join(repr(c) for c in choices),
    )


def _fits(got: Sequence[int], shape: Sequence[int | None]) -> bool:
    if len(got) != len(shape):
        return False
    for size, wanted in zip(got, shape):  # noqa: SIM110  all() of a generator: three times as long
        if wanted is not None and size != wanted:
            return False
    return True


def require_tensor(
    value: object,
    name: str,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    contiguous_last_dim: bool = True,
) -> None:
    """Check a tensor: type, shape (None = any size), dtype, device, stride of the last dim.

    Raises
    ------
    TypeError
        Not a tensor, or of another dtype.
    ValueError
        Another shape or device, or a last dim that is not contiguous.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {_shown(value)}, allowed: a torch.Tensor")
    got = value.shape
    if not _fits(got, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: got shape {tuple(got)}, allowed: [{wanted}]")
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: got {value.dtype}, allowed: {names}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got device {value.device}, allowed: {device}")
    if contiguous_last_dim and got and got[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: got a last dim of stride {value.stride(-1)}, allowed: 1 (contiguous)"
        )
