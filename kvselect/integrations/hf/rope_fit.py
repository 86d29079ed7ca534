"""Which rotation a layer applies to its queries and keys: measured, never looked up by name.

A layer is run twice on the same input, once as it is and once with cos = 1 and sin = 0
(`calibrate`). The layout that turns the un-rotated queries and keys into the rotated ones is the
layer's layout; where none does, what the layer does is not a plain rotation, and un-rotated keys
cannot be had from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kvselect.rope import Rope

FIT_TOLERANCE = 2e-2
"""Largest relative error of a fit.

A correct one has 1e-6 in float32, 1e-3 in float16, 6e-3 in bfloat16 (the model rotates in its own
dtype, we in float32); the smallest seen where no layout fits is 0.32.
"""

CosLayout = Literal["cat", "repeat", "half"]


@dataclass(frozen=True, slots=True)
class RopeLayout:
    """Where the rotated channels lie, and how the model's cos and sin list their pairs.

    Attributes
    ----------
    interleaved : bool
        Pair ``i`` is channels ``(2i, 2i + 1)`` of the rotated span; otherwise ``(i, i +
        num_pairs)``.
    start : int
        First rotated channel.
    num_pairs : int
        0: the layer has no rotation (NoPE).
    cos_layout : {"cat", "repeat", "half"}
        The model's cos holds every frequency twice, one half after the other ("cat") or side by
        side ("repeat"), or once ("half").
    """

    interleaved: bool = False
    start: int = 0
    num_pairs: int = 0
    cos_layout: CosLayout = "cat"

    def __str__(self) -> str:
        if self.num_pairs == 0:
            return "none"
        kind = "interleaved" if self.interleaved else "half"
        return f"{kind} [{self.start}:{self.start + 2 * self.num_pairs}]"

    def pairs(self, table: Tensor) -> Tensor:
        """The model's cos or sin ``[..., width]`` as float32 ``[..., num_pairs]``, contiguous."""
        if self.cos_layout == "cat":
            table = table[..., : self.num_pairs]
        elif self.cos_layout == "repeat":
            table = table[..., 0::2]
        return table.to(torch.float32).contiguous()

    def table(self, cos: Tensor, sin: Tensor) -> Rope:
        """A call's cos and sin ``[batch, seqlen, width]`` as a table of ``batch * seqlen`` rows."""
        return Rope(
            cos=self.pairs(cos).view(-1, self.num_pairs),
            sin=self.pairs(sin).view(-1, self.num_pairs),
            start=self.start,
            interleaved=self.interleaved,
        )

    def unrotation(self, cos: Tensor, sin: Tensor, head_dim: int) -> Unrotation:
        """What takes the queries of a call back to before RoPE, from its cos and sin."""
        cos, sin = self.pairs(cos), self.pairs(sin)
        norm = cos.square() + sin.square()  # the attention scaling, squared (YaRN, longrope)
        rope = Rope(
            cos=(cos / norm).flatten(0, 1),
            sin=(-sin / norm).flatten(0, 1),
            start=self.start,
            interleaved=self.interleaved,
        )
        rows = torch.arange(rope.num_positions, device=cos.device).view(cos.shape[:2])
        own, other = rope.factors(rows, head_dim)
        return Unrotation(rope, own.unsqueeze(-2), other.unsqueeze(-2))


class Unrotation(NamedTuple):
    """Factors of `Rope.turn` that undo a call's rotation, [batch or 1, seqlen, 1, head_dim]."""

    rope: Rope
    own: Tensor
    other: Tensor

    def __call__(self, q: Tensor) -> Tensor:
        """``q`` ``[batch, seqlen, heads, head_dim]`` before RoPE, float32.

        Notes
        -----
        Relative error at most 3e-7 in float32 and 6e-3 in bfloat16 (what the model's own rounding
        left).
        """
        return self.rope.turn(q, self.own, self.other)


NO_ROPE = RopeLayout()


def candidate_layouts(width: int, head_dim: int) -> list[RopeLayout]:
    """All layouts that ``width`` channels of cos and ``head_dim`` of the head allow."""
    spans: tuple[tuple[CosLayout, int], ...] = (
        ("cat", width),
        ("repeat", width),
        ("half", 2 * width),
    )
    return [NO_ROPE] + [
        RopeLayout(interleaved, start, dim // 2, cos_layout)
        for cos_layout, dim in spans
        if dim <= head_dim
        for interleaved in (False, True)
        for start in sorted({0, head_dim - dim})
    ]


def fit_layout(
    rotated: tuple[Tensor, Tensor], unrotated: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor
) -> tuple[RopeLayout, float]:
    """The layout that turns un-rotated queries and keys into rotated ones, and its error.

    Parameters
    ----------
    rotated, unrotated : pair of Tensor, [1, heads, seqlen, head_dim]
        Queries and keys of the same input with and without rotation.
    cos, sin : Tensor, [1, seqlen, width]
        What the model's rotary module gave for these positions.

    Returns
    -------
    layout : RopeLayout
    error : float
        ``max |difference| / max |true|``, the larger of queries and keys; the caller compares it to
        `FIT_TOLERANCE`.
    """
    head_dim = rotated[0].shape[-1]
    layouts = candidate_layouts(cos.shape[-1], head_dim)
    errors = [
        max(_fit_error(layout, x, y, cos, sin) for x, y in zip(unrotated, rotated))
        for layout in layouts
    ]
    best = min(range(len(layouts)), key=errors.__getitem__)
    return layouts[best], errors[best]


def _fit_error(
    layout: RopeLayout, unrotated: Tensor, rotated: Tensor, cos: Tensor, sin: Tensor
) -> float:
    x, y = unrotated.transpose(1, 2).float(), rotated.transpose(1, 2).float()
    if layout.num_pairs > 0:
        x = layout.table(cos, sin).rotate(x, torch.arange(x.shape[1], device=x.device)[None])
    error = float((x - y).abs().max() / y.abs().max())
    return error if error == error else float("inf")  # NaN compares false with everything


@dataclass(frozen=True, slots=True, eq=False)
class Frequencies:
    """The rotation of a layer, frozen: some models change it with the length of the context.

    Attributes
    ----------
    inv_freq : Tensor, [num_pairs], float32
        Radians per position.
    scaling : float
        Factor on cos and sin (YaRN, longrope).
    """

    inv_freq: Tensor
    scaling: float

    def rope(self, layout: RopeLayout, num_positions: int, device: torch.device) -> Rope:
        """Table for positions ``[0, num_positions)``."""
        return self._rope(layout, num_positions, self.scaling, device)

    def inverse(self, layout: RopeLayout, device: torch.device) -> Rope:
        """What takes a vector at position ``p`` back to position 0 by ``rotate_at(x, -p)``."""
        return self._rope(layout, 1, 1.0 / self.scaling, device)

    def _rope(
        self, layout: RopeLayout, num_positions: int, scaling: float, device: torch.device
    ) -> Rope:
        return Rope.from_frequencies(
            self.inv_freq,
            num_positions,
            scaling=scaling,
            start=layout.start,
            interleaved=layout.interleaved,
            device=device,
        )


def freeze_frequencies(rotary: nn.Module | None, layer_type: str | None) -> Frequencies | None:
    """A copy of what the rotary module uses now, or None if it keeps no frequencies.

    To be called right after calibration: its few small positions put ``dynamic`` and ``longrope``
    scaling into their short state, the one that compact positions stay in.
    """
    prefix = f"{layer_type}_" if layer_type and hasattr(rotary, f"{layer_type}_inv_freq") else ""
    inv_freq = getattr(rotary, f"{prefix}inv_freq", None)
    if not isinstance(inv_freq, Tensor):
        return None
    scaling = getattr(rotary, f"{prefix}attention_scaling", 1.0)
    return Frequencies(inv_freq.detach().to(torch.float32).clone(), float(scaling))


def frequencies_match(
    frequencies: Frequencies, layout: RopeLayout, cos: Tensor, positions: Tensor
) -> bool:
    """Whether frozen frequencies give the model's own cos ``[1, seqlen, width]`` at ``positions``.

    Exact: the same product in float32, rounded to the model's dtype.
    """
    rows = int(positions.max()) + 1
    if frequencies.inv_freq.shape[0] != layout.num_pairs:
        return False
    table = frequencies.rope(layout, rows, cos.device).cos[positions.flatten()]
    return torch.equal(table.to(cos.dtype).float(), layout.pairs(cos)[0])
