"""What a handful of seeds can say: mean and spread, and paired differences with Student's 95 % interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from soul.statistics.means import mean_interval

Verdict = Literal["survives", "inside the noise", "no interval"]


@dataclass(frozen=True, slots=True)
class Summary:
    """`values` in the order of the seeds, None where a run has none; mean and sd (n - 1) are over those that have one."""

    values: tuple[float | None, ...]
    mean: float | None
    sd: float | None


def summary(values: Sequence[float | None]) -> Summary:
    present = [value for value in values if value is not None]
    mean = statistics.fmean(present) if present else None
    return Summary(tuple(values), mean, statistics.stdev(present) if len(present) > 1 else None)


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean over the seeds of left - right, and its 95 % interval: None with fewer than two pairs."""

    mean: float | None
    low: float | None
    high: float | None
    num_pairs: int

    @property
    def verdict(self) -> Verdict:
        """Whether the interval leaves zero out. Both runs equal in every seed is a difference of zero, which it does not."""
        if self.low is None or self.high is None:
            return "no interval"
        return "inside the noise" if self.low <= 0 <= self.high else "survives"


def paired_difference(left: Sequence[float | None], right: Sequence[float | None]) -> Difference:
    """Seed by seed; a seed in which either has no value is left out."""
    deltas = [a - b for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if not deltas:
        return Difference(None, None, None, 0)
    mean = statistics.fmean(deltas)
    interval = mean_interval(deltas)
    if interval is None:
        return Difference(mean, None, None, 1)
    return Difference(mean, *interval, len(deltas))
