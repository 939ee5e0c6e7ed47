"""A whole run on Ray: what it leaves, that it is left alone afterwards, and that Ray does not change what is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from soul.orchestration import pipeline
from soul.orchestration.claim import run_dir
from soul.orchestration.train import TrainingStopped, fit
from soul.records import InputError
from soul.report.results import load_results
from soul.rundir import RunDir
from soul.train.engines import make_engine
from soul.train.job import TrainJob, run_job
from tests.orchestration.mini import NUM_FORGET, NUM_OTHER, Finished, fingerprint, mini, on_gpus, stamps, steps, weights

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # on a machine that does ten other things

BATCH = 8
STEPS = 3 * -(-NUM_FORGET // BATCH)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would start or join a cluster fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(pipeline, "cluster", refuse)


def test_both_arms_leave_what_the_design_names(finished: Finished) -> None:
    for folder in (finished.run, finished.twin):
        files = ("config.json", "manifest.json", "metrics.jsonl", "results.json", "report.html", "report.md", "model/README.md")
        assert all((folder / name).stat().st_size > 0 for name in files), folder
        assert list((folder / "figures").glob("*.svg")) and not (folder / "checkpoints").exists()
        manifest = json.loads((folder / "manifest.json").read_text())
        assert {"versions", "data", "seconds", "command"} <= manifest.keys() and manifest["steps"] == STEPS
        assert set(manifest["data"]) >= {"forget", "retain"} and all(len(print_) == 64 for print_ in manifest["data"].values())
    assert "SO-NPO" in (finished.run / "report.html").read_text() and "FO-NPO" in (finished.run / "report.html").read_text()


def test_results_are_measured_and_complete(finished: Finished) -> None:
    for folder, optimizer in ((finished.run, "sophia"), (finished.twin, "adamw")):
        results = load_results(folder)  # validates: every null has its reason
        assert (results.method, results.optimizer, results.benchmark) == ("npo", optimizer, "tofu/forget05")
        assert results.splits == {"forget": NUM_FORGET, "holdout": 6, "real_authors": 6, "retain": NUM_OTHER, "world_facts": 6}
        for name in ("target", "unlearned", "retrained"):
            model = results.models[name]  # type: ignore[index]
            assert model is not None and model.forget_quality is not None and model.model_utility is not None and model.mia_auc is not None
        assert results.models["retrained"].forget_quality == pytest.approx(1.0)  # type: ignore[union-attr]
        assert [row.epoch for row in results.epochs] == [0, 1, 2, 3] and results.cost.train_s


def test_metrics_have_one_line_per_step(finished: Finished) -> None:
    for folder in (finished.run, finished.twin):
        rows = steps(folder)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert {row["total_steps"] for row in rows} == {STEPS}


def test_the_model_is_a_hugging_face_folder(finished: Finished) -> None:
    target = weights(finished.target)
    for folder in (finished.run, finished.twin):
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert len(AutoTokenizer.from_pretrained(folder / "model")) == model.config.vocab_size
        exported = weights(folder / "model")
        assert exported.keys() == target.keys()
        assert any(not torch.equal(exported[name], target[name]) for name in target)


def test_a_finished_run_is_left_alone(finished: Finished, no_ray: None) -> None:
    before = stamps(finished.run.parent)
    assert pipeline.run(finished.config) == finished.run
    assert pipeline.resume(finished.run) == finished.run
    assert stamps(finished.run.parent) == before


def test_other_settings_do_not_take_over_a_run(finished: Finished, no_ray: None) -> None:
    before = stamps(finished.run)
    other = mini(finished.data, finished.run, twin="adamw", train={"epochs": 4}, method={"name": "npo", "beta": 0.3})
    with pytest.raises(InputError, match=r"holds another run: its method, train settings differ\. Choose another --output"):
        pipeline.run(other)
    assert stamps(finished.run) == before


def test_settings_of_a_run_that_never_trained_may_be_corrected(tofu: Path, tmp_path: Path, no_ray: None) -> None:
    for epochs in (2, 4):
        with pytest.raises(AssertionError, match="Ray was started"):
            pipeline.run(mini(tofu, tmp_path / "run", train={"epochs": epochs}))
    assert json.loads(run_dir(mini(tofu, tmp_path / "run")).config.read_text())["train"]["epochs"] == 4


def test_new_rows_are_another_experiment(finished: Finished, no_ray: None, tmp_path: Path) -> None:
    changed = tmp_path / "tofu"
    changed.mkdir()
    for file in finished.data.iterdir():
        (changed / file.name).write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    config = finished.config.model_copy(update={"data": finished.config.data.model_copy(update={"source": str(changed)})})
    RunDir(tmp_path / "run").create()
    (tmp_path / "run" / "config.json").write_text(config.model_dump_json())
    with pytest.raises(AssertionError, match="Ray was started"):
        pipeline.run(config.model_copy(update={"output": str(tmp_path / "run")}))


def bare(job: TrainJob, folder: Path) -> Path:
    """The job without Ray, on the local feed."""
    moved = replace(job, run_dir=str(folder), export=str(folder / "model"))
    engine = make_engine(moved.engine, rank=0, world=1, local_rank=0)
    run_job(moved, engine, resume_from=None, save_checkpoint=lambda engine, progress: None)
    return folder


@pytest.mark.parametrize("optimizer", ["sophia", "adamw"])
def test_ray_computes_what_a_bare_process_does_bit_for_bit(finished: Finished, optimizer: str, tmp_path: Path) -> None:
    run = {"sophia": finished.run, "adamw": finished.twin}[optimizer]
    alone = bare(finished.jobs[optimizer], tmp_path)
    assert steps(alone) == steps(run)
    assert fingerprint(alone / "model") == fingerprint(run / "model")


def on_two_workers(job: TrainJob, engine: Any, folder: Path, **train: Any) -> TrainJob:
    config = on_gpus(name=engine, num_workers=2, max_failures=0)
    changed = job.train.model_copy(update={"keep_checkpoints": 2, **train})
    return replace(job, run_dir=str(folder), export=str(folder / "model"), engine=config, train=changed)


def checkpoints(folder: Path) -> list[str]:
    assert not list(folder.glob("checkpoints/.staging/*"))
    return sorted(path.name for path in folder.glob("checkpoints/*/step_*"))


def assert_close(folder: Path, finished: Finished) -> None:
    losses: Callable[[Path], list[float]] = lambda run: [row["loss"] for row in steps(run)]  # noqa: E731
    assert losses(folder) == pytest.approx(losses(finished.run), rel=1e-5)
    together, alone = weights(folder / "model"), weights(finished.run / "model")
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-4)


def test_two_workers_compute_what_one_does_and_keep_the_last_checkpoints(finished: Finished, tmp_path: Path) -> None:
    fit(on_two_workers(finished.jobs["sophia"], "fsdp", tmp_path, save_steps=2), name="two")
    assert checkpoints(tmp_path) == ["step_00000006", "step_00000008"]  # of 2, 4, 6 and 8; behind the last step there is the model
    assert_close(tmp_path, finished)


def test_a_model_that_cannot_be_written_stops_all_workers_and_is_kept_as_a_checkpoint(finished: Finished, tmp_path: Path) -> None:
    job = on_two_workers(finished.jobs["sophia"], "ddp", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingStopped, match=r"the model cannot be written to .*/file/model: .*The last checkpoint is kept"):
        fit(replace(job, export=str(tmp_path / "file" / "model")), name="two")
    assert checkpoints(tmp_path) == ["step_00000009"]
    before = steps(tmp_path)
    fit(job, name="two")
    assert steps(tmp_path) == before and checkpoints(tmp_path) == ["step_00000009"]  # nothing was trained again
    assert_close(tmp_path, finished)
