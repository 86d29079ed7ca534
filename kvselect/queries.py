"""What a policy is asked about: the queries of one call, or of one run of blocks of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from kvselect.rope import Rope
from kvselect.tensor_parallel import ProcessGroup

__all__ = ["Phase", "Queries"]

Phase = Literal["prefill", "decode"]


@dataclass(slots=True, kw_only=True)
class Queries:
    """Queries that end ``num_later_tokens`` before the end of the cache.

    Parameters
    ----------
    q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
        As attention uses them: rotated with ``positions="original"``, un-rotated with
        ``"compact"``. Query ``j`` of row ``b`` sits at position ``cache_seqlens[b] - seqlen_q +
        j``.
    phase : "prefill" or "decode"
        "decode": every block holds one query and selects as a decode step does, whatever their
        number.
    softmax_scale : float
    cache_seqlens : Tensor, [batch], int32
        Tokens of each row up to and with the last of these queries.
    max_seqlen : int
        At least the largest of them, known to the host.
    q_unrotated : Tensor of the shape of ``q``, or None
        The queries before RoPE; None: ``q`` carries no rotation (or ``positions="compact"``).
    rope : Rope or None
        The model's rotation.
    offsets : tuple of int, ascending from 0 to ``seqlen_q``
        First query of each block.
    q_block_offsets : Tensor, [num_blocks + 1], int32, or None
        The same on the device; None: one block.
    num_later_tokens : int
        Tokens that the cache holds after the last of these queries.
    softcap : float
        A logit ``x`` becomes ``softcap * tanh(x / softcap)``; 0: it stays as it is.
    sink_logits : Tensor, [num_q_heads], float32, contiguous, or None
        One more logit per head in the denominator of its softmax.
    process_group : ProcessGroup or None
        Ranks that hold the layer's other heads (tensor parallel): with scope "layer" their votes
        are added.
    question : Tensor, [batch, n, num_q_heads, head_dim], or None
        Prefill, for policies with ``num_question_tokens``: the last queries of the whole call,
        before RoPE where those are known.
    kernels : list of str
        Attention appends the name of each kernel that it runs.
    """

    q: Tensor
    phase: Phase
    softmax_scale: float
    cache_seqlens: Tensor
    max_seqlen: int
    q_unrotated: Tensor | None = None
    rope: Rope | None = None
    offsets: tuple[int, ...] = (0, 1)
    q_block_offsets: Tensor | None = None
    num_later_tokens: int = 0
    softcap: float = 0.0
    sink_logits: Tensor | None = None
    process_group: ProcessGroup | None = None
    question: Tensor | None = None
    kernels: list[str] = field(default_factory=list)

    @property
    def seqlen_q(self) -> int:
        return self.q.shape[1]

    @property
    def num_blocks(self) -> int:
        return len(self.offsets) - 1
