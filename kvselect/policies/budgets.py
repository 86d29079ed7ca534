"""How a budget of tokens per decode step is shared out: sinks, recent tokens, the rest by score."""

from __future__ import annotations

from typing import NamedTuple

from kvselect.checks import require_int

__all__ = ["MIN_BUDGET", "Budget", "share_out"]

MIN_BUDGET = 144  # a sketch needs 128 recent tokens
_MAX_SINKS, _MIN_RECENT, _MAX_RECENT = 128, 128, 512


class Budget(NamedTuple):
    """Tokens that a decode step attends to, by why it does."""

    num_sink_tokens: int
    num_recent_tokens: int
    num_picked: int


def share_out(budget: int) -> Budget:
    """A 29th of ``budget`` are sinks (at most 128), a quarter is recent (128 to 512 tokens).

    These are the shares of `TokenSelect`'s defaults, whose budget is 3712.

    Raises
    ------
    ValueError, TypeError
        If nothing is left to be picked.
    """
    allowed = f"an int >= {MIN_BUDGET}, tokens per decode step"
    require_int(budget, "budget", MIN_BUDGET, allowed)
    sinks = min(_MAX_SINKS, budget // 29)
    recent = min(_MAX_RECENT, max(_MIN_RECENT, budget // 4))
    return Budget(sinks, recent, budget - sinks - recent)
