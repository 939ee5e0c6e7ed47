"""A grid's report as Markdown: report.md with its figures, and results.md, the numbers alone as a section for a results log."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from soul.report.grid_content import GridReport
from soul.report.grid_tables import markdown_grid
from soul.report.table import markdown_text
from soul.report.words import ARROW_KEY

PLACES: Final = ("--output", "--cache", "--address", "--wandb")


def grid_markdown(report: GridReport) -> str:
    """report.md."""
    parts = [f"# {markdown_text(report.title)}", *_numbers(report, level=2)]
    parts += [
        f"![{markdown_text(figure.alt)}](figures/{figure.name}.svg)\n\n*{figure.title}.* {figure.caption}" for figure in report.figures
    ]
    parts += ["## Reproduce", f"    {report.command}"] if report.command else []
    return "\n\n".join(parts) + "\n"


def results_section(report: GridReport, heading: str) -> str:
    """results.md: numbers only, no text of the benchmark or of a model, to be pasted as it is."""
    parts = [f"## {markdown_text(heading)}", markdown_text(report.title)]
    parts += [f"`{anywhere(report.command)}`"] if report.command else []
    return "\n\n".join([*parts, *_numbers(report, level=3)]) + "\n"


def anywhere(command: str) -> str:
    """The command without what belongs to one machine or one moment: where its folders lie, and that only the report was rebuilt."""
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        name, has_value, _ = word.partition("=")
        if name in PLACES:
            if not has_value:
                next(words, None)
        elif word not in ("--report", "--no-progress"):
            kept.append(word)
    return shlex.join(kept)


def _numbers(report: GridReport, *, level: int) -> Iterator[str]:
    mark = "#" * level
    yield markdown_text(report.sizes)
    yield "\n".join(f"- {markdown_text(line)}" for line in report.statements)
    yield from (f"{mark} Cells", markdown_text(report.main.caption), markdown_grid(report.main), f"{ARROW_KEY}.")
    if report.differences:
        yield from (f"{mark} At equal forgetting", markdown_text(report.differences.caption), markdown_grid(report.differences))
    for grid in report.paper:
        yield from (f"{mark} {markdown_text(grid.caption)}", markdown_grid(grid))
    if report.notes:
        yield "\n".join(f"- {markdown_text(note)}" for note in report.notes)
    if report.failures:
        yield f"{mark} Trials without a result"
        yield "\n".join(f"- **{markdown_text(what)}**: {markdown_text(why)}" for what, why in report.failures)
