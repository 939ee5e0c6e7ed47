"""Membership inference: can an attacker who sees only likelihoods tell forgotten rows from rows that no model has seen?

Scores follow OpenUnlearning's sign: higher means *less* likely a member. The AUC is the chance that a holdout row scores above a forget
row, so 1 means forget rows are still far more likely, 0.5 that the attack is blind, below 0.5 that they became conspicuously unlikely.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from scipy import stats


def zlib_score(mean_nll: float, text: str) -> float:
    """Loss per byte of the compressed answer: discounts text that any model finds easy."""
    return mean_nll / len(zlib.compress(text.encode("utf-8")))


def min_k_score(token_scores: Sequence[float], fraction: float) -> float:
    """Minus the mean of the lowest `fraction` of the token scores, of one at least.

    With log-probabilities this is Min-K, with log-probabilities standardised over the vocabulary Min-K++.
    """
    values = np.sort(np.asarray(token_scores, dtype=np.float64))
    return float(-values[: max(1, int(len(values) * fraction))].mean())


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """P(other > member) + P(other = member)/2, the exact Mann-Whitney statistic over all pairs."""
    ranks = stats.rankdata(np.concatenate([np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)]))
    pairs_won = ranks[len(members) :].sum() - len(others) * (len(others) + 1) / 2
    return float(pairs_won / (len(members) * len(others)))


def privleak(model_auc: float, retrained_auc: float) -> float | None:
    """Relative excess of 1 - AUC over the retrained model's, in percent: 0 is ideal, -100 leaks fully, positive over-unlearns.

    None when the retrained model's AUC is 1: the measure divides by its distance from there.
    """
    if retrained_auc >= 1:
        return None
    return ((1 - model_auc) - (1 - retrained_auc)) / (1 - retrained_auc) * 100
