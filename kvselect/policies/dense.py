"""Dense: attention over every visible token, the method that all others are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvselect.cache import KVCache
from kvselect.policies.base import Policy, PolicyState, register_policy, visible_tokens
from kvselect.queries import Phase, Queries
from kvselect.rope import Rope

__all__ = ["Dense"]


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(Policy):
    """No selection: our own exact attention over the whole cache, at the model's positions."""

    revocable: ClassVar[bool] = True
    query_aware: ClassVar[bool] = (
        True  # nothing is dropped, so nothing depends on a query that is not there yet
    )
    persistent: ClassVar[bool] = False

    @property
    def reads_unlisted(self) -> str:
        return "every step reads every key"

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        return True

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> None:
        """None, always: every visible token."""
        state.statistics(queries.phase).record_dense(visible_tokens(queries, cache))
