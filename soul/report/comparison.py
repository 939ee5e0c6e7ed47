"""The before/after comparison as rows of cells, which the terminal, Markdown and HTML tables only print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from soul.records import InputError
from soul.report.numbers import DASH, duration, fixed, log10_p
from soul.report.results import ModelResults, Results
from soul.report.words import ARROWS, METRICS, OVERALL, Direction, run_title

RowKind = Literal["target", "unlearned", "retrained"]


@dataclass(frozen=True, slots=True)
class Column:
    group: str
    title: str
    path: str
    direction: Direction

    @property
    def header(self) -> str:
        return f"{self.title} {ARROWS[self.direction]}"


@dataclass(frozen=True, slots=True)
class Cell:
    """`note` numbers the reason for a missing value; `best` is set where several runs compete."""

    text: str
    note: int | None = None
    best: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    kind: RowKind
    label: str
    meaning: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Column groups in order, with how many columns each spans."""
        spans: dict[str, int] = {}
        for column in self.columns:
            spans[column.group] = spans.get(column.group, 0) + 1
        return list(spans.items())

    @property
    def best_means(self) -> str:
        """What a cell that is marked as the best stands for; empty if none is."""
        if not any(cell.best for row in self.rows for cell in row.cells):
            return ""
        if any(row.kind == "retrained" and row.cells[0].note is None for row in self.rows):
            return "best of the runs; on forget rows, the nearest to the retrained model"
        return "best of the runs"


def _column(group: str, path: str) -> Column:
    split, _, metric = path.partition(".")
    word = METRICS[metric] if metric else OVERALL[split]
    return Column(group, word.title, path, word.forget if split == "forget" else word.retain)


COLUMNS: Final[tuple[Column, ...]] = (
    _column("Forget", "forget.rougeL_recall"),
    _column("Forget", "forget.probability"),
    _column("Forget", "forget.exact_memorization"),
    _column("Forget", "forget.truth_ratio"),
    _column("Retain", "retain.rougeL_recall"),
    _column("Retain", "retain.probability"),
    _column("Authors", "real_authors.rougeL_recall"),
    _column("Facts", "world_facts.rougeL_recall"),
    _column("Overall", "model_utility"),
    Column("Overall", "forget quality, log10 p", "forget_quality", "higher"),
)
TIME: Final = Column("Cost", "train time", "train_s", "lower")


@dataclass
class Notes:
    """Reasons in the order they are first met; the same reason gets the same number."""

    reasons: list[str] = field(default_factory=list)

    def number(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason) + 1


def run_labels(runs: Sequence[Results]) -> list[str]:
    """One distinct name per run: method and optimizer, and where that is not enough the seed, then its place in the list."""
    labels = [run_title(run.method, run.optimizer) for run in runs]
    for detail in ([f"seed {run.seed}" for run in runs], _different_settings(runs), [f"run {n}" for n, _ in enumerate(runs, start=1)]):
        clashes = {label for label in labels if labels.count(label) > 1}
        useful = {label: len({extra for name, extra in zip(labels, detail, strict=True) if name == label}) > 1 for label in clashes}
        labels = [f"{label}, {extra}" if useful.get(label) and extra else label for label, extra in zip(labels, detail, strict=True)]
    return labels


def _different_settings(runs: Sequence[Results]) -> list[str]:
    for key in ("learning_rate", "retain_weight", "rho", "engine"):
        if len({run.settings.get(key) for run in runs}) > 1:
            return [f"{key} {run.settings[key]}" if key in run.settings else "" for run in runs]
    return ["" for _ in runs]


def check_comparable(runs: Sequence[Results]) -> None:
    """Numbers of different benchmarks or row counts do not belong in one table."""
    for run in runs[1:]:
        if (run.benchmark, run.splits) != (runs[0].benchmark, runs[0].splits):
            raise InputError(
                f"runs of one report need the same benchmark and split sizes, got {_benchmark(runs[0])} and {_benchmark(run)}. "
                "Build one report for each."
            )


def _benchmark(run: Results) -> str:
    return f"{run.benchmark} ({', '.join(f'{name} {size}' for name, size in run.splits.items())})"


def distinct_models(runs: Sequence[Results], kind: Literal["target", "retrained"]) -> list[tuple[str, ModelResults]]:
    """The target (or retrained) models behind the runs, each once: runs that start from one model share its row."""
    found: list[tuple[list[str], ModelResults]] = []
    for label, run in zip(run_labels(runs), runs, strict=True):
        model = run.models[kind]
        if model is None:
            continue
        same = next((owners for owners, other in found if other == model), None)
        if same is None:
            found.append(([label], model))
        else:
            same.append(label)
    return [(kind if len(found) == 1 else f"{kind} of {', '.join(owners)}", model) for owners, model in found]


def comparison(runs: Sequence[Results]) -> Comparison:
    check_comparable(runs)
    notes = Notes()
    rows = [_row("target", label, "before unlearning", model, notes) for label, model in distinct_models(runs, "target")]
    for label, run in zip(run_labels(runs), runs, strict=True):
        unlearned = run.models["unlearned"]
        if unlearned is not None:
            rows.append(_row("unlearned", label, "after unlearning", unlearned, notes, best=_best(runs, unlearned), cost=run))
    rows += [_row("retrained", label, "never saw the forget rows", model, notes) for label, model in distinct_models(runs, "retrained")]
    for run in runs:
        for kind, model in run.models.items():
            if model is None:
                notes.number(f"no {kind} model: {run.reasons[f'models.{kind}']}")
    return Comparison((*COLUMNS, TIME), tuple(rows), tuple(notes.reasons))


def _row(
    kind: RowKind,
    label: str,
    meaning: str,
    model: ModelResults,
    notes: Notes,
    *,
    best: frozenset[str] = frozenset(),
    cost: Results | None = None,
) -> Row:
    cells = [_cell(model, column, notes, best=column.path in best) for column in COLUMNS]
    if cost is None:
        cells.append(Cell(""))
    elif cost.cost.train_s is None:
        cells.append(Cell(DASH, notes.number(cost.reasons["cost.train_s"])))
    else:
        cells.append(Cell(duration(cost.cost.train_s)))
    return Row(kind, label, meaning, tuple(cells))


def _cell(model: ModelResults, column: Column, notes: Notes, *, best: bool) -> Cell:
    value = model.value(column.path)
    if value is None:
        return Cell(DASH, notes.number(model.reason(column.path)))
    return Cell(log10_p(value) if column.path == "forget_quality" else fixed(value), best=best)


def _best(runs: Sequence[Results], model: ModelResults) -> frozenset[str]:
    """The columns in which this model wins among the runs: nearest to the retrained model, else furthest in the good direction."""
    models = [run.models["unlearned"] for run in runs]
    rivals = [rival for rival in models if rival is not None]
    references = distinct_models(runs, "retrained")
    if len(rivals) < 2 or len(references) > 1:
        return frozenset()
    won = set()
    for column in COLUMNS:
        losses = [_loss(rival, column, references[0][1] if references else None) for rival in rivals]
        own = _loss(model, column, references[0][1] if references else None)
        known = [round(loss, 3) for loss in losses if loss is not None]
        if own is not None and len(set(known)) > 1 and round(own, 3) == min(known):
            won.add(column.path)
    return frozenset(won)


def _loss(model: ModelResults, column: Column, retrained: ModelResults | None) -> float | None:
    value = model.value(column.path)
    if value is None:
        return None
    wanted = retrained.value(column.path) if retrained and column.path.startswith("forget.") else None
    if wanted is not None:
        return abs(value - wanted)
    if column.direction == "retrained":
        return None
    return value if column.direction == "lower" else -value
