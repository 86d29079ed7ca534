"""Rotary position embedding as a float32 table, taken from the model.

Scaled, partial and YaRN variants come for free: they are nothing but other tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from kvselect.checks import require, require_bool, require_float, require_int, require_tensor

__all__ = ["Rope"]


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """cos and sin of every position, and which channels they rotate.

    Channel pair ``(a, b)`` of a vector at position ``p`` becomes
    ``(a * cos[p] - b * sin[p], b * cos[p] + a * sin[p])``; channels outside
    ``[start, start + 2 * num_pairs)`` stay as they are.

    Parameters
    ----------
    cos, sin : Tensor, [num_positions, num_pairs], float32, contiguous
        Any attention scaling (YaRN) is already multiplied in.
    start : int
        First rotated channel.
    interleaved : bool
        Pair ``i`` is channels ``(2i, 2i + 1)`` of the rotated span; otherwise ``(i, i +
        num_pairs)``.
    inv_freq : Tensor, [num_pairs], float32, or None
        Radians per position; lets `rotate_at` go beyond the table.
    scaling : float
        Factor that was multiplied into cos and sin.
    """

    cos: Tensor
    sin: Tensor
    start: int = 0
    interleaved: bool = False
    inv_freq: Tensor | None = None
    scaling: float = 1.0
    _fixed: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        require_tensor(self.cos, "cos", (None, None), (torch.float32,))
        require_tensor(self.sin, "sin", tuple(self.cos.shape), (torch.float32,), self.cos.device)
        require(self.cos.is_contiguous(), "cos", self.cos.stride(), "a contiguous tensor")
        require(self.sin.is_contiguous(), "sin", self.sin.stride(), "a contiguous tensor")
        require(self.cos.shape[0] >= 1, "num_positions", self.cos.shape[0], "an int >= 1")
        require_int(self.start, "start", 0)
        require_bool(self.interleaved, "interleaved")
        require_float(self.scaling, "scaling", "a finite float")
        if self.inv_freq is not None:
            shape = (self.num_pairs,)
            require_tensor(self.inv_freq, "inv_freq", shape, (torch.float32,), self.cos.device)

    @classmethod
    def from_frequencies(
        cls,
        inv_freq: Tensor,
        num_positions: int,
        scaling: float = 1.0,
        start: int = 0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> Rope:
        """Table of ``scaling * cos(position * inv_freq)``, and the same for sin, in float32.

        Parameters
        ----------
        inv_freq : Tensor, [num_pairs], any float dtype
            Radians per position.
        num_positions : int
            Rows of the table; the model's trained length, for `positions="compact"`.
        device : device or None
            Where the table lies; None: where ``inv_freq`` lies.

        Notes
        -----
        Bit-equal to the float32 tables of transformers' rotary modules, which form the same
        product.
        """
        floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        require_tensor(inv_freq, "inv_freq", (None,), floats)
        require_int(num_positions, "num_positions", 1)
        scaling = require_float(scaling, "scaling", "a finite float")
        inv_freq = inv_freq.detach().to(device=device or inv_freq.device, dtype=torch.float32)
        positions = torch.arange(num_positions, device=inv_freq.device, dtype=torch.float32)
        angles = positions[:, None] * inv_freq
        return cls(
            angles.cos() * scaling, angles.sin() * scaling, start, interleaved, inv_freq, scaling
        )

    @property
    def num_positions(self) -> int:
        return self.cos.shape[0]

    @property
    def num_pairs(self) -> int:
        return self.cos.shape[1]

    def to(self, device: torch.device | str) -> Rope:
        """The same table on another device."""
        inv_freq = None if self.inv_freq is None else self.inv_freq.to(device)
        return Rope(
            self.cos.to(device),
            self.sin.to(device),
            self.start,
            self.interleaved,
            inv_freq,
            self.scaling,
        )

    def rotate(self, x: Tensor, positions: Tensor | int) -> Tensor:
        """``x`` as it is at ``positions``, from the table.

        Parameters
        ----------
        x : Tensor, [..., heads, head_dim], any float dtype
        positions : int, or integer Tensor broadcastable to ``x.shape[:-2]``
            Each in ``[0, num_positions)``; an IndexError otherwise (CPU).

        Returns
        -------
        Tensor, shape of ``x``, float32
        """
        factors = self.factors(positions, x.shape[-1])
        return self.turn(x, *(factor.unsqueeze(-2) for factor in factors))

    def rotate_at(self, x: Tensor, positions: Tensor | int) -> Tensor:
        """As `rotate`, for positions that may lie beyond the table.

        cos and sin come from ``inv_freq``; without it, from the table. For queries only: kernels
        read the table.
        """
        if self.inv_freq is None:
            return self.rotate(x, positions)
        place = torch.as_tensor(positions, dtype=torch.float32, device=self.inv_freq.device)
        angles = place[..., None] * self.inv_freq
        factors = self._spread(
            angles.cos() * self.scaling, angles.sin() * self.scaling, x.shape[-1]
        )
        return self.turn(x, *(factor.unsqueeze(-2) for factor in factors))

    def unrotate(self, x: Tensor, positions: Tensor | int) -> Tensor:
        """The inverse of `rotate`: ``unrotate(rotate(x, p), p)`` is ``x`` up to float32 rounding.

        Divides by ``cos**2 + sin**2``, which undoes YaRN's attention scaling as well.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        norm = cos.square() + sin.square()
        factors = self._spread(cos / norm, -sin / norm, x.shape[-1])
        return self.turn(x, *(factor.unsqueeze(-2) for factor in factors))

    def factors(self, positions: Tensor | int, head_dim: int) -> tuple[Tensor, Tensor]:
        """What `turn` multiplies by, each [*positions.shape, head_dim]."""
        return self._spread(self.cos[positions], self.sin[positions], head_dim)

    def fixed_factors(self, positions: tuple[int, ...], head_dim: int) -> tuple[Tensor, Tensor]:
        """`factors` of positions that the host knows, kept from call to call.

        Each [len(positions), 1, 1, 1, 1, head_dim].
        """
        key = (*positions, head_dim)
        if key not in self._fixed:
            own, other = self.factors(torch.tensor(positions, device=self.cos.device), head_dim)
            shape = (len(positions), 1, 1, 1, 1, head_dim)
            self._fixed[key] = own.view(shape), other.view(shape)
        return self._fixed[key]

    def turn(self, x: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """``x * own + partner(x) * other`` in float32; partner: the other channel of a pair.

        ``own`` and ``other`` come from `factors`, shaped to broadcast against ``x`` [...,
        head_dim].
        """
        x = x.float()
        partners = _make_partners if torch.compiler.is_compiling() else _partners
        partner = partners(self.start, self.num_pairs, self.interleaved, x.shape[-1], x.device)
        return x * own + x.index_select(-1, partner) * other

    def _spread(self, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Per pair to per channel; 1 and 0 for channels that do not rotate."""
        stop = self.start + 2 * self.num_pairs
        require(stop <= head_dim, "head_dim", head_dim, f"an int >= {stop} (rotated channels)")
        if self.interleaved:
            own = cos.repeat_interleave(2, -1)
            other = torch.stack((-sin, sin), dim=-1).flatten(-2)
        else:
            own, other = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        if stop - self.start < head_dim:
            edges = (self.start, head_dim - stop)
            own, other = (
                functional.pad(own, edges, value=1.0),
                functional.pad(other, edges, value=0.0),
            )
        return own, other


def _make_partners(
    start: int, num_pairs: int, interleaved: bool, head_dim: int, device: torch.device
) -> Tensor:
    """For every channel the other of its pair; channels that do not rotate are their own."""
    with torch.inference_mode(False):  # kept: it must serve calls that track gradients, too
        channels = torch.arange(head_dim)
    span = channels[start : start + 2 * num_pairs].clone()
    pairs = span.view(num_pairs, 2) if interleaved else span.view(2, num_pairs).T
    channels[pairs[:, 0]], channels[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return channels.to(device)


_partners = lru_cache(maxsize=64)(_make_partners)
