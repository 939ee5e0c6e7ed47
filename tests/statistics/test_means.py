"""An interval covers what it says it covers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from soul.statistics.means import CONFIDENCE, mean_interval

DRAWS = 4000


def coverage(values: np.ndarray, truth: float) -> float:
    """Of one interval per row of `values`."""
    found = [mean_interval(row.tolist()) for row in values]
    return float(np.mean([interval is not None and interval[0] <= truth <= interval[1] for interval in found]))


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says(num_seeds: int) -> None:
    drawn = np.random.default_rng(num_seeds).normal(0.3, 0.1, (DRAWS, num_seeds))
    low, high = stats.binom.ppf([0.0005, 0.9995], DRAWS, CONFIDENCE) / DRAWS
    assert low <= coverage(drawn, 0.3) <= high


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_it_is_not_far_off_where_values_are_skewed(num_seeds: int) -> None:
    """Shares near zero, as forget scores are: fewer are covered than it says, and far more than by resampling three values (.72)."""
    drawn = np.random.default_rng(7).beta(2, 20, (DRAWS, num_seeds))
    assert 0.88 < coverage(drawn, 2 / 22) < 0.96


def test_by_hand_and_without_a_spread() -> None:
    # values .1 .3 .5: mean .3, sd .2, t(0.975, 2) = 4.302653 (tables)
    half = 4.302653 * 0.2 / 3**0.5
    assert mean_interval([0.1, 0.3, 0.5]) == (pytest.approx(0.3 - half), pytest.approx(0.3 + half))
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5) and mean_interval([0.5]) is None and mean_interval([]) is None
