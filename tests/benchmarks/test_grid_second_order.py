"""What a grid claims about second order: at which forgetting it compares, on which rows, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from soul.benchmarks.aggregate import Table, front_of, tabulate
from soul.benchmarks.fronts import level_to_compare
from soul.benchmarks.grid import Cell, Choice, Trial
from soul.benchmarks.outcomes import Outcome
from soul.report.grid_second_order import second_order
from soul.report.grid_statements import statements
from soul.report.grid_tables import differences_grid, failures, main_grid

ALL = {"forget.rougeL_recall": 1.0, "retain.rougeL_recall": 1.0}
SEEDS = ((0, 0.0), (1, 0.004), (2, -0.004))


def place(forget: float, retain: float) -> dict[str, float]:
    return {"forget.rougeL_recall": forget, "retain.rougeL_recall": retain}


def run(optimizer: str, rate: float, seed: int, forget: float, retain: float, **changes: Any) -> Outcome:
    trial = Trial(Cell("tiny", "npo", optimizer), Choice({"retain_weight": 1.0}, {"learning_rate": rate}), seed)
    values = place(forget, retain)
    cost = {"train_s": 3.0 if optimizer == "sophia" else 2.0, "eval_s": 1.0, "peak_memory_bytes": None}
    made = {"validation": values, "values": values, "target": ALL, "target_validation": ALL, "cost": cost}
    return Outcome(trial, "done", **{**made, **changes}, sizes={"forget": 9, "retain": 9}, benchmark="tofu/forget05")


def search(optimizer: str, kept: float, left: float = 0.2) -> list[Outcome]:
    """A timid, a good and a destructive rate; at the good one `left` is left and `kept` is kept."""
    found = []
    for seed, shift in SEEDS:
        sign = shift if optimizer == "sophia" else -shift
        found += [
            run(optimizer, 1e-5, seed, 0.95, 0.999),
            run(optimizer, 1e-4, seed, left + sign, kept + sign),
            run(optimizer, 1e-3, seed, 0, 0),
        ]
    return found


def table_of(floor: float = 0.9, **kept: float) -> Table:
    return tabulate([outcome for optimizer, value in kept.items() for outcome in search(optimizer, value)], floor=floor)


# where two cells are compared


def test_cells_are_compared_where_one_of_them_still_keeps_the_floor() -> None:
    good, bad = [(1.0, 1.0), (0.4, 0.92), (0.0, 0.0)], [(1.0, 1.0), (0.4, 0.6), (0.0, 0.0)]
    assert level_to_compare([[good], [bad]], floor=0.9) == 0.4  # not 0, where everything is lost and nothing differs
    assert level_to_compare([[bad], [good]], floor=0.9) == 0.4
    assert level_to_compare([[good, [(1.0, 1.0), (0.5, 0.91), (0.0, 0.1)]], [bad, bad]], floor=0.9) == 0.5  # in every seed
    assert level_to_compare([[bad], [bad]], floor=0.9) is None  # the start alone keeps it
    assert level_to_compare([[good], [[(1.0, 1.0), (0.7, 0.95)]]], floor=0.9) == pytest.approx(0.7)  # as deep as both reach
    assert level_to_compare([[], []], floor=0.9) is None


def test_which_runs_are_on_a_front_is_decided_on_the_validation_rows() -> None:
    lucky = run("adamw", 1e-3, 0, 0.1, 1.0, validation=place(0.9, 0.5))  # good on the reported rows only
    plain = run("adamw", 1e-4, 0, 0.5, 0.8, validation=place(0.4, 0.9))
    [row] = tabulate([lucky, plain], floor=0.9).rows
    assert front_of(row, 0, "rougeL_recall") == [(1.0, 1.0), (0.5, 0.8)]


# what is said


def said(table: Table) -> str:
    return " ".join(second_order(table, "tiny"))


def test_an_advantage_over_both_baselines_is_what_second_order_buys() -> None:
    words = said(table_of(adamw=0.91, signum=0.91, sophia=0.96))
    assert "against adamw, first order. Retain score at equal forgetting: higher in 1 of 1 (SO-NPO (sophia) +0.0" in words
    assert "against adamw and signum: SO-NPO (sophia) keeps more at equal forgetting." in words
    assert "not owed to curvature" not in words and "an advantage in 0 of its 1 cells" in words
    assert "A run trains 1.50 times as long as with adamw" in words


def test_an_advantage_that_sign_descent_has_too_is_not_curvatures() -> None:
    words = said(table_of(adamw=0.91, signum=0.96, sophia=0.96))
    assert "outside the noise and against adamw and signum: nothing." in words
    assert "Better than adamw but not than signum, so not owed to curvature: SO-NPO (sophia) keeps more" in words
    assert "an advantage in 1 of its 1 cells" in words


def test_a_tie_is_inside_the_noise_and_a_loss_is_named() -> None:
    assert "inside the noise in 1" in said(table_of(adamw=0.95, sophia=0.9505)) and "nothing." in said(table_of(adamw=0.95, sophia=0.9505))
    assert "Worse outside the noise, in either respect and against either: SO-NPO (sophia)." in said(table_of(adamw=0.97, sophia=0.91))


def test_forgetting_at_the_floor_counts_too_and_only_where_both_keep_it() -> None:
    runs = [*search("adamw", 0.95, left=0.3), *search("sophia", 0.95, left=0.1)]
    table = tabulate(runs, floor=0.9)
    assert table.differences[0].forgetting.mean == pytest.approx(-0.2)
    assert "forgets more at the floor" in said(table)
    grid = differences_grid(tabulate(runs, floor=0.97))  # adamw's timid rate keeps it, and so does sophia's: both at 0.95
    assert grid is not None and "−" not in grid.rows[0][3].partition("[")[0]


def test_one_seed_buys_nothing_that_could_be_said() -> None:
    table = tabulate([outcome for outcome in (*search("adamw", 0.91), *search("sophia", 0.96)) if outcome.trial.seed == 0], floor=0.9)
    assert "cannot be said" in said(table)


def test_a_grid_without_second_order_says_nothing_about_it() -> None:
    assert said(table_of(adamw=0.91, signum=0.95)) == ""


# warnings


def test_a_search_that_ended_at_an_edge_is_told_in_table_and_words() -> None:
    table = tabulate([outcome for outcome in search("adamw", 0.95) if outcome.trial.choice.settings["learning_rate"] != 1e-3], floor=0.9)
    [row] = table.rows
    assert row.edges == {"learning_rate": "largest"}  # one retain weight is no range
    cells = dict(zip(main_grid(table).head, main_grid(table).rows[1], strict=True))
    assert cells["settings"] == "learning_rate 0.0001 (largest tried), retain_weight 1"
    assert any("ended at the edge" in line and "FO-NPO (adamw) (largest learning_rate)" in line for line in statements(table))
    inner = table_of(adamw=0.95)
    assert not inner.edges and not any("edge" in line for line in statements(inner))


def test_the_pareto_front_of_the_cells_is_named() -> None:
    table = tabulate([*search("adamw", 0.97), *search("signum", 0.92, left=0.1), *search("sophia", 0.91, left=0.3)], floor=0.9)
    assert [row.cell.optimizer for row in table.best] == ["adamw", "signum"]
    assert any(line.startswith("On the Pareto front") and "sophia" not in line for line in statements(table))


def test_trials_without_a_result_are_told_by_reason() -> None:
    runs = [*search("adamw", 0.95), *(Outcome(run("sophia", rate, 0, 0, 0).trial, "missing", "not yet") for rate in (1, 2, 3, 4, 5, 6.0))]
    table = tabulate(runs, floor=0.9)
    assert any(line.startswith("6 of 15 trials have not run yet") for line in statements(table))
    [(names, reason)] = failures(table)
    assert reason == "not yet" and names.endswith("and 2 more") and names.count("-s0") == 4
