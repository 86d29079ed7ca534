"""Heads of any size on kernels for some: what is missing is filled up with zeros."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from kvselect.checks import HEAD_DIMS, require


def stored_head_dim(key_head_dim: int, value_head_dim: int) -> int | None:
    """Channels that the kernels work on, for keys and values of these; None: they are too many.

    What a head has fewer of is filled up with zeros, which changes no logit and no output channel.
    """
    enough = [size for size in HEAD_DIMS if size >= max(key_head_dim, value_head_dim)]
    return min(enough, default=None)


def filled_up(x: Tensor, head_dim: int) -> Tensor:
    """``x`` [..., channels] with zeros up to ``head_dim`` channels."""
    missing = head_dim - x.shape[-1]
    return x if missing == 0 else pad(x, (0, missing))


def require_head_dim(key_states: Tensor, value_states: Tensor) -> int:
    """`stored_head_dim` of a layer's first keys and values, [batch, heads, tokens, channels].

    Raises
    ------
    ValueError
        If they do not belong together, or have more channels than the kernels take.
    """
    require(
        key_states.shape[:-1] == value_states.shape[:-1],
        "value_states",
        list(value_states.shape),
        f"the shape of the keys, {list(key_states.shape)}, but for the channels",
    )
    head_dim = stored_head_dim(key_states.shape[-1], value_states.shape[-1])
    if head_dim is None:
        largest = max(key_states.shape[-1], value_states.shape[-1])
        require(False, "head_dim", largest, f"at most {max(HEAD_DIMS)}")
    assert head_dim is not None
    return head_dim
