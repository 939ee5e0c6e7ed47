"""The area under an ROC curve with its interval, and the difference of two areas from the same rows (DeLong and others, Biometrics 1988).

Scores are higher for `others` than for `members` where the area is above one half, as in soul/evaluate/privacy.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]
Z: Final = float(stats.norm.ppf(0.975))


@dataclass(frozen=True, slots=True)
class Area:
    """An AUC and its 95 % interval."""

    area: float
    low: float
    high: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class AreaDifference:
    """`area - reference` of two models on the same rows, with its 95 % interval; the standard error is 0 where it tells nothing."""

    area: float
    reference: float
    difference: float
    low: float
    high: float
    standard_error: float


def placements(members: ArrayLike, others: ArrayLike) -> tuple[Array, Array]:
    """For every member the share of others above it, for every other row the share of members below it; a tie counts one half."""
    first, second = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    m, n = len(first), len(second)
    pooled = stats.rankdata(np.concatenate([first, second]))
    return 1 - (pooled[:m] - stats.rankdata(first)) / n, (pooled[m:] - stats.rankdata(second)) / m


def delong(members: ArrayLike, others: ArrayLike) -> Area:
    """Interval on the logit scale; where the variance is 0 or cannot be estimated, Newcombe's score interval (`newcombe`)."""
    inner, outer = placements(members, others)
    area = float(inner.mean())
    error = math.sqrt(_variance(inner) + _variance(outer))
    if not 0 < area < 1 or error == 0 or min(len(inner), len(outer)) < 2:
        return Area(area, *newcombe(area, len(inner), len(outer)), error)
    centre, width = math.log(area / (1 - area)), Z * error / (area * (1 - area))
    return Area(area, float(_expit(centre - width)), float(_expit(centre + width)), error)


def delong_difference(
    members: ArrayLike,
    others: ArrayLike,
    reference_members: ArrayLike,
    reference_others: ArrayLike,
    groups: Sequence[int] | None = None,
) -> AreaDifference:
    """DeLong's variance for correlated areas; where it is 0, the two single intervals are combined (Newcombe's square-and-add).

    `groups` numbers what rows have in common, members first: their placements are summed before they vary (Obuchowski, Biometrics 1997),
    and Student's quantile takes the number of groups into account.
    """
    inner, outer = placements(members, others)
    reference_inner, reference_outer = placements(reference_members, reference_others)
    area, reference = float(inner.mean()), float(reference_inner.mean())
    difference = area - reference
    first, second = inner - reference_inner, outer - reference_outer
    z = Z
    if groups is None or len(set(groups)) == len(groups):
        error = math.sqrt(_variance(first) + _variance(second))
    else:
        sides = (_group_variance(first, groups[: len(first)]), _group_variance(second, groups[len(first) :]))
        error = math.sqrt(sum(variance for variance, _ in sides))
        z = float(stats.t.ppf(0.975, max(min(number for _, number in sides) - 1, 1)))
    if error < 1e-12 or min(len(inner), len(outer)) < 2:
        one, two = delong(members, others), delong(reference_members, reference_others)
        low = difference - math.hypot(area - one.low, two.high - reference)
        high = difference + math.hypot(one.high - area, reference - two.low)
        return AreaDifference(area, reference, difference, max(low, -1.0), min(high, 1.0), 0.0)
    return AreaDifference(area, reference, difference, max(difference - z * error, -1.0), min(difference + z * error, 1.0), error)


def newcombe(area: float, num_members: int, num_others: int) -> tuple[float, float]:
    """Score interval with Hanley and McNeil's variance (Newcombe, Statistics in Medicine 2006, method 5): never of zero width."""
    middle = (num_members + num_others) / 2 - 1

    def off(guess: float) -> float:
        spread = guess * (1 - guess) * (1 + middle * (1 - guess) / (2 - guess) + middle * guess / (1 + guess)) / (num_members * num_others)
        return (area - guess) ** 2 - Z**2 * spread

    low = 0.0 if area <= 0 else float(optimize.brentq(off, 0.0, area - 1e-12))
    high = 1.0 if area >= 1 else float(optimize.brentq(off, area + 1e-12, 1.0))
    return low, high


def summed(values: Array, groups: Sequence[int] | None) -> Array:
    """Of the rows of each group, along the first axis; the values themselves without groups."""
    if groups is None:
        return values
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    found = np.zeros((numbers.max() + 1, *values.shape[1:]))
    np.add.at(found, numbers, values)
    return found


def _group_variance(values: Array, groups: Sequence[int]) -> tuple[float, int]:
    """Of the mean of rows that come in groups, and the number of groups."""
    sums = summed(values - values.mean(), groups)
    number = len(sums)
    return (float((sums**2).sum()) / len(values) ** 2 * number / (number - 1) if number > 1 else 0.0), number


def _variance(values: Array) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def _expit(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0
