"""report.html: one file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from soul.report.content import Report
from soul.report.figures import Figure
from soul.report.svg import RUNS, THEME, inline
from soul.report.tests_table import TESTS_MEANING
from soul.report.words import ARROW_KEY, ARROW_WORDS, ARROWS, ATTACKS, AUC_MEANING, METRICS, OVERALL

FOLDER: Final = Path(__file__).parent


@cache
def environment() -> Environment:
    return Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def html_page(report: Report) -> str:
    template = environment().get_template("page.html.j2")
    page: str = template.render(
        report=report,
        css=style_sheet(),
        figures=inlined(report.figures),
        telemetry=inlined(report.telemetry),
        words=[*METRICS.values(), *OVERALL.values(), *ATTACKS.values()],
        arrow_key=ARROW_KEY,
        arrows=ARROWS,
        arrow_words=ARROW_WORDS,
        tests_meaning=TESTS_MEANING,
        auc_meaning=AUC_MEANING,
        best_means=report.comparison.best_means,
        num_colours=len(RUNS),
    )
    return page.rstrip() + "\n"


def inlined(figures: Sequence[Figure]) -> list[tuple[Figure, Markup]]:
    """Safe to mark as markup: matplotlib escapes the text it draws, and `inline` escapes the alternative text."""
    return [(figure, Markup(inline(figure.svg, figure.alt))) for figure in figures]


def style_sheet() -> Markup:
    """The style sheet with the figures' colours, which must be the same in both."""
    text = (FOLDER / "page.css").read_text(encoding="utf-8")
    for position, theme in enumerate(("light", "dark")):
        colours = " ".join(f"--{name}: {pair[position]};" for name, pair in THEME.items())
        text = text.replace(f"{{{{ {theme} }}}}", colours)
    runs = " ".join(f".verdict.run{number} {{ --run: var(--run{number}); }}" for number in range(1, len(RUNS) + 1))
    return Markup(text.replace("{{ runs }}", runs))
