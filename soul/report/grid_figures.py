"""The figures of a grid: every choice's forgetting against keeping with each optimizer's front, and Figure 2's curves over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Final

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from soul.benchmarks.aggregate import CHEAP_METRIC, Row, Table, front_of
from soul.benchmarks.fronts import Point
from soul.report.figures import Figure, legend_above, share_axis
from soul.report.grid_paper import paper_name
from soul.report.numbers import percent
from soul.report.svg import INK, MUTED, new_figure, run_colour, run_marker, styled, to_svg
from soul.report.words import METHODS, METRICS, run_title

DASHES: Final = ((0, (4, 1.6)), "-")  # of a method's first and second optimizer


def grid_figures(table: Table) -> list[Figure]:
    """One trade-off figure per model and method, then the curves of forget and retain rows per model."""
    found: list[Figure | None] = []
    for number, model in enumerate(table.models):
        rows = [row for row in table.rows if row.cell.model == model and row.selected]
        suffix = "" if len(table.models) == 1 else f"-{number}"
        for method in dict.fromkeys(row.cell.method for row in rows):
            found.append(_trade_off([row for row in rows if row.cell.method == method], table, model, f"front-{method}{suffix}"))
        for words, ending, some in _readable(rows):
            found += [
                _curves(some, split, f"{words}{_place(table, model)}", f"epochs-{split}{ending}{suffix}") for split in ("forget", "retain")
            ]
    return [figure for figure in found if figure is not None]


def _place(table: Table, model: str) -> str:
    return "" if len(table.models) == 1 else f", {model}"


def _readable(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """(words of a title, end of a file name, rows): all curves in one figure, or a figure per method where they would be too many."""
    if len({row.cell.optimizer for row in rows}) <= len(DASHES):
        return [("", "", list(rows))]
    methods = dict.fromkeys(row.cell.method for row in rows)
    return [(f", {METHODS[method]}", f"-{method}", [row for row in rows if row.cell.method == method]) for method in methods]


def _trade_off(rows: Sequence[Row], table: Table, model: str, name: str) -> Figure | None:
    forget, retain = f"forget.{table.metric}", f"retain.{table.metric}"
    target = table.reference(model, "target")
    word = METRICS[table.metric].title
    told, heights = [], [target.get(retain, 1.0)]
    with styled():
        canvas = new_figure(height=3.9)
        axes = canvas.add_subplot()
        if forget in target and retain in target:
            axes.plot(target[forget], target[retain], "s", ms=8, color=INK[0], label="target", ls="none", zorder=4)
        for position, row in enumerate(rows):
            colour, marker = run_colour(position), run_marker(position)
            for seed in sorted({outcome.trial.seed for outcome in row.outcomes}):
                front = front_of(row, seed, table.metric)
                axes.plot([x for x, _ in front], [y for _, y in front], "-", lw=1, alpha=0.6, color=colour, zorder=2, label="_")
            tried = [_point(o.values, forget, retain) for o in row.outcomes if o.state == "done"]
            _dots(axes, [point for point in tried if point], colour, marker, size=4, alpha=0.35, label="_")
            chosen = [point for outcome in row.selected if (point := _point(outcome.values, forget, retain))]
            if not chosen:
                continue
            _dots(axes, chosen, colour, marker, size=9, alpha=0.95, label=row.cell.optimizer)
            heights += [y for _, y in chosen]
            told.append(f"{row.cell.optimizer}: {percent(fmean(x for x, _ in chosen))} left, {percent(fmean(y for _, y in chosen))} kept")
        if not told:
            return None
        axes.axhline(table.floor * target.get(retain, 1.0), color=MUTED[0], lw=1, ls=(0, (5, 2)), label="_")
        axes.set_xlabel(f"forget rows left ({word})")
        axes.set_ylabel(f"retain rows kept ({word})")
        share_axis(axes.xaxis, lowest=0)
        share_axis(axes.yaxis, lowest=min(heights))
        legend_above(canvas, axes.lines)
        svg = to_svg(canvas, name)
    caption = (
        "Large marks are the selected choices, one per seed; small ones every other choice; lines each seed's front from the target on. "
        "Dashed: the floor."
    )
    title = f"{METHODS[rows[0].cell.method]}{_place(table, model)}"
    return Figure(name, title, caption, f"{title}: forget left against retain kept, means of the selected runs", tuple(told), svg)


def _point(values: object, forget: str, retain: str) -> Point | None:
    assert isinstance(values, dict)
    return (values[forget], values[retain]) if forget in values and retain in values else None


def _dots(axes: object, points: Sequence[Point], colour: str, marker: str, *, size: int, alpha: float, label: str) -> list[Line2D]:
    plot = getattr(axes, "plot")  # noqa: B009 - matplotlib's axes have no useful type here
    drawn: list[Line2D] = plot(
        [x for x, _ in points], [y for _, y in points], marker, ms=size, color=colour, alpha=alpha, ls="none", zorder=5, label=label
    )
    return drawn


def _curves(rows: Sequence[Row], split: str, place: str, name: str) -> Figure | None:
    """The paper's Figure 2: a score per epoch, mean over the seeds of the selected choice."""
    word = METRICS[CHEAP_METRIC].title
    methods, optimizers = ([*dict.fromkeys(getattr(row.cell, name) for row in rows)] for name in ("method", "optimizer"))
    with styled():
        canvas = new_figure()
        axes = canvas.add_subplot()
        told, heights = [], []
        for row in rows:
            points = _mean_curve(row, split)
            if not points:
                continue
            look = methods.index(row.cell.method) if len(methods) > 1 else optimizers.index(row.cell.optimizer)
            dash = DASHES[optimizers.index(row.cell.optimizer)] if len(methods) > 1 else "-"
            label = run_title(row.cell.method, row.cell.optimizer)
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                ls=dash,
                marker=run_marker(look),
                ms=5,
                color=run_colour(look),
                label=_short(row, rows),
            )
            told.append(f"{label} from {percent(points[0][1])} to {percent(points[-1][1])}")
            heights += [y for _, y in points]
        if not told:
            return None
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_ylabel(f"{word}\n({'lower' if split == 'forget' else 'higher'} is better)")
        share_axis(axes.yaxis, lowest=min(heights))
        legend_above(canvas, axes.lines)
        svg = to_svg(canvas, name)
    title = f"{'Forget' if split == 'forget' else 'Retain'} rows per epoch{place}"
    curve = f"{word.capitalize()} after each epoch, mean over the seeds of the selected choice."
    caption = f"{curve} The paper's Figure 2 shows accuracy, without numbers."
    return Figure(name, title, caption, f"{word}, {title.lower()}", tuple(told), svg)


def _short(row: Row, rows: Sequence[Row]) -> str:
    """The paper's "SO-NPO" where that names one row of the figure, else with the optimizer."""
    namesakes = [other for other in rows if paper_name(other) == paper_name(row)]
    return paper_name(row) if len(namesakes) == 1 else run_title(row.cell.method, row.cell.optimizer)


def _mean_curve(row: Row, split: str) -> list[tuple[float, float]]:
    found: dict[float, list[float]] = {}
    for outcome in row.selected:
        for epoch in outcome.epochs:
            value = epoch[split].get(CHEAP_METRIC)
            if value is not None:
                found.setdefault(epoch["epoch"], []).append(value)
    return [(epoch, fmean(values)) for epoch, values in sorted(found.items())]
