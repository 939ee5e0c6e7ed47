"""report.md: the report for a terminal, a pull request or a wiki, with its figures as files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from soul.report.content import Report
from soul.report.figures import Figure
from soul.report.grid_type import Grid
from soul.report.results import Results
from soul.report.table import markdown_row, markdown_table, markdown_text
from soul.report.tests_table import TESTS_MEANING
from soul.report.words import ATTACKS, AUC_MEANING, METRICS, OVERALL


def markdown_report(report: Report, runs: Sequence[Results], figures: str) -> str:
    """`figures` is the folder of the figures, relative to the report."""
    parts = [f"# Unlearning report: {markdown_text(report.benchmark)}", f"Rows: {markdown_text(report.sizes)}"]
    parts += [markdown_text(report.headline)] if report.headline else []
    for judged in report.judged:
        parts += [f"**{markdown_text(judged.label)}: {judged.verdict.badge}.** {markdown_text(judged.verdict.text)}"]
    parts += [markdown_text(report.twin)] if report.twin else []
    parts += ["## Before and after", markdown_table(runs).rstrip()]
    parts += _figures("Forgetting and keeping", report.figures, figures)
    parts += ["## Removal tests", TESTS_MEANING, _grid(report.tests)] if report.tests else []
    parts += ["## Membership attacks", AUC_MEANING]
    parts += [_grid(report.attacks) if report.attacks else "None was run; the reasons are under missing values."]
    parts += _figures("What the optimizer did", report.telemetry, figures)
    parts += ["## Cost", _grid(report.cost), "## Settings", _grid(report.settings)]
    parts += ["## Versions", _grid(report.versions)] if report.versions else []
    words = [*METRICS.values(), *OVERALL.values(), *ATTACKS.values()]
    parts += ["## All metrics", _grid(report.details), "\n".join(f"- **{word.title}**: {word.meaning}" for word in words)]
    parts += ["## Reproduce", *(f"    {' '.join(command.split())}" for command in report.commands)]
    parts += [] if report.commands else ["The run directory holds neither a recorded command nor a configuration."]
    missing = [f"- **{markdown_text(what)}**: {markdown_text(why)}" for what, why in report.missing]
    parts += ["## Missing values", "\n".join(missing) or "Nothing is missing."]
    return "\n\n".join(parts) + "\n"


def _figures(title: str, figures: Sequence[Figure], folder: str) -> list[str]:
    shown = [f"![{markdown_text(figure.alt)}]({folder}/{figure.name}.svg)\n\n*{figure.title}.* {figure.caption}" for figure in figures]
    return [f"## {title}", *shown] if shown else []


def _grid(grid: Grid) -> str:
    lines = [markdown_row([markdown_text(title) for title in grid.head]), markdown_row(["---", *("---:" for _ in grid.head[1:])])]
    return "\n".join([*lines, *(markdown_row([markdown_text(cell) for cell in row]) for row in grid.rows)])
