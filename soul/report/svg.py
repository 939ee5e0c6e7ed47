"""matplotlib figures as SVG text that is the same on every build, follows the page's colours and can share a page with others."""

from __future__ import annotations

import html
import io
import re
from contextlib import AbstractContextManager
from typing import Any, Final

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Colours for light and dark backgrounds, apart for every common form of colour blindness and >= 3:1 against the background.
INK: Final = ("#1f2328", "#e6e8eb")
MUTED: Final = ("#6a737d", "#9aa4af")
GRID: Final = ("#d9dee3", "#333a42")
RUNS: Final = (
    ("#0072b2", "#56b4e9"),
    ("#c84e00", "#ff9d5c"),
    ("#00805e", "#3fcf9f"),
    ("#a6487f", "#e79bc8"),
    ("#8a6d00", "#e6c229"),
    ("#5b50b5", "#a9a1ff"),
)
MARKERS: Final = ("o", "D", "^", "v", "P", "X")
THEME: Final = {"ink": INK, "muted": MUTED, "grid": GRID, **{f"run{number}": pair for number, pair in enumerate(RUNS, start=1)}}

STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "soul",
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED[0],
    "axes.labelcolor": INK[0],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "grid.color": GRID[0],
    "grid.linewidth": 0.7,
    "figure.facecolor": "none",
    "text.color": INK[0],
    "xtick.color": MUTED[0],
    "ytick.color": MUTED[0],
    "xtick.labelcolor": INK[0],
    "ytick.labelcolor": INK[0],
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 2.4,
    "text.parse_math": False,
}


def run_colour(position: int) -> str:
    return RUNS[position % len(RUNS)][0]


def run_marker(position: int) -> str:
    """Shifted with every round of the colours, so that colour and marker together name a run."""
    return MARKERS[(position + position // len(RUNS)) % len(MARKERS)]


def styled() -> AbstractContextManager[None]:
    """Our style on top of matplotlib's defaults, so that nobody's matplotlibrc changes a report."""
    return style.context(STYLE, after_reset=True)


def new_figure(width: float = 4.7, height: float = 3.4) -> Figure:
    """In inches, without pyplot and its global state. 4.7 wide stays readable at the width of a phone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_svg(figure: Figure, name: str) -> str:
    """The <svg> element alone. `name` makes its ids unique within a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return svg.replace("url(#", f"url(#{name}-")


def inline(svg: str, alt: str) -> str:
    """For an HTML page: scales with its column, takes its colours and fonts from the page. `alt` is plain text."""
    for name, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{name})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', lambda _: f'<svg role="img" aria-label="{html.escape(alt)}"', svg, count=1)


def standalone(svg: str, alt: str) -> str:
    """For a file of its own, on white paper. `alt` is plain text."""
    opening = svg.index(">") + 1
    head = svg[:opening].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" style="background: #ffffff"', 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}\n <title>{html.escape(alt)}</title>{svg[opening:]}\n'
