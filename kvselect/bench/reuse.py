"""A decode step with a selection cache that can be run again and again from the same state."""

from __future__ import annotations

from torch import Tensor

from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.decode import DecodeInfo, decode_step
from kvselect.policies.token_select import TokenSelect
from kvselect.selection import Lists

__all__ = ["RepeatedStep"]


class RepeatedStep:
    """The step after a first one, whose list it reuses if its query is the same.

    ``RepeatedStep(...)``, then one token appended to the cache, then `arm`; from there on `restore`
    brings back what a step changes, on the device and on the host, so that every call (and every
    replay of a graph captured from one) is the same step.

    Parameters
    ----------
    policy : TokenSelect
        With a ``similarity_threshold``.
    anchor : Tensor, [batch, 1, num_q_heads, head_dim]
        Query of the first step; compared as it is, rotation or not.
    cache : KVCache
        Must not change after `arm`.
    """

    def __init__(self, policy: TokenSelect, anchor: Tensor, cache: KVCache) -> None:
        allowed = "a float (a policy with a selection cache)"
        got = policy.similarity_threshold
        require(got is not None, "similarity_threshold", got, allowed)
        self._policy, self._cache, self._anchor = policy, cache, anchor
        self._state = policy.new_state(cache)
        decode_step(anchor, cache, policy, self._state, q_unrotated=anchor)
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._lists: Lists | None = None

    def arm(self) -> None:
        """Remember the state; `restore` comes back to it."""
        reuse = self._state.selection_cache
        assert reuse is not None and reuse.lists is not None and reuse.anchor_query is not None
        self._lists = reuse.lists
        kept = (
            reuse.anchor_query,
            reuse.age,
            reuse.expected_seqlens,
            reuse.known_nonfinite,
            *reuse.lists,
        )
        self._saved = [(tensor, tensor.clone()) for tensor in kept]

    def restore(self) -> None:
        """Back to the state that `arm` saw; not timed."""
        reuse = self._state.selection_cache
        assert reuse is not None and self._lists is not None, "arm() comes first"
        for tensor, value in self._saved:
            tensor.copy_(value)
        # The lists of the last call share the indices, but not the counts.
        reuse.store(self._lists, self._cache)

    def step(self, q: Tensor, similar: bool) -> tuple[Tensor, DecodeInfo]:
        """One step; ``similar``: its query before RoPE is the anchor, else its negative."""
        unrotated = self._anchor if similar else -self._anchor
        return decode_step(q, self._cache, self._policy, self._state, q_unrotated=unrotated)
