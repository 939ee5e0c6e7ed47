"""A comparison of optimizers as JSON, as Markdown and for the terminal: means, every seed, differences and what survives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich import box
from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from soul.benchmarks.comparison import ComparisonResult, Group
from soul.benchmarks.findings import (
    FORGET_QUALITY,
    METRICS,
    conclusions,
    differences,
    setting,
    statements,
    summaries,
    title,
    value,
    warnings,
)
from soul.benchmarks.paired import Difference, Summary, summary
from soul.benchmarks.selection import RULES
from soul.objectives.methods import TITLES

ON_TERMINAL: Final = (
    "forget.rougeL_recall",
    "retain.rougeL_recall",
    "forget.probability",
    "retain.probability",
    "model_utility",
    FORGET_QUALITY,
)
MARKS: Final = {"keep": "k", "forget": "f"}
DASH: Final = "-"


@dataclass(frozen=True, slots=True)
class Grid:
    """A table before it is printed somewhere; a `part` belongs to the one above it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    part: bool = False


def results_grid(result: ComparisonResult, group: Group, paths: Sequence[str]) -> Grid:
    """Mean ± sd over the seeds, between the target and the retrained model."""

    def model_row(name: str) -> tuple[str, ...]:
        return (name, DASH, *(_number(value(result.models[name], path)) for path in paths), DASH, DASH)

    rows = [model_row("target")]
    for optimizer, found in summaries(group).items():
        cells = group.cells[optimizer]
        reach = summary([cell["telemetry"]["update_norm"] for cell in cells]).mean
        cost = summary([cell["train_s"] for cell in cells]).mean
        rows.append(
            (
                optimizer,
                f"{group.learning_rates[optimizer]:g}",
                *(_mean_sd(found[path]) for path in paths),
                DASH if reach is None else f"{reach:.3g}",
                DASH if cost is None else f"{cost:.1f}",
            )
        )
    rows.append(model_row("retrained"))
    return Grid(title(group), ("model", "lr", *(METRICS[path] for path in paths), "update norm", "train s"), tuple(rows))


def differences_grid(group: Group, baseline: str, paths: Sequence[str]) -> Grid:
    found = differences(group, baseline)
    rows = tuple((METRICS[path], *(difference_text(found[other][path]) for other in found)) for path in paths)
    return Grid(f"{baseline} minus the other, paired by seed", ("metric", *found), rows, part=True)


def seeds_grid(group: Group, seeds: Sequence[int]) -> Grid:
    rows = tuple(
        (optimizer, str(seed), *(_number(found[path].values[place]) for path in METRICS))
        for optimizer, found in summaries(group).items()
        for place, seed in enumerate(seeds)
    )
    return Grid("Every seed", ("optimizer", "seed", *METRICS.values()), rows, part=True)


def search_grid(result: ComparisonResult, method: str) -> Grid:
    settings = result.settings
    rows = []
    for place, rate in enumerate(settings.learning_rates):
        cells = [f"{rate:g}"]
        for optimizer in settings.optimizers:
            search = result.searches[method, optimizer]
            trial = search.trials[place]
            marks = "".join(f" {MARKS[rule]}" for rule, selection in search.selections.items() if selection.learning_rate == rate)
            both = f"{_number(trial.forget_probability)} / {_number(trial.retain_probability)}{marks}"
            cells.append("diverged" if trial.forget_probability is None else both)
        rows.append(tuple(cells))
    key = ", ".join(f"{mark} selected by rule {rule}" for rule, mark in MARKS.items())
    target = f"target {_number(result.bounds.target_forget)} / {_number(result.bounds.target_retain)}"
    name = f"{TITLES[method]}, search: forget / retain probability on the selection half ({target}; {key})"
    return Grid(name, ("lr", *settings.optimizers), tuple(rows))


def difference_text(difference: Difference) -> str:
    if difference.mean is None:
        return DASH
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.3f} (no interval: one pair)"
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] {difference.verdict}"


def _number(number: float | None) -> str:
    return DASH if number is None else f"{number:.2f}"


def _mean_sd(found: Summary) -> str:
    if found.mean is None:
        return DASH
    num_present = sum(one is not None for one in found.values)
    note = f" (n = {num_present})" if num_present < len(found.values) else ""
    return f"{found.mean:.2f}" + ("" if found.sd is None else f" ± {found.sd:.2f}") + note


def grids(result: ComparisonResult, paths: Sequence[str] = tuple(METRICS), *, every_seed: bool = True) -> Iterator[Grid]:
    for method in result.settings.methods:
        yield search_grid(result, method)
        for group in result.groups:
            if group.method == method:
                yield results_grid(result, group, paths)
                yield differences_grid(group, result.settings.baseline, paths)
                if every_seed:
                    yield seeds_grid(group, result.settings.report_seeds)


def markdown(result: ComparisonResult) -> str:
    """comparison.md."""
    parts = ["# First- against second-order optimizers", *setting(result)]
    for heading, lines in (
        ("What survives the search", conclusions(result)),
        ("Comparison by comparison", statements(result)),
        ("Warnings", warnings(result)),
    ):
        listed = "\n".join(f"- {line}" for line in lines)
        parts += [f"## {heading}", listed] if listed else []
    for grid in grids(result):
        lines_of = [grid.head, ("---", *("---:" for _ in grid.head[1:])), *grid.rows]
        parts += [f"{'###' if grid.part else '##'} {grid.title}", "\n".join(f"| {' | '.join(cells)} |" for cells in lines_of)]
    return "\n\n".join(parts) + "\n"


def terminal(result: ComparisonResult) -> RenderableType:
    """For `rich.print`: the main columns, then what survives."""
    shown: list[RenderableType] = []
    for grid in grids(result, ON_TERMINAL, every_seed=False):
        table = Table(*grid.head, title=Text(grid.title), box=box.SIMPLE_HEAD, pad_edge=False)
        for row in grid.rows:
            table.add_row(*map(Text, row))
        shown.append(table)
    return Renderables(*shown, *(Text(f"{line}\n") for line in (*warnings(result), *conclusions(result))))


def to_json(result: ComparisonResult) -> dict[str, Any]:
    """comparison.json."""
    settings = result.settings
    return {
        "schema": 1,
        "benchmark": result.benchmark,
        "settings": settings.model_dump(mode="json"),
        "sizes": dict(result.sizes),
        "max_new_tokens": result.max_new_tokens,
        "longest_answer": result.longest_answer,
        "steps": result.steps,
        "rules": {rule: text.format(floor=settings.retain_floor, ceiling=settings.forget_ceiling) for rule, text in RULES.items()},
        "bounds": asdict(result.bounds),
        "models": {name: dict(entry) for name, entry in result.models.items()},
        "search": {
            method: {optimizer: asdict(result.searches[method, optimizer]) for optimizer in settings.optimizers}
            for method in settings.methods
        },
        "report": [_group_json(group, settings.baseline) for group in result.groups],
        "conclusions": list(conclusions(result)),
        "statements": list(statements(result)),
        "warnings": list(warnings(result)),
    }


def _group_json(group: Group, baseline: str) -> dict[str, Any]:
    return {
        "method": group.method,
        "kinds": list(group.kinds),
        "learning_rates": dict(group.learning_rates),
        "optimizers": {optimizer: {path: asdict(one) for path, one in found.items()} for optimizer, found in summaries(group).items()},
        "differences": {
            other: {path: {**asdict(one), "verdict": one.verdict} for path, one in found.items()}
            for other, found in differences(group, baseline).items()
        },
    }
