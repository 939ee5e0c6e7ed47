"""Figures draw what was measured, tell runs apart, and leave out what nobody recorded."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from soul.report.figures import Figure, outcome_figures, telemetry_figures
from soul.report.results import Results
from soul.report.steps import Steps
from soul.report.svg import MARKERS, RUNS, inline, run_colour, run_marker

Make = Callable[..., Results]


def named(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def recorded(**keys: float) -> Steps:
    return Steps(tuple({"step": float(step), **{name: value * (step + 1) for name, value in keys.items()}} for step in range(5)))


def test_curves_show_the_first_metric_that_epochs_have(document: Callable[..., dict[str, Any]]) -> None:
    cheap = document()
    for row in cheap["epochs"]:
        row |= {split: {"exact_memorization": 0.5, "nll": 3.0} for split in ("forget", "retain")}
    figures = named(outcome_figures([Results.model_validate(cheap)]))
    assert "exact memory on forget rows per epoch" in figures["forget-curve"].alt
    assert "SO-NPO (sophia) from 50" in figures["forget-curve"].alt
    assert "12\u00a0% reproduced, 97\u00a0% kept" in figures["trade-off"].alt


def test_without_epochs_and_rouge_there_is_nothing_to_draw(document: Callable[..., dict[str, Any]]) -> None:
    bare = document() | {"epochs": []}
    assert set(named(outcome_figures([Results.model_validate(bare)]))) == {"trade-off"}
    for model in bare["models"].values():
        del model["retain"]["rougeL_recall"]
    assert outcome_figures([Results.model_validate(bare)]) == []


@pytest.mark.parametrize(
    ("steps", "names"),
    [
        (Steps(), set()),
        (recorded(grad_norm=1.0), {"gradient-norm"}),
        (recorded(update_norm=1.0, learning_rate=1e-5), {"update-norm", "learning-rate"}),
        (recorded(unclipped_fraction=0.1, rho=0.04), {"unclipped-fraction", "rho"}),
        (Steps(tuple({"step": float(step), "rho": 0.04} for step in range(3))), set()),
        (recorded(**{"terms.forget": -1.0, "terms.retain": 1.0}), {"loss-terms"}),
    ],
)
def test_only_recorded_quantities_get_a_panel(results: Make, steps: Steps, names: set[str]) -> None:
    assert set(named(telemetry_figures([results()], [steps]))) == names


def test_a_legend_names_each_run_and_each_term_once(results: Make) -> None:
    steps = recorded(**{"terms.forget": -1.0, "terms.retain": 1.0})
    (figure,) = telemetry_figures([results(), results(optimizer="adamw")], [steps, steps])
    for words in (">SO-NPO (sophia)<", ">FO-NPO (adamw)<", ">forget<", ">retain<"):
        assert figure.svg.count(words) == 1
    (alone,) = telemetry_figures([results()], [steps])
    assert "SO-NPO" not in alone.svg and alone.svg.count(">forget<") == 1


def test_log_axes_have_plain_labels(results: Make) -> None:
    wide = Steps(tuple({"step": float(step), "grad_norm": 10.0**-step} for step in range(6)))
    (figure,) = telemetry_figures([results()], [wide])
    assert "mathdefault" not in figure.svg and ">0.001<" in figure.svg


@pytest.mark.parametrize("num_runs", [1, 2, 9])
def test_every_run_is_named_in_its_own_colour(results: Make, num_runs: int) -> None:
    runs = [results(seed=seed) for seed in range(num_runs)]
    for figure in outcome_figures(runs):
        for seed in range(num_runs):
            assert num_runs == 1 or f"seed {seed}" in figure.svg
            assert run_colour(seed) in figure.svg


def test_colour_and_marker_together_name_a_run() -> None:
    looks = {(run_colour(position), run_marker(position)) for position in range(len(RUNS) * len(MARKERS))}
    assert len(looks) == len(RUNS) * len(MARKERS)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("pair", "theme"), product(RUNS, (0, 1)))
def test_run_colours_stand_out_from_their_background(pair: tuple[str, str], theme: int) -> None:
    """WCAG's 3:1 for graphics, on the page and on its panels."""
    for background in (("#ffffff", "#f6f8fa"), ("#14171b", "#1c2127"))[theme]:
        light, dark = sorted((luminance(pair[theme]), luminance(background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3


def test_inline_figures_take_colours_and_fonts_from_the_page(results: Make) -> None:
    figure = outcome_figures([results()])[0]
    svg = inline(figure.svg, 'a "quoted" <alt>')
    assert not re.search(r"#(?:0072b2|1f2328|d9dee3)", svg) and "var(--run1)" in svg and "DejaVu" not in svg
    assert 'aria-label="a &quot;quoted&quot; &lt;alt&gt;"' in svg and "viewBox" in svg
    assert not re.search(r"<svg[^>]* (?:width|height)=", svg)
