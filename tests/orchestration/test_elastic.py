"""A run goes on where it has room: with another number of workers, on another engine, from the checkpoint it has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.train import TrainingFailedError

from soul.config import Config
from soul.orchestration.arm import unlearn
from soul.orchestration.claim import check_claim, check_recipe, claim, decided_run, is_done
from soul.orchestration.prepare import Prepared
from soul.orchestration.progress import Display
from soul.orchestration.train import fit
from soul.records import InputError
from soul.rundir import RunDir, digest, write_json
from soul.train.engine import EngineConfig
from soul.train.engines import make_engine
from soul.train.job import JobResult, TrainJob, run_job
from tests.orchestration.mini import STEPS, TRAIN, Finished, on_gpus
from tests.orchestration.test_faults import children

SHORT = [{"name": "fsdp", "num_workers": 2}, {"name": "deepspeed", "num_workers": 1, "zero_stage": 2}]
LONG = [*SHORT, {"name": "single"}, {"name": "ddp", "num_workers": 2}, {"name": "deepspeed", "num_workers": 2}]


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return {row["step"]: row["loss"] for row in rows}


def killed_at(job: TrainJob, step: int) -> None:
    """Run the job until a worker is killed behind `step`; no worker is started again."""

    def kill(now: int, _: int) -> None:
        if now >= step:
            for process in children("RayTrainWorker")[:1]:
                process.kill()

    with pytest.raises(TrainingFailedError):
        fit(job, name="elastic", on_progress=kill)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engines", [SHORT, LONG], ids=["2 -> 1", "2 -> 1 -> 1 -> 2 -> 2"])
def test_a_run_changes_engines_and_workers_on_its_way(engines: list[Mapping[str, Any]], finished: Finished, tmp_path: Path) -> None:
    made = finished.jobs["adamw"]
    job = replace(made, train=made.train.model_copy(update=TRAIN))
    straight = replace(job, run_dir=str(tmp_path / "straight"), export=str(tmp_path / "straight" / "model"))
    run_job(straight, make_engine(job.engine, rank=0, world=1, local_rank=0), resume_from=None, save_checkpoint=lambda *_: None)

    run = tmp_path / "moved"
    moved = replace(job, run_dir=str(run), export=str(run / "model"))
    for i, engine in enumerate(engines[:-1]):
        killed_at(replace(moved, engine=on_gpus(**engine, max_failures=0)), 40 + 45 * i)
        assert not (run / "model").exists(), "the run ended before its worker was killed"
    result = fit(replace(moved, engine=on_gpus(**engines[-1])), name="elastic")
    assert result.steps == STEPS
    assert losses(run) == pytest.approx(losses(tmp_path / "straight"), rel=0.01)


def config(folder: Path, **values: Any) -> Config:
    return Config.model_validate({"output": str(folder / "run"), **values})


def begun(folder: Path) -> None:
    claim(config(folder, engine={"name": "fsdp", "num_workers": 2}))
    RunDir(folder / "run").finish("tokens", "key", {})


def test_a_run_of_an_earlier_version_is_known_and_goes_on_in_its_precision(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    written = json.loads(config(tmp_path).model_dump_json())
    del written["engine"]["device"]
    written["engine"]["precision"] = "fp32"
    write_json(run.config, written)
    placed = {"name", "num_workers", "min_workers", "max_failures", "zero_stage", "offload", "gradient_checkpointing"}
    kept = {name: value for name, value in written.items() if name not in {"output", "cache", "address", "resume", "progress", "verbose"}}
    kept["engine"] = {name: value for name, value in written["engine"].items() if name not in placed}
    run.finish("outcome", digest([kept, ["rows"]]), {})
    run.results.write_text("{}")
    run.model.mkdir()
    check_claim(config(tmp_path))
    assert is_done(config(tmp_path), ["rows"]) and not is_done(config(tmp_path), ["other rows"])
    claim(config(tmp_path))
    assert decided_run(config(tmp_path), "gpu").engine.computes_in == "fp32"
    with pytest.raises(InputError, match=r"its engine settings differ"):
        check_claim(config(tmp_path, engine={"precision": "bf16"}))
    write_json(run.config, {**written, "optimiser": "sophia"})
    with pytest.raises(InputError, match=r"that this version cannot read \(config.json: optimiser\)"):
        check_claim(config(tmp_path))


def test_a_run_that_a_version_of_another_recipe_began_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of its steps would be of one order of rows and half of another. One that has come to its end is read, and not made again."""
    monkeypatch.setattr("soul.orchestration.claim.RECIPE", 1)
    claim(config(tmp_path))
    monkeypatch.undo()
    check_claim(config(tmp_path))  # nothing has been computed yet
    run = RunDir(tmp_path / "run")
    run.finish("tokens", "key", {})
    with pytest.raises(InputError, match=r"holds a run of an earlier version of soul"):
        check_claim(config(tmp_path))
    run.finish("outcome", "key", {})
    check_claim(config(tmp_path))
    with pytest.raises(InputError, match=r"Its report and its model can still be read"):
        check_recipe(config(tmp_path))
    run.marker("recipe").unlink()  # as the versions left it that knew of none
    with pytest.raises(InputError, match=r"holds a run of an earlier version of soul"):
        check_recipe(config(tmp_path))


def test_a_run_keeps_the_precision_it_began_with(tmp_path: Path) -> None:
    claim(config(tmp_path))
    assert decided_run(config(tmp_path), "gpu").engine.computes_in == "bf16"
    assert decided_run(config(tmp_path), "cpu").engine.computes_in == "fp32"  # nothing has been computed yet
    assert decided_run(config(tmp_path), "gpu").engine.computes_in == "bf16"
    RunDir(tmp_path / "run").finish("tokens", "key", {})
    again = decided_run(config(tmp_path), "cpu").engine
    assert (again.runs_on, again.computes_in) == ("cpu", "bf16")
    check_claim(config(tmp_path, engine={"precision": "bf16"}))  # told what it does
    with pytest.raises(InputError, match=r"its engine settings differ"):
        check_claim(config(tmp_path, engine={"precision": "fp32"}))


def test_resuming_may_move_a_run(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(InputError, match=r"its engine settings differ\. --resume continues it on this engine"):
        check_claim(config(tmp_path, engine={"name": "deepspeed", "zero_stage": 1}))
    check_claim(config(tmp_path, engine={"name": "deepspeed", "zero_stage": 1}, resume=True))


def test_a_run_that_is_continued_may_be_saved_at_other_times(tmp_path: Path) -> None:
    """By another command, and by another version, which saved after every epoch: it goes on from the checkpoints that there are."""
    often = {"save_minutes": None, "save_steps": 7, "save_every": 3, "keep_checkpoints": 5}
    claim(config(tmp_path))
    RunDir(tmp_path / "run").finish("tokens", "key", {})
    check_claim(config(tmp_path, train=often))
    with pytest.raises(InputError, match="its train settings differ"):
        check_claim(config(tmp_path, train={**often, "eval_every": 2}))
    names: list[str] = []

    def fit_nothing(job: TrainJob, *, name: str, **_: object) -> JobResult:
        names.append(name)
        return JobResult(job.train.epochs, 0, 0.0, 0, 0, [])

    for i, train in enumerate(({}, often, {"epochs": 4})):
        arm = config(tmp_path / str(i), train=train, method="ga").decided("cpu")
        unlearn(arm, Prepared("m", "k"), {"forget": Path("f"), "retain": Path("r")}, Display(enabled=False), fit=fit_nothing)
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("values", [{"engine": {"precision": "bf16"}}, {"train": {"seed": 1}}, {"engine": {"max_grad_norm": None}}])
def test_resuming_may_not_change_what_is_computed(values: dict[str, Any], tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(InputError, match=r"settings differ\. Choose another --output"):
        check_claim(config(tmp_path, resume=True, **values))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"min_workers": 1}, "min_workers belongs to engines of several workers, got single"),
        ({"name": "fsdp", "num_workers": 2, "min_workers": 3}, "min_workers must be at most num_workers 2, got 3"),
    ],
)
def test_bounds_without_a_meaning_are_refused(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**engine)
