"""The figures of a report: forgetting and keeping per epoch, the trade-off between them, and what the optimizer did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from soul.report.comparison import distinct_models, run_labels
from soul.report.numbers import compact, percent
from soul.report.results import ModelResults, Results
from soul.report.steps import Steps
from soul.report.svg import INK, MUTED, RUNS, new_figure, run_colour, run_marker, styled, to_svg
from soul.report.words import METRICS

CURVE_METRICS: Final = ("rougeL_recall", "exact_memorization", "probability")
TERM_STYLES: Final = ("-", (0, (4, 1.6)), (0, (1, 1.4)), (0, (5, 1.4, 1, 1.4)))
LEGEND_ROW: Final = 0.17  # inches
REFERENCES: Final = {"target": ("s", (0, (1, 1.6))), "retrained": ("*", (0, (5, 2)))}


@dataclass(frozen=True, slots=True)
class Figure:
    """`svg` is the bare element; `readings` say in words what it shows, one curve or point each."""

    name: str
    title: str
    caption: str
    subject: str
    readings: tuple[str, ...]
    svg: str

    @property
    def alt(self) -> str:
        return f"{self.subject}: {'; '.join(self.readings)}."


def outcome_figures(runs: Sequence[Results]) -> list[Figure]:
    """The trade-off plot, then forget and retain curves where epochs were evaluated."""
    figures = [_trade_off(runs), _curves(runs, "forget"), _curves(runs, "retain")]
    return [figure for figure in figures if figure is not None]


def telemetry_figures(runs: Sequence[Results], steps: Sequence[Steps]) -> list[Figure]:
    """One panel per quantity that any run recorded."""
    panels = [
        _telemetry(runs, steps, "loss-terms", "Loss terms", "mean loss per term (nats)", None),
        _telemetry(runs, steps, "gradient-norm", "Gradient norm, before clipping", "global gradient norm", "grad_norm"),
        _telemetry(runs, steps, "update-norm", "Update norm", "length of the step", "update_norm"),
        _telemetry(runs, steps, "unclipped-fraction", "Unclipped fraction", "share of coordinates", "unclipped_fraction"),
        _telemetry(runs, steps, "rho", "Clipping threshold", "rho", "rho")
        if any(len(set(run.curve("rho").values)) > 1 for run in steps)
        else None,
        _telemetry(runs, steps, "learning-rate", "Learning rate", "learning rate", "learning_rate"),
    ]
    return [panel for panel in panels if panel is not None]


CAPTIONS: Final = {
    "loss-terms": "The parts of the objective, before weighting.",
    "gradient-norm": "A norm far above the clipping threshold means that every step is a clipped one.",
    "update-norm": "How far a step moves the weights: at equal learning rates, optimizers differ here first.",
    "unclipped-fraction": "Near 0 a step is sign descent, whatever the optimizer's name; Sophia's advice is the shaded 0.1 to 0.5.",
    "rho": "What the controller of rho = auto chose to hold the unclipped fraction in its band.",
    "learning-rate": "The schedule as it was applied.",
}


def _trade_off(runs: Sequence[Results]) -> Figure | None:
    with styled():
        canvas = new_figure(height=3.9)
        axes = canvas.add_subplot()
        told, heights = [], []
        for kind in ("target", "retrained"):
            for label, model in distinct_models(runs, kind):
                point = _pair(model)
                if point is None:
                    continue
                marker = REFERENCES[kind][0]
                axes.plot(*point, marker, ms=13 if marker == "*" else 8, color=INK[0], label=label, ls="none", zorder=4)
                told.append(f"{label}: {percent(point[0])} reproduced, {percent(point[1])} kept")
                heights.append(point[1])
        for position, (label, run) in enumerate(zip(run_labels(runs), runs, strict=True)):
            end = _pair(run.models["unlearned"])
            if end is None:
                continue
            kept = dict(_points(run, "retain", "rougeL_recall"))
            trail = [(left, kept[epoch]) for epoch, left in _points(run, "forget", "rougeL_recall") if epoch in kept]
            points = [*trail, end]
            colour = run_colour(position)
            axes.plot(
                [x for x, _ in points], [y for _, y in points], "-", color=colour, lw=1, alpha=0.55, marker=".", ms=4, zorder=2, label="_"
            )
            axes.plot(*end, run_marker(position), ms=9, color=colour, label=label, ls="none", zorder=5)
            told.append(f"{label}: {percent(end[0])} reproduced, {percent(end[1])} kept")
            heights += [y for _, y in points]
        if not told:
            return None
        axes.set_xlabel("forget rows still reproduced (ROUGE-L)")
        axes.set_ylabel("retain rows kept (ROUGE-L)")
        share_axis(axes.xaxis, lowest=0)
        share_axis(axes.yaxis, lowest=min(heights))
        legend_above(canvas, axes.lines)
        svg = to_svg(canvas, "trade-off")
    caption = "Top left is the goal: the forget rows gone, the rest kept. Thin lines are the way there, one dot per evaluated epoch."
    subject = "Share of forget rows reproduced against share of retain rows kept"
    return Figure("trade-off", "Forgetting against keeping", caption, subject, tuple(told), svg)


def _curves(runs: Sequence[Results], split: str) -> Figure | None:
    metric = next((name for name in CURVE_METRICS if any(_points(run, split, name) for run in runs)), None)
    if metric is None:
        return None
    title = "Forget rows" if split == "forget" else "Retain rows"
    path = f"{split}.{metric}"
    with styled():
        canvas = new_figure()
        axes = canvas.add_subplot()
        told, heights = [], []
        for kind in ("target", "retrained"):
            for label, model in distinct_models(runs, kind):
                value = model.value(path)
                if value is not None:
                    axes.axhline(value, color=MUTED[0], lw=1.3, ls=REFERENCES[kind][1], label=label, zorder=1)
                    told.append(f"{label} {percent(value)}")
                    heights.append(value)
        for position, (label, run) in enumerate(zip(run_labels(runs), runs, strict=True)):
            points = _points(run, split, metric)
            if points:
                marker = run_marker(position)
                axes.plot([x for x, _ in points], [y for _, y in points], "-", marker=marker, ms=5, color=run_colour(position), label=label)
                told.append(f"{label} from {percent(points[0][1])} to {percent(points[-1][1])}")
                heights += [y for _, y in points]
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_ylabel(f"{METRICS[metric].title} ({'lower' if split == 'forget' else 'higher'} is better)")
        share_axis(axes.yaxis, lowest=min(heights))
        legend_above(canvas, axes.lines)
        svg = to_svg(canvas, f"{split}-curve")
    word = METRICS[metric].title
    caption = f"{word} on the {split} rows after each epoch of unlearning."
    return Figure(f"{split}-curve", f"{title} per epoch", caption, f"{word} on {title.lower()} per epoch", tuple(told), svg)


def _pair(model: ModelResults | None) -> tuple[float, float] | None:
    """ROUGE-L on forget and on retain rows; None unless both are known."""
    forget, retain = (model.value(f"{split}.rougeL_recall") if model else None for split in ("forget", "retain"))
    return None if forget is None or retain is None else (forget, retain)


def _points(run: Results, split: str, metric: str) -> list[tuple[float, float]]:
    """(epoch, value) where the metric was measured."""
    rows = [(row.epoch, (row.forget if split == "forget" else row.retain).get(metric)) for row in run.epochs]
    return [(epoch, value) for epoch, value in rows if value is not None]


def _telemetry(runs: Sequence[Results], steps: Sequence[Steps], name: str, title: str, ylabel: str, key: str | None) -> Figure | None:
    keys = [key] if key else sorted({term for run in steps for term in run.terms})
    with styled():
        canvas = new_figure(height=3.1)
        axes = canvas.add_subplot()
        told: list[str] = []
        values: list[float] = []
        for position, (label, run) in enumerate(zip(run_labels(runs), steps, strict=True)):
            for number, part in enumerate(keys):
                curve = run.curve(part).thinned()
                if not curve.steps:
                    continue
                full = label if key else f"{label}: {part.removeprefix('terms.')}"
                style = TERM_STYLES[(number if key is None else position // len(RUNS)) % len(TERM_STYLES)]
                axes.plot(curve.steps, curve.values, ls=style, lw=1.5, color=run_colour(position), label=full)
                lost = f", {curve.num_not_finite} values not finite" if curve.num_not_finite else ""
                told.append(f"{full} from {compact(curve.values[0])} to {compact(curve.values[-1])}{lost}")
                values += curve.values
        if not values:
            return None
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(ylabel)
        if name == "unclipped-fraction":
            axes.axhspan(0.1, 0.5, color=MUTED[0], alpha=0.13, lw=0)
            axes.set_ylim(-0.02, 1.02)
        elif key and min(values) > 0 and max(values) > 50 * min(values) and key != "learning_rate":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        legend_above(canvas, axes.lines if key else _run_and_term_lines(axes.lines, keys))
        svg = to_svg(canvas, name)
    return Figure(name, title, CAPTIONS[name], f"{title}, by optimizer step", tuple(told), svg)


def share_axis(axis: Axis, *, lowest: float) -> None:
    """A share in percent, with room for markers at 0 and 100; zoomed only where everything lies high."""
    axis.set_view_interval(*((-0.03, 1.03) if lowest < 0.7 else (lowest - 0.1, 1.01)), ignore=True)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axis.set_major_locator(MaxNLocator(nbins=6))


def _run_and_term_lines(lines: Sequence[Line2D], keys: Sequence[str]) -> list[Line2D]:
    """Legend lines where colour is the run and dashes are the term: each named once, the run only where there are several."""
    runs = {str(line.get_label()).rpartition(": ")[0]: line.get_color() for line in lines}
    terms = [
        Line2D([], [], color=INK[0] if len(runs) > 1 else lines[0].get_color(), ls=style, lw=1.5, label=key.removeprefix("terms."))
        for key, style in zip(keys, TERM_STYLES * len(keys), strict=False)
    ]
    return [*(Line2D([], [], color=colour, lw=1.5, label=label) for label, colour in runs.items() if len(runs) > 1), *terms]


def legend_above(canvas: Canvas, handles: Sequence[Line2D]) -> None:
    """Above the axes, where it covers nothing; the figure grows with it."""
    handles = [handle for handle in handles if not str(handle.get_label()).startswith("_")]
    labels = [str(handle.get_label()) for handle in handles]
    num_columns = 2 if max(map(len, labels)) < 26 else 1
    num_rows = -(-len(labels) // num_columns)
    canvas.set_figheight(canvas.get_figheight() + LEGEND_ROW * max(num_rows - 2, 0))
    canvas.legend(handles=handles, loc="outside upper left", ncols=num_columns, columnspacing=1.4)
