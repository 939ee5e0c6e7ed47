"""Fronts of (left of forget, kept of retain), and what is read off them at equal forgetting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]  # what is left of the forget rows (lower is better), what is kept of the retain rows (higher is better)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in one respect without losing in the other, by falling forget score."""
    front: list[Point] = []
    for left, kept in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or kept > front[-1][1]:
            front.append((left, kept))
    return front[::-1]


def kept_at(front: Sequence[Point], left: float) -> float | None:
    """What the front keeps where `left` is left, on the straight line between its neighbours. None where it does not forget so much.

    Beyond the end that forgets least it keeps what that end keeps: nothing is better there.
    """
    points = sorted(front)
    if not points or left < points[0][0]:
        return None
    return float(np.interp(left, [x for x, _ in points], [y for _, y in points]))


def deepest_shared_level(fronts: Sequence[Sequence[Point]]) -> float | None:
    """The least that every one of these fronts leaves: the deepest forgetting at which all of them can be compared."""
    if not fronts or not all(fronts):
        return None
    return max(min(left for left, _ in front) for front in fronts)


def level_to_compare(sides: Sequence[Sequence[Sequence[Point]]], *, floor: float) -> float | None:
    """The deepest forgetting that every front of both sides reaches and at which one side still keeps the floor in every seed.

    `floor` is a share of what a front keeps where it forgets least. Deeper than that both have lost what they should keep: where all is
    lost all is equal. Between runs that keep the floor a front is nearly level; on the cliff behind them a line would say little. None
    where nothing but the start keeps the floor.
    """
    fronts = [front for side in sides for front in side]
    deepest = deepest_shared_level(fronts)
    if deepest is None:
        return None
    level = max(deepest, min(max(_depth(front, floor) for front in side) for side in sides))
    return level if level < max(left for front in fronts for left, _ in front) else None


def _depth(front: Sequence[Point], floor: float) -> float:
    """What is left at the deepest point that keeps the floor."""
    least = floor * max(front)[1]
    return min(left for left, kept in front if kept >= least)
