"""What a grid's report says, before it is written as a page, Markdown, CSV or LaTeX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from soul.benchmarks.aggregate import Table
from soul.benchmarks.outcomes import Outcome
from soul.report.content import Grid
from soul.report.figures import Figure
from soul.report.grid_figures import grid_figures
from soul.report.grid_paper import COST_NOTES, NOTES, is_paper_shaped, our_table_6, own_table_2, table_2
from soul.report.grid_statements import statements
from soul.report.grid_tables import LISTED, differences_grid, failures, main_grid
from soul.report.numbers import duration


@dataclass(frozen=True, slots=True)
class GridReport:
    title: str
    sizes: str
    statements: tuple[str, ...]
    main: Grid
    differences: Grid | None
    figures: tuple[Figure, ...]
    paper: tuple[Grid, ...]
    notes: tuple[str, ...]
    failures: tuple[tuple[str, str], ...]
    samples: tuple[tuple[str, str], ...]
    command: str | None


def compose_grid(table: Table, outcomes: Sequence[Outcome], *, samples: tuple[tuple[str, str], ...], command: str | None) -> GridReport:
    done = next(outcome for outcome in outcomes if outcome.state == "done")
    paper: list[Grid] = []
    if is_paper_shaped(table):
        paper = [make(table, model) for model in table.models for make in (table_2, own_table_2, our_table_6)]
    return GridReport(
        title=f"{done.benchmark}: {len(table.rows)} cells, {len(outcomes)} trials",
        sizes=f"Rows: {', '.join(f'{split} {size:,}' for split, size in done.sizes.items())}. {' '.join(_search(table, outcomes))}",
        statements=tuple(statements(table)),
        main=main_grid(table),
        differences=differences_grid(table),
        figures=tuple(grid_figures(table)),
        paper=tuple(paper),
        notes=(*NOTES, *COST_NOTES) if paper else (),
        failures=tuple(failures(table)),
        samples=samples,
        command=command,
    )


def _search(table: Table, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What was tried, and what all of it cost."""
    if table.halved:
        tried: dict[str, set[float | str]] = {}
        for outcome in outcomes:
            for name, value in outcome.trial.choice.settings.items():
                tried.setdefault(name, set()).add(value)
        counts = " or ".join(map(str, sorted({row.num_choices for row in table.rows})))
        yield f"{counts} choices per cell and seed: {'; '.join(_range(name, found) for name, found in tried.items())}."
    yield f"Training and evaluation of all trials: {duration(sum(row.seconds for row in table.rows))}."


def _range(name: str, found: set[float | str]) -> str:
    numbers = sorted(value for value in found if not isinstance(value, str))
    if len(found) <= LISTED or len(numbers) < len(found):
        return f"{name} {', '.join(f'{value:.3g}' if isinstance(value, float) else str(value) for value in sorted(found, key=str))}"
    return f"{name} {numbers[0]:.3g} to {numbers[-1]:.3g} ({len(found)} values)"
