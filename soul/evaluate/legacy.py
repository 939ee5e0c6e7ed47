"""SOUL's own variants as its released code computes them, for comparison with its tables only.

Neither measures what its published name says: the "forget quality" never sees a retrained model, and the "MIA" has its labels in
another order than its scores. Every name here begins with `legacy_` and none of them is shown under the name of a metric.
"""

from __future__ import annotations

from collections.abc import Sequence

from soul.evaluate.privacy import auc
from soul.evaluate.utility import KolmogorovSmirnov, kolmogorov_smirnov


def legacy_self_ks(forget_ratios: Sequence[float], retain_ratios: Sequence[float]) -> KolmogorovSmirnov:
    """KS test between one model's own forget and retain truth ratios.

    The released code prints p, the paper's table agrees with 1 - p. A destroyed model scores as well as a perfectly unlearned one.
    """
    return kolmogorov_smirnov(forget_ratios, retain_ratios)


def legacy_self_ks_p(forget_ratios: Sequence[float], retain_ratios: Sequence[float]) -> float:
    """The p-value of `legacy_self_ks`, SOUL's "forget quality"."""
    return legacy_self_ks(forget_ratios, retain_ratios).p_value


def legacy_scrambled_mia_auc(forget_scores: Sequence[float], holdout_scores: Sequence[float]) -> float:
    """AUC with SOUL's labels: scores are ordered forget, then holdout, but the first `len(holdout)` of them are labelled 0, the rest 1.

    With 400 forget and 217 holdout rows, 183 forget rows count as holdout: for exchangeable forget rows the value cannot leave
    [0.229, 0.771] however well or badly the model forgot.
    """
    scores = [*forget_scores, *holdout_scores]
    first = len(holdout_scores)
    return auc(scores[:first], scores[first:])
