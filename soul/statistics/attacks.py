"""Do membership attacks do better or worse on a model than on one that never saw the rows? One answer for several attacks at once.

Attacks on one model are highly correlated, so Bonferroni's or Holm's bound wastes most of the level. The largest of the standardised
differences is compared with its own distribution instead (single-step max-T, Westfall and Young 1993), which has the correlation in it:
the chance that *any* attack is called different while none is stays at the level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from soul.statistics import LEVEL
from soul.statistics.auc import delong, delong_difference, summed

Array = NDArray[np.float64]
POWER_Z: Final = float(stats.norm.ppf(0.8))
_DRAWS: Final = 4999
_ALL: Final = 8192  # up to here every rearrangement is looked at
_MANY: Final = 30  # from here on a perfect separation is beyond every rearrangement that is drawn
_SEED: Final = 20
_CHUNK: Final = 1_000_000
_TINY: Final = 1e-9


@dataclass(frozen=True, slots=True)
class AttackTest:
    """One attack. `area` is its AUC, `reference` what it is compared with, `p_value` adjusted for all attacks tested together.

    `smallest_p` is what an attack that separates the rows perfectly would have got; `detectable` the difference found with 80 % power,
    infinite where none within reach is.
    """

    area: float
    low: float
    high: float
    reference: float
    difference: float
    difference_low: float
    difference_high: float
    p_value: float
    smallest_p: float
    detectable: float


def against_model(
    members: Array, others: Array, reference_members: Array, reference_others: Array, groups: Sequence[int] | None = None
) -> list[AttackTest]:
    """Rows x attacks of two models, the same rows in the same order: a paired comparison.

    Ranks within each model are swapped between the models, row by row (after Venkatraman and Begg, Biometrika 1996), all attacks of a row
    together. Ranks, because a model that is surer of everything is no better an attack's victim. `groups` numbers what rows have in
    common, members first: rows about one author are swapped together, since two models that have seen none of them differ by author.
    A difference that lies in the members of a few authors may go unseen, however large: nothing is called detectable then.
    """
    held = len(members) if groups is None else len(set(groups[: len(members)]))
    observed, maxima, spreads = _compared(members, others, reference_members, reference_others, groups)
    adjusted = _adjusted(observed, maxima)
    critical = float(np.quantile(maxima, 1 - LEVEL, method="higher")) if maxima.any() else float(stats.norm.ppf(1 - LEVEL / 2))
    found = []
    for k in range(members.shape[1]):
        area = delong(members[:, k], others[:, k])
        pair = delong_difference(members[:, k], others[:, k], reference_members[:, k], reference_others[:, k], groups)
        error = pair.standard_error or (pair.high - pair.low) / (2 * stats.norm.ppf(1 - LEVEL / 2))
        found.append(
            AttackTest(
                area=area.area,
                low=area.low,
                high=area.high,
                reference=pair.reference,
                difference=pair.difference,
                difference_low=pair.low,
                difference_high=pair.high,
                p_value=adjusted[k],
                smallest_p=1.0
                if _tied(members[:, k], others[:, k])
                else _smallest(reference_members[:, [k]], reference_others[:, [k]], groups),
                detectable=math.inf
                if 2.0 ** (1 - held) > LEVEL
                else _reachable(critical * max(spreads[k], error) + POWER_Z * error, pair.reference),
            )
        )
    return found


def paired_p_values(
    members: Array, others: Array, reference_members: Array, reference_others: Array, groups: Sequence[int] | None = None
) -> list[float]:
    """The adjusted p-values of `against_model` alone."""
    observed, maxima, _ = _compared(members, others, reference_members, reference_others, groups)
    return _adjusted(observed, maxima)


def _compared(
    members: Array, others: Array, reference_members: Array, reference_others: Array, groups: Sequence[int] | None
) -> tuple[Array, Array, Array]:
    parts = _parts(_ranks(members, others), _ranks(reference_members, reference_others), len(members))
    return _swapped(summed(parts, groups))


def against_guessing(members: Array, others: Array, groups: Sequence[int] | None = None) -> list[AttackTest]:
    """Rows x attacks of one model against 0.5: members and others are shuffled, all attacks of a row together.

    `groups` numbers what rows have in common, members first, none of them in both. Rows about one author are alike, so that whole
    groups are shuffled then: row by row a model that has seen neither would look guilty because two authors are unlike ten others.
    """
    ranks = _ranks(members, others)
    m, n = len(members), len(others)
    if groups is None or len(set(groups)) == m + n:
        spread = ranks.std(axis=0, ddof=1) * math.sqrt(1 / n - 1 / (m + n)) / m
        shuffled = (_shuffled_means(ranks, m, n) - (m + n + 1) / 2) / m
        ways, smallest = math.comb(m + n, m), 2.0
    else:
        shuffled = _shuffled_groups(ranks, m, groups)
        spread = shuffled.std(axis=0)
        held, every = len(set(groups[:m])), len(set(groups))
        ways, smallest = math.comb(every, held), 2.0 if 2 * held == every else 1.0
    maxima = _standardised(shuffled, spread).max(axis=1)
    observed = _standardised((ranks[m:].mean(axis=0) - (m + n + 1) / 2) / m, spread)
    critical = float(np.quantile(maxima, 1 - LEVEL, method="higher"))
    smallest = smallest / ways if ways <= _ALL else 1 / (_DRAWS + 1)
    adjusted = _adjusted(observed, maxima)
    found = []
    for k in range(members.shape[1]):
        area = delong(members[:, k], others[:, k])
        needed = _reachable(float((critical + POWER_Z) * spread[k]), 0.5)
        tied = not spread[k]
        found.append(
            AttackTest(
                area=area.area,
                low=area.low,
                high=area.high,
                reference=0.5,
                difference=area.area - 0.5,
                difference_low=area.low - 0.5,
                difference_high=area.high - 0.5,
                p_value=adjusted[k],
                smallest_p=1.0 if tied else min(1.0, smallest),
                detectable=math.inf if tied else needed,
            )
        )
    return found


def _ranks(members: Array, others: Array) -> Array:
    return np.asarray(stats.rankdata(np.concatenate([members, others]), axis=0), dtype=np.float64)


def _parts(first: Array, second: Array, m: int) -> Array:
    """What each row's swap does: with signs s (-1: swapped), the difference of the AUCs is the sum of s times these, for every attack.

    A pair of rows counts by the sign of its difference of ranks. Over the four ways to take a pair's rows from the two models, the
    difference of the two AUCs is linear in the two signs, so no rearrangement has to be ranked again.
    """
    pairs = 4.0 * m * (len(first) - m)
    found = np.empty_like(first)
    for k in range(first.shape[1]):
        (a, b), (c, d) = ((ranks[:m, k], ranks[m:, k]) for ranks in (first, second))
        straight, crossed = _signs(a, b) - _signs(c, d), _signs(a, d) - _signs(c, b)
        found[:m, k] = (straight + crossed) / pairs
        straight, crossed = _signs(d, c) - _signs(b, a), _signs(b, c) - _signs(d, a)
        found[m:, k] = (straight - crossed) / pairs
    return found


def _signs(values: Array, among: Array) -> Array:
    """For each value how many of the others are above it, less how many are below."""
    ordered = np.sort(among)
    upto, below = np.searchsorted(ordered, values, "right"), np.searchsorted(ordered, values, "left")
    return np.asarray(len(among) - upto - below, dtype=np.float64)


def _swapped(parts: Array) -> tuple[Array, Array, Array]:
    """Standardised differences, the largest of them in every rearrangement, and what they were divided by."""
    spread = np.sqrt((parts**2).sum(axis=0))
    rows = len(parts)
    if 2**rows <= _ALL:
        signs = 1.0 - 2.0 * ((np.arange(2**rows)[:, None] >> np.arange(rows)) & 1)
        swapped = signs @ parts
    else:
        rng = np.random.default_rng(_SEED)
        size = max(1, _CHUNK // rows)
        sizes = [min(size, _DRAWS - start) for start in range(0, _DRAWS, size)]
        swapped = np.concatenate([(1.0 - 2.0 * rng.integers(0, 2, (size, rows))) @ parts for size in sizes] + [parts.sum(axis=0)[None]])
    return _standardised(parts.sum(axis=0), spread), _standardised(swapped, spread).max(axis=1), spread


def _shuffled_means(ranks: Array, m: int, n: int) -> Array:
    """Mean rank of the others under every division of the rows, or under drawn ones and the real one."""
    rows = m + n
    if math.comb(rows, m) <= _ALL:
        chosen = np.array(list(combinations(range(rows), n)))
        return np.asarray(ranks[chosen].mean(axis=1))
    rng = np.random.default_rng(_SEED)
    drawn = [ranks[rng.permutation(rows)[:n]].mean(axis=0) for _ in range(_DRAWS)]
    return np.stack([*drawn, ranks[m:].mean(axis=0)])


def _shuffled_groups(ranks: Array, m: int, groups: Sequence[int]) -> Array:
    """The AUC less one half under every choice of as many groups for members, or under drawn ones and the real one."""
    numbers = np.asarray(groups)
    every, held = np.unique(numbers), len(set(groups[:m]))
    if math.comb(len(every), held) <= _ALL:
        choices = [np.array(chosen) for chosen in combinations(every, held)]
    else:
        rng = np.random.default_rng(_SEED)
        choices = [*(rng.permutation(every)[:held] for _ in range(_DRAWS)), np.unique(numbers[:m])]
    found = []
    for chosen in choices:
        inside = np.isin(numbers, chosen)
        found.append((ranks[~inside].mean(axis=0) - (len(numbers) + 1) / 2) / inside.sum())
    return np.stack(found)


def _standardised(differences: Array, spread: Array) -> Array:
    return np.asarray(np.abs(differences) / np.where(spread > 0, spread, 1.0))


def _adjusted(observed: Array, maxima: Array) -> list[float]:
    return [float((maxima >= value - _TINY).mean()) for value in observed]


def _tied(members: Array, others: Array) -> bool:
    """Whether every row has the same score, which tells nothing about any of them."""
    return bool(np.ptp(np.concatenate([members, others])) == 0)


def _smallest(members: Array, others: Array, groups: Sequence[int] | None) -> float:
    """The p-value of a model whose rows are separated perfectly, one way or the other, beside this reference.

    Of so few rows that it matters it may be a little more than the least there is.
    """
    if _tied(members, others):
        return 1.0
    sizes = (len(members), len(others)) if groups is None else (len(set(groups[: len(members)])), len(set(groups[len(members) :])))
    if min(sizes) >= _MANY:
        return 1 / (_DRAWS + 1)
    m, rows = len(members), len(members) + len(others)
    reference = _ranks(members, others)
    order = np.arange(rows, dtype=np.float64)
    order[np.argsort(reference[:m, 0], kind="stable")] = np.arange(m)
    order[m + np.argsort(reference[m:, 0], kind="stable")] = np.arange(m, rows)
    found = []
    for shift in (0, rows):
        extreme = _ranks(order[:m, None] + shift, order[m:, None])
        observed, maxima, _ = _swapped(summed(_parts(extreme, reference, m), groups))
        found += _adjusted(observed, maxima)
    return min(found)


def _reachable(effect: float, reference: float) -> float:
    """An AUC can move no further than to 0 or 1."""
    return effect if effect <= max(reference, 1 - reference) else math.inf
