"""The mean of a handful of values, such as one per seed, and how far it may be from what all seeds would give."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

from scipy.stats import t as student

CONFIDENCE: Final = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of the mean; None below two values.

    It covers the true mean as often as it says for two values and more, where these are about normal. The percentiles of resampled means
    cannot reach beyond the smallest and the largest value: of three they cover about three quarters, of two about half.
    """
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
