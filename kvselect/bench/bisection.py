"""The smallest budget that is enough."""

from __future__ import annotations

from collections.abc import Callable

from kvselect.checks import require

__all__ = ["fewest"]


def fewest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """The smallest budget in ``[low, high]`` that is enough, by bisection.

    Parameters
    ----------
    enough : callable
        Once True, True for all larger budgets; ``high`` counts as enough without being asked.

    Raises
    ------
    ValueError
        If the range is empty.
    """
    require(low <= high, "low", low, f"at most high = {high}")
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low
