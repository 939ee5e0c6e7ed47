"""From the trials of a grid to its report: report.html, report.md, results.md, grid.csv, grid.tex and the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table as Terminal
from rich.text import Text

from soul.benchmarks.aggregate import Table, tabulate
from soul.benchmarks.grid import Trial
from soul.benchmarks.outcomes import Outcome, fetch_trials, read_outcome, trial_folder
from soul.records import InputError
from soul.report.grid_content import GridReport, compose_grid
from soul.report.grid_markdown import grid_markdown, results_section
from soul.report.grid_statements import statements
from soul.report.grid_tables import cell_title, latex_grid, settings_of, shown_columns, sort_key, spread, trials_csv, trials_of
from soul.report.page import environment, inlined, style_sheet
from soul.report.svg import standalone
from soul.report.words import ARROW_KEY
from soul.rundir import write_atomically
from soul.store import place_of

TERMINAL_COLUMNS = 4
LATEX_HEAD = "% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n"


def read_outcomes(trials: Sequence[Trial], output: Path) -> list[Outcome]:
    """Every trial's, in order; of a grid on a store as it is there now. Rows are halved where a cell has choices to select from."""
    fetch_trials(trials, output)
    choices: dict[object, set[str]] = {}
    for trial in trials:
        choices.setdefault(trial.cell, set()).add(trial.choice.key)
    halved = any(len(keys) > 1 for keys in choices.values())
    return [read_outcome(trial, output, halved=halved) for trial in trials]


def build_grid_report(
    trials: Sequence[Trial], output: Path, *, floor: float, samples: bool, command: str | None = None, heading: str | None = None
) -> Table:
    """Write the report into `output`. `samples`: quote one generated answer per method, where the runs were allowed to keep some.

    `heading`: what results.md is called (None: the report's title).

    Raises:
        InputError: no trial has finished yet, or what ran there had other rows.
    """
    outcomes = read_outcomes(trials, output)
    done = [outcome for outcome in outcomes if outcome.state == "done"]
    if not done:
        reasons = "; ".join(dict.fromkeys(outcome.reason for outcome in outcomes))
        raise InputError(f"{place_of(output)} holds no finished trial to report on ({reasons}). Run the grid first.")
    if len({(outcome.benchmark, tuple(sorted(outcome.sizes.items()))) for outcome in done}) > 1:
        raise InputError(
            f"the trials in {place_of(output)} had different benchmarks or numbers of rows. Give each grid a folder of its own."
        )
    table = tabulate(outcomes, floor=floor)
    report = compose_grid(table, outcomes, samples=_samples(table, output) if samples else (), command=command)
    for figure in report.figures:
        write_atomically(output / "figures" / f"{figure.name}.svg", standalone(figure.svg, figure.alt))
    write_atomically(output / "grid.csv", trials_csv(table))
    latex = [LATEX_HEAD, latex_grid(report.main, label="tab:grid")]
    latex += [latex_grid(report.differences, label="tab:differences")] if report.differences else []
    latex += [latex_grid(grid, label=f"tab:paper-{number}") for number, grid in enumerate(report.paper, start=1)]
    write_atomically(output / "grid.tex", "\n".join(latex))
    write_atomically(output / "report.md", grid_markdown(report))
    write_atomically(output / "results.md", results_section(report, heading or report.title))
    write_atomically(output / "report.html", _page(report))
    return table


def _page(report: GridReport) -> str:
    template = environment().get_template("grid.html.j2")
    page: str = template.render(report=report, css=style_sheet(), figures=inlined(report.figures), arrow_key=ARROW_KEY, sort_key=sort_key)
    return page.rstrip() + "\n"


def _samples(table: Table, output: Path) -> tuple[tuple[str, str], ...]:
    """The first forget question, its true answer and what a selected run of every cell answers, where runs have written samples."""
    found: list[tuple[str, str]] = []
    for row in table.rows:
        for outcome in row.selected[:1]:
            path = trial_folder(outcome.trial, output) / "samples.jsonl"
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
