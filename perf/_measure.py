"""Clocks, peak memory, and what a list of paired measurements says: medians and the quartiles of the paired ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Moment:
    """Wall-clock and process CPU seconds, once the device has done what it was asked to."""

    wall: float
    cpu: float

    @classmethod
    def now(cls, device: torch.device) -> Moment:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Moment) -> Moment:
        return Moment(self.wall - start.wall, self.cpu - start.cpu)

    def per(self, count: int) -> Moment:
        return Moment(self.wall / count, self.cpu / count)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`ratio` is the median of the rounds' paired ratios above / below; `aim` is the bound that was set for it, None for context."""

    part: str
    name: str
    above: str
    below: str
    unit: str
    above_median: float
    below_median: float
    ratio: float
    quartiles: tuple[float, float]
    rounds: int
    aim: float | None = None
    at_least: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def is_met(self) -> bool | None:
        if self.aim is None:
            return None
        return self.ratio >= self.aim if self.at_least else self.ratio <= self.aim

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_met": self.is_met}


def compare(
    part: str,
    name: str,
    above: tuple[str, Sequence[float]],
    below: tuple[str, Sequence[float]],
    *,
    unit: str,
    aim: float | None = None,
    at_least: bool = False,
    notes: dict[str, Any] | None = None,
) -> Comparison:
    """Both sides as (label, one value per round); round i of one is paired with round i of the other."""
    ratios = [a / b for a, b in zip(above[1], below[1], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    medians = statistics.median(above[1]), statistics.median(below[1])
    return Comparison(
        part, name, above[0], below[0], unit, *medians, statistics.median(ratios), (low, high), len(ratios), aim, at_least, notes or {}
    )


def interleaved(sides: dict[str, Callable[[], Moment]], *, rounds: int) -> dict[str, list[Moment]]:
    """Every side once a round, in turn, the first one changing from round to round: what else the machine does falls on all of them."""
    moments: dict[str, list[Moment]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            gc.collect()
            moments[name].append(sides[name]())
    return moments


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that existed at once while `work` ran, from the allocator: the GPU's, or the profiled one of the CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results = recorded.profiler.kineto_results
    events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    live = peak = 0
    for _, num_bytes in events:
        live += num_bytes
        peak = max(peak, live)
    return peak


def table(comparisons: Sequence[Comparison]) -> str:
    """One line per comparison, columns aligned."""
    lines = [("", "comparison", "above", "below", "ratio", "quartiles", "aim")]
    for item in comparisons:
        bound = "" if item.aim is None else f"{'>=' if item.at_least else '<='} {item.aim:g} {'met' if item.is_met else 'MISSED'}"
        low, high = item.quartiles
        lines.append(
            (
                f"({item.part})",
                item.name,
                f"{item.above}: {shown(item.above_median, item.unit)}",
                f"{item.below}: {shown(item.below_median, item.unit)}",
                f"{item.ratio:.3f}",
                f"{low:.3f}-{high:.3f}",
                bound,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.1f} MiB"
    return f"{value * 1000:.2f} ms" if value < 1 else f"{value:.2f} s"
