"""TOFU's truth ratio: how much likelier the wrong answers are than the right one, by length-normalised probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

TruthRatioMean = Literal["geometric", "arithmetic"]
_LIMIT: Final = 700.0  # exp of anything beyond leaves float64; no model's mean loss comes near


def truth_ratio(right_nll: float, wrong_nlls: Sequence[float], mean: TruthRatioMean = "geometric") -> float:
    """r = mean_j p(wrong_j) / p(right), with p = exp(-mean nats per token).

    `geometric` is what TOFU's leaderboard and OpenUnlearning compute, `arithmetic` what TOFU's paper writes.
    """
    losses = np.asarray(wrong_nlls, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and whoever aggregates looks for it
        log_wrong = -losses.mean() if mean == "geometric" else np.logaddexp.reduce(-losses) - np.log(len(losses))
        return float(np.exp(np.clip(log_wrong + right_nll, -_LIMIT, _LIMIT)))


def indistinguishability(ratios: Sequence[float] | NDArray[np.float64]) -> float:
    """The forget set's aggregate: mean min(r, 1/r), 1 where wrong answers are exactly as likely as the right one."""
    values = np.asarray(ratios, dtype=np.float64)
    return float(np.minimum(values, 1 / np.maximum(values, np.finfo(np.float64).tiny)).mean())


def preference(ratios: Sequence[float] | NDArray[np.float64]) -> float:
    """Every other set's aggregate: mean max(0, 1 - r), 1 where the right answer is always preferred."""
    return float(np.maximum(0.0, 1 - np.asarray(ratios, dtype=np.float64)).mean())
