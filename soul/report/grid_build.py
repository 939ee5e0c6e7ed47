"""From the trials of a grid to its report: report.html, report.md, grid.csv, grid.tex and the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table as Terminal
from rich.text import Text

from soul.benchmarks.aggregate import Table, tabulate
from soul.benchmarks.grid import Trial
from soul.benchmarks.outcomes import Outcome, read_outcome
from soul.records import InputError
from soul.report.content import Grid
from soul.report.figures import Figure
from soul.report.grid_figures import grid_figures
from soul.report.grid_paper import COST_NOTES, NOTES, is_paper_shaped, our_table_2, our_table_6, paper_table_2
from soul.report.grid_statements import statements
from soul.report.grid_tables import (
    cell_title,
    differences_grid,
    failures,
    latex_grid,
    main_grid,
    markdown_grid,
    settings_of,
    shown_columns,
    sort_key,
    spread,
    trials_csv,
    trials_of,
)
from soul.report.page import environment, inlined, style_sheet
from soul.report.svg import standalone
from soul.report.table import markdown_text
from soul.report.words import ARROW_KEY
from soul.rundir import RunDir, write_atomically

TERMINAL_COLUMNS = 4


@dataclass(frozen=True, slots=True)
class GridReport:
    """What the page says."""

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


def read_outcomes(trials: Sequence[Trial], output: Path) -> list[Outcome]:
    """Every trial's, in order. Rows are halved where a cell has choices to select from."""
    choices: dict[object, set[str]] = {}
    for trial in trials:
        choices.setdefault(trial.cell, set()).add(trial.choice.key)
    halved = any(len(keys) > 1 for keys in choices.values())
    return [read_outcome(trial, output, halved=halved) for trial in trials]


def build_grid_report(trials: Sequence[Trial], output: Path, *, floor: float, samples: bool, command: str | None = None) -> Table:
    """Write the report into `output`. `samples`: quote one generated answer per method, where the runs were allowed to keep some.

    Raises:
        InputError: no trial has finished yet, or what ran there had other rows.
    """
    outcomes = read_outcomes(trials, output)
    done = [outcome for outcome in outcomes if outcome.state == "done"]
    if not done:
        reasons = "; ".join(dict.fromkeys(outcome.reason for outcome in outcomes))
        raise InputError(f"{output} holds no finished trial to report on ({reasons}). Run the grid first.")
    if len({(outcome.benchmark, tuple(sorted(outcome.sizes.items()))) for outcome in done}) > 1:
        raise InputError(f"the trials in {output} had different benchmarks or numbers of rows. Give each grid a folder of its own.")
    table = tabulate(outcomes, floor=floor)
    report = compose_grid(table, outcomes, samples=_samples(table, output) if samples else (), command=command)
    for figure in report.figures:
        write_atomically(output / "figures" / f"{figure.name}.svg", standalone(figure.svg, figure.alt))
    write_atomically(output / "grid.csv", trials_csv(table))
    latex = [latex_grid(report.main, label="tab:grid")]
    latex += [latex_grid(grid, label=f"tab:paper-{number}") for number, grid in enumerate(report.paper, start=1)]
    write_atomically(output / "grid.tex", "\n".join(latex))
    write_atomically(output / "report.md", _markdown(report))
    write_atomically(output / "report.html", _page(report))
    return table


def compose_grid(table: Table, outcomes: Sequence[Outcome], *, samples: tuple[tuple[str, str], ...], command: str | None) -> GridReport:
    done = next(outcome for outcome in outcomes if outcome.state == "done")
    paper: list[Grid] = []
    if is_paper_shaped(table):
        paper = [our_table_2(table, model) for model in table.models] + [paper_table_2()]
        paper += [our_table_6(table, model) for model in table.models]
    return GridReport(
        title=f"{done.benchmark}: {len(table.rows)} cells, {len(outcomes)} trials",
        sizes="Rows: " + ", ".join(f"{split} {size:,}" for split, size in done.sizes.items()),
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


def _page(report: GridReport) -> str:
    template = environment().get_template("grid.html.j2")
    page: str = template.render(report=report, css=style_sheet(), figures=inlined(report.figures), arrow_key=ARROW_KEY, sort_key=sort_key)
    return page.rstrip() + "\n"


def _markdown(report: GridReport) -> str:
    parts = [
        f"# {markdown_text(report.title)}",
        markdown_text(report.sizes),
        "\n".join(f"- {markdown_text(line)}" for line in report.statements),
    ]
    parts += ["## Cells", markdown_text(report.main.caption), markdown_grid(report.main), f"{ARROW_KEY}."]
    if report.differences:
        parts += ["## At equal forgetting", report.differences.caption, markdown_grid(report.differences)]
    parts += [
        f"![{markdown_text(figure.alt)}](figures/{figure.name}.svg)\n\n*{figure.title}.* {figure.caption}" for figure in report.figures
    ]
    for grid in report.paper:
        parts += [f"## {markdown_text(grid.caption)}", markdown_grid(grid)]
    parts += ["\n".join(f"- {markdown_text(note)}" for note in report.notes)] if report.notes else []
    if report.failures:
        parts += [
            "## Trials without a result",
            "\n".join(f"- **{markdown_text(what)}**: {markdown_text(why)}" for what, why in report.failures),
        ]
    parts += ["## Reproduce", f"    {report.command}"] if report.command else []
    return "\n\n".join(parts) + "\n"


def _samples(table: Table, output: Path) -> tuple[tuple[str, str], ...]:
    """The first forget question, its true answer and what a selected run of every cell answers, where runs have written samples."""
    found: list[tuple[str, str]] = []
    for row in table.rows:
        for outcome in row.selected[:1]:
            path = RunDir(output / "trials" / outcome.trial.id).path / "samples.jsonl"
            if not path.is_file():
                continue
            sample = next((line for line in map(json.loads, path.read_text().splitlines()) if line["split"] == "forget"), None)
            if sample is None:
                continue
            if not found:
                found += [("question", sample["prompt"]), ("true answer", sample["response"])]
            found.append((cell_title(row, table), sample["generated"] or "(nothing)"))
    return tuple(found)


def show_grid(table: Table) -> None:
    """The main numbers on stdout: forget and retain scores, trials and settings."""
    terminal = Terminal(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    columns = shown_columns(table)[:TERMINAL_COLUMNS]
    for title in ("cell", *(column.header for column in columns), "seeds", "trials", "settings"):
        terminal.add_column(Text(title), overflow="fold")
    for row in table.rows:
        terminal.add_row(
            Text(cell_title(row, table) + ("" if row.qualifies or not row.selected else " *")),
            *(Text(spread(row, column).partition(" [")[0]) for column in columns),
            Text(str(len(row.selected))),
            Text(trials_of(row)),
            Text(settings_of(row)),
        )
    lines = [Padding(Text(line), (1, 0, 0, 0)) for line in statements(table)]
    Console(width=None if Console().is_terminal else 140).print(Group(terminal, Text(ARROW_KEY, style="dim"), *lines))
