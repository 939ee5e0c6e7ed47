"""rho="auto": hold the fraction of unclipped coordinates in a band.

A coordinate is unclipped when |m| / h < rho, h bias-corrected: the rho that leaves a fraction f unclipped is the f-quantile of
|m| / h. Ranks add up histograms of that ratio, so every rank and every world size arrives at the same rho. Coordinates without
curvature (h = 0, or negative by Hutchinson's estimate) are left out: they take sign steps whatever rho is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soul.optim.sophia import SophiaG, hessian_correction, ratio_counts
from soul.optim.stats import NUM_BINS, fraction_below, quantile
from soul.records import InputError


@torch.no_grad()
def log_ratio_histogram(optimizer: SophiaG) -> Tensor:
    """Local counts of |m| / h over the coordinates that move and have curvature; the ranks' sum goes into `RhoController.update`."""
    factor = hessian_correction(optimizer.param_groups[0])
    total = torch.zeros(NUM_BINS, dtype=torch.int64)
    for exp_avgs, hessians in optimizer.state_buckets():
        counts = ratio_counts(exp_avgs, hessians, factor=factor)
        total = total.to(counts.device) + counts
    return total


def unclipped_fraction(histogram: Tensor, rho: float) -> float:
    """Which fraction of the counted coordinates this rho leaves unclipped; nan where there are none."""
    return fraction_below(histogram, rho)


def rho_for(histogram: Tensor, target: float) -> float:
    """The rho that leaves a fraction `target` unclipped: inf where too many ratios are beyond counting, nan where there are none."""
    return quantile(histogram, target)


@dataclass(slots=True)
class RhoController:
    """Feed it the global histogram whenever curvature was measured and hand the returned rho to the optimizer.

    The first measurement sets rho to the solution. Later ones leave it alone within `band` of the target; outside, they go
    `smoothing` of the way to the solution in log space. A measurement without a solution (nothing with curvature moves) changes nothing.
    """

    target: float = 0.3
    band: float = 0.05
    smoothing: float = 0.5
    bounds: tuple[float, float] = (1e-8, 1e8)
    rho: float = 0.04
    is_measured: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.target < 1 and 0 <= self.band < 1 and 0 < self.smoothing <= 1):
            raise InputError(f"target, band and smoothing must be fractions, got {self.target}, {self.band} and {self.smoothing}.")
        if not 0 < self.bounds[0] <= self.rho <= self.bounds[1]:
            raise InputError(f"rho must lie within its bounds {self.bounds}, got {self.rho}.")

    def update(self, histogram: Tensor) -> float:
        solution = rho_for(histogram, self.target)
        if not math.isfinite(solution):
            return self.rho
        solution = min(max(solution, self.bounds[0]), self.bounds[1])
        if not self.is_measured:
            self.rho, self.is_measured = solution, True
        elif abs(unclipped_fraction(histogram, self.rho) - self.target) > self.band:
            self.rho *= (solution / self.rho) ** self.smoothing
        return self.rho

    def state_dict(self) -> dict[str, Any]:
        return {"rho": self.rho, "is_measured": self.is_measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rho, self.is_measured = float(state["rho"]), bool(state["is_measured"])
