"""Every metric against hand-computed values, brute force, or its definition."""

from __future__ import annotations

import itertools
import math
import random
import zlib

import numpy as np
import pytest
from scipy import stats

from soul.evaluate.legacy import legacy_scrambled_mia_auc, legacy_self_ks_p
from soul.evaluate.memorization import exact_memorization, extraction_strength, option_probability, probability
from soul.evaluate.privacy import auc, min_k_score, privleak, zlib_score
from soul.evaluate.rouge import rouge_recalls
from soul.evaluate.truth_ratio import indistinguishability, preference, truth_ratio
from soul.evaluate.utility import kolmogorov_smirnov, model_utility


def test_probability_by_hand() -> None:
    assert probability(0.0) == 1.0
    assert probability(math.log(4)) == pytest.approx(0.25)
    assert option_probability(math.log(2), [math.log(4), math.log(4)]) == pytest.approx(0.5)
    assert option_probability(5000.0, [0.0]) == pytest.approx(0.0)
    assert option_probability(0.0, [5000.0]) == 1.0


@pytest.mark.parametrize(
    ("flags", "exact", "strength"),
    [
        ([], None, None),
        ([False], 0.0, 0.0),
        ([True], 1.0, 1.0),
        ([False, False, False], 0.0, 0.0),
        ([True, True, True], 1.0, 1.0),
        ([True, True, False], 2 / 3, 0.0),  # OpenUnlearning's loop gives 1/3 where not even the last token follows
        ([False, True, True, True], 3 / 4, 3 / 4),
        ([True, False, True, True, False, True], 4 / 6, 1 / 6),
    ],
)
def test_memorization_edges(flags: list[bool], exact: float | None, strength: float | None) -> None:
    assert exact_memorization(flags) == exact
    assert extraction_strength(flags) == strength


def test_extraction_strength_is_the_smallest_sufficient_prefix() -> None:
    for flags in itertools.product([False, True], repeat=6):
        prefixes = [k for k in range(7) if all(flags[k:])]
        assert extraction_strength(flags) == pytest.approx(1 - min(prefixes) / 6)


def test_truth_ratio_by_hand() -> None:
    wrong = [math.log(2), math.log(8)]  # probabilities 1/2 and 1/8
    assert truth_ratio(math.log(4), wrong) == pytest.approx((1 / 4) / (1 / 4))
    assert truth_ratio(math.log(4), wrong, "arithmetic") == pytest.approx((5 / 16) / (1 / 4))
    assert truth_ratio(3.0, [2.0]) == pytest.approx(truth_ratio(3.0, [2.0], "arithmetic"))
    assert math.isfinite(truth_ratio(1e5, [0.0])) and truth_ratio(0.0, [1e5]) >= 0
    assert math.isnan(truth_ratio(math.nan, [1.0])) and math.isnan(truth_ratio(math.inf, [math.inf]))
    assert indistinguishability([2.0, 0.5, 1.0, 0.0]) == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)
    assert preference([0.25, 3.0, 0.0]) == pytest.approx((0.75 + 0 + 1) / 3)


def test_model_utility_rules() -> None:
    nine = [0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2, 0.6, 1.0]
    assert model_utility(nine) == pytest.approx(float(stats.hmean(nine)))
    assert model_utility([*nine[:-1], 0.0]) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs_with_ties_as_halves(seed: int) -> None:
    rng = random.Random(seed)
    members = [rng.randint(0, 6) / 2 for _ in range(rng.randint(1, 23))]
    others = [rng.randint(0, 8) / 2 for _ in range(rng.randint(1, 17))]
    wins = sum((other > member) + (other == member) / 2 for member in members for other in others)
    assert auc(members, others) == pytest.approx(wins / (len(members) * len(others)), abs=1e-12)


def test_auc_is_one_when_forget_rows_are_likelier_than_every_holdout_row() -> None:
    assert auc([0.1, 0.2], [3.0, 4.0, 5.0]) == 1.0  # scores are losses: low means likely
    assert auc([9.0], [3.0, 4.0]) == 0.0
    assert auc([1.0, 1.0], [1.0]) == 0.5


def test_attack_scores_by_hand() -> None:
    logps = [-5.0, -1.0, -3.0, -0.5, -2.0]
    assert min_k_score(logps, 0.4) == pytest.approx((5 + 3) / 2)
    assert min_k_score(logps, 0.1) == pytest.approx(5.0)
    assert min_k_score(logps, 1.0) == pytest.approx(11.5 / 5)
    assert zlib_score(2.0, "née in 1950") == pytest.approx(2.0 / len(zlib.compress("née in 1950".encode())))
    assert privleak(0.5, 0.5) == 0.0
    assert privleak(1.0, 0.5) == pytest.approx(-100.0)
    assert privleak(0.25, 0.5) == pytest.approx(50.0)
    assert privleak(0.9, 1.0) is None


def exact_ks(first: list[float], second: list[float]) -> tuple[float, float]:
    """D, and P(D' >= D) over all assignments of the pooled ranks (no ties)."""
    pooled = sorted([*first, *second])

    def statistic(chosen: set[int]) -> float:
        ranks = range(len(pooled))
        return max(
            abs(sum(i in chosen for i in ranks[: k + 1]) / len(first) - sum(i not in chosen for i in ranks[: k + 1]) / len(second))
            for k in ranks
        )

    observed = statistic({pooled.index(value) for value in first})
    splits = [statistic(set(chosen)) for chosen in itertools.combinations(range(len(pooled)), len(first))]
    return observed, sum(value >= observed - 1e-12 for value in splits) / len(splits)


@pytest.mark.parametrize("seed", range(4))
def test_kolmogorov_smirnov_against_enumeration(seed: int) -> None:
    rng = random.Random(seed)
    first, second = [rng.random() for _ in range(5)], [rng.random() + 0.3 * seed for _ in range(6)]
    test = kolmogorov_smirnov(first, second)
    assert (test.statistic, test.p_value) == pytest.approx(exact_ks(first, second), rel=1e-9)


def test_kolmogorov_smirnov_is_scipys_exact_test_and_invariant_under_inversion() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.lognormal(size=40), rng.lognormal(mean=0.5, size=33)
    expected = stats.ks_2samp(first, second, method="exact")
    test = kolmogorov_smirnov(first.tolist(), second.tolist())
    assert (test.statistic, test.p_value) == (expected.statistic, expected.pvalue)
    inverse = kolmogorov_smirnov((1 / first).tolist(), (1 / second).tolist())
    assert (inverse.statistic, inverse.p_value) == pytest.approx((test.statistic, test.p_value))


def test_more_rows_than_the_exact_test_can_bear() -> None:
    values = np.linspace(0, 1, 10_001).tolist()
    assert kolmogorov_smirnov(values, values[::2]).p_value > 0.99


def test_legacy_mia_cannot_leave_its_bounds() -> None:
    """400 forget and 217 holdout rows whose halves are exchangeable: [0.229, 0.771], whatever the model does."""
    rng = random.Random(0)
    forget = [rng.choice([0.0, 1.0]) for _ in range(183)]
    forget = [*forget, *[rng.choice([0.0, 1.0]) for _ in range(34)], *forget]
    assert len(forget) == 400
    blind = 183 * auc(forget[:217], forget[217:]) / 400
    far, near = [1e9] * 217, [-1e9] * 217
    assert legacy_scrambled_mia_auc(forget, far) == pytest.approx(blind + 217 / 400)
    assert legacy_scrambled_mia_auc(forget, near) == pytest.approx(blind)
    same = [1.0] * 400
    assert legacy_scrambled_mia_auc(same, near) == pytest.approx(0.229, abs=5e-4)
    assert legacy_scrambled_mia_auc(same, far) == pytest.approx(0.771, abs=5e-4)
    assert auc(same, far) == 1.0, "labelled correctly, the same scores separate perfectly"


def test_legacy_mia_by_its_labels() -> None:
    rng = random.Random(1)
    forget, holdout = [rng.random() for _ in range(9)], [rng.random() for _ in range(4)]
    scores = [*forget, *holdout]
    labels = [0] * len(holdout) + [1] * len(forget)
    wins = [(scores[i] > scores[j]) + (scores[i] == scores[j]) / 2 for i in range(13) for j in range(13) if labels[i] > labels[j]]
    assert legacy_scrambled_mia_auc(forget, holdout) == pytest.approx(sum(wins) / len(wins))


def test_legacy_self_ks_calls_a_destroyed_model_forgotten() -> None:
    assert legacy_self_ks_p([1.0, 1.1, 1.2, 1.3], [1.0, 1.1, 1.2, 1.3]) == 1.0


def test_rouge_recall_by_hand() -> None:
    pairs = [
        ("the cat sat", "the cat sat on the mat"),
        ("running quickly", "He runs quick"),  # the stemmer: run, quickli / he run quick
        ("", "something"),
        ("b a", "a b"),
    ]
    recalls = rouge_recalls([generated for generated, _ in pairs], [reference for _, reference in pairs])
    assert recalls[0] == pytest.approx((3 / 6, 3 / 6))
    assert recalls[1] == pytest.approx((1 / 3, 1 / 3))
    assert recalls[2] == (0.0, 0.0)
    assert recalls[3] == pytest.approx((1.0, 0.5))
    assert rouge_recalls(*zip(*pairs, strict=True), num_processes=2) == recalls
