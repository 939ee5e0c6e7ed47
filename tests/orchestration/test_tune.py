"""Grids on Ray Tune: what is shared is made once, a failing trial is a row, nothing is repeated, and no row of the data reaches Tune."""

from __future__ import annotations

import binascii
import dataclasses
import json
import os
import pickletools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray import tune
from ray.tune.logger import JsonLoggerCallback

from soul.benchmarks.presets import PRESETS
from soul.config import Config
from soul.grid_config import GridConfig
from soul.orchestration import pipeline
from soul.orchestration.halving import GroupedHalving
from soul.orchestration.trial import checkpoints, fit_here, flat_epoch, nested_epoch
from soul.orchestration.tune import Planned, plan, run_grid
from soul.records import InputError
from soul.report.grid_build import build_grid_report, read_outcomes
from soul.report.results import load_results
from tests.orchestration.mini import ROOT, Finished, fingerprint, found_in, splits, stamps, steps, weights

COMMON: dict[str, Any] = {"prepare": {"max_steps": 15}, "train": {"epochs": 2}, "evaluate": {"max_new_tokens": 8}, "progress": False}
COMMON |= {"engine": {"precision": "fp32"}, "max_concurrent": 2}  # logical GPUs are eight, cores are two
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 400, "max_length": 256}
CANARY = splits()["forget05"][7].response


@pytest.fixture(autouse=True, scope="module")
def _a_model_for_tests() -> Iterator[None]:
    """The grid's smallest model is too large for these tests."""
    from soul import grid_config
    from soul.benchmarks import grid

    with pytest.MonkeyPatch.context() as patch:
        for module in (grid, grid_config):
            patch.setattr(module, "TINY_MODELS", {**grid.TINY_MODELS, "mini": SMALL})
        yield


def grid_of(data: Path, output: Path, **settings: Any) -> GridConfig:
    chosen = {"methods": ("npo",), "optimizers": ("adamw",), "models": ("mini",), **COMMON, **settings}
    return GridConfig.model_validate({"data": {"source": str(data)}, "output": str(output), **chosen})


def folder_of(item: Planned) -> Path:
    return Path(item.config.output)


# --- inside one process


def test_an_epochs_row_survives_its_way_through_tune() -> None:
    row = {"epoch": 2, "step": 14, "forget": {"probability": 0.25, "nll": 1.5}, "retain": {"probability": 0.75, "nll": 0.5}}
    flat = flat_epoch(row)
    assert all(isinstance(value, int | float) for value in flat.values())
    assert nested_epoch({**flat, "trial_id": "x", "config/run/seed": 1, "time_total_s": 3.0}) == row


def halving_decision(scheduler: GroupedHalving, group: str, name: str, epoch: int, score: float) -> str:
    trial: Any = SimpleNamespace(trial_id=f"{group}-{name}", config={"run": {"group": group}})
    if epoch == 1:
        scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {"epoch": epoch, "score": score})


def test_halving_compares_within_a_group_only() -> None:
    scheduler = GroupedHalving(epochs=4)
    assert [halving_decision(scheduler, "strong", str(i), 1, -0.1) for i in range(4)] == ["CONTINUE"] * 4
    assert [halving_decision(scheduler, "weak", str(i), 1, -1.9) for i in range(4)] == ["CONTINUE"] * 4
    assert halving_decision(scheduler, "strong", "late", 1, -0.5) == "STOP"
    assert halving_decision(scheduler, "weak", "late", 1, -0.5) == "CONTINUE"


def test_halving_never_stops_a_trial_at_its_last_report() -> None:
    scheduler = GroupedHalving(epochs=2)
    trial: Any = SimpleNamespace(trial_id="a", config={"run": {"group": "g"}})
    scheduler.on_trial_add(None, trial)
    for result in ({"epoch": 0, "score": 0.0}, {"epoch": 1, "score": -0.5}, {"epoch": 2, "score": -0.4}, {"epoch": 3}):
        assert scheduler.on_trial_result(None, trial, result) == "CONTINUE"


@pytest.mark.slow
@pytest.mark.ray
def test_a_trial_that_broke_off_goes_on_from_its_last_checkpoint(finished: Finished, tmp_path: Path) -> None:
    made = finished.jobs["sophia"]
    often = made.train.model_copy(update={"save_steps": 2})
    job = dataclasses.replace(made, export=str(tmp_path / "model"), run_dir=str(tmp_path), train=often)
    heard: list[int] = []

    class Killed(BaseException):
        pass

    def stop_after_the_first(row: Mapping[str, Any]) -> None:
        heard.append(row["epoch"])
        if row["epoch"] == 1:
            raise Killed

    with pytest.raises(Killed):
        fit_here(job, name="x", on_epoch=stop_after_the_first)
    [kept] = checkpoints(tmp_path / "checkpoints" / "x")
    assert heard == [0, 1] and not (tmp_path / "model").exists()
    fit_here(job, name="x", on_epoch=lambda row: heard.append(row["epoch"]))
    assert heard == [0, 1, 0, 1, 2, 3] and not kept.exists()  # a new scheduler hears all; two checkpoints are kept
    assert steps(tmp_path) == steps(finished.run)
    assert all((value == weights(finished.run / "model")[name]).all() for name, value in weights(tmp_path / "model").items())


# --- grids


@pytest.fixture(scope="module")
def small_grid(ray_cluster: None, tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> GridConfig:
    """Two choices of NPO, one of which blows up."""
    config = grid_of(tofu, tmp_path_factory.mktemp("grid") / "g", learning_rates=(1e-3, 1e30))
    run_grid(config)
    return config


@pytest.mark.ray
def test_every_cell_is_a_run_and_a_failing_one_is_a_row_with_its_reason(small_grid: GridConfig) -> None:
    good, bad = plan(small_grid)
    results = load_results(folder_of(good))
    assert (results.method, results.optimizer, results.seed) == ("npo", "adamw", 0) and results.models["retrained"] is not None
    assert results.reasons["cost.peak_memory_bytes"] and len(results.epochs) == 3
    for name in ("config.json", "manifest.json", "metrics.jsonl", "model/model.safetensors", "logs"):
        assert (folder_of(good) / name).exists(), name
    assert not (folder_of(good) / "checkpoints").exists()
    assert Config.model_validate_json((folder_of(good) / "config.json").read_text()) == good.config
    outcomes = read_outcomes(small_grid.all_trials(), Path(small_grid.output))
    assert [outcome.state for outcome in outcomes] == ["done", "failed"]
    assert "not finite" in outcomes[1].reason
    build_grid_report(small_grid.all_trials(), Path(small_grid.output), floor=0.9, samples=False)
    assert bad.trial.id in (Path(small_grid.output) / "report.html").read_text()


@pytest.mark.ray
def test_target_and_retrained_are_made_once_and_nothing_is_repeated(small_grid: GridConfig, tofu: Path) -> None:
    output = Path(small_grid.output)
    assert len(list((output / "cache" / "models").iterdir())) == 2
    before = {name: stamp for name, stamp in stamps(output).items() if not name.startswith("tune/")}
    again = run_grid(small_grid)
    assert {name: stamp for name, stamp in stamps(output).items() if not name.startswith("tune/")} == before
    assert len(list((output / "tune").glob("session-*"))) == 1 and len(again) == 2
    larger = grid_of(tofu, output, learning_rates=(1e-3, 1e30), optimizers=("adamw", "signum"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridConfig, "all_trials", lambda self: [t for t in _all(self) if t.choice.optimizer["learning_rate"] == 1e-3])
        planned = run_grid(larger)
    assert [item.trial.cell.optimizer for item in planned] == ["adamw", "signum"]
    new = stamps(output)
    assert all(new[name] == stamp for name, stamp in before.items()) and load_results(folder_of(planned[1])).optimizer == "signum"
    assert len(list((output / "cache" / "models").iterdir())) == 2


_all = GridConfig.all_trials


@pytest.mark.ray
def test_a_trial_is_bit_for_bit_the_run_of_the_same_config(small_grid: GridConfig, tmp_path: Path) -> None:
    good = plan(small_grid)[0]
    alone = good.config.model_copy(update={"output": str(tmp_path / "alone")})
    run = pipeline.run(alone)
    assert fingerprint(run / "model") == fingerprint(folder_of(good) / "model") and steps(run) == steps(folder_of(good))
    ours, normal = load_results(folder_of(good)), load_results(run)
    assert ours.models == normal.models and ours.epochs == normal.epochs and ours.settings == normal.settings


@pytest.mark.ray
def test_another_grid_in_the_same_folder_is_refused_before_it_touches_anything(small_grid: GridConfig, tofu: Path) -> None:
    before = stamps(Path(small_grid.output))
    with pytest.raises(InputError, match="holds another run"):
        run_grid(grid_of(tofu, Path(small_grid.output), learning_rates=(1e-3,), train={"epochs": 3}))
    assert stamps(Path(small_grid.output)) == before


@pytest.mark.slow
@pytest.mark.ray
def test_halving_spends_full_runs_on_survivors_only(ray_cluster: None, tofu: Path, small_grid: GridConfig, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"search": "asha", "trials": 4, "learning_rates": (1e-6, 1e-2), "train": {"epochs": 4}}
    config = grid_of(tofu, tmp_path / "g", cache=str(Path(small_grid.output) / "cache"), **settings)
    run_grid(config)
    outcomes = read_outcomes(config.all_trials(), tmp_path / "g")
    states = [outcome.state for outcome in outcomes]
    assert set(states) <= {"done", "stopped"} and "done" in states and "stopped" in states
    for outcome in outcomes:
        folder = tmp_path / "g" / "trials" / outcome.trial.id
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["step"] == last["total_steps"]) == (outcome.state == "done")
    before = stamps(tmp_path / "g" / "trials")
    run_grid(config)
    assert stamps(tmp_path / "g" / "trials") == before


# --- privacy


def decoded(data: bytes, depth: int = 0) -> Iterator[bytes]:
    """The bytes, and what pickles and hexadecimal text in them hold."""
    yield data
    if depth > 4:
        return
    for found in re.findall(rb"[0-9a-f]{40,}", data):
        yield from decoded(binascii.unhexlify(found[: len(found) // 2 * 2]), depth + 1)
    for start in {match.start() for match in re.finditer(rb"\x80[\x02-\x05]", data)}:
        try:
            for _, argument, _ in pickletools.genops(data[start:]):
                if isinstance(argument, str | bytes):
                    yield from decoded(argument.encode() if isinstance(argument, str) else argument, depth + 1)
        except ValueError:  # these bytes began like a pickle and are none
            continue


def holders(text: str, folder: Path) -> list[str]:
    needle = text.encode()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [str(path.relative_to(folder)) for path in files if any(needle in part for part in decoded(path.read_bytes()))]


@pytest.mark.ray
def test_no_forget_text_reaches_tune_and_the_search_for_it_can_find_one(small_grid: GridConfig, tofu: Path, tmp_path: Path) -> None:
    output = Path(small_grid.output)
    assert found_in(CANARY, tofu)  # it is a row of the data
    for text in (CANARY, CANARY[10:40]):
        assert not holders(text, output / "tune") and not holders(text, output / "trials")
    assert not found_in(CANARY, output / "cache")
    assert holders(plan(small_grid)[0].trial.id, output / "tune")  # the folder does hold Tune's state
    [events] = (output / "tune").glob(f"*/{plan(small_grid)[0].trial.id}/events.out.tfevents.*")  # TensorBoard's
    assert b"forget/probability" in events.read_bytes()
    storage = tune.RunConfig(storage_path=str(tmp_path), verbose=0, callbacks=[JsonLoggerCallback()])
    tune.Tuner(lambda params: tune.report({"x": 1}), param_space={"leak": CANARY}, run_config=storage).fit()
    assert {Path(name).suffix for name in holders(CANARY, tmp_path)} >= {".pkl", ".json"}


def test_tune_is_told_names_and_numbers_only(tmp_path: Path) -> None:
    config = GridConfig.model_validate({**PRESETS["equal"], "output": str(tmp_path / "g"), "samples": True})
    for item in plan(config):
        allowed = {"id", "group", "folder", "method", "optimizer", "seed", "isolated", "learning_rate", "retain_weight", "target_unclipped"}
        assert set(item.params) <= allowed
        texts = [value for name, value in item.params.items() if isinstance(value, str) and name != "folder"]
        assert all(re.fullmatch(r"[\w.\-]+", text) for text in texts)


# --- trials with processes of their own


def figures(folder: Path) -> tuple[Any, Any]:
    found = load_results(folder)
    return found.models, found.epochs


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_trial_in_processes_of_its_own_gives_the_same_figures_and_a_peak_memory(
    small_grid: GridConfig, tofu: Path, tmp_path: Path
) -> None:
    shared = folder_of(plan(small_grid)[0])
    cache = str(Path(small_grid.output) / "cache")
    alone = grid_of(tofu, tmp_path / "alone", cache=cache, learning_rates=(1e-3,), isolated=True)
    [item] = run_grid(alone)
    assert figures(folder_of(item)) == figures(shared) and fingerprint(folder_of(item) / "model") == fingerprint(shared / "model")
    ours, theirs = load_results(folder_of(item)), load_results(shared)
    assert theirs.cost.peak_memory_bytes is None and "--isolated" in theirs.reasons["cost.peak_memory_bytes"]
    assert (ours.cost.peak_memory_bytes or 0) > 50 * 2**20 and "cost.peak_memory_bytes" not in ours.reasons


WHOLE_CLUSTER = """
import json, sys
import ray
from soul.benchmarks import grid
from soul import grid_config
from soul.orchestration.cluster import worker_environment
from soul.orchestration.tune import run_grid

settings, tiny = map(json.loads, sys.argv[1:])
grid.TINY_MODELS = grid_config.TINY_MODELS = {"mini": tiny}
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False,
         runtime_env={"env_vars": worker_environment()})
run_grid(grid_config.GridConfig.model_validate(settings))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_trials_that_need_every_cpu_of_the_cluster_wait_for_each_other_and_not_for_ever(
    small_grid: GridConfig, tofu: Path, tmp_path: Path
) -> None:
    """Two workers a trial on a cluster of two CPUs; their figures are those of one process."""
    cache = str(Path(small_grid.output) / "cache")
    changes: dict[str, Any] = {"learning_rates": (1e-3, 3e-4), "engine": {"name": "ddp", "num_workers": 2}, "cache": cache}
    config = grid_of(tofu, tmp_path / "g", **changes)
    command = [sys.executable, "-c", WHOLE_CLUSTER, config.model_dump_json(), json.dumps(SMALL)]
    subprocess.run(command, check=True, timeout=800, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    outcomes = read_outcomes(config.all_trials(), Path(config.output))
    assert [outcome.state for outcome in outcomes] == ["done", "done"]
    ours, single = outcomes[0], read_outcomes(small_grid.all_trials(), Path(small_grid.output))[0]
    assert ours.trial == single.trial and ours.cost["peak_memory_bytes"]
    for metric in ("probability", "exact_memorization"):
        for split in ("forget", "retain"):
            assert ours.values[f"{split}.{metric}"] == pytest.approx(single.values[f"{split}.{metric}"], abs=2e-3), (split, metric)
