"""The KS test's smallest p by enumeration, its critical distance against scipy, its detectable distance by other draws."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from soul.statistics.distance import _critical, _exact_p, compare_distributions, detectable_distance, smallest_p


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 5), (3, 3), (3, 4), (4, 4), (2, 6)])
def test_p_values_by_enumeration(m: int, n: int) -> None:
    orders = []
    for chosen in combinations(range(m + n), m):
        steps = np.array([1 / m if place in chosen else -1 / n for place in range(m + n)])
        orders.append(np.abs(steps.cumsum()).max())
    for distance in set(np.round(orders, 12)):
        assert _exact_p(distance, m, n) == pytest.approx(np.mean(np.array(orders) >= distance - 1e-9))
    assert smallest_p(m, n) == pytest.approx(np.mean(np.array(orders) >= 1 - 1e-9))


@pytest.mark.parametrize(("m", "n"), [(12, 9), (40, 40), (30, 100)])
def test_exact_p_is_scipys(m: int, n: int) -> None:
    rng = np.random.default_rng(m)
    found = stats.ks_2samp(rng.standard_normal(m), rng.standard_normal(n) + 0.4, method="exact")
    assert _exact_p(found.statistic, m, n) == pytest.approx(found.pvalue, rel=1e-6)
    critical = _critical(m, n)
    assert _exact_p(critical, m, n) <= 0.05 < _exact_p(critical - 1 / math.lcm(m, n), m, n)


def test_what_is_called_detectable_is_found_in_four_of_five_draws() -> None:
    shift = 2 * stats.norm.ppf((detectable_distance(40, 40) + 1) / 2)
    rng = np.random.default_rng(6)
    found = [stats.ks_2samp(rng.standard_normal(40), rng.standard_normal(40) + shift, method="exact").pvalue <= 0.05 for _ in range(300)]
    assert 0.72 <= np.mean(found) <= 0.88


def test_three_rows_can_say_nothing_and_many_say_more() -> None:
    three = compare_distributions([1.0, 2.0, 3.0], [11.0, 12.0, 13.0])
    assert (three.p_value, three.smallest_p) == (pytest.approx(0.1), pytest.approx(0.1)) and three.detectable == math.inf
    assert three.low < 1 and detectable_distance(20, 20) > detectable_distance(60, 60) > detectable_distance(1600, 1600) > 0
