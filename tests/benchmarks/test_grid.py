from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from soul.benchmarks.grid import OWN_CHOICES, TINY_MODELS, Cell, Choice, Trial, cells_of, grid_choices, halton, random_choices, trials_of
from soul.benchmarks.objective import cheap_objective, objective
from soul.benchmarks.presets import PAPER_CHOICES, PRESETS, paper_cells
from soul.cli import BAD_INPUT, DONE, run_command
from soul.config import Config
from soul.grid_config import GridConfig
from soul.objectives.methods import METHODS
from soul.optim.configs import OPTIMIZERS
from soul.records import InputError

RANGES = {"learning_rates": (1e-5, 1e-3), "retain_weights": (0.5, 8.0)}


def equal(**changes: object) -> GridConfig:
    return GridConfig.model_validate({**PRESETS["equal"], **changes})


# cells and trials


def test_a_plain_grid_is_the_full_product_with_every_seed() -> None:
    config = GridConfig(methods=("ga", "npo", "po"), optimizers=("adamw", "signum"), models=("tiny", "tiny-s"), seeds=3)
    trials = config.all_trials()
    assert len(trials) == 3 * 2 * 2 * 3 == len({trial.id for trial in trials})
    places = {(trial.cell.model, trial.cell.method, trial.cell.optimizer, trial.seed) for trial in trials}
    assert places == set(itertools.product(("tiny", "tiny-s"), ("ga", "npo", "po"), ("adamw", "signum"), range(3)))


def test_a_trial_keeps_its_name_when_the_grid_grows() -> None:
    small = GridConfig(methods=("npo",), optimizers=("adamw",), learning_rates=(1e-4,))
    large = GridConfig(methods=("ga", "npo"), optimizers=("sophia", "adamw"), learning_rates=(3e-4, 1e-4), seeds=2)
    assert {trial.id for trial in small.all_trials()} < {trial.id for trial in large.all_trials()}


def test_different_settings_have_different_names_and_every_name_is_a_file_name() -> None:
    cells = cells_of(["tiny", "org/model-1.1B", "../models/model-1.1B"], ["grad_diff"], ["adamw"])
    choices = {cell: grid_choices(cell, learning_rates=(1e-4, 1.0001e-4), retain_weights=(1, 2, 3)) for cell in cells}
    names = [trial.id for trial in trials_of(choices, seeds=2)]
    assert len(set(names)) == len(names) == 3 * 6 * 2
    assert not [name for name in names if set(name) & set("/ \\:") or name.startswith(".")]


def test_seeds_come_in_rounds() -> None:
    seeds = [trial.seed for trial in equal(seeds=3, trials=2).all_trials()]
    assert seeds == sorted(seeds) and seeds.count(0) == 16 * 2


def test_an_interrupted_grid_has_tried_as_much_in_every_cell() -> None:
    trials = equal(seeds=1, trials=8).all_trials()
    for done in (1, 15, 16, 50, len(trials)):
        counts = Counter(trial.cell for trial in trials[:done])
        tried = [
            counts[cell] for cell in cells_of(("tiny",), ("ga", "grad_diff", "po", "npo"), ("adamw", "sophia", "soul_release", "signum"))
        ]
        assert max(tried) - min(tried) <= 1 and sum(tried) == done


def test_a_method_without_a_retain_term_has_no_retain_weight() -> None:
    ga, npo = Cell("tiny", "ga", "adamw"), Cell("tiny", "npo", "adamw")
    lists = {"learning_rates": (1e-4, 2e-4), "retain_weights": (1.0, 2.0, 4.0)}
    assert [choice.method for choice in grid_choices(ga, **lists)] == [{}, {}]
    assert len(grid_choices(npo, **lists)) == 6
    assert all(not choice.method for choice in random_choices(ga, 5, **RANGES))


# search


def test_every_optimizer_gets_the_same_points_and_the_same_number_of_them() -> None:
    config = equal(trials=8)
    for method in config.methods:
        points = {}
        for optimizer in config.optimizers:
            choices = config.cells()[Cell("tiny", method, optimizer)]
            assert len({choice.key for choice in choices}) == 8
            points[optimizer] = [(choice.optimizer["learning_rate"], choice.method.get("retain_weight")) for choice in choices]
        assert len({tuple(found) for found in points.values()}) == 1
    sophia = config.cells()[Cell("tiny", "npo", "sophia")]
    name, values = OWN_CHOICES["sophia"]
    assert {choice.optimizer[name] for choice in sophia} == set(values)


def test_more_trials_only_add_points() -> None:
    few, many = (random_choices(Cell("tiny", "npo", "sophia"), number, **RANGES) for number in (5, 9))
    assert many[:5] == few


def test_random_points_fill_the_range_evenly_in_the_logarithm() -> None:
    rates = sorted(float(choice.optimizer["learning_rate"]) for choice in random_choices(Cell("t", "npo", "adamw"), 63, **RANGES))
    assert rates[0] >= 1e-5 and rates[-1] <= 1e-3
    assert abs(sum(rate < 1e-4 for rate in rates) - 31.5) <= 1
    assert halton(1, 2) == 0.5 and halton(6, 2) == 0.375 and halton(5, 3) == pytest.approx(7 / 9)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_a_bad_range_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="range"):
        random_choices(Cell("t", "npo", "adamw"), 1, learning_rates=ends, retain_weights=(1, 2))


def test_the_objective_prefers_forgetting_above_the_floor_and_keeping_below_it() -> None:
    order = [(0.1, 0.9), (0.3, 1.0), (0.9, 0.95), (0.0, 0.89), (0.0, 0.5), (0.0, 0.0)]
    scores = [objective(left, kept, floor=0.9) for left, kept in order]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)


def test_the_cheap_objective_compares_with_the_model_before_the_first_step() -> None:
    before = {name: {"probability": 0.8, "exact_memorization": 0.8} for name in ("forget", "retain")}
    kept = {"forget": {"probability": 0.1, "exact_memorization": 0.3}, "retain": {"probability": 0.76, "exact_memorization": 0.8}}
    lost = {"forget": {"probability": 0.0, "exact_memorization": 0.0}, "retain": {"probability": 0.4, "exact_memorization": 0.4}}
    assert cheap_objective(kept, before, floor=0.9) == pytest.approx(-0.2)
    assert cheap_objective(lost, before, floor=0.9) == pytest.approx(-1.4)


# configs and presets


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_makes_runs_that_are_valid_and_differ_only_where_they_should(preset: str) -> None:
    config = GridConfig.model_validate({**PRESETS[preset], "preset": preset})
    for trial in config.all_trials():
        run = config.run_config(trial)
        assert isinstance(run, Config)
        assert (run.method.name, run.optimizer.name, run.train.seed) == (trial.cell.method, trial.cell.optimizer, trial.seed)
        assert run.output == f"{config.output}/trials/{trial.id}" and run.cache_folder == f"{config.output}/cache"
        assert run.prepare == config.prepare and run.data == config.data
        for section, settings in (("method", trial.choice.method), ("optimizer", trial.choice.optimizer)):
            assert settings.items() <= getattr(run, section).model_dump().items()


def test_the_paper_preset_is_the_released_table_and_says_what_is_ours() -> None:
    released = {
        ("grad_diff", "adamw"): (5e-6, 0.3),
        ("grad_diff", "soul_release"): (5e-6, 2.0),
        ("po", "adamw"): (2e-5, 1.0),
        ("po", "soul_release"): (1e-5, 5.0),
    }
    published = {cell: choice for cell, choice in PAPER_CHOICES.items() if choice.origin == "published"}
    assert {cell: (choice.optimizer["learning_rate"], choice.method["retain_weight"]) for cell, choice in published.items()} == released
    assert {cell for cell, choice in PAPER_CHOICES.items() if choice.origin == "ours"} == {
        ("ga", "adamw"),
        ("npo", "adamw"),
        ("npo", "soul_release"),
    }
    run = GridConfig.model_validate({**PRESETS["paper"], "preset": "paper"})
    config = run.run_config(run.all_trials()[2])
    assert (config.data.forget, config.train.epochs, config.train.batch_size, config.optimizer.weight_decay) == ("forget10", 5, 4, 0.1)


def test_scaling_the_papers_rates_scales_all_of_them_and_says_so() -> None:
    plain, scaled = paper_cells(("tiny",)), paper_cells(("tiny",), learning_rate_scale=20)
    for cell, [choice] in plain.items():
        [other] = scaled[cell]
        assert other.optimizer["learning_rate"] == pytest.approx(20 * float(choice.optimizer["learning_rate"]))
        assert other.origin == ("scaled" if choice.origin == "published" else "ours") and other.method == choice.method


def test_the_tables_know_every_method_and_optimizer() -> None:
    fields = GridConfig.model_fields
    # influence brings its one step along: it is crossed with no optimizer
    assert set(fields["methods"].annotation.__args__[0].__args__) == set(METHODS) - {"influence"}  # type: ignore[union-attr]
    assert set(fields["optimizers"].annotation.__args__[0].__args__) == set(OPTIMIZERS) - {"one_shot"}  # type: ignore[union-attr]
    for name in TINY_MODELS:
        config = GridConfig(models=(name,))
        assert config.run_config(config.all_trials()[0]).model.path is None


def test_other_models_are_paths_and_their_default_rates_are_smaller() -> None:
    config = GridConfig(models=("org/base", "tiny"), methods=("npo",), optimizers=("adamw",), search="random", trials=8, finetune=True)
    runs = {trial.cell.model: config.run_config(trial) for trial in config.all_trials()}
    assert runs["org/base"].model.path == "org/base" and runs["org/base"].model.finetune and runs["tiny"].model.path is None
    rates = {model: [float(c.optimizer["learning_rate"]) for c in config.cells()[Cell(model, "npo", "adamw")]] for model in runs}
    assert max(rates["org/base"]) <= 5e-5 < max(rates["tiny"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"search": "random", "learning_rates": (1e-4,)}, "two ends"),
        ({"search": "asha", "retain_weights": (4.0, 1.0)}, "two ends"),
        ({"learning_rate_scale": 2.0}, "paper"),
        ({"search": "asha", "isolated": True}, "asha"),
        ({"learning_rates": (-1.0,)}, "learning_rate"),
        ({"methods": ()}, "methods"),
        ({"retrained": "runs/gold"}, "one model given by path"),
        ({"retrained": "runs/gold", "models": ("a/b", "a/c")}, "one model given by path"),
    ],
)
def test_impossible_grids_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GridConfig.model_validate(settings)


def test_a_choice_says_what_it_is() -> None:
    assert Choice().words == "" and Choice().key == ""
    choice = Choice({"retain_weight": 2.0}, {"learning_rate": 1.234e-4})
    assert choice.words == "learning_rate 0.000123, retain_weight 2" and len(choice.key) == 6
    assert Trial(Cell("tiny", "npo", "adamw"), choice, 3).id == f"tiny-npo-adamw-{choice.key}-s3"


# command line


def test_a_dry_run_lists_the_runs_and_flags_win_over_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "equal", "--methods", "ga,npo", "--trials", "3", "--models", "tiny-s,tiny", "--seeds", "2", "--dry-run"]
    assert run_command("grid", words) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 4 * 2 * 3 * 2 and lines[0].startswith("96 runs of 16 cells in runs/equal")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "npoo"], "npoo"),
        (["--optimizer", "adamw"], "--optimizers"),
        (["--seeds", "0"], "--seeds"),
        (["--preset", "papers"], "paper"),
        (["--trials", "4", "--search", "asha", "--isolated"], "asha"),
    ],
)
def test_bad_flags_are_told_in_a_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("grid", words) == BAD_INPUT
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_a_report_without_a_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("grid", ["--report", "--output", str(tmp_path)]) == BAD_INPUT
    assert "no finished trial" in capsys.readouterr().err
