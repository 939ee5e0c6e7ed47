"""From run directories to report.html, report.md, figures and model cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soul.records import InputError
from soul.report.card import model_card
from soul.report.content import compose
from soul.report.markdown import markdown_report
from soul.report.page import html_page
from soul.report.runs import load_run
from soul.report.svg import standalone
from soul.rundir import RunDir, write_atomically


@dataclass(frozen=True, slots=True)
class ReportFiles:
    html: Path
    markdown: Path
    figures: tuple[Path, ...]
    cards: tuple[Path, ...]


def build_report(run_dirs: Sequence[Path], output: Path | None = None) -> ReportFiles:
    """Write the report of one run, or of several side by side, and the card of every exported model.

    `output` is a folder; without it one run's report goes into its run directory, and that of several into "report" beside the first.

    Raises:
        InputError: no run directory, one without a valid results.json, or runs that cannot be compared.
    """
    if not run_dirs:
        raise InputError("expected at least one run directory, got none. Name a folder that holds results.json.")
    folders = list(dict.fromkeys(Path(folder) for folder in run_dirs))
    runs = [load_run(folder) for folder in folders]
    if output is None:
        output = folders[0] if len(folders) == 1 else folders[0].parent / "report"
    report = compose(runs)
    figures = []
    for figure in (*report.figures, *report.telemetry):
        figures.append(output / "figures" / f"{figure.name}.svg")
        write_atomically(figures[-1], standalone(figure.svg, figure.alt))
    cards = []
    for folder, run in zip(folders, runs, strict=True):
        if RunDir(folder).model.is_dir():
            cards.append(RunDir(folder).model / "README.md")
            write_atomically(cards[-1], model_card(run))
    files = ReportFiles(output / "report.html", output / "report.md", tuple(figures), tuple(cards))
    write_atomically(files.markdown, markdown_report(report, [run.results for run in runs], "figures"))
    write_atomically(files.html, html_page(report))
    return files
