"""From outcomes to a table: a choice selected per cell, summaries over the seeds, and paired differences at equal forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Literal

from soul.benchmarks.fronts import Point, kept_at, level_to_compare, pareto_front
from soul.benchmarks.grid import Cell
from soul.benchmarks.objective import objective
from soul.benchmarks.outcomes import Outcome, Values
from soul.benchmarks.paired import Difference, Summary, paired_difference, summary
from soul.statistics.means import mean_interval

MAIN_METRICS = ("rougeL_recall", "exact_memorization", "probability")
CHEAP_METRIC = "exact_memorization"
BASELINES = ("adamw", "signum")  # first order: with the gradient's second moment, and with its sign alone
SEARCHED = ("learning_rate", "retain_weight")
Edge = Literal["smallest", "largest"]


@dataclass(frozen=True)
class Row:
    """A cell. `selected` holds the choice that won on the validation half, seed by seed; a seed in which it did not finish is absent."""

    cell: Cell
    outcomes: tuple[Outcome, ...]
    selected: tuple[Outcome, ...]
    qualifies: bool
    """Whether the selected choice keeps the floor on the validation half in every seed."""

    def values(self, path: str) -> list[float]:
        return [outcome.values[path] for outcome in self.selected if path in outcome.values]

    def summary(self, path: str) -> Summary:
        return summary(self.values(path))

    def interval(self, path: str) -> tuple[float, float] | None:
        return mean_interval(self.values(path))

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.state in ("failed", "crashed", "missing")]

    @property
    def seconds(self) -> float:
        """Training and evaluation of all its trials that finished."""
        costs = [outcome.cost.get(name) or 0.0 for outcome in self.outcomes for name in ("train_s", "eval_s")]
        return sum(costs)

    def cost(self, name: str) -> float | None:
        """Mean over the selected runs; None where it was not measured."""
        known = [value for outcome in self.selected if (value := outcome.cost.get(name)) is not None]
        return fmean(known) if known else None

    @cached_property
    def num_choices(self) -> int:
        return len({outcome.trial.choice.key for outcome in self.outcomes})

    def edge(self, outcome: Outcome, name: str) -> Edge | None:
        """Whether the value of setting `name` is the smallest or the largest that the cell tried: a better one may lie outside."""
        tried = {value for one in self.outcomes if isinstance(value := one.trial.choice.settings.get(name), int | float)}
        value = outcome.trial.choice.settings.get(name)
        if len(tried) < 2 or value not in {min(tried), max(tried)}:
            return None
        return "smallest" if value == min(tried) else "largest"

    @property
    def edges(self) -> dict[str, Edge]:
        """The searched settings whose selected value lies at an edge."""
        found = ((name, self.edge(outcome, name)) for outcome in self.selected for name in SEARCHED)
        return {name: edge for name, edge in found if edge is not None}


@dataclass(frozen=True)
class Comparison:
    """`cell` minus a first-order `baseline` of the same method, seed by seed."""

    cell: Cell
    baseline: Cell
    metric: str
    """What `difference` is measured by."""
    level: float | None
    """The share of the forget rows that both leave where `difference` compares their retain scores."""
    difference: Difference
    forgetting: Difference
    """Of the forget scores (lower is better) of the selected choices, in the seeds in which both keep the floor."""
    time_ratio: float | None
    """Training time of a selected run over the baseline's."""


@dataclass(frozen=True)
class Table:
    rows: tuple[Row, ...]
    metric: str
    """What forgetting and keeping are measured by."""
    differences: tuple[Comparison, ...]
    floor: float

    @property
    def halved(self) -> bool:
        return any(row.num_choices > 1 for row in self.rows)

    @property
    def shared_groups(self) -> list[str]:
        """The splits whose halves had to share an author in any trial."""
        return list(dict.fromkeys(split for row in self.rows for outcome in row.outcomes for split in outcome.shared_groups))

    @property
    def edges(self) -> list[Row]:
        """The rows whose search ended at an edge."""
        return [row for row in self.rows if row.edges]

    @property
    def best(self) -> list[Row]:
        """The rows on the Pareto front of (forget, retain), by their means over the seeds and model by model."""
        found = []
        for model in self.models:
            places = [(row, self._mean_place(row)) for row in self.rows if row.cell.model == model]
            front = pareto_front([place for _, place in places if place is not None])
            found += [row for row, place in places if place in front]
        return found

    def _mean_place(self, row: Row) -> Point | None:
        left, kept = row.values(f"forget.{self.metric}"), row.values(f"retain.{self.metric}")
        return (fmean(left), fmean(kept)) if left and kept else None

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
    return Table(rows, metric, tuple(_comparisons(rows, metric, floor)), floor)


def _row(cell: Cell, outcomes: Sequence[Outcome], metric: str, floor: float) -> Row:
    chosen = sorted(select(outcomes, metric=metric, floor=floor), key=lambda outcome: outcome.trial.seed)
    return Row(cell, tuple(outcomes), tuple(chosen), bool(chosen) and all(kept_share(best, metric) >= floor for best in chosen))


def kept_share(outcome: Outcome, metric: str) -> float:
    """Retain score on the validation rows as a share of the target's; 0 where it was not measured."""
    path = f"retain.{metric}"
    return outcome.validation.get(path, 0.0) / max(outcome.target_validation.get(path, 0.0), 1e-9)


def select(outcomes: Sequence[Outcome], *, metric: str, floor: float) -> list[Outcome]:
    """A cell's runs of one choice, the same for all seeds: the best by the means of their validation rows.

    Only among the choices that have finished in the most seeds; of equals the one with the smaller learning rate. Empty where none has
    finished. A choice of its own for each seed would be luckier than any setting that can be written down.
    """
    by_choice: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.state == "done" and f"forget.{metric}" in outcome.validation:
            by_choice.setdefault(outcome.trial.choice.key, []).append(outcome)

    def rank(runs: list[Outcome]) -> tuple[int, float, float]:
        left = fmean(run.validation[f"forget.{metric}"] for run in runs)
        kept = fmean(kept_share(run, metric) for run in runs)
        return len(runs), objective(left, kept, floor=floor), -float(runs[0].trial.choice.optimizer.get("learning_rate", 0.0))

    return max(by_choice.values(), key=rank, default=[])


def _comparisons(rows: Sequence[Row], metric: str, floor: float) -> list[Comparison]:
    """Every cell against each baseline of its method; the second baseline against the first."""
    by_cell = {row.cell: row for row in rows}
    found = []
    for row in rows:
        known = BASELINES.index(row.cell.optimizer) if row.cell.optimizer in BASELINES else len(BASELINES)
        baselines = [by_cell.get(Cell(row.cell.model, row.cell.method, name)) for name in BASELINES[:known]]
        found += [_compare(row, baseline, metric, floor) for baseline in baselines if baseline is not None]
    return found


def _compare(row: Row, baseline: Row, metric: str, floor: float) -> Comparison:
    """Along the fronts of all choices; where each cell has only one, along that run's epochs."""
    along_epochs = row.num_choices == baseline.num_choices == 1
    used = CHEAP_METRIC if along_epochs else metric
    seeds = sorted({outcome.trial.seed for outcome in (*row.outcomes, *baseline.outcomes)})
    pairs = [(front_of(row, seed, used, along_epochs), front_of(baseline, seed, used, along_epochs)) for seed in seeds]
    sides = [[pair[side] for pair in pairs if all(pair)] for side in (0, 1)]
    level = level_to_compare(sides, floor=floor)
    kept: list[list[float | None]] = [[], []]
    if level is not None:
        kept = [[kept_at(front, level) if front else None for front in fronts] for fronts in zip(*pairs, strict=True)]
    left = [_at_the_floor(one, seeds, metric, floor) for one in (row, baseline)]
    times = row.cost("train_s"), baseline.cost("train_s")
    return Comparison(
        row.cell,
        baseline.cell,
        used,
        level,
        paired_difference(*kept),
        paired_difference(*left),
        times[0] / times[1] if times[0] and times[1] else None,
    )


def _at_the_floor(row: Row, seeds: Sequence[int], metric: str, floor: float) -> list[float | None]:
    """Each seed's forget score of the selected choice; None where that does not keep the floor."""
    scores = {o.trial.seed: o.values.get(f"forget.{metric}") for o in row.selected if kept_share(o, metric) >= floor}
    return [scores.get(seed) for seed in seeds]


def front_of(row: Row, seed: int, metric: str, along_epochs: bool = False) -> list[Point]:
    """The front of a cell's finished runs of one seed, from the target on; empty where none has finished.

    Which runs are on it is decided on the validation rows; the points are those of the reported rows.
    """
    done = [outcome for outcome in row.outcomes if outcome.state == "done" and outcome.trial.seed == seed]
    if along_epochs:
        points = [(epoch["forget"].get(metric), epoch["retain"].get(metric)) for outcome in done for epoch in outcome.epochs]
        return pareto_front([(left, kept) for left, kept in points if left is not None and kept is not None])
    sides = [(o.target_validation, o.target) for o in done[:1]] + [(o.validation, o.values) for o in done]
    places = [(validated, told) for seen, shown in sides if (validated := _point(seen, metric)) and (told := _point(shown, metric))]
    chosen = pareto_front([validated for validated, _ in places])
    return sorted((told for validated, told in places if validated in chosen), reverse=True)


def _point(values: Values, metric: str) -> Point | None:
    left, kept = values.get(f"forget.{metric}"), values.get(f"retain.{metric}")
    return None if left is None or kept is None else (left, kept)
