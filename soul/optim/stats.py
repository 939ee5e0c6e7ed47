"""What an optimizer reports about its steps and its curvature: local sums on the device, to be added over ranks.

Nothing here communicates. Every number is a sum, a maximum or a histogram, so ranks merge theirs with one all-reduce each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A histogram's bins: one for zeros, then 32 a decade from 1e-32 to 1e32, then one for anything above (inf and nan too).
_LOW, _HIGH, _PER_DECADE = -32, 32, 32
NUM_BINS = (_HIGH - _LOW) * _PER_DECADE + 2


@dataclass(frozen=True, slots=True)
class OptimizerStats:
    """Four sums over the coordinates stepped since the last take. Ranks with different shards add their `sums`.

    A coordinate with zero momentum does not move (the embedding of a token never seen): it is neither clipped nor unclipped.
    """

    sums: Tensor

    @classmethod
    def unclipped(cls, directions: Sequence[Tensor], *, lr: float) -> OptimizerStats:
        """Of directions that nothing clips."""
        moved = [int(direction.count_nonzero()) for direction in directions]
        squared = [float(direction.double().square().sum()) * lr**2 for direction in directions]
        numel = [direction.numel() for direction in directions]
        return cls(torch.tensor([sum(moved), sum(moved), sum(numel), math.fsum(squared)], dtype=torch.float64))

    @property
    def num_unclipped(self) -> Tensor:
        """Moved by less than the learning rate: here the curvature decided, not the clip."""
        return self.sums[0]

    @property
    def num_moved(self) -> Tensor:
        return self.sums[1]

    @property
    def numel(self) -> Tensor:
        return self.sums[2]

    @property
    def update_squared_norm(self) -> Tensor:
        """Squared length of the updates in parameter units, weight decay left out."""
        return self.sums[3]

    @property
    def unclipped_fraction(self) -> Tensor:
        return self.num_unclipped / self.num_moved.clamp(min=1)


def step_sums(directions: list[Tensor], *, lr: float) -> Tensor:
    """The sums of one bucket from its clipped directions, each coordinate in [-1, 1]."""
    totals = torch.zeros(4, dtype=torch.float64, device=directions[0].device)
    for direction in directions:
        magnitude = direction.abs()
        num_moved = magnitude.count_nonzero()
        totals[0] += num_moved - (magnitude >= 1).count_nonzero()
        totals[1] += num_moved
        totals[2] += magnitude.numel()
        totals[3] += magnitude.square_().sum(dtype=torch.float64) * lr**2
    return totals


@dataclass(frozen=True, slots=True)
class CurvatureStats:
    """A curvature diagonal. Ranks add their `sums` and `histogram` and take the largest `maximum`; quantiles count negatives as zeros."""

    sums: Tensor  # number of non-zeros, number of zeros, sum of h, number of negatives
    maximum: Tensor
    histogram: Tensor

    @classmethod
    def of(cls, hessians: Iterable[Tensor], *, quantiles: bool = True) -> CurvatureStats:
        """Without `quantiles` the histogram stays empty."""
        stats = cls(torch.zeros(4, dtype=torch.float64), torch.zeros((), dtype=torch.float64), torch.zeros(NUM_BINS, dtype=torch.int64))
        for h in hessians:
            num_nonzero = h.count_nonzero()
            sums = torch.stack([num_nonzero, h.numel() - num_nonzero, h.sum(dtype=torch.float64), (h < 0).sum()])
            stats = cls(
                sums=stats.sums.to(h.device) + sums,
                maximum=torch.maximum(stats.maximum.to(h.device), h.max().double()),
                histogram=stats.histogram.to(h.device) + log_histogram(h.clamp(min=0)) if quantiles else stats.histogram,
            )
        return stats

    @property
    def mean(self) -> Tensor:
        return self.sums[2] / self.sums[:2].sum().clamp(min=1)

    @property
    def zero_fraction(self) -> Tensor:
        return self.sums[1] / self.sums[:2].sum().clamp(min=1)

    @property
    def negative_fraction(self) -> Tensor:
        return self.sums[3] / self.sums[:2].sum().clamp(min=1)

    def quantile(self, q: float) -> float:
        """The q-quantile of h, 0 < q < 1, to a few percent of its size; 0.0 where it falls among the zeros."""
        return quantile(self.histogram, q)


def log_histogram(values: Tensor) -> Tensor:
    """Counts of non-negative values in logarithmic bins: int64, shape (NUM_BINS,), additive over tensors and ranks."""
    position = values.flatten().float().log10().sub_(_LOW).mul_(_PER_DECADE)
    torch.nan_to_num_(position, nan=math.inf).floor_().clamp_(-1, NUM_BINS - 2).add_(1)
    return torch.bincount(position.int(), minlength=NUM_BINS)


def quantile(histogram: Tensor, q: float) -> float:
    """The value below which a fraction 0 < q < 1 of the counted values lies, interpolated within its bin; nan for no counts."""
    cumulative = histogram.cpu().cumsum(0).double()
    rank = q * float(cumulative[-1])
    if rank == 0:
        return math.nan
    index = int(torch.searchsorted(cumulative, rank))
    if index == 0:
        return 0.0
    if index == NUM_BINS - 1:
        return math.inf
    below, upto = float(cumulative[index - 1]), float(cumulative[index])
    return float(10 ** (_LOW + (index - 1 + (rank - below) / (upto - below)) / _PER_DECADE))


def fraction_below(histogram: Tensor, value: float) -> float:
    """The inverse of `quantile`: which fraction of the counted values lies below `value` > 0; nan for no counts."""
    cumulative = histogram.cpu().cumsum(0).double()
    if cumulative[-1] == 0:
        return math.nan
    position = min(max((math.log10(value) - _LOW) * _PER_DECADE, 0.0), NUM_BINS - 2.0)
    index = int(position)
    below, upto = float(cumulative[index]), float(cumulative[min(index + 1, NUM_BINS - 2)])
    return (below + (position - index) * (upto - below)) / float(cumulative[-1])
