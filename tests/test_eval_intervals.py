"""Wilson intervals and the paired bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvselect.eval.intervals import Z_95, macro_difference, paired_difference, wilson


def test_wilson_against_published_halves() -> None:
    low, high = wilson(90, 100)  # +-6 points at .9 and n = 100, +-2.6 at n = 500
    assert (high - low) / 2 == pytest.approx(0.06, abs=0.002)
    low, high = wilson(450, 500)
    assert (high - low) / 2 == pytest.approx(0.0264, abs=0.0005)


def test_wilson_at_the_ends_is_one_sided() -> None:
    low, high = wilson(20, 20)
    assert high == 1.0 and low == pytest.approx(1 / (1 + Z_95**2 / 20))
    assert wilson(0, 20) == pytest.approx((0.0, 1 - low))
    assert wilson(0, 0) == (0.0, 1.0)


@settings(deadline=None)
@given(n=st.integers(1, 2000), share=st.floats(0, 1))
def test_wilson_solves_its_equation(n: int, share: float) -> None:
    k = round(share * n)
    low, high = wilson(k, n)
    p = k / n
    assert 0.0 <= low <= p + 1e-12 and p - 1e-12 <= high <= 1.0
    for bound in (low, high):  # |p - bound| is z standard errors of a share of `bound`
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(p - bound) == pytest.approx(Z_95 * math.sqrt(bound * (1 - bound) / n))


@pytest.mark.parametrize("k", [-1, 11])
def test_wilson_refuses_impossible_counts(k: int) -> None:
    with pytest.raises(ValueError, match=f"num_correct: got {k}, allowed: 0 to 10"):
        wilson(k, 10)


def test_difference_of_equal_outcomes_is_certainly_zero() -> None:
    outcomes = [True, False, True]
    assert paired_difference(outcomes, outcomes) == (0.0, 0.0, 0.0)


def test_difference_has_the_width_of_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(400) < 0.8, rng.random(400) < 0.6
    mean, low, high = paired_difference(ours, theirs)
    differences = ours.astype(float) - theirs
    assert mean == pytest.approx(differences.mean())
    half = Z_95 * differences.std() / math.sqrt(400)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert low < mean < high


def test_difference_is_the_same_every_time_and_antisymmetric() -> None:
    ours, theirs = [True] * 30 + [False] * 5, [True] * 20 + [False] * 15
    first = paired_difference(ours, theirs)
    assert first == paired_difference(ours, theirs)
    assert paired_difference(theirs, ours)[0] == -first[0]


@pytest.mark.parametrize("baseline", [[], [True], [[True, False]]])
def test_difference_needs_pairs(baseline: list[bool]) -> None:
    with pytest.raises(ValueError, match="baseline: got shape"):
        paired_difference([True, False], baseline)


def test_difference_of_scores_between_right_and_wrong() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(0, 5, 300) / 4, rng.integers(0, 5, 300) / 4
    mean, low, high = paired_difference(ours, theirs)
    assert mean == pytest.approx((ours - theirs).mean())
    half = Z_95 * (ours - theirs).std() / math.sqrt(300)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_the_mean_over_tasks_is_resampled_within_each() -> None:
    """A task of few samples does not drown: its mean counts as much, and its error is kept."""
    rng = np.random.default_rng(2)
    many = rng.random(2000) < 0.9, rng.random(2000) < 0.9
    few = rng.random(40) < 0.5, rng.random(40) < 0.9
    mean, low, high = macro_difference([many, few])
    parts = [np.asarray(ours, float) - theirs for ours, theirs in (many, few)]
    assert mean == pytest.approx(sum(part.mean() for part in parts) / 2)
    error = math.sqrt(sum(part.var() / part.size for part in parts)) / 2
    assert (high - low) / 2 == pytest.approx(Z_95 * error, rel=0.1)
    with pytest.raises(ValueError, match="pairs: got none, allowed: at least one task"):
        macro_difference([])
