"""Runs on an object store: the same results as on a disk, whatever the network does, and from there on another machine."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from soul.cli import BAD_INPUT, DONE, main
from soul.config import Config
from soul.evaluate.eval_log import EvalLog
from soul.object_store import find, put_bytes, read_bytes
from soul.orchestration import pipeline
from soul.orchestration.gold import given_standard
from soul.orchestration.prepare import Prepared
from soul.store import COPIES_VARIABLE, checkout, holds, local, path_of, place_of
from soul.train.engines import make_engine
from soul.train.job import run_job
from tests.orchestration.mini import STEPS, TRAIN, Finished, fingerprint, mini, num_lines, start, steps, wait_for
from tests.s3 import Fault, Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ONE_WORKER: dict[str, Any] = {"train": {"epochs": 3, "keep_checkpoints": 2, "save_every": 1}}  # as the run of `finished`
TWO_WORKERS: dict[str, Any] = {"engine": {"name": "fsdp", "num_workers": 2}, "train": {"epochs": 2, "save_every": 1}}


@dataclass(frozen=True)
class Remote:
    """A run on the store, made while requests failed, and the same run on the disk."""

    uri: str
    config: Config
    faults: list[str]
    local: Path


def measured(results: bytes | None) -> dict[str, Any]:
    """results.json without what a clock or a meter says."""
    found: dict[str, Any] = json.loads(results or b"null")
    return {**found, "cost": None}


def weather(seed: int) -> Callable[[str], Fault]:
    """One request in twenty fails or is slow, and the second upload of a checkpoint's weights loses its connection."""
    draw, uploads = random.Random(seed), [0]

    def fault(request: str) -> Fault:
        if request.startswith("PUT") and ".distcp" in request:
            uploads[0] += 1
            if uploads[0] == 2:
                return "drop request"
        faults: list[Fault] = [500, 503, 0.5, "drop request", "drop answer"]
        return draw.choice(faults) if draw.random() < 0.05 else None

    return fault


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one worker", "two workers"])
def remote(
    request: pytest.FixtureRequest, finished: Finished, s3_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("beside")
    if request.param == 1:
        sections, beside = ONE_WORKER, finished.run
    else:
        sections, beside = TWO_WORKERS, folder / "run"
        pipeline.run(mini(finished.data, beside, cache=finished.config.cache_folder, **TWO_WORKERS))
    uri = f"{s3_store.make_bucket(f'weather{request.param}')}/runs/x"
    config = Config.model_validate({**mini(finished.data, folder, **sections).model_dump(mode="json"), "output": uri})
    with s3_store.failing(weather(7)):
        assert place_of(pipeline.run(config)) == uri
        faults = list(s3_store.faults)
    yield Remote(uri, config, faults, beside)


def test_a_run_on_a_store_is_the_run_on_a_disk(remote: Remote) -> None:
    assert any("drop request" in fault and ".distcp" in fault for fault in remote.faults) and len(remote.faults) > 5
    assert measured(read_bytes(f"{remote.uri}/results.json")) == measured((remote.local / "results.json").read_bytes())
    names = {name for name in find(remote.uri) or {} if "/" not in name or name.startswith(("logs/", "model/"))}
    beside = {path.relative_to(remote.local).as_posix() for path in remote.local.rglob("*") if path.is_file()}
    assert {name for name in beside if "/" not in name or name.startswith(("logs/", "model/"))} <= names
    assert not [name for name in find(remote.uri) or {} if name.startswith("checkpoints/")]


def test_another_machine_sees_the_whole_run(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUL_STORE_COPIES", str(tmp_path))
    folder = checkout(remote.uri)
    assert folder.is_relative_to(tmp_path) and not (folder / "model").exists() and not (folder / "checkpoints").exists()
    assert steps(folder) == steps(remote.local)
    assert fingerprint(Path(local(f"{remote.uri}/model"))) == fingerprint(remote.local / "model")


def test_a_run_on_a_store_that_is_done_is_left_alone(remote: Remote, s3_store: Store) -> None:
    before = find(remote.uri)
    s3_store.requests.clear()
    assert place_of(pipeline.run(remote.config)) == remote.uri
    assert find(remote.uri) == before
    assert {request.rpartition("/")[2] for request in s3_store.requests if request.startswith("PUT")} <= {".probe", ""}


def test_other_settings_do_not_take_over_a_run_on_a_store(remote: Remote, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = find(remote.uri)
    file = tmp_path / "config.yaml"
    file.write_text(remote.config.model_copy(update={"train": remote.config.train.model_copy(update={"epochs": 7})}).model_dump_json())
    assert main(["tofu", "--config", str(file)]) == BAD_INPUT
    assert f"{remote.uri} holds another run: its train settings differ" in capsys.readouterr().err
    assert find(remote.uri) == before


def test_a_run_on_a_store_is_a_gold_standard_and_can_be_reported_on(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    standard, beside = given_standard(remote.uri), given_standard(str(remote.local))
    assert isinstance(standard, EvalLog) and isinstance(beside, EvalLog) and standard.splits == beside.splits
    model = given_standard(f"{remote.uri}/model")
    assert isinstance(model, Prepared) and fingerprint(Path(model.path)) == fingerprint(remote.local / "model")
    assert model.key.startswith(f"{remote.uri}/model ")
    assert main(["report", remote.uri]) == DONE
    assert (read_bytes(f"{remote.uri}/report.html") or b"").startswith(b"<!DOCTYPE html>")


def leave_a_half_checkpoint(uri: str) -> None:
    """What a worker leaves that was killed while it uploaded the checkpoint of a step to come."""
    [last] = sorted({name.rpartition("/")[0] for name in find(f"{uri}/checkpoints") or {} if "/step_" in name})[-1:]
    data = read_bytes(f"{uri}/checkpoints/{last}/__0_0.distcp") or b""
    put_bytes(f"{uri}/checkpoints/{last.rpartition('/')[0]}/step_{STEPS - 3:08d}/__0_0.distcp", data[: len(data) // 2])


@pytest.mark.slow
def test_a_killed_driver_is_continued_on_an_empty_machine(
    remote: Remote, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its disk is lost with it: what the store has is enough, and a checkpoint that is there in part is not taken for one."""
    alone = tmp_path / "uninterrupted"
    job = finished.jobs["sophia"]
    job = replace(job, run_dir=str(alone), export=str(alone / "model"), train=job.train.model_copy(update=TRAIN))
    run_job(job, make_engine(job.engine, rank=0, world=1, local_rank=0), resume_from=None, save_checkpoint=lambda *_: None)

    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "first"))
    uri = f"{remote.uri.rpartition('/')[0]}/killed"
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({**mini(finished.data, tmp_path, train=TRAIN).model_dump(mode="json"), "output": uri}))
    process = start("tofu", "--config", str(file))
    try:
        metrics = path_of(uri) / "metrics.jsonl"
        wait_for(lambda: num_lines(metrics) >= 100 or process.poll() is not None, timeout_s=600)
        assert num_lines(metrics) < STEPS, "the run was over before it could be interrupted"
    finally:
        for lost in [
            psutil.Process(process.pid),
            *psutil.Process(process.pid).children(recursive=True),
        ]:  # the machine, not only the driver
            lost.kill()
        process.communicate(timeout=120)
    assert not holds(path_of(f"{uri}/model")) and read_bytes(f"{uri}/results.json") is None
    shutil.rmtree(tmp_path / "first", ignore_errors=True)
    leave_a_half_checkpoint(uri)

    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "second"))
    assert main(["resume", uri]) == DONE
    assert capsys.readouterr().out.rstrip().endswith(uri)
    assert steps(checkout(uri)) == steps(alone)
    assert fingerprint(Path(local(f"{uri}/model"))) == fingerprint(alone / "model")
    assert read_bytes(f"{uri}/results.json") is not None
