"""One decode step, top to bottom, in the order it happens: select, attend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvselect.arguments import (
    raise_if_not_finite,
    require_queries,
    require_rope,
    require_sink_logits,
    require_softcap,
    require_softmax_scale,
)
from kvselect.block_masks import BlockMask
from kvselect.cache import KVCache
from kvselect.checks import require, require_tensor, require_type
from kvselect.policies.base import Policy, PolicyState
from kvselect.queries import Queries
from kvselect.rope import Rope
from kvselect.selection import Selection
from kvselect.tensor_parallel import ProcessGroup

__all__ = ["DecodeInfo", "decode_step"]


class DecodeInfo(NamedTuple):
    """What a decode step did.

    ``selection`` is None where the step was dense; with a selection cache its indices belong to the
    state and change at the next step.
    """

    selection: Selection | None
    lse: Tensor  # [batch, 1, num_q_heads] float32

    @property
    def hit(self) -> Tensor | None:
        """Lists that were reused, int32 [batch, num_lists]; None: none could be."""
        return None if self.selection is None else self.selection.hit

    @property
    def kept_mass(self) -> Tensor | None:
        """`Selection.kept_mass`, [batch, num_kv_heads]; None: a dense step, or not known."""
        return None if self.selection is None else self.selection.kept_mass


def decode_step(
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
    audit: bool = False,
    check_finite: bool = False,
) -> tuple[Tensor, DecodeInfo]:
    """Attention of each row's newest token over what a policy selects for it.

    Parameters
    ----------
    q : Tensor, [batch, 1, num_q_heads, head_dim]
        Query of the token appended last: append first. Rotated for ``positions="original"``,
        un-rotated for "compact".
    cache : KVCache
    policy : Policy
    state : PolicyState
        ``policy.new_state(cache)``, kept from step to step, one per layer.
    q_unrotated : Tensor of the shape of ``q``, or None
        With "original": the query before RoPE, for the similarity of a selection cache.
    rope : Rope or None
        The model's rotation; required by "compact".
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    softcap : float or None
        Given, a logit ``x`` becomes ``softcap * tanh(x / softcap)``; one that is not finite, NaN.
    sink_logits : Tensor, [num_q_heads], float32, or None
        One more logit per head in the denominator of its softmax, of a value that is 0.
    process_group : torch.distributed.ProcessGroup or None
        Ranks that hold the layer's other heads: a policy of scope "layer" adds their votes.
    audit : bool
        Score the step from the exact keys as well, and record in the state what was missed
        (`PhaseStatistics.exact_audit`). Reads every key.
    check_finite : bool
        Raise if the query, or any token ever appended, holds NaN or inf (reads a flag back from the
        device).

    Returns
    -------
    out : Tensor, [batch, 1, num_q_heads, head_dim], dtype of ``q``; 0 for a row without tokens
    info : DecodeInfo

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes, devices or settings do not fit.

    Notes
    -----
    Three ops at most (scores, lists, attention), each for the whole batch; no host synchronisation.
    A step whose rows are all short (`TokenSelect.dense_limit`) is dense; the state knows how short
    that is, if the policy leaves it to measurement.
    """
    require_step(q, cache, policy, state, q_unrotated, rope, sink_logits)
    seqlen_q = q.shape[1]
    require(seqlen_q == 1, "seqlen_q", seqlen_q, "1 (prefill takes more)")
    if check_finite:
        raise_if_not_finite(q, cache)
    queries = Queries(
        q=q,
        phase="decode",
        softmax_scale=require_softmax_scale(softmax_scale, cache.head_dim),
        cache_seqlens=cache.cache_seqlens,
        max_seqlen=cache.max_seqlen,
        q_unrotated=q_unrotated,
        rope=rope,
        softcap=require_softcap(softcap),
        sink_logits=sink_logits,
        process_group=process_group,
    )
    policy = state.decode_policy(q.shape[2])
    policy.update(state, cache)
    selection = policy.select(state, queries, cache)
    assert not isinstance(selection, BlockMask)  # of prefill only
    if audit and selection is not None:
        policy.audit(state, queries, cache, selection)
    out, lse = policy.attend(queries, cache, selection)
    return out, DecodeInfo(selection, lse)


def require_step(
    q: object,
    cache: KVCache,
    policy: object,
    state: object,
    q_unrotated: object,
    rope: object,
    sink_logits: object = None,
) -> None:
    """Checks that decode steps and prefill calls share."""
    require_type(policy, Policy, "policy", "a kvselect policy, such as TokenSelect()")
    require_type(state, PolicyState, "state", "policy.new_state(cache)")
    require_queries(q, cache)
    assert isinstance(policy, Policy) and isinstance(state, PolicyState) and isinstance(q, Tensor)
    if q_unrotated is not None:
        require_tensor(q_unrotated, "q_unrotated", tuple(q.shape), (q.dtype,), q.device)
    require_rope(rope, cache)
    require_sink_logits(sink_logits, q.shape[2], cache)
    state.follow(policy, cache)
