"""How sure a score is: Wilson intervals for one cell, paired bootstrap for a difference to
dense."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054
BOOTSTRAP_DRAWS = 10_000
BOOTSTRAP_SEED = 20_240


def wilson(num_correct: float, num_samples: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share; of a mean of scores in [0, 1], where it is no narrower
    than it must be: nothing varies more than right and wrong.

    ``centre = (p + z^2 / 2n) / (1 + z^2 / n)``, ``half = z / (1 + z^2 / n) * sqrt(p (1 - p) / n +
    z^2 / 4n^2)``

    Returns
    -------
    (low, high), both in [0, 1]; (0, 1) without samples

    Raises
    ------
    ValueError
        Unless 0 <= num_correct <= num_samples.

    Notes
    -----
    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927). Unlike p +- z*sqrt(p(1-p)/n) it is not
    empty at p = 0 or 1.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct: got {num_correct}, allowed: 0 to {num_samples}")
    if num_samples == 0:
        return 0.0, 1.0
    share, z2 = num_correct / num_samples, Z_95**2
    scale = 1.0 / (1.0 + z2 / num_samples)
    centre = scale * (share + z2 / (2 * num_samples))
    half = scale * Z_95 * math.sqrt(share * (1 - share) / num_samples + z2 / (4 * num_samples**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    correct: npt.ArrayLike, baseline: npt.ArrayLike
) -> tuple[float, float, float]:
    """Mean of ``correct - baseline`` over the same questions, with a 95 % bootstrap interval.

    Parameters
    ----------
    correct, baseline : bool or float in [0, 1], [num_samples]
        The same questions in the same order under two policies.

    Returns
    -------
    (difference, low, high)

    Raises
    ------
    ValueError
        If the lengths differ or are 0.

    Notes
    -----
    10 000 resamples of questions with a fixed seed. Questions count as independent, also those
    about one context. Cost: equal differences are resampled by their counts, so right and wrong
    cost the same however many the samples are.
    """
    return macro_difference([(correct, baseline)])


def macro_difference(
    pairs: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
) -> tuple[float, float, float]:
    """`paired_difference` of a mean over tasks: resampled within each task.

    Parameters
    ----------
    pairs : list of (correct, baseline)
        One entry per task.
    """
    if not pairs:
        raise ValueError("pairs: got none, allowed: at least one task")
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    mean, means = 0.0, np.zeros(BOOTSTRAP_DRAWS)
    for correct, baseline in pairs:
        ours, theirs = np.asarray(correct, float), np.asarray(baseline, float)
        if ours.shape != theirs.shape or ours.ndim != 1 or ours.size == 0:
            raise ValueError(
                f"baseline: got shape {theirs.shape}, allowed: [num_samples], the shape of "
                f"correct: {ours.shape}"
            )
        values, counts = np.unique(ours - theirs, return_counts=True)
        draws = rng.multinomial(ours.size, counts / ours.size, BOOTSTRAP_DRAWS)
        means += draws @ values / (ours.size * len(pairs))
        mean += float((ours - theirs).mean()) / len(pairs)
    low, high = np.quantile(means, [0.025, 0.975])
    return mean, float(low), float(high)
