"""Prefill: the queries of a call in blocks, run by run: select for each block, attend, next run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from kvselect.arguments import raise_if_not_finite, require_softcap, require_softmax_scale
from kvselect.cache import KVCache
from kvselect.checks import require_bool, require_int
from kvselect.decode import require_step
from kvselect.policies.base import Policy, PolicyState
from kvselect.queries import Phase, Queries
from kvselect.query_blocks import cut_queries
from kvselect.rope import Rope
from kvselect.tensor_parallel import ProcessGroup

__all__ = ["prefill", "query_blocks", "selects_stepwise"]


def query_blocks(seqlen_q: int, policy: Policy) -> tuple[int, ...]:
    """First query of each block of a call, and ``seqlen_q``; cut from the end of the call."""
    require_int(seqlen_q, "seqlen_q", 0)
    return cut_queries(
        seqlen_q, policy.q_block_size, policy.num_tail_tokens, policy.tail_q_block_size
    )


def selects_stepwise(policy: Policy, seqlen_q: int, num_tokens: int) -> bool:
    """Whether each query of a short call on a filled cache selects by the decode rule.

    ``num_tokens``: of the longest row, those of the call included.
    """
    return seqlen_q <= policy.tail_q_block_size and num_tokens > seqlen_q


def prefill(
    q: Tensor,
    cache: KVCache,
    policy: Policy,
    state: PolicyState,
    *,
    q_unrotated: Tensor | None = None,
    rope: Rope | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    stepwise: bool = True,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last ``seqlen_q`` tokens over what a policy selects for their blocks.

    Parameters
    ----------
    q : Tensor, [batch, seqlen_q, num_q_heads, head_dim]
        Queries of the tokens that end each row: append first. Rotated for ``positions="original"``,
        un-rotated for "compact". A row shorter than ``seqlen_q`` is aligned at the end; what stands
        before it gives 0.
    cache : KVCache
    policy : Policy
    state : PolicyState
        ``policy.new_state(cache)``, one per layer. Its selection cache, if any, is void afterwards.
    q_unrotated : Tensor of the shape of ``q``, or None
        With "original": the queries before RoPE, which are what a block's vectors average. With
        neither this nor ``rope`` the queries count as un-rotated.
    rope : Rope or None
        The model's rotation; required by "compact", and by ``q_unrotated``.
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    softcap : float or None
        Given, a logit ``x`` becomes ``softcap * tanh(x / softcap)``; one that is not finite, NaN.
    sink_logits : Tensor, [num_q_heads], float32, or None
        One more logit per head in the denominator of its softmax, of a value that is 0.
    process_group : torch.distributed.ProcessGroup or None
        Ranks that hold the layer's other heads: a policy of scope "layer" adds their votes.
    stepwise : bool
        Whether a short call on a filled cache selects by the decode rule (Notes). False: the
        queries are the next piece of a prompt, which may be short by chance of where it was cut.
    check_finite : bool
        Raise if a query, or any token ever appended, holds NaN or inf (reads a flag back from the
        device).

    Returns
    -------
    out : Tensor, [batch, seqlen_q, num_q_heads, head_dim], dtype of ``q``; 0 where a query sees
    nothing lse : Tensor, [batch, seqlen_q, num_q_heads], float32; -inf there

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes, devices or settings do not fit.

    Notes
    -----
    A call of at most ``tail_q_block_size`` queries on a filled cache (a draft to verify, a short
    turn) selects for each query by the decode rule, so that it gives what as many decode steps
    would, unless ``stepwise`` is False. Otherwise one scan scores the blocks of a run of about
    ``chunk_size`` queries; the first blocks, which select everything, are attended densely.
    """
    require_step(q, cache, policy, state, q_unrotated, rope, sink_logits)
    require_bool(stepwise, "stepwise")
    scale = require_softmax_scale(softmax_scale, cache.head_dim)
    cap = require_softcap(softcap)
    if check_finite:
        raise_if_not_finite(q, cache)
    policy.update(state, cache)
    state.invalidate()

    seqlen_q = q.shape[1]
    longest = max(cache.num_real_tokens, default=0)
    phase: Phase = "prefill"
    offsets = query_blocks(seqlen_q, policy)
    if stepwise and selects_stepwise(policy, seqlen_q, longest):
        phase, offsets = "decode", tuple(range(seqlen_q + 1))
        policy = state.decode_policy(q.shape[2])

    question = None
    if policy.num_question_tokens:
        question = (q if q_unrotated is None else q_unrotated)[:, -policy.num_question_tokens :]

    outs, lses = [], []
    with cache.whole_rows():
        for first, last in _runs(offsets, longest - seqlen_q, policy, phase, rope):
            begin, end = offsets[first], offsets[last]
            run_offsets = tuple(offset - begin for offset in offsets[first : last + 1])
            later = seqlen_q - end
            queries = Queries(
                q=q[:, begin:end],
                phase=phase,
                softmax_scale=scale,
                # Rows may be shorter than what comes later: nothing of them is visible yet.
                cache_seqlens=(cache.cache_seqlens - later).clamp_(min=0)
                if later
                else cache.cache_seqlens,
                max_seqlen=max(cache.max_seqlen - later, 0),
                q_unrotated=None if q_unrotated is None else q_unrotated[:, begin:end],
                rope=rope,
                offsets=run_offsets,
                q_block_offsets=state.offsets_on(q.device, run_offsets),
                num_later_tokens=later,
                softcap=cap,
                sink_logits=sink_logits,
                process_group=process_group,
                question=question,
            )
            selection = policy.select(state, queries, cache)
            out, lse = policy.attend(queries, cache, selection)
            if phase == "prefill":
                state.prefill.record_kernels(queries.kernels)
            outs.append(out)
            lses.append(lse)
    state.invalidate()
    if len(outs) == 1:
        return outs[0], lses[0]
    if not outs:
        return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def _runs(
    offsets: tuple[int, ...], num_cached: int, policy: Policy, phase: Phase, rope: Rope | None
) -> Iterator[tuple[int, int]]:
    """Runs of blocks ``[first, last)``: all dense ones, then about ``chunk_size`` queries each.

    ``num_cached``: real tokens before the call in the longest row; which blocks are dense depends
    on nothing else.
    """
    num_blocks = len(offsets) - 1
    dense = [
        policy.is_dense(phase, max(num_cached + begin, 0), max(num_cached + end, 0), rope)
        for begin, end in pairwise(offsets)
    ]
    first = 0
    while first < num_blocks:
        last = first + 1
        while last < num_blocks and dense[last] == dense[first]:
            if not dense[first] and offsets[last + 1] - offsets[first] > policy.chunk_size:
                break
            last += 1
        yield first, last
        first = last
