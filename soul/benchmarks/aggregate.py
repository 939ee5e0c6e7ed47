"""From outcomes to a table: a choice selected per cell and seed, summaries over the seeds, and paired differences at equal forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from soul.benchmarks.fronts import Point, bootstrap_interval, deepest_shared_level, kept_at, pareto_front
from soul.benchmarks.grid import Cell
from soul.benchmarks.objective import objective
from soul.benchmarks.outcomes import Outcome, Values
from soul.benchmarks.paired import Difference, Summary, paired_difference, summary

MAIN_METRICS = ("rougeL_recall", "exact_memorization", "probability")
CHEAP_METRIC = "exact_memorization"
FIRST_ORDER = "adamw"


@dataclass(frozen=True)
class Row:
    """A cell. `selected` holds, seed by seed, the choice that won on the validation half; a seed without a finished trial is absent."""

    cell: Cell
    outcomes: tuple[Outcome, ...]
    selected: tuple[Outcome, ...]
    qualifies: bool
    """Whether every selected choice keeps the floor on the validation half."""

    def values(self, path: str) -> list[float]:
        return [outcome.values[path] for outcome in self.selected if path in outcome.values]

    def summary(self, path: str) -> Summary:
        return summary(self.values(path))

    def interval(self, path: str) -> tuple[float, float] | None:
        return bootstrap_interval(self.values(path))

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.state in ("failed", "crashed", "missing")]

    @property
    def seconds(self) -> float:
        """Training and evaluation of all its trials that finished."""
        costs = [outcome.cost.get(name) or 0.0 for outcome in self.outcomes for name in ("train_s", "eval_s")]
        return sum(costs)

    @cached_property
    def num_choices(self) -> int:
        return len({outcome.trial.choice.key for outcome in self.outcomes})


@dataclass(frozen=True)
class EqualForgetting:
    """Retain score of `cell` minus that of the same method's `baseline`, seed by seed, where both leave `level` of the forget rows."""

    cell: Cell
    baseline: Cell
    metric: str
    level: float | None
    difference: Difference


@dataclass(frozen=True)
class Table:
    rows: tuple[Row, ...]
    metric: str
    """What forgetting and keeping are measured by."""
    differences: tuple[EqualForgetting, ...]
    floor: float

    @property
    def halved(self) -> bool:
        return any(row.num_choices > 1 for row in self.rows)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row.cell.model for row in self.rows))

    def reference(self, model: str, kind: str) -> Values:
        """The target's or the retrained model's metrics on the reported rows; empty where nothing of the model has finished."""
        found = [outcome for row in self.rows if row.cell.model == model for outcome in row.outcomes if outcome.state == "done"]
        return {} if not found else found[0].target if kind == "target" else found[0].retrained


def tabulate(outcomes: Sequence[Outcome], *, floor: float) -> Table:
    """The rows in the order in which their cells first come."""
    done = [outcome for outcome in outcomes if outcome.state == "done"]
    metric = next((name for name in MAIN_METRICS if done and all(f"forget.{name}" in outcome.values for outcome in done)), MAIN_METRICS[-1])
    cells = list(dict.fromkeys(outcome.trial.cell for outcome in outcomes))
    rows = tuple(_row(cell, [outcome for outcome in outcomes if outcome.trial.cell == cell], metric, floor) for cell in cells)
    return Table(rows, metric, tuple(_differences(rows, metric)), floor)


def _row(cell: Cell, outcomes: Sequence[Outcome], metric: str, floor: float) -> Row:
    seeds = sorted({outcome.trial.seed for outcome in outcomes})
    chosen = [best for seed in seeds if (best := select([o for o in outcomes if o.trial.seed == seed], metric=metric, floor=floor))]
    return Row(cell, tuple(outcomes), tuple(chosen), bool(chosen) and all(kept_share(best, metric) >= floor for best in chosen))


def kept_share(outcome: Outcome, metric: str) -> float:
    """Retain score on the validation rows as a share of the target's; 0 where it was not measured."""
    path = f"retain.{metric}"
    return outcome.validation.get(path, 0.0) / max(outcome.target_validation.get(path, 0.0), 1e-9)


def select(outcomes: Sequence[Outcome], *, metric: str, floor: float) -> Outcome | None:
    """The best finished choice by its validation rows; of equals the one with the smaller learning rate. None where none has finished."""
    found = [outcome for outcome in outcomes if outcome.state == "done" and f"forget.{metric}" in outcome.validation]

    def rank(outcome: Outcome) -> tuple[float, float]:
        rate = outcome.trial.choice.optimizer.get("learning_rate", 0.0)
        goal = objective(outcome.validation[f"forget.{metric}"], kept_share(outcome, metric), floor=floor)
        return goal, -float(rate)

    return max(found, key=rank, default=None)


def _differences(rows: Sequence[Row], metric: str) -> list[EqualForgetting]:
    found = []
    for row in rows:
        baseline = next((other for other in rows if other.cell == Cell(row.cell.model, row.cell.method, FIRST_ORDER)), None)
        if baseline is not None and row is not baseline:
            found.append(_compare(row, baseline, metric))
    return found


def _compare(row: Row, baseline: Row, metric: str) -> EqualForgetting:
    """Along the fronts of all choices; where each cell has only one, along that run's epochs."""
    along_epochs = row.num_choices == baseline.num_choices == 1
    used = CHEAP_METRIC if along_epochs else metric
    seeds = sorted({outcome.trial.seed for outcome in (*row.outcomes, *baseline.outcomes)})
    pairs = [(front_of(row, seed, used, along_epochs), front_of(baseline, seed, used, along_epochs)) for seed in seeds]
    level = deepest_shared_level([front for pair in pairs if all(pair) for front in pair])
    if level is None:
        return EqualForgetting(row.cell, baseline.cell, used, None, paired_difference([], []))
    left, right = ([kept_at(front, level) if front else None for front in fronts] for fronts in zip(*pairs, strict=True))
    return EqualForgetting(row.cell, baseline.cell, used, level, paired_difference(left, right))


def front_of(row: Row, seed: int, metric: str, along_epochs: bool = False) -> list[Point]:
    """The front of a cell's finished runs of one seed, from the target on; empty where none has finished."""
    done = [outcome for outcome in row.outcomes if outcome.state == "done" and outcome.trial.seed == seed]
    if along_epochs:
        points = [(epoch["forget"].get(metric), epoch["retain"].get(metric)) for outcome in done for epoch in outcome.epochs]
    else:
        points = [
            (side.get(f"forget.{metric}"), side.get(f"retain.{metric}")) for outcome in done for side in (outcome.values, outcome.target)
        ]
    return pareto_front([(left, kept) for left, kept in points if left is not None and kept is not None])
