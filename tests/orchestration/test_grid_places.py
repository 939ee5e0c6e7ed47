"""A grid on a bucket, without Ray: trials are named by URIs, go on from what another node left, and are reported on from anywhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from soul import store
from soul.benchmarks.grid import Cell, Choice, Trial
from soul.benchmarks.outcomes import CRASHED, FAILED, MARK_KEY, read_outcome
from soul.cli import BAD_INPUT, DONE, main
from soul.grid_config import GridConfig
from soul.object_store import find, read_bytes
from soul.orchestration import disks
from soul.orchestration.attempts import REPEATS, Attempt
from soul.orchestration.claim import claim, run_dir
from soul.orchestration.ready import check_grid
from soul.orchestration.trial import checkpoints, fit_here
from soul.orchestration.tune import plan
from soul.records import InputError
from soul.report.grid_build import build_grid_report
from soul.rundir import RunDir
from soul.store import COPIES_VARIABLE, attach, discard, holds, path_of, publish, push
from soul.train.job import TrainJob
from tests.benchmarks.test_grid_table import write_trial
from tests.orchestration.mini import fingerprint, steps
from tests.s3 import Store
from tests.train.test_job import folder, job_in

__all__ = ["folder"]  # the fixture: a model and token stores of a few rows

FEW = {"num_authors": 20, "forget": "forget10"}
FLAGS = ["grid", "--methods", "npo", "--optimizers", "adamw", "--models", "tiny-s"]
AUTHORS = ["--num-authors", "20", "--forget", "forget10"]


def test_a_trial_is_told_uris_and_nothing_of_the_drivers_disk(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path))
    config = GridConfig.model_validate({"models": ("tiny-s",), "output": f"{bucket}/g"})
    for item in plan(config):
        assert item.params["folder"] == f"{bucket}/g/trials/{item.trial.id}" == item.config.output
        assert str(tmp_path) not in json.dumps(item.params)
        assert item.config.cache_folder == f"{bucket}/g/cache"


# --- training that goes on elsewhere


class Killed(BaseException):
    """What no handler of ours stops."""


def killed_after(epoch: int) -> Any:
    def hear(row: Mapping[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Killed

    return hear


def on_bucket(job: TrainJob, uri: str) -> TrainJob:
    return dataclasses.replace(job, run_dir=uri, export=f"{uri}/model")


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> TrainJob:
    made = job_in(folder, tmp_path / "beside", epochs=4, save_every=1, keep_checkpoints=1)
    return dataclasses.replace(made, engine=made.engine.decided("cpu"))


def test_another_node_goes_on_from_the_checkpoint_of_a_lost_one(
    job: TrainJob, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_here(job, name="x", on_epoch=lambda row: None)
    uri = f"{bucket}/trials/a"
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "lost"))
    with pytest.raises(Killed):
        fit_here(on_bucket(job, uri), name="x", on_epoch=killed_after(3))
    shutil.rmtree(tmp_path / "lost")
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "other"))
    assert [path.name for path in checkpoints(path_of(uri) / "checkpoints" / "x")] == ["step_00000006"]
    heard: list[int] = []
    result = fit_here(on_bucket(job, uri), name="x", on_epoch=lambda row: heard.append(row["epoch"]))
    first_step = json.loads((read_bytes(f"{uri}/metrics.jsonl") or b"").splitlines()[0])["step"]
    assert (heard, result.steps, first_step) == ([0, 1, 2, 3, 4], 12, 1)
    assert steps(path_of(uri)) == steps(Path(job.run_dir))
    assert fingerprint(path_of(uri) / "model") == fingerprint(Path(job.export)) and holds(path_of(uri) / "model")
    kept = {name.partition("/")[0] for name in find(f"{uri}/checkpoints/x") or {}}
    assert kept == {"step_00000009"}  # as many as --keep-checkpoints says, in the store too


def test_a_checkpoint_whose_upload_broke_off_is_not_gone_on_from(
    job: TrainJob, bucket: str, s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{bucket}/trials/a"
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "lost"))

    def refused(request: str) -> int | None:
        return 403 if request.startswith("PUT") and "step_00000006/" in request and "json" not in request else None

    with s3_store.failing(refused), pytest.raises(OSError, match="permission denied"):
        fit_here(on_bucket(job, uri), name="x", on_epoch=lambda row: None)
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "other"))
    assert any("step_00000006" in name for name in find(uri) or {})
    assert [path.name for path in checkpoints(path_of(uri) / "checkpoints" / "x")] == ["step_00000003"]


def test_a_folder_whose_deletion_broke_off_is_not_taken_for_whole(bucket: str, s3_store: Store, tmp_path: Path) -> None:
    folder = path_of(f"{bucket}/c")
    folder.mkdir(parents=True)
    for name in "abc":
        (folder / name).write_text(name)
    publish(folder)
    assert holds(folder)
    deleted: list[str] = []

    def after_the_first(request: str) -> int | None:
        deleted.extend([request] if request.startswith("DELETE") else [])
        return 403 if len(deleted) > 1 else None

    with s3_store.failing(after_the_first), pytest.raises(OSError, match="permission denied"):
        discard(folder)
    assert find(f"{bucket}/c") and not holds(folder) and not folder.exists()
    discard(folder)
    assert not find(f"{bucket}/c")


# --- attempts


def test_attempts_without_progress_are_counted_wherever_they_are_made(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(node: str, session: str = "s") -> Attempt:
        monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / node))
        run = RunDir.at(f"{bucket}/trials/a")
        attach(run.path)
        return Attempt.begin(run, session)

    assert [begin(node).starts for node in ("a", "b", "a")] == [1, 2, 3] and REPEATS == 2
    lost = begin("c")
    assert lost.is_one_too_many and "broke off 3 times" in lost.reason and "node was lost" in lost.reason
    checkpoint = lost.run.checkpoints / "x" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "w").write_text("w")
    publish(checkpoint)
    assert [begin("a").starts, begin("b").starts] == [1, 2]  # it got further, so it may break off again
    with pytest.raises(ValueError, match="a defect"), begin("b"):
        raise ValueError("a defect")
    crashed = begin("c")
    assert crashed.is_one_too_many and "ValueError" in crashed.reason and "a defect" not in crashed.reason
    crashed.run.finish("train", "k", {})
    assert begin("a").starts == 1
    assert begin("a", session="the same command again").starts == 1


# --- disks


class FakeCluster:
    """Nodes that see these folders, asked as Ray's are."""

    def __init__(self, *disks: tuple[Path, ...]) -> None:
        self.disks = disks

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": f"{index:056x}", "Alive": True} for index in range(len(self.disks))]

    def remote(self, look: Any) -> Any:
        del look
        return self

    def options(self, *, num_cpus: int, scheduling_strategy: Any) -> Any:
        mounted = self.disks[int(scheduling_strategy.node_id, 16)]

        def ask(paths: list[str]) -> list[int]:
            return [
                i for i, path in enumerate(paths) if not (Path(path).exists() and any(Path(path).is_relative_to(disk) for disk in mounted))
            ]

        return SimpleNamespace(remote=ask)

    def get(self, answers: list[list[int]], timeout: float) -> list[list[int]]:
        return answers


def test_a_folder_that_a_node_does_not_see_is_refused_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(disks, "ray", FakeCluster((shared, own), (shared,), (shared,)))
    disks.check_disks(
        written={"--output": str(shared / "g"), "--cache": None}, read={"--models x/y": "x/y", "--retrained": "s3://bucket/run"}
    )
    assert list(shared.rglob("*")) == [shared / "g"]  # nothing is left of the question
    for told in ({"written": {"--output": str(own / "g")}, "read": {}}, {"written": {}, "read": {"--models": str(own)}}):
        with pytest.raises(InputError, match=r"on a disk that 2 of the cluster's 3 nodes do not see"):
            disks.check_disks(**told)
    monkeypatch.setattr(disks, "ray", FakeCluster((own,)))
    disks.check_disks(written={"--output": str(own / "g")}, read={})


# --- the report


def test_the_report_of_a_grid_on_a_bucket_is_the_one_of_a_folder(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = [Choice({}, {"learning_rate": rate}) for rate in (1e-4, 2e-4)]
    trials = [
        Trial(Cell("tiny", "npo", optimizer), choice, seed) for seed in (0, 1) for optimizer in ("adamw", "sophia") for choice in choices
    ]
    beside, uri = tmp_path / "beside", f"{bucket}/runs/grid"
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "node"))
    for output in (beside, path_of(uri)):
        for number, trial in enumerate(trials[:-2]):
            write_trial(output, trial, offset=0.1 * number)
        RunDir(output / "trials" / trials[-2].id).finish(FAILED, MARK_KEY, {"reason": "the forget loss is not finite"})
        RunDir(output / "trials" / trials[-1].id).finish(CRASHED, MARK_KEY, {"reason": "its node was lost"})
    publish_logs(path_of(uri))
    build_grid_report(trials, beside, floor=0.9, samples=False)
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "empty machine"))
    assert [read_outcome(trial, path_of(uri), halved=True).state for trial in trials] == ["missing"] * 8
    build_grid_report(trials, path_of(uri), floor=0.9, samples=False)
    for name in ("grid.csv", "grid.tex", "report.md", "results.md", "report.html"):
        assert (read_bytes(f"{uri}/{name}") or b"").decode() == (beside / name).read_text(), name
    assert "its node was lost" in (beside / "report.md").read_text()
    assert not list((tmp_path / "empty machine").rglob("*.safetensors"))


def publish_logs(output: Path) -> None:
    """`write_trial` leaves the logs on the disk; a run pushes them."""
    for kind in ("references", "trials"):
        push(output / kind)


# --- what is refused, and when


def refusals(bucket: str, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    file = tmp_path / "file"
    file.write_text("")
    return {
        "a file": (["--output", str(file)], "is a file"),
        "no such bucket": (["--output", "s3://no-such-bucket-here/g"], "no such bucket"),
        "a bucket alone": (["--output", bucket], "at least one name in it"),
        "no such cache": (["--output", f"{bucket}/g", "--cache", "s3://no-such-bucket-here/c"], "no such bucket"),
        "no such rows": (["--output", f"{bucket}/g", "--data", "no/such/folder"], "no such folder"),
        "no such model": (["--output", f"{bucket}/g", "--models", "./no/such/model"], "does not exist"),
        "too long": (["--output", f"{bucket}/g", "--max-length", "99999"], "the model takes at most"),
        "another grid": (["--output", f"{bucket}/other", "--epochs", "9"], "holds another run: its train settings differ"),
    }


def test_a_dry_run_refuses_what_the_run_refuses_and_starts_nothing(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("soul.orchestration.tune.cluster", no_ray)
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "copies"))
    chosen: dict[str, Any] = {"methods": ("npo",), "optimizers": ("adamw",), "models": ("tiny-s",), "data": FEW}
    begun = GridConfig.model_validate({**chosen, "output": f"{bucket}/other"})
    for item in plan(begun):
        claim(item.config)
        run_dir(item.config).finish("train", "k", {})
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "empty machine"))
    for name, (flags, says) in refusals(bucket, tmp_path).items():
        errors = []
        for more in (["--dry-run"], []):
            assert main([*FLAGS, *([] if "--data" in flags else AUTHORS), *flags, *more]) == BAD_INPUT, name
            errors.append(capsys.readouterr().err)
        assert errors[0] == errors[1] and says in errors[0], (name, errors)
    before = find(bucket)
    assert main([*FLAGS, *AUTHORS, "--output", f"{bucket}/new", "--dry-run"]) == DONE
    assert f"1 runs of 1 cells in {bucket}/new/trials" in capsys.readouterr().out and find(bucket) == before


def test_two_drivers_of_one_machine_do_not_share_a_grid(bucket: str) -> None:
    config = GridConfig.model_validate({"data": FEW, "models": ("tiny-s",), "methods": ("npo",), "output": f"{bucket}/g"})
    check_grid(config)
    assert store._lock_at_once(path_of(config.output)) is None  # what another process would find
    check_grid(config)
