"""Areas and their differences against brute force and a bootstrap; intervals that keep their promise, also at 0 and 1."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from soul.statistics.auc import delong, delong_difference, newcombe, placements

Array = NDArray[np.float64]


def rows(seed: int, size: int, shift: float = 0.0) -> Array:
    return np.random.default_rng(seed).standard_normal(size).round(1) + shift  # rounded, so that there are ties


def kernel(members: Array, others: Array) -> Array:
    return (others[None] > members[:, None]) + 0.5 * (others[None] == members[:, None])


def test_delong_is_the_placement_formula() -> None:
    one, two, three, four = rows(0, 13), rows(1, 9, 0.5), rows(2, 13), rows(3, 9, 0.2)
    first, second = kernel(one, two), kernel(three, four)
    inner, outer = placements(one, two)
    assert inner == pytest.approx(first.mean(axis=1)) and outer == pytest.approx(first.mean(axis=0))
    found = delong_difference(one, two, three, four)
    gap = first - second
    variance = gap.mean(axis=1).var(ddof=1) / 13 + gap.mean(axis=0).var(ddof=1) / 9
    assert found.difference == pytest.approx(gap.mean()) and found.standard_error == pytest.approx(np.sqrt(variance))


def test_delong_agrees_with_a_bootstrap() -> None:
    rng = np.random.default_rng(4)
    hardness = rng.standard_normal(160)
    one, two = hardness + 0.7 * rng.standard_normal(160), hardness + 0.7 * rng.standard_normal(160)
    first, second = kernel(one[:80], one[80:]), kernel(two[:80], two[80:])
    drawn = [(first - second)[rng.integers(0, 80, 80)][:, rng.integers(0, 80, 80)].mean() for _ in range(1500)]
    assert delong_difference(one[:80], one[80:], two[:80], two[80:]).standard_error == pytest.approx(np.std(drawn), rel=0.12)


@pytest.mark.parametrize("shift", [9.0, -9.0])
def test_a_perfect_area_has_an_interval(shift: float) -> None:
    found = delong(rows(0, 8), rows(1, 10, shift))
    assert found.area in (0.0, 1.0) and found.high - found.low > 0.1
    same = delong_difference(rows(0, 8), rows(1, 10), rows(0, 8), rows(1, 10))
    assert same.difference == 0 and same.high - same.low > 0.1
    assert newcombe(0.5, 20, 20)[0] == pytest.approx(1 - newcombe(0.5, 20, 20)[1], abs=1e-6)


def test_intervals_hold_the_truth_in_19_of_20_draws() -> None:
    rng = np.random.default_rng(5)
    truth, held = 0.8413447, 0  # shift of sqrt(2) standard deviations
    for _ in range(400):
        found = delong(rng.standard_normal(30), rng.standard_normal(25) + np.sqrt(2))
        held += found.low <= truth <= found.high
    assert 0.91 <= held / 400 <= 0.985
