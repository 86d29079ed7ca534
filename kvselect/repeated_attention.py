"""Attention that repeats over like inputs without a causal mask: search seldom, attend sparsely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvselect.block_masks import BlockMask, head_recall
from kvselect.block_sparse import block_mass, block_sparse_attention
from kvselect.checks import require, require_float, require_int, require_type
from kvselect.policies.adaspa import AdaSpa

__all__ = ["RepeatedAttention"]


@dataclass(slots=True)
class RepeatedAttention:
    """One layer of a diffusion model, or of any that attends anew to inputs that change slowly.

    Calls before the first of ``search_at`` are dense. A call at one of these, and one whose mask
    has fallen behind, searches the blocks of its own mass; the others attend to the last mask.

    Parameters
    ----------
    policy : AdaSpa
        ``sparsity``, ``block_size``, ``recall_threshold``; sinks and recent tokens mean nothing
        here.
    search_at : sequence of int, ascending
        Calls that search; the paper's are 10 and 30 of 50.
    mandatory_tokens : sequence of (int, int)
        Spans [begin, end) of keys whose blocks every query keeps: an instruction, a modality.
    keep_lse : bool
        True: searches after the first take the normalisers of the last dense call (the paper's
        cached search). False: their own.
    refresh_share : float in [0, 1] or None
        Search again as soon as the recall on sampled rows, mean over the heads, is under this share
        of what the last search found. None: only at ``search_at``.
    check_stride : int
        One in so many queries is looked at for that.

    Attributes
    ----------
    num_calls, num_searches, num_refreshes : int
    mask : BlockMask or None
        Of the last search.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds.

    Notes
    -----
    Source: AdaSpa, arXiv:2502.21079; ``refresh_share`` is ours. `block_mass` finds normalisers in
    the same pass as masses, so a search with its own costs what one with kept ones does.
    """

    policy: AdaSpa
    search_at: Sequence[int] = (10, 30)
    mandatory_tokens: Sequence[tuple[int, int]] = ()
    keep_lse: bool = False
    refresh_share: float | None = None
    check_stride: int = 64
    num_calls: int = field(default=0, init=False)
    num_searches: int = field(default=0, init=False)
    num_refreshes: int = field(default=0, init=False)
    mask: BlockMask | None = field(default=None, init=False)
    _lse: Tensor | None = field(default=None, init=False)
    _shape: tuple[int, ...] = field(default=(), init=False)
    _sampled_recall: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        require_type(self.policy, AdaSpa, "policy", "a kvselect.AdaSpa")
        steps = list(self.search_at)
        allowed = "ascending ints >= 0, at least one"
        fits = all(isinstance(step, int) and step >= 0 for step in steps)
        require(bool(steps) and fits and steps == sorted(set(steps)), "search_at", steps, allowed)
        for begin, end in self.mandatory_tokens:
            require(
                0 <= begin < end, "mandatory_tokens", (begin, end), "spans with 0 <= begin < end"
            )
        if self.refresh_share is not None:
            allowed = "None or a float in [0, 1]"
            share = require_float(self.refresh_share, "refresh_share", allowed)
            require(0.0 <= share <= 1.0, "refresh_share", share, allowed)
        require_int(self.check_stride, "check_stride", 1)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of one call, without a causal mask.

        Parameters
        ----------
        q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
        k, v : Tensor, [batch, seqlen_k, num_kv_heads, head_dim]

        Returns
        -------
        out, lse
            As `block_sparse_attention`.

        Raises
        ------
        ValueError, TypeError
            As `block_sparse_attention`; if the shapes are not those of the first call, or a
            mandatory span ends behind the keys.
        """
        shape = (*q.shape, *k.shape)
        require(self._shape in ((), shape), "q, k", shape, f"{self._shape} as in the first call")
        self._shape, step = shape, self.num_calls
        self.num_calls += 1
        if step < self.search_at[0]:
            return self._dense(q, k, v)
        if self.mask is None or step in self.search_at:
            if self.mask is None and self.keep_lse:
                out, self._lse = self._dense(q, k, v)
                self._search(q, k)
                return out, self._lse
            self._search(q, k)
        elif self._has_fallen_behind(q, k):
            self.num_refreshes += 1
            self._search(q, k)
        assert self.mask is not None
        return block_sparse_attention(q, k, v, self.mask.unpack(), causal=False, **self._sizes())

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        everything = torch.ones((1, 1, *self._num_blocks(q, k)), dtype=torch.bool)
        return block_sparse_attention(q, k, v, everything, causal=False, **self._sizes())

    def _search(self, q: Tensor, k: Tensor) -> None:
        lse = self._lse if self.keep_lse else None
        mass = block_mass(q, k, lse=lse, causal=False, **self._sizes())
        num_q_blocks, num_blocks = self._num_blocks(q, k)
        num_visible = torch.full((q.shape[0], num_q_blocks), num_blocks)
        mandatory = torch.zeros(q.shape[0], num_q_blocks, num_blocks, dtype=torch.bool)
        for begin, end in self.mandatory_tokens:
            require(end <= k.shape[1], "mandatory_tokens", (begin, end), f"ends <= {k.shape[1]}")
            size = self.policy.block_size
            mandatory[..., begin // size : -(-end // size)] = True
        self.mask = self.policy.search(mass, num_visible, mandatory)
        self.num_searches += 1
        if self.refresh_share is not None:
            self._sampled_recall = self._recall_on_samples(q, k)

    def _has_fallen_behind(self, q: Tensor, k: Tensor) -> bool:
        if self.refresh_share is None:
            return False
        return self._recall_on_samples(q, k) < self.refresh_share * self._sampled_recall

    def _recall_on_samples(self, q: Tensor, k: Tensor) -> float:
        """Mean over heads of the share of the sampled queries' attention that the mask holds."""
        assert self.mask is not None
        stride = self.check_stride
        mass = block_mass(q, k, causal=False, row_stride=stride, **self._sizes())
        return float(head_recall(mass, self.mask.unpack()).mean())

    def _num_blocks(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        size = self.policy.block_size
        return -(-q.shape[1] // size), -(-k.shape[1] // size)

    def _sizes(self) -> dict[str, Any]:
        return {"q_block_size": self.policy.block_size, "kv_block_size": self.policy.block_size}
