"""One selecting layer of a server: store a step's keys and values, attend for its requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvselect.checks import require
from kvselect.decode import decode_step
from kvselect.engine_cache import EngineKVCache
from kvselect.engine_selection_cache import EngineSelectionCache
from kvselect.integrations.vllm.config import averages_unrotated, compares_unrotated
from kvselect.integrations.vllm.state import Rows, Step
from kvselect.policies.base import Policy
from kvselect.prefill import prefill, selects_stepwise
from kvselect.rope import Rope
from kvselect.tensor_parallel import ProcessGroup

__all__ = ["Rotation", "ServedLayer", "rotation_from_table"]

QUERIES_AT_ONCE = 2048
"""Queries and keys that are rotated back at once: bounds the float32 copies."""


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The model's rotation, which the engine applies before anything reaches us.

    Attributes
    ----------
    table : Rope
        Of every position that a request can have.
    trained : Rope
        Of the positions that the model was trained on: what compact positions stay in.
    """

    table: Rope
    trained: Rope

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` ``[num_tokens, heads, head_dim]`` before RoPE, in its dtype.

        float32 inside; in bfloat16 the rounding of the rotated values remains, 6e-3 relative at
        most.
        """
        back = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for begin in range(0, x.shape[0], QUERIES_AT_ONCE):
            part = slice(begin, begin + QUERIES_AT_ONCE)
            back[part] = self.table.unrotate(x[part], positions[part])
        return back


def rotation_from_table(
    cos_sin: Tensor, is_neox_style: bool, trained_length: int, head_dim: int
) -> Rotation:
    """The rotation that vLLM's table describes.

    Parameters
    ----------
    cos_sin : Tensor, [num_positions, rotary_dim]
        Cosines of the pairs, then their sines.
    is_neox_style : bool
        Pairs are channels ``(i, i + rotary_dim / 2)``; otherwise ``(2i, 2i + 1)``.
    trained_length : int
        Positions that the model was trained on [tokens].

    Raises
    ------
    ValueError
        If the table is shorter than that, or turns more channels than a head has.
    """
    rows, width = cos_sin.shape
    require(rows >= trained_length, "rotary table", rows, f"at least {trained_length} positions")
    require(width <= head_dim, "rotary_dim", width, f"at most head_dim = {head_dim}")
    cos, sin = (half.float().contiguous() for half in cos_sin.chunk(2, dim=-1))
    interleaved = not is_neox_style
    return Rotation(
        Rope(cos, sin, interleaved=interleaved),
        Rope(cos[:trained_length], sin[:trained_length], interleaved=interleaved),
    )


class ServedLayer:
    """A policy over one layer's blocks.

    Parameters
    ----------
    policy : Policy
    k_pages, v_pages : Tensor, [num_blocks, page_block_size, num_kv_heads, head_dim]
    num_q_heads : int
    softmax_scale : float
    rotation : Rotation or None
        None: the policy never asks for anything before RoPE.
    softcap : float or None
    sink_logits : Tensor, [num_q_heads], or None
    process_group : ProcessGroup or None
        Ranks with the layer's other heads.
    """

    def __init__(
        self,
        policy: Policy,
        k_pages: Tensor,
        v_pages: Tensor,
        *,
        num_q_heads: int,
        softmax_scale: float,
        rotation: Rotation | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.policy, self.rotation = policy, rotation
        self.cache = EngineKVCache(k_pages, v_pages, sketch=policy.required_sketch)
        # Ranks that vote together must select at the same steps, whatever each machine measured.
        self.state = policy.new_state(self.cache, None if process_group is None else {})
        # Prefill calls void what a state remembers: of their rows, which are others' than a step's.
        self._selections, self.state.selection_cache = self.state.selection_cache, None
        self._num_steps = 0
        self._num_nonfinite: Tensor | None = None  # by flat token that is decoded
        self._num_q_heads = num_q_heads
        self._options: dict[str, Any] = {
            "softmax_scale": softmax_scale,
            "softcap": softcap,
            "sink_logits": None if sink_logits is None else sink_logits.float(),
            "process_group": process_group,
        }

    def is_over(self, kv_cache: Tensor) -> bool:
        """Whether these are the engine's blocks still: it may make others."""
        same = self.cache.k_pages.data_ptr() == kv_cache.data_ptr()
        return same and self.cache.k_pages.shape[0] == kv_cache.shape[0]

    def store(self, step: Step, k: Tensor, v: Tensor) -> None:
        """Keys and values of all the step's tokens, before any of its queries attends.

        A request may share blocks that another one fills in the same step.

        Parameters
        ----------
        k, v : Tensor, [at least step.num_tokens, num_kv_heads, head_dim]
            Rotated, as the model gives them.
        """
        k = k[: step.num_tokens]
        if self.policy.caches_unrotated:
            assert self.rotation is not None
            k = self.rotation.undo(k, step.positions)
        self._num_steps += 1
        for rows in step.rows:
            self.cache.serve(rows.block_table, rows.lengths(after=False), rows.before)
            self.cache.append(rows.take(k), rows.take(v))
            # Of all rows before any attends: pages that are filled in this step may be shared.
            self.policy.update(self.state, self.cache)
            if rows.decodes and self._selections is not None:
                counts = self.cache.num_nonfinite
                self._num_nonfinite = counts.new_zeros(step.num_tokens, counts.shape[1])
                rows.put(self._num_nonfinite, counts[:, None])

    def attend(self, step: Step, q: Tensor, out: Tensor) -> None:
        """Attention of the step's queries.

        Parameters
        ----------
        q, out : Tensor, [at least step.num_tokens, num_q_heads, head_dim]
            ``out`` is written to.
        """
        q = q[: step.num_tokens]
        if self.policy.caches_unrotated:
            assert self.rotation is not None
            q = self.rotation.undo(q, step.positions)
        for rows in step.calls(self._is_dense):
            attend = self._decode_rows if rows.decodes else self._prefill_rows
            rows.put(out, attend(step, rows, rows.take(q)))

    def _is_dense(self, length: int) -> bool:
        """Whether decode steps of a row of so many tokens are dense."""
        policy = self.state.decode_policy(self._num_q_heads)
        return policy.is_dense("decode", length - 1, length, self._compact_rope())

    def _compact_rope(self) -> Rope | None:
        if not self.policy.caches_unrotated:
            return None
        assert self.rotation is not None
        return self.rotation.trained

    def _decode_rows(self, step: Step, rows: Rows, q: Tensor) -> Tensor:
        num_nonfinite, q_unrotated = None, None
        if self._selections is not None:
            assert isinstance(self._selections, EngineSelectionCache)
            assert self._num_nonfinite is not None  # these rows were stored
            num_nonfinite = rows.take(self._num_nonfinite)[:, 0]
            self._selections.serve(self._num_steps, *step.pages(rows, self.cache.k_pages.shape[1]))
            if compares_unrotated(self.policy):
                assert self.rotation is not None
                q_unrotated = self.rotation.undo(q[:, 0], step.positions[rows.tokens])[:, None]
        self.cache.serve(rows.block_table, rows.lengths(after=True), rows.after, num_nonfinite)
        self.state.selection_cache = self._selections
        try:
            return decode_step(
                q,
                self.cache,
                self.policy,
                self.state,
                q_unrotated=q_unrotated,
                rope=self._compact_rope(),
                **self._options,
            )[0]
        finally:
            self.state.selection_cache = None

    def _prefill_rows(self, step: Step, rows: Rows, q: Tensor) -> Tensor:
        """The same call as under Hugging Face, where nobody cuts prompts: pieces are prefill,
        however short.
        """
        self.cache.serve(rows.block_table, rows.lengths(after=True), rows.after)
        rope, q_unrotated = self._compact_rope(), None
        (longest,) = rows.after
        stepwise = not rows.of_prompt and selects_stepwise(self.policy, rows.num_new, longest)
        dense = self.policy.is_dense("prefill", longest - 1, longest, None)
        if averages_unrotated(self.policy) and not stepwise and not dense:
            assert self.rotation is not None
            q_unrotated = self.rotation.undo(q[0], step.positions[rows.tokens])[None]
            rope = self.rotation.table
        out, _ = prefill(
            q,
            self.cache,
            self.policy,
            self.state,
            q_unrotated=q_unrotated,
            rope=rope,
            stepwise=stepwise,
            **self._options,
        )
        return out
