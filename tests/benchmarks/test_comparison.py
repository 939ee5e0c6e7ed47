"""The comparison of optimizers: halves, intervals and the selection rule on numbers made by hand, and a whole one of two authors."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from soul.benchmarks import comparison
from soul.benchmarks.comparison import ComparisonResult, ComparisonSettings, Group, Search, compare
from soul.benchmarks.comparison_tables import markdown, terminal, to_json
from soul.benchmarks.findings import conclusions, differences, statements, warnings
from soul.benchmarks.paired import paired_difference, summary
from soul.benchmarks.selection import RULES, Bounds, Rule, Selection, Trial, select
from soul.data.fictitious import fictitious_splits
from soul.data.sources import Benchmark
from soul.models.tiny import TinyConfig
from soul.records import InputError
from soul.train.loop import NonFiniteLoss

BOUNDS = Bounds(target_forget=0.9, target_retain=0.9, floor=0.9, ceiling=0.1)


@pytest.mark.parametrize(
    ("rule", "trials", "rate", "qualifies", "at_edge"),
    [
        # the lowest forget probability of those with retain >= 0.9 x 0.9, not the lowest of all
        ("keep", [(1e-5, 0.9, 0.90), (1e-4, 0.4, 0.82), (1e-3, 0.1, 0.80)], 1e-4, True, False),
        # exactly on the floor counts
        ("keep", [(1e-5, 0.9, 0.90), (1e-4, 0.4, 0.82), (1e-3, 0.1, 0.9 * 0.9)], 1e-3, True, True),
        # none keeps enough: the best retain, whatever it forgets
        ("keep", [(1e-5, 0.3, 0.5), (1e-4, 0.2, 0.7), (1e-3, 0.0, 0.1)], 1e-4, False, False),
        # of equals the smaller rate, in whatever order they come
        ("keep", [(1e-3, 0.2, 0.85), (1e-4, 0.2, 0.9), (1e-5, 0.9, 0.9)], 1e-4, True, False),
        # what diverged or is not a number cannot be chosen
        ("keep", [(1e-5, 0.8, 0.9), (1e-4, 0.7, 0.9), (1e-3, None, None), (1e-2, 0.0, math.nan)], 1e-4, True, False),
        # the highest retain of those with forget <= 0.1 x 0.9, not the highest of all and not the lowest forget
        ("forget", [(1e-5, 0.9, 0.9), (1e-4, 0.08, 0.7), (1e-3, 0.05, 0.8), (1e-2, 0.0, 0.6)], 1e-3, True, False),
        # exactly on the ceiling counts
        ("forget", [(1e-5, 0.9, 0.9), (1e-4, 0.1 * 0.9, 0.7), (1e-3, 0.05, 0.6)], 1e-4, True, False),
        # none forgets enough: the lowest forget, whatever it keeps
        ("forget", [(1e-5, 0.9, 0.9), (1e-4, 0.5, 0.7), (1e-3, 0.3, 0.1)], 1e-3, False, True),
        ("forget", [(1e-3, 0.0, 0.7), (1e-4, 0.0, 0.7), (1e-5, 0.9, 0.9)], 1e-4, True, False),
    ],
)
def test_selection_rules(
    rule: Rule, trials: Sequence[tuple[float, float | None, float | None]], rate: float, qualifies: bool, at_edge: bool
) -> None:
    assert select([Trial(*trial) for trial in trials], rule, BOUNDS) == Selection(rate, qualifies, at_edge)


@pytest.mark.parametrize("rule", RULES)
def test_a_search_that_only_diverged_says_what_to_do(rule: Rule) -> None:
    with pytest.raises(InputError, match="--learning-rates"):
        select([Trial(1.0, None, None)], rule, BOUNDS)


def test_paired_interval_is_students() -> None:
    found = paired_difference([0.5, 0.7, 0.9], [0.4, 0.4, 0.4])
    # differences .1 .3 .5: mean .3, sd .2, t(0.975, 2) = 4.302653 (tables)
    assert found.mean == pytest.approx(0.3)
    assert (found.low, found.high) == (pytest.approx(0.3 - 4.302653 * 0.2 / 3**0.5), pytest.approx(0.3 + 4.302653 * 0.2 / 3**0.5))
    assert (found.num_pairs, found.verdict) == (3, "inside the noise")


def test_pairing_takes_out_what_the_seeds_share() -> None:
    spread = [0.1, 0.5, 0.9, 0.3]
    found = paired_difference([value + delta for value, delta in zip(spread, (0.02, 0.021, 0.019, 0.02), strict=True)], spread)
    assert found.verdict == "survives" and found.low is not None and 0.018 < found.low < 0.02


def test_differences_without_a_spread_and_without_pairs() -> None:
    assert paired_difference([0.2, 0.2], [0.2, 0.2]).verdict == "inside the noise"
    assert paired_difference([1.0, 1.0], [0.0, 0.0]).verdict == "survives"
    one = paired_difference([0.5, None, 0.1], [0.1, 0.2, None])
    assert (one.mean, one.num_pairs, one.verdict) == (pytest.approx(0.4), 1, "no interval")
    assert paired_difference([None], [1.0]).mean is None


def test_summary_keeps_the_gaps() -> None:
    found = summary([1.0, None, 3.0])
    assert found.values == (1.0, None, 3.0)
    assert (found.mean, found.sd) == (2.0, pytest.approx(2**0.5))
    assert summary([4.0]).sd is None and summary([None]).mean is None


@pytest.mark.parametrize(
    "wrong",
    [{"optimizers": ("adamw",)}, {"optimizers": ("adamw", "adamw")}, {"learning_rates": (1e-4, 0.0)}, {"methods": ("finetune",)}, {"x": 1}],
)
def test_settings_refuse(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ComparisonSettings(**wrong)


def test_no_seed_of_the_report_is_the_searchs() -> None:
    assert comparison.SEARCH_SEED not in ComparisonSettings(seeds=5).report_seeds
    assert len(set(ComparisonSettings(seeds=5).report_seeds)) == 5


def cell(rouge: float | None, retain: float = 0.9) -> dict[str, Any]:
    """A cell of the report; `rouge` None: it diverged."""
    metrics = {"probability": 0.5, "exact_memorization": 0.5, "truth_ratio": 0.5}
    scores = {
        "forget": {"rougeL_recall": rouge, **metrics},
        "retain": {"rougeL_recall": retain, "probability": 0.5},
        "real_authors": None,
        "world_facts": None,
        "model_utility": None,
        "forget_quality": 0.0,
    }
    known = {"train_s": 1.0, "telemetry": {"update_norm": 0.1, "unclipped_fraction": None}}
    return known if rouge is None else {**known, "scores": scores}


Cells = Mapping[str, Sequence[Mapping[str, Any]]]


def made_result(keep: Cells, forget: Cells | None = None) -> ComparisonResult:
    """NPO with AdamW at 1e-4 and Sophia at 5e-5 by rule keep, and at twice that by rule forget."""
    trials = (Trial(5e-5, 0.5, 0.9), Trial(1e-4, None, None), Trial(2e-4, 0.1, 0.2))
    adamw: dict[Rule, Selection] = {"keep": Selection(2e-4, True, False), "forget": Selection(2e-4, True, False)}
    sophia: dict[Rule, Selection] = {"keep": Selection(5e-5, False, True), "forget": Selection(1e-4, True, False)}
    groups = [Group("npo", ("keep",), {"adamw": 1e-4, "sophia": 5e-5}, keep)]
    groups += [Group("npo", ("forget",), {"adamw": 2e-4, "sophia": 1e-4}, keep if forget is None else forget)]
    return ComparisonResult(
        settings=ComparisonSettings(methods=("npo",), optimizers=("adamw", "sophia"), learning_rates=(5e-5, 1e-4, 2e-4), seeds=3),
        benchmark="made",
        sizes={"forget": 3},
        max_new_tokens=8,
        longest_answer=9,
        steps=5,
        shared_groups=(),
        models={"target": cell(1.0)["scores"], "retrained": cell(0.1)["scores"]},
        bounds=BOUNDS,
        searches={("npo", "adamw"): Search(trials, adamw), ("npo", "sophia"): Search(trials, sophia)},
        groups=groups,
    )


def test_a_statement_names_what_survives_and_nothing_else() -> None:
    result = made_result({"adamw": [cell(0.50), cell(0.52), cell(0.51)], "sophia": [cell(0.30, 0.9), cell(0.31, 0.8), cell(0.31, 0.99)]})
    lines = list(statements(result))
    assert lines[0].endswith("adamw against sophia (0.0001 against 5e-05): forget ROUGE-L of adamw higher by 0.2.")
    found = differences(result.groups[0], "adamw")["sophia"]
    assert found["retain.rougeL_recall"].verdict == "inside the noise"
    assert found["model_utility"].mean is None
    assert "14 intervals" in lines[-1]  # two groups; utility, authors and facts have no value
    same = made_result({"adamw": [cell(0.5), cell(0.6)], "sophia": [cell(0.6), cell(0.5)]})
    assert "every difference is inside the noise" in next(statements(same))


def test_only_what_survives_both_rules_with_one_sign_is_concluded() -> None:
    low, high = [cell(0.30), cell(0.31), cell(0.32)], [cell(0.50), cell(0.52), cell(0.51)]
    noisy = [cell(0.1), cell(0.9), cell(0.5)]
    assert "forget ROUGE-L of adamw higher by 0.2 and 0.2" in next(conclusions(made_result({"adamw": high, "sophia": low})))
    for forget in ({"adamw": low, "sophia": high}, {"adamw": high, "sophia": noisy}, {"adamw": high, "sophia": high}):
        assert "no difference survives" in next(conclusions(made_result({"adamw": high, "sophia": low}, forget)))


def test_the_same_runs_under_both_rules_are_one_comparison() -> None:
    """Where both rules select the same rates, for one of the optimizers or for both."""
    low, high = [cell(0.30), cell(0.31), cell(0.32)], [cell(0.50), cell(0.52), cell(0.51)]
    result = made_result({"adamw": high, "sophia": low})
    one = Group("npo", ("keep",), {"adamw": 1e-4, "sophia": 5e-5}, result.groups[0].cells)
    same = Group("npo", ("forget",), {"adamw": 1e-4, "sophia": 5e-5}, result.groups[0].cells)
    said = next(conclusions(replace(result, groups=[one, same])))
    assert "both rules select the same runs, which is one comparison and not two: forget ROUGE-L of adamw higher by 0.2." in said
    other = replace(same, learning_rates={"adamw": 1e-4, "sophia": 1e-4})
    said = next(conclusions(replace(result, groups=[one, other])))
    assert "higher by 0.2 and 0.2" in said and said.endswith("The runs of adamw are the same under both rules.")
    assert "are the same under both rules" not in next(conclusions(result))


def test_tables_show_gaps_warnings_and_the_underflown_p() -> None:
    result = made_result({"adamw": [cell(0.5), cell(None), cell(0.6)], "sophia": [cell(0.3), cell(0.3), cell(0.3)]})
    text = markdown(result)
    assert "(n = 2)" in text and "-300.00" in text and "diverged" in text and "0.50 / 0.90 k" in text and "0.10 / 0.20 k f" in text
    assert len(list(warnings(result))) == 3  # sophia by rule keep meets no bound, at the grid's edge; and the cap cuts an answer
    report = json.loads(json.dumps(to_json(result), allow_nan=False))["report"]
    assert report[0]["optimizers"]["adamw"]["forget.rougeL_recall"]["values"] == [0.5, None, 0.6]
    assert report[0]["differences"]["sophia"]["forget.rougeL_recall"]["num_pairs"] == 2
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal(result))
    assert "inside the noise" in console.export_text()


SETTINGS = ComparisonSettings(
    methods=("npo",),
    optimizers=("adamw", "sophia"),
    learning_rates=(1e-3, 3e-3),
    equal_learning_rates=(),
    seeds=2,
    epochs=2,
    prepare_steps=25,
    max_new_tokens=6,
    tiny=TinyConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, vocab_size=320, max_length=256),
)


@pytest.fixture(scope="module")
def two_authors() -> Benchmark:
    """Nine rows of one author to forget, eleven of another to keep."""
    rows = fictitious_splits(num_authors=2, seed=0)["full"]
    return Benchmark("fictitious", {"forget": rows[:9], "retain": rows[20:31]})


@pytest.fixture(scope="module")
def finished(two_authors: Benchmark, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ComparisonResult, list[str]]:
    folder, lines = tmp_path_factory.mktemp("compare"), list[str]()
    return folder, compare(two_authors, SETTINGS, folder, say=lines.append), lines


def test_a_whole_comparison(finished: tuple[Path, ComparisonResult, list[str]]) -> None:
    folder, result, lines = finished
    assert (result.steps, result.sizes["forget (report half)"], result.sizes["retain (report half)"]) == (6, 4, 5)
    assert {cells for group in result.groups for cells in group.cells} == {"adamw", "sophia"}
    assert {kind for group in result.groups for kind in group.kinds} == {"equal", "keep", "forget"}
    for rule in RULES:
        selected = next(group for group in result.groups if rule in group.kinds)
        assert selected.learning_rates == {
            name: result.searches["npo", name].selections[rule].learning_rate for name in ("adamw", "sophia")
        }
    for group in result.groups:
        assert {optimizer: {one["cell"]["learning_rate"] for one in cells} for optimizer, cells in group.cells.items()} == {
            optimizer: {rate} for optimizer, rate in group.learning_rates.items()
        }
        assert [one["cell"]["seed"] for one in group.cells["sophia"]] == [1, 2]
    assert len(lines) == 2 + len(list((folder / "cells").iterdir()))  # two models and every cell once
    assert {path.name for path in folder.iterdir()} == {"models", "cells"}  # no scratch is left


def test_a_finished_comparison_is_not_run_again(finished: tuple[Path, ComparisonResult, list[str]], two_authors: Benchmark) -> None:
    folder, result, _ = finished
    lost = folder / "cells" / "report-npo-sophia-lr0.001-seed2.json"
    if not lost.is_file():
        lost = next((folder / "cells").glob("report-*-seed2.json"))
    before = json.loads(lost.read_text())
    lost.unlink()
    lines: list[str] = []
    again = compare(two_authors, SETTINGS, folder, say=lines.append)
    assert [line.split(":")[0] for line in lines] == [lost.stem]
    assert json.loads(lost.read_text())["scores"] == before["scores"]
    assert again.groups[0].cells["adamw"][0] == result.groups[0].cells["adamw"][0]


def test_other_settings_do_not_meet_old_cells(finished: tuple[Path, ComparisonResult, list[str]], two_authors: Benchmark) -> None:
    folder, _, _ = finished
    other, lines = SETTINGS.model_copy(update={"retain_weight": 2.0, "seeds": 1, "learning_rates": (1e-3,)}), list[str]()
    compare(two_authors, other, folder, say=lines.append)
    assert not any(line.startswith("training") for line in lines) and len(lines) == 4  # two of the search, two of the report


def test_a_diverged_run_is_a_result(two_authors: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = comparison.run_job

    def sometimes(job: Any, engine: Any, **options: Any) -> Any:
        if job.optimizer.learning_rate > 2e-3:
            raise NonFiniteLoss(3, ["forget"])
        return real(job, engine, **options)

    monkeypatch.setattr(comparison, "run_job", sometimes)
    result = compare(two_authors, SETTINGS.model_copy(update={"seeds": 1, "equal_learning_rates": (3e-3,)}), tmp_path)
    chosen = {selection.learning_rate for search in result.searches.values() for selection in search.selections.values()}
    assert chosen == {1e-3}
    equal = next(group for group in result.groups if group.learning_rates["adamw"] == 3e-3)
    assert equal.cells["adamw"][0]["diverged_at_step"] == 3
    assert "diverged" in markdown(result)


def test_nothing_that_is_written_quotes_a_row(finished: tuple[Path, ComparisonResult, list[str]], two_authors: Benchmark) -> None:
    folder, result, lines = finished
    texts = [*lines, markdown(result), json.dumps(to_json(result)), *(path.read_text() for path in (folder / "cells").iterdir())]
    for record in (record for rows in two_authors.splits.values() for record in rows):
        assert not any(record.response in text or record.prompt in text for text in texts)
