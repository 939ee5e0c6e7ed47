"""One finished run with a twin, on the session's Ray; what it prepared is in the cache that every other run of this folder uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from soul.config import Config
from soul.train.engines import make_engine
from soul.train.job import TrainJob, run_job
from tests.orchestration.held import watched
from tests.orchestration.mini import Finished, long_job, mini, write_tofu


@pytest.fixture(scope="session")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tofu(tmp_path_factory.mktemp("data") / "tofu")


@pytest.fixture(scope="session")
def finished(ray_cluster: None, tofu: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """SO-NPO and its first-order twin, from rows to reports."""
    from soul.orchestration import arm, pipeline

    folder = tmp_path_factory.mktemp("runs")
    config = mini(tofu, folder / "run", twin="adamw", train={"epochs": 3, "keep_checkpoints": 2})
    jobs: dict[str, TrainJob] = {}
    prepared: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        made = pipeline.prepared_model

        def recorded(**fields: Any) -> TrainJob:
            job = TrainJob(**fields)
            return jobs.setdefault(job.optimizer.name, job)

        def kept(config: Config, kind: Any, **options: Any) -> Any:
            model = made(config, kind, **options)
            prepared[kind] = model.path
            return model

        patch.setattr(arm, "TrainJob", recorded)
        patch.setattr(pipeline, "prepared_model", kept)
        with watched() as held:
            run = pipeline.run(config)
    yield Finished(tofu, run, folder / "run-adamw", config, jobs, Path(prepared["target"]), Path(prepared["retrained"]), held)


@pytest.fixture(scope="session")
def uninterrupted(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every interrupted long run has to end with; without Ray, which test_pipeline.py shows to make no difference."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = long_job(finished, folder)
    run_job(job, make_engine(job.engine, rank=0, world=1, local_rank=0), resume_from=None, save_checkpoint=lambda engine, progress: None)
    return folder
