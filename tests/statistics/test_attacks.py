"""Never-trained models are told apart in 5 % of draws, whatever the rows; what is called detectable is detected."""

from __future__ import annotations

import math
import tracemalloc
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from perf.told_apart import scores, told_apart
from soul.evaluate.privacy import auc
from soul.statistics.attacks import against_guessing, against_model, paired_p_values

Array = NDArray[np.float64]


def halves(seed: int, m: int, n: int, shift: float = 0.0) -> tuple[Array, Array, Array, Array]:
    rng = np.random.default_rng(seed)
    hardness = rng.standard_normal(m + n)
    one, two = scores(hardness, 0.5, rng), scores(hardness, 0.5, rng)
    return one[:m] - shift, one[m:], two[:m], two[n * 0 + m :]


@pytest.mark.parametrize(("m", "n"), [(20, 20), (40, 15)])
def test_two_never_trained_models_are_told_apart_in_one_of_twenty_draws(m: int, n: int) -> None:
    tested, _ = told_apart(m, n, 0.5, 150)
    assert 0.005 <= tested <= 0.1
    assert m != n or told_apart(m, n, 1.5, 50)[1] > 0.25, "a margin on the worst attack tells them apart"


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 40, 200])
@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_the_level_is_kept_in_a_thousand_draws(n: int, noise: float) -> None:
    assert 0.03 <= told_apart(n, n, noise, 1000)[0] <= 0.07


def test_one_model_against_guessing_keeps_the_level() -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(100):
        rows = scores(rng.standard_normal(9), 0.5, rng)
        found.append(min(test.p_value for test in against_guessing(rows[:4], rows[4:])) <= 0.05)
    assert np.mean(found) <= 0.12
    rows = scores(rng.standard_normal(60), 0.5, rng)
    told = against_guessing(rows[:30] - 2, rows[30:])
    assert max(test.p_value for test in told) < 0.001 and all(test.low > 0.6 for test in told)


def test_what_is_called_detectable_is_detected() -> None:
    """Pushed until the AUC differs by what the test calls detectable, the model is told apart in about four of five draws."""
    tests = against_model(*halves(0, 60, 60))
    aim = float(np.mean([test.detectable for test in tests]))
    shifts = np.linspace(0, 2, 41)
    reached = [np.mean([against_area(seed, shift) for seed in range(20)]) for shift in shifts]
    shift = float(np.interp(aim, reached, shifts))
    found = [paired_p_values(*halves(seed, 60, 60, shift))[0] <= 0.05 for seed in range(100, 220)]
    assert 0.6 <= np.mean(found) <= 0.95


def against_area(seed: int, shift: float) -> float:
    one, two, three, four = (half[:, 0] for half in halves(seed, 60, 60, shift))
    return float((two[None] > one[:, None]).mean() - (four[None] > three[:, None]).mean())


@pytest.mark.parametrize(("m", "n"), [(4, 3), (1, 5), (5, 2)])
def test_every_swap_by_brute_force(m: int, n: int) -> None:
    one, two, three, four = (half[:, 0] for half in halves(7, m, n))
    first, second = stats.rankdata(np.concatenate([one, two])), stats.rankdata(np.concatenate([three, four]))
    gaps = []
    for swaps in product([True, False], repeat=m + n):
        a, b = np.where(swaps, second, first), np.where(swaps, first, second)
        gaps.append(abs(auc(a[:m], a[m:]) - auc(b[:m], b[m:])))
    observed = gaps[-1]
    expected = np.mean(np.array(gaps) >= observed - 1e-9)
    assert paired_p_values(one[:, None], two[:, None], three[:, None], four[:, None]) == pytest.approx([expected])


def test_one_forget_row_does_not_tell_models_apart() -> None:
    assert told_apart(1, 50, 0.5, 60)[0] == 0


def test_few_rows_and_tied_scores_are_not_testable() -> None:
    assert all(test.smallest_p > 0.05 for test in against_model(*halves(2, 1, 100)))
    assert all(test.smallest_p > 0.05 for test in against_model(*halves(2, 2, 2)))
    assert all(test.smallest_p <= 0.05 for test in against_model(*halves(2, 20, 20)))
    one, two, three, four = halves(2, 20, 20)
    for found in (against_model(one * 0, two * 0, three, four), against_model(one, two, three * 0, four * 0)):
        assert all(test.smallest_p == 1 for test in found)
    flat = against_guessing(one * 0, two * 0)
    assert all((test.smallest_p, test.p_value, test.detectable) == (1, 1, math.inf) and test.low < 0.5 < test.high for test in flat)
    assert against_guessing(one[:1], two[:3])[0].smallest_p == pytest.approx(0.5)


def test_a_model_beside_itself_is_not_told_apart() -> None:
    one, two, _, _ = halves(3, 20, 20)
    for test in against_model(one, two, one, two):
        assert test.p_value == 1 and test.difference == 0 and test.difference_low < 0 < test.difference_high and test.detectable > 0


def test_rows_of_one_author_count_once() -> None:
    """Four authors against eight, ten rows each, of a model that has seen none: authors differ more than their rows do."""
    rng = np.random.default_rng(3)
    authors = np.repeat(np.arange(12), 10)
    by_row, by_author = [], []
    for _ in range(30):
        rows = scores(rng.standard_normal(120) * 0.5 + rng.standard_normal(12)[authors], 0.2, rng)
        by_row.append(min(test.p_value for test in against_guessing(rows[:40], rows[40:])) <= 0.05)
        by_author.append(min(test.p_value for test in against_guessing(rows[:40], rows[40:], authors.tolist())) <= 0.05)
    assert np.mean(by_author) <= 0.17 and np.mean(by_row) > 0.3
    told = against_guessing(rows[:40] - 9, rows[40:], authors.tolist())
    assert max(test.p_value for test in told) <= 0.01 and told[0].smallest_p == pytest.approx(1 / math.comb(12, 4))
    few = against_guessing(rows[:20] - 9, rows[20:40], authors[:40].tolist())
    assert all(test.smallest_p > 0.05 for test in few), "two authors against two: whatever they say, one division in three is as extreme"


def test_two_never_trained_models_that_differ_by_author_are_not_told_apart() -> None:
    """Four authors against ten, ten rows each; what a model makes of an author is shared by all of the author's rows."""
    rng = np.random.default_rng(4)
    authors = np.repeat(np.arange(14), 10)
    by_row, by_author = [], []
    for _ in range(60):
        hardness = rng.standard_normal(140)
        one, two = (scores(hardness + 0.4 * rng.standard_normal(14)[authors], 0.3, rng) for _ in range(2))
        rows = (one[:40], one[40:], two[:40], two[40:])
        by_row.append(min(paired_p_values(*rows)) <= 0.05)
        by_author.append(min(paired_p_values(*rows, authors.tolist())) <= 0.05)
    assert np.mean(by_author) <= 0.15 and np.mean(by_row) > 0.2
    few = against_model(one[:20], one[20:40], two[:20], two[20:40], authors[:40].tolist())
    assert all(test.smallest_p > 0.05 for test in few), "two authors a side: no difference could be seen"
    many = against_model(one[:40] - 9, one[40:], two[:40], two[40:], authors.tolist())
    assert many[0].p_value < 0.01 and math.isinf(many[0].detectable), "seen here, and not sure to be seen with four authors"


def test_many_rows_need_no_square_of_memory() -> None:
    rng = np.random.default_rng(5)
    one, two = scores(rng.standard_normal(20_000), 0.3, rng)[:, :1], scores(rng.standard_normal(20_000), 0.3, rng)[:, :1]
    tracemalloc.start()
    paired_p_values(one[:10_000], one[10_000:], two[:10_000], two[10_000:])
    assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
    tracemalloc.stop()
