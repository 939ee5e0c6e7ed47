"""The comparison as a terminal table and as a Markdown table, with the verdict underneath."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from soul.report.comparison import Cell, Comparison, comparison, run_labels
from soul.report.numbers import SPACE, SUPERSCRIPTS
from soul.report.results import Results
from soul.report.verdict import headline, twin_sentence, verdict
from soul.report.words import ARROW_KEY, ARROWS

TERMINAL_TITLES: Final = {"probability": "prob.", "forget quality, log10 p": "forget quality log10 p"}
ROW_STYLES: Final = {"target": "dim", "unlearned": "bold", "retrained": "dim"}


def terminal_table(runs: Sequence[Results]) -> RenderableType:
    """For `rich.print`: made for 100 columns, wraps its labels below that."""
    compared = comparison(runs)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, title=Text(f"Unlearning on {runs[0].benchmark}"))
    table.add_column("model", overflow="fold", vertical="bottom", min_width=12)
    for previous, column in zip((None, *compared.columns), compared.columns, strict=False):
        group = column.group if previous is None or previous.group != column.group else ""
        heading = [group, *TERMINAL_TITLES.get(column.title, column.title).split(), ARROWS[column.direction]]
        table.add_column(Text("\n".join(heading)), justify="right", vertical="bottom", no_wrap=True)
    for row in compared.rows:
        table.add_row(Text(row.label), *(_terminal_cell(cell) for cell in row.cells), style=ROW_STYLES[row.kind])
    notes = [Text(f"{_superscript(number)} {note}", style="dim") for number, note in enumerate(compared.notes, start=1)]
    lines = [Padding(Text(line.replace(f"{SPACE}%", "%")), (1, 0, 0, 0)) for line in verdict_lines(runs)]  # rich breaks lines at any space
    key = f"{ARROW_KEY}; green: {compared.best_means}" if compared.best_means else ARROW_KEY
    return Group(table, Text(key, style="dim"), *notes, *lines)


def verdict_lines(runs: Sequence[Results]) -> list[str]:
    """What the runs show: a paragraph each, or their outcomes counted where they are many; and the second-order run beside its twin."""
    labels = run_labels(runs)
    verdicts = [verdict(run) for run in runs]
    counted = headline(verdicts)
    if counted is not None:
        lines = [counted]
    elif len(runs) == 1:
        lines = [verdicts[0].text]
    else:
        lines = [f"{label}: {judged.text}" for label, judged in zip(labels, verdicts, strict=True)]
    twin = twin_sentence(labels, runs)
    return [*lines, twin] if twin else lines


def markdown_table(runs: Sequence[Results]) -> str:
    compared = comparison(runs)
    header = ["model", *(f"{column.group}: {column.header}" for column in compared.columns)]
    lines = [markdown_row(header), markdown_row(["---", *("---:" for _ in compared.columns)])]
    lines += [markdown_row([markdown_text(row.label), *(_markdown_cell(cell) for cell in row.cells)]) for row in compared.rows]
    return "\n".join([*lines, "", f"{ARROW_KEY}.{_bold_key(compared)}", *_markdown_notes(compared)]) + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown_text(text: str) -> str:
    """Text that a Markdown reader shows as it is: no markup, no HTML, no cell ends, one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#~" else letter for letter in text)


def _bold_key(compared: Comparison) -> str:
    return f" **Bold**: {compared.best_means}." if compared.best_means else ""


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text.replace("<", "&lt;")
    return text if cell.note is None else f"{text} ({cell.note})"


def _markdown_notes(compared: Comparison) -> list[str]:
    return ["", *(f"({number}) {markdown_text(note)}  " for number, note in enumerate(compared.notes, start=1))] if compared.notes else []


def _terminal_cell(cell: Cell) -> Text:
    text = cell.text if cell.note is None else f"{cell.text}{_superscript(cell.note)}"
    return Text(text, style="green" if cell.best else "")


def _superscript(number: int) -> str:
    return str(number).translate(SUPERSCRIPTS)
