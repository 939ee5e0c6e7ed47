from __future__ import annotations

import numpy as np
import pytest

from soul.benchmarks.fronts import deepest_shared_level, kept_at, pareto_front


def dominated(point: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    return any(x <= point[0] and y >= point[1] and (x, y) != point for x, y in others)


@pytest.mark.parametrize("number", [0, 1, 2, 7, 50])
def test_a_front_is_exactly_the_points_that_nothing_dominates(number: int) -> None:
    drawn = np.random.default_rng(number).integers(0, 8, size=(number, 2)) / 8  # with ties and doubles
    points = [(float(x), float(y)) for x, y in drawn]
    front = pareto_front(points)
    assert set(front) == {point for point in points if not dominated(point, points)}
    assert front == sorted(front, reverse=True) and len(set(front)) == len(front)


def test_a_front_is_read_between_its_points_and_not_below_its_deepest() -> None:
    front = [(1.0, 1.0), (0.5, 0.9), (0.2, 0.5)]
    assert kept_at(front, 0.35) == pytest.approx(0.7)
    assert kept_at(front, 0.2) == 0.5 and kept_at(front, 1.0) == 1.0
    assert kept_at(front, 0.19) is None and kept_at([], 0.5) is None
    assert kept_at([(0.2, 0.5)], 0.8) == 0.5


def test_the_shared_level_is_one_that_every_front_reaches() -> None:
    fronts = [[(1.0, 1.0), (0.1, 0.2)], [(0.9, 1.0), (0.3, 0.8)]]
    level = deepest_shared_level(fronts)
    assert level == 0.3 and all(kept_at(front, level) is not None for front in fronts)
    assert deepest_shared_level([]) is None and deepest_shared_level([[], [(1.0, 1.0)]]) is None
