"""The two headline numbers: forget quality (is it like a model that never saw the data?) and model utility (is the rest intact?)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from scipy import stats

UTILITY_SPLITS: Final = ("retain", "real_authors", "world_facts")
UTILITY_METRICS: Final = ("probability", "rougeL_recall", "truth_ratio")
_EXACT_ROWS: Final = 10_000  # beyond, the exact null distribution costs more than it tells


@dataclass(frozen=True, slots=True)
class KolmogorovSmirnov:
    """The largest gap between two empirical distributions, and the two-sided p-value that both come from one."""

    statistic: float
    p_value: float


def kolmogorov_smirnov(first: Sequence[float], second: Sequence[float]) -> KolmogorovSmirnov:
    """Two-sample test with the exact null distribution (asymptotic above 10,000 rows)."""
    method: Literal["exact", "asymp"] = "exact" if max(len(first), len(second)) <= _EXACT_ROWS else "asymp"
    result = stats.ks_2samp(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64), method=method)
    return KolmogorovSmirnov(float(result.statistic), float(result.pvalue))


def model_utility(components: Sequence[float]) -> float:
    """Harmonic mean of TOFU's nine components; zero as soon as one of them is."""
    if min(components) <= 0:
        return 0.0
    return len(components) / sum(1 / value for value in components)
