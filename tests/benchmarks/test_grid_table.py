from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soul.benchmarks.aggregate import Table, front_of, select, tabulate
from soul.benchmarks.grid import Cell, Choice, Origin, Trial
from soul.benchmarks.outcomes import CRASHED, FAILED, MARK_KEY, STOPPED, Outcome, halves_of, part_of, read_outcome, reference_folder
from soul.benchmarks.paired import paired_difference
from soul.evaluate.eval_log import EvalLog, SplitLog
from soul.evaluate.score import score
from soul.evaluate.tofu_log import AGGREGATED, write_tofu_log
from soul.records import InputError
from soul.report.grid_build import build_grid_report, show_grid
from soul.report.grid_content import compose_grid
from soul.report.grid_markdown import anywhere
from soul.report.grid_paper import PAPER_HEAD, PAPER_TABLE_2, our_table_6, own_table_2, table_2
from soul.report.grid_tables import difference_words, latex_grid, latex_text, main_grid, sort_key, trials_csv
from soul.rundir import RunDir, write_json

TARGET = {"forget.rougeL_recall": 1.0, "retain.rougeL_recall": 1.0, "forget.probability": 0.9, "retain.probability": 0.9}


def outcome(optimizer: str, rate: float, seed: int, forget: float, retain: float, *, method: str = "npo", **changes: Any) -> Outcome:
    """A finished trial whose validation and report halves agree unless `validation` says otherwise."""
    trial = Trial(Cell("tiny", method, optimizer), Choice({}, {"learning_rate": rate}), seed)
    values = {"forget.rougeL_recall": forget, "retain.rougeL_recall": retain, "forget.probability": forget, "retain.probability": retain}
    epochs = tuple(
        {"epoch": e, "step": e, "forget": {"exact_memorization": x}, "retain": {"exact_memorization": y}}
        for e, x, y in ((0, 1.0, 1.0), (1, (1 + forget) / 2, (1 + retain) / 2), (2, forget, retain))
    )
    made = {
        "validation": values,
        "values": values,
        "target": TARGET,
        "target_validation": TARGET,
        "retrained": {"forget.rougeL_recall": 0.05},
        "epochs": epochs,
        "cost": {"train_s": 2.0, "eval_s": 1.0, "peak_memory_bytes": None},
        "sizes": {"forget": 20, "retain": 40},
        "benchmark": "tofu/forget05",
    }
    return Outcome(trial, "done", **{**made, **changes})


# fronts


def eval_log(num_rows: int, *, offset: float = 0.0) -> EvalLog:
    rows = range(num_rows)

    def split(shift: float) -> SplitLog:
        return SplitLog(
            tuple(map(str, rows)),
            answer_nll=tuple(0.1 * (i + 1) + shift for i in rows),
            right_nll=tuple(0.2 * (i + 1) + shift for i in rows),
            wrong_nlls=tuple((1.0 + 0.05 * i, 2.0 - 0.01 * i, 1.5 + shift) for i in rows),
            rougeL_recall=tuple((i % 5) / 5 for i in rows),
            exact_memorization=tuple((i % 3) / 3 for i in rows),
            attacks={"loss": tuple(0.1 * i for i in rows)},
            groups=tuple(i // 3 for i in rows),
        )

    return EvalLog("a model", {"forget": split(offset), "retain": split(0.5 + offset), "world_facts": split(0.2)})


@pytest.mark.parametrize("num_rows", [2, 7, 10])
def test_halves_share_no_row_and_together_are_the_whole(num_rows: int) -> None:
    log = eval_log(num_rows)
    cut = {name: halves_of(log.splits[name]) for name in ("forget", "retain")}
    first, second = (part_of(log, {name: getattr(half, side) for name, half in cut.items()}) for side in ("selection", "report"))
    for name in ("forget", "retain"):
        authors = [set(half.splits[name].groups or ()) for half in (first, second)]
        assert bool(authors[0] & authors[1]) == (num_rows == 2)  # of one author only
        keys = [set(half.splits[name].keys) for half in (first, second)]
        assert keys[0] & keys[1] == set() and keys[0] | keys[1] == set(log.splits[name].keys)
        for half in (first, second):
            by_key = dict(zip(log.splits[name].keys, log.splits[name].answer_nll or (), strict=True))
            assert half.splits[name].answer_nll == tuple(by_key[key] for key in half.splits[name].keys)
            assert len(half.splits[name].attacks["loss"]) == len(half.splits[name].keys)
    assert first.splits["world_facts"] == log.splits["world_facts"]


def write_trial(output: Path, trial: Trial, *, offset: float = 0.3) -> None:
    run = RunDir(output / "trials" / trial.id)
    log, gold = eval_log(11, offset=offset), eval_log(11, offset=0.9)
    write_tofu_log(log, run.logs / AGGREGATED)
    for kind, reference in (("target", eval_log(11)), ("retrained", gold)):
        write_tofu_log(reference, reference_folder(output, trial.cell.model, kind) / AGGREGATED)
    entry = score(log, retrained=gold).model_entry()
    models = {"target": score(eval_log(11), retrained=gold).model_entry(), "unlearned": entry, "retrained": score(gold).model_entry()}
    cost = {"train_s": 1.5, "eval_s": 0.5, "tokens_per_s": 10.0, "peak_memory_bytes": None, "optimizer_state_bytes_per_rank": 8}
    write_json(run.results, {"models": models, "epochs": [], "cost": cost, "splits": {"forget": 11, "retain": 11}, "benchmark": "tofu/x"})


def test_a_trial_is_read_in_halves_from_its_logs(tmp_path: Path) -> None:
    trial = Trial(Cell("tiny", "npo", "adamw"), Choice(), 0)
    write_trial(tmp_path, trial)
    whole = read_outcome(trial, tmp_path, halved=False)
    halved = read_outcome(trial, tmp_path, halved=True)
    assert whole.validation == whole.values and halved.validation != halved.values
    chosen = ((0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10))  # the authors of three rows each in turn, the last one of two
    for outcome_, rows in ((halved.validation, chosen[0]), (halved.values, chosen[1]), (whole.values, range(11))):
        expected = np.mean([math.exp(-(0.1 * (i + 1) + 0.3)) for i in rows])
        assert outcome_["forget.probability"] == pytest.approx(expected)
    assert whole.values["log10_forget_quality"] == pytest.approx(math.log10(whole.values["forget_quality"]))
    reported = np.mean([math.exp(-0.1 * (i + 1)) for i in chosen[1]])
    assert halved.target["forget.probability"] == pytest.approx(reported) and halved.target != halved.target_validation
    assert halved.shared_groups == ()
    assert whole.cost["train_s"] == 1.5 and whole.retrained["forget.probability"] < whole.values["forget.probability"]


def test_a_trial_without_results_says_why(tmp_path: Path) -> None:
    trial = Trial(Cell("tiny", "npo", "adamw"), Choice(), 0)
    run = RunDir(tmp_path / "trials" / trial.id)
    assert read_outcome(trial, tmp_path, halved=False).state == "missing"
    run.finish(CRASHED, MARK_KEY, {"reason": "it broke off"})
    assert read_outcome(trial, tmp_path, halved=False).reason == "it broke off"
    run.finish(STOPPED, MARK_KEY, {"epochs": [{"epoch": 0}, {"epoch": 2}]})
    stopped = read_outcome(trial, tmp_path, halved=False)
    assert stopped.state == "stopped" and "epoch 2" in stopped.reason
    run.finish(FAILED, MARK_KEY, {"reason": "the forget loss is not finite"})
    found = read_outcome(trial, tmp_path, halved=False)
    assert (found.state, found.reason) == ("failed", "the forget loss is not finite")


# selection and comparison


def test_selection_looks_at_the_validation_half_only() -> None:
    liar = outcome("adamw", 1e-3, 0, forget=0.0, retain=1.0, validation={"forget.rougeL_recall": 0.5, "retain.rougeL_recall": 1.0})
    honest = outcome("adamw", 1e-4, 0, forget=0.6, retain=0.9, validation={"forget.rougeL_recall": 0.4, "retain.rougeL_recall": 1.0})
    assert select([liar, honest], metric="rougeL_recall", floor=0.9) == [honest]


def test_selection_takes_the_deepest_above_the_floor_else_the_nearest_to_it() -> None:
    runs = [outcome("adamw", rate, 0, forget, retain) for rate, forget, retain in ((1e-5, 0.9, 1.0), (1e-4, 0.4, 0.92), (1e-3, 0.0, 0.6))]
    assert select(runs, metric="rougeL_recall", floor=0.9) == [runs[1]]
    assert select(runs, metric="rougeL_recall", floor=0.5) == [runs[2]]
    assert select(runs[2:], metric="rougeL_recall", floor=0.9) == [runs[2]]
    twin = outcome("adamw", 2e-4, 0, 0.4, 0.92)
    assert select([twin, runs[1]], metric="rougeL_recall", floor=0.9) == [runs[1]]  # the smaller rate
    assert select([], metric="rougeL_recall", floor=0.9) == []


def test_a_cell_has_one_setting_for_all_its_seeds() -> None:
    """Not the luckiest of each seed: 1e-4 wins seed 0 and 1e-3 seed 1, and 3e-4 both together."""
    lucky = {(1e-4, 0): 0.0, (1e-4, 1): 0.9, (3e-4, 0): 0.2, (3e-4, 1): 0.2, (1e-3, 0): 0.9, (1e-3, 1): 0.0}
    runs = [outcome("adamw", rate, seed, forget, 0.95) for (rate, seed), forget in lucky.items()]
    chosen = select(runs, metric="rougeL_recall", floor=0.9)
    assert {(run.trial.choice.settings["learning_rate"], run.trial.seed) for run in chosen} == {(3e-4, 0), (3e-4, 1)}
    [row] = tabulate(runs, floor=0.9).rows
    assert [run.trial.seed for run in row.selected] == [0, 1] and row.values("forget.rougeL_recall") == [0.2, 0.2]


def test_a_choice_that_failed_in_a_seed_is_not_preferred_for_its_luck_in_the_other() -> None:
    runs = [outcome("adamw", 1e-4, seed, 0.3, 0.95) for seed in (0, 1)] + [outcome("adamw", 1e-3, 0, 0.0, 0.95)]
    assert select(runs, metric="rougeL_recall", floor=0.9) == runs[:2]


def test_a_log_that_knows_no_authors_is_cut_row_by_row_and_says_so(tmp_path: Path) -> None:
    log = replace(eval_log(6).splits["forget"], groups=None)
    assert halves_of(log).share_groups and halves_of(log).selection == (0, 2, 4)


def two_searches(gap: float = 0.1, noise: float = 0.01) -> list[Outcome]:
    """AdamW's front is the line retain = 1 - (1 - forget) / 2; Sophia's lies `gap` x depth above it, both with a seed's offset."""
    found = []
    for seed, shift in ((0, 0.0), (1, noise), (2, -noise)):
        for rate, forget in ((1e-4, 0.6), (2e-4, 0.4), (4e-4, 0.2)):
            found.append(outcome("adamw", rate, seed, forget, 1 - (1 - forget) / 2))
            found.append(outcome("sophia", rate, seed, forget - 0.1, 1 - (1.1 - forget) / 2 + (gap + shift) * (1.1 - forget)))
    return found


def test_differences_at_equal_forgetting_are_those_of_the_fronts() -> None:
    table = tabulate(two_searches(), floor=0.5)
    [found] = table.differences
    assert (found.cell.optimizer, found.baseline.optimizer, found.metric) == ("sophia", "adamw", "rougeL_recall")
    assert found.level == pytest.approx(0.2)  # adamw's deepest: sophia reaches further
    assert found.difference.mean == pytest.approx(0.08, abs=1e-9) and found.difference.num_pairs == 3
    expected = paired_difference([0.08, 0.088, 0.072], [0.0, 0.0, 0.0])
    assert (found.difference.low, found.difference.high) == pytest.approx((expected.low, expected.high))
    assert "outside the noise of 3 seeds" in difference_words(found.difference)


def test_a_difference_smaller_than_its_noise_is_printed_as_such() -> None:
    [found] = tabulate(two_searches(gap=0.002, noise=0.05), floor=0.5).differences
    assert difference_words(found.difference).endswith("inside the noise")


def test_a_single_choice_is_compared_along_its_epochs() -> None:
    table = tabulate([outcome("adamw", 1e-4, 0, 0.2, 0.6), outcome("sophia", 1e-4, 0, 0.4, 0.8)], floor=0.5)
    [found] = table.differences
    assert found.metric == "exact_memorization" and found.level == pytest.approx(0.4)
    assert found.difference.mean == pytest.approx(0.8 - 0.7) and "one seed, no interval" in difference_words(found.difference)
    assert front_of(table.rows[0], 0, "exact_memorization", along_epochs=True)[0] == (1.0, 1.0)


def test_a_seed_that_failed_is_left_out_and_told() -> None:
    runs = two_searches()
    broken = [
        Outcome(run.trial, "failed", "the forget loss is not finite")
        if (run.trial.cell.optimizer, run.trial.seed) == ("sophia", 2)
        else run
        for run in runs
    ]
    table = tabulate(broken, floor=0.5)
    [found] = table.differences
    assert found.difference.num_pairs == 2
    sophia = next(row for row in table.rows if row.cell.optimizer == "sophia")
    assert len(sophia.selected) == 2 and len(sophia.failures) == 3
    assert "9, of which 3 failed" in {cell for row in main_grid(table).rows for cell in row}


def test_the_row_of_a_cell_holds_mean_spread_interval_trials_and_time() -> None:
    table = tabulate(two_searches(), floor=0.5)
    grid = main_grid(table)
    assert grid.rows[0][0] == "target" and grid.rows[-1][0] == "retrained"
    cells = dict(zip(grid.head, next(row for row in grid.rows if row[0] == "FO-NPO (adamw)"), strict=True))
    assert cells["Forget ROUGE-L ↓"] == "0.200 ± 0.000 [0.200, 0.200]"
    assert (cells["seeds"], cells["trials"], cells["time of all trials"]) == ("3", "9", "27.0\N{NO-BREAK SPACE}s")
    assert cells["settings"] == "learning_rate 0.0004 (largest tried)"
    assert cells["training time of a run"] == "2.0\N{NO-BREAK SPACE}s" and "peak memory" not in cells
    assert not [row for row in grid.rows if len(row) != len(grid.head)]


def test_cells_below_the_floor_are_marked() -> None:
    table = tabulate(two_searches(), floor=0.95)
    assert [row[0] for row in main_grid(table).rows[1:-1]] == ["FO-NPO (adamw) *", "SO-NPO (sophia) *"]
    page = compose_grid(table, two_searches(), samples=(), command=None)
    assert any("No cell keeps 95%" in line for line in page.statements)


# files


def parsed_csv(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(trials_csv(table))))


def test_the_csv_holds_every_trial_and_marks_the_selected_ones() -> None:
    runs = two_searches()
    table = tabulate(runs, floor=0.5)
    rows = parsed_csv(table)
    assert {row["trial"] for row in rows} == {run.trial.id for run in runs}
    chosen = {run.trial.id for row in table.rows for run in row.selected}
    assert {row["trial"] for row in rows if row["selected"] == "1"} == chosen
    by_name = {run.trial.id: run for run in runs}
    assert all(float(row["forget.rougeL_recall"]) == pytest.approx(by_name[row["trial"]].values["forget.rougeL_recall"]) for row in rows)


def test_latex_is_whole_plain_and_has_as_many_columns_as_it_says() -> None:
    table = tabulate([*two_searches(), *paper_outcomes()], floor=0.5)
    report = compose_grid(table, two_searches(), samples=(), command=None)
    assert report.differences is not None and len(report.paper) == 3
    for number, grid in enumerate((report.main, report.differences, *report.paper)):
        text = latex_grid(grid, label=f"tab:{number}")
        assert text.isascii()
        columns = len(re.search(r"begin\{tabular\}\{(l?r+)\}", text)[1])  # type: ignore[index]
        lines = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert len(lines) == len(grid.rows) + 1 and all(line.count(" & ") == columns - 1 for line in lines)
        assert not [line for line in lines if line.startswith("[")]  # LaTeX would read it as the space after the line before
        bare = re.sub(r"\\[\\{}%&$#_]", "", text)
        assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
        assert "%" not in bare.replace("{!}{%", "") and not re.search(r"[#^_~]", bare.replace("~", ""))
        assert re.findall(r"\\begin\{(\w+)\}", text) == re.findall(r"\\end\{(\w+)\}", text)[::-1]
    assert latex_text("50% of a_b & −1 ± 2") == r"50\% of a\_b \& $-$1 $\pm$ 2"
    assert latex_text("a\\b^c~{d}") == r"a\textbackslash{}b\^{}c\textasciitilde{}\{d\}"


def test_cells_sort_by_the_number_they_begin_with() -> None:
    assert [
        sort_key(text) for text in ("0.20 ± 0.1 [0.1, 0.3]", "−3.4", "< −300", "1,250", "–", "learning_rate 1", "9, of which 1 failed")
    ] == [
        "0.2",
        "-3.4",
        "-300",
        "1250",
        "",
        "",
        "9",
    ]


def paper_outcomes() -> list[Outcome]:
    more = {"legacy_self_ks_p": 0.25, "log10_forget_quality": -7.5, "legacy_scrambled_mia_auc": 0.4}
    made = []
    for method, optimizer in (("grad_diff", "adamw"), ("grad_diff", "soul_release"), ("npo", "soul_release")):
        run = outcome(optimizer, 1e-4, 0, 0.3, 0.8, method=method)
        origin: Origin = "ours" if method == "npo" else "published"
        trial = replace(run.trial, choice=replace(run.trial.choice, origin=origin))
        made.append(replace(run, trial=trial, values={**run.values, **more}))
    return made


def test_the_papers_numbers_are_printed_beside_ours_in_its_own_rows_and_columns() -> None:
    table = tabulate(paper_outcomes(), floor=0.5)
    ours = table_2(table, "tiny")
    assert ours.head == ("", *PAPER_HEAD)
    assert [row[0] for row in ours.rows] == ["Original", "FO-GradDiff", "SO-GradDiff", "SO-NPO (our settings)", "Retrained"]
    for row in ours.rows[:-1]:
        printed = PAPER_TABLE_2[row[0].removesuffix(" (our settings)")]
        assert [float(cell.partition("[")[2].rstrip("]")) for cell in row[1:]] == list(printed)
    assert not [cell for cell in ours.rows[-1] if "[" in cell]  # the paper has no retrained model
    cells = dict(zip(ours.head, ours.rows[2], strict=True))
    assert (cells["FQ"], cells["MIA"], cells["F-RougeL"], cells["R-Acc"]) == (
        "0.75 [1.00]",
        "0.4000 [0.2156]",
        "0.3000 [0.0221]",
        "– [72.25]",
    )
    own = own_table_2(table, "tiny")
    assert dict(zip(own.head, own.rows[2], strict=True))["TOFU FQ, log10 p"] == "−7.5"
    cost = our_table_6(table, "tiny")
    assert (cost.rows[1][2], cost.rows[1][6], cost.rows[2][7]) == ("1.00", "1.00", "89,362 MiB")
    assert [row[0] for row in cost.rows] == ["FO-GradDiff", "SO-GradDiff", "SO-NPO"]


def test_the_papers_tables_belong_to_its_cells_only() -> None:
    assert not compose_grid(tabulate(two_searches(), floor=0.5), two_searches(), samples=(), command=None).paper
    assert len(compose_grid(tabulate(paper_outcomes(), floor=0.5), paper_outcomes(), samples=(), command=None).paper) == 3


def test_the_whole_report_from_run_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell, other = Cell("tiny", "npo", "adamw"), Cell("tiny", "npo", "soul_release")
    choices = [Choice({}, {"learning_rate": rate}, "published") for rate in (1e-4, 2e-4)]
    trials = [Trial(c, choice, seed) for seed in (0, 1) for c in (cell, other) for choice in choices]
    for number, trial in enumerate(trials[:-1]):
        write_trial(tmp_path, trial, offset=0.1 * number)
    RunDir(tmp_path / "trials" / trials[-1].id).finish(FAILED, MARK_KEY, {"reason": "the <forget> loss is not finite"})
    table = build_grid_report(trials, tmp_path, floor=0.9, samples=True, command="python pipelines/grid.py --x 1")
    assert table.halved
    page, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for text in (page, markdown):
        assert trials[-1].id in text.replace("\\", "") and "pipelines/grid.py --x 1" in text and "Table 2" in text
    assert "the &lt;forget&gt; loss" in page and "<forget>" not in page and "<svg" in page and "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "grid.tex").read_text().count(r"\begin{table}") == 5
    section = (tmp_path / "results.md").read_text()
    assert section.startswith("## tofu/x") and "![" not in section and "\n# " not in section and str(tmp_path) not in section
    assert [line for line in markdown.splitlines() if line.startswith("| ")] == [
        line for line in section.splitlines() if line.startswith("| ")
    ]
    assert len(list((tmp_path / "figures").glob("*.svg"))) >= 1
    show_grid(table)
    assert "FO-NPO (adamw)" in capsys.readouterr().out


def test_a_log_tells_the_command_without_where_it_ran() -> None:
    command = "python pipelines/grid.py --output /tmp/x --preset equal --cache=/big/cache --report --data '../a b' --wandb p --seeds 3"
    assert anywhere(command) == "python pipelines/grid.py --preset equal --data '../a b' --seeds 3"


def test_a_report_of_nothing_and_of_different_rows_is_refused(tmp_path: Path) -> None:
    trials = [Trial(Cell("tiny", "npo", "adamw"), Choice(), seed) for seed in (0, 1)]
    with pytest.raises(InputError, match="no finished trial"):
        build_grid_report(trials, tmp_path, floor=0.9, samples=False)
    for trial in trials:
        write_trial(tmp_path, trial)
    changed = tmp_path / "trials" / trials[1].id / "results.json"
    changed.write_text(json.dumps({**json.loads(changed.read_text()), "splits": {"forget": 3, "retain": 4}}))
    with pytest.raises(InputError, match="different benchmarks"):
        build_grid_report(trials, tmp_path, floor=0.9, samples=False)


def test_several_models_have_tables_and_figures_of_their_own() -> None:
    runs = []
    for model, shift in (("tiny", 0.0), ("tiny-s", 0.1)):
        for run in (*two_searches(), *paper_outcomes()):
            cell = Cell(model, run.trial.cell.method, run.trial.cell.optimizer)
            target = {**TARGET, "retain.rougeL_recall": 1.0 - shift}
            runs.append(replace(run, trial=replace(run.trial, cell=cell), target=target, target_validation=target))
    table = tabulate(runs, floor=0.5)
    report = compose_grid(table, runs, samples=(), command=None)
    assert table.models == ["tiny", "tiny-s"]
    assert [row[0] for row in report.main.rows if row[0].startswith("target")] == ["target, tiny", "target, tiny-s"]
    names = [figure.name for figure in report.figures]
    assert len(names) == len(set(names)) and {"front-npo-0", "front-npo-1", "epochs-forget-npo-0", "epochs-retain-grad_diff-1"} <= set(
        names
    )
    kinds = ("Table 2 with", "Beside Table 2 with", "Table 6 with")
    assert [grid.caption.split(":")[0] for grid in report.paper] == [f"{kind} {model}" for model in table.models for kind in kinds]
    assert all(found.cell.model == found.baseline.model for found in table.differences)
    assert any(line.startswith("tiny-s: Of the") for line in report.statements)
