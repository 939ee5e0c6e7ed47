"""Checkpoints on their way into the run directory: where ranks write them, how they get to their place, and the room that takes.

    on a disk      checkpoints/.staging/step_N is written by all ranks together and renamed to checkpoints/NAME/step_N: nothing is copied
    on a store     each rank writes checkpoints/.staging/rank-R of its node's copy of the run directory, and uploads that

Nothing goes through $TMPDIR, which on many machines is small, or memory.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode, collective

from soul.object_store import send
from soul.optim.configs import OptimizerConfig
from soul.preflight import check_room
from soul.records import InputError
from soul.rundir import RunDir
from soul.store import is_uri, path_of
from soul.train.engine import Engine
from soul.train.job import TrainJob
from soul.train.loop import Progress
from soul.train.ranks import first_of_ranks

FP32 = 4


class NoRoom(OSError):
    """A node's disk cannot hold what a run is going to write. Raised on every rank, before the first step."""


@dataclass(frozen=True)
class Staging:
    """Of one rank. `local_rank` of `local_world` on its node."""

    run_dir: str
    local_rank: int
    local_world: int

    @property
    def folder(self) -> Path:
        return RunDir(path_of(self.run_dir)).checkpoints / ".staging"

    def open(self, checkpoint: Checkpoint | None) -> Path | None:
        """Remove what a crash has left; returns where to read `checkpoint`, the one to continue from. Collective.

        Of one on a store that is a copy of this node, which `is_loaded` removes.
        """
        if self.local_rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            if checkpoint is not None and is_uri(self.run_dir):
                checkpoint.to_directory(self._resumed)
        if ray.train.get_context().get_world_rank() == 0 and not is_uri(self.run_dir):
            self._remove_unknown(checkpoint)
        collective.barrier()  # has no time limit, unlike those of torch
        if checkpoint is None:
            return None
        return self._resumed if is_uri(self.run_dir) else Path(checkpoint.path)

    @property
    def _resumed(self) -> Path:
        return self.folder / "resume"

    def _remove_unknown(self, checkpoint: Checkpoint | None) -> None:
        """Checkpoints that are newer than the last one Ray Train knows of: it was killed before it heard of them."""
        last = "" if checkpoint is None else Path(checkpoint.path).name
        for found in Path(ray.train.get_context().get_storage().experiment_fs_path).glob("step_*"):
            if found.name > last:
                shutil.rmtree(found, ignore_errors=True)

    def save(self, engine: Engine, progress: Progress) -> None:
        """Write a checkpoint; returns once it is in Ray Train's books, so that the next failure does not lose it. Collective."""
        name = f"step_{progress.step:08d}"
        if is_uri(self.run_dir):
            self._upload(engine, progress, name)
        else:
            self._move(engine, progress, name)
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)

    def _move(self, engine: Engine, progress: Progress, name: str) -> None:
        storage: Any = ray.train.get_context().get_storage()
        place, staged = Path(storage.build_checkpoint_path_from_name(name)), self.folder / name
        engine.save(staged, progress.to_json())  # complete when any rank returns
        if engine.rank == 0:
            shutil.rmtree(place, ignore_errors=True)  # of a run that was killed before Ray Train heard of it
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, place)
        ray.train.report(  # waits for all ranks before it tells anybody
            {"step": progress.step},
            checkpoint=Checkpoint(str(place), filesystem=storage.storage_filesystem),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def _upload(self, engine: Engine, progress: Progress, name: str) -> None:
        staged = self.folder / f"rank-{engine.rank}"
        shutil.rmtree(staged, ignore_errors=True)
        try:
            engine.save(staged, progress.to_json())
            ray.train.report(
                {"step": progress.step},
                checkpoint=Checkpoint.from_directory(str(staged)),
                checkpoint_dir_name=name,
                checkpoint_upload_fn=self._sent,
            )
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _sent(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """Upload a rank's part. Ray's own copy (pyarrow's) does not hear of a file that the store refuses when it is closed."""
        storage: Any = ray.train.get_context().get_storage()
        place = storage.build_checkpoint_path_from_name(name)
        scheme = self.run_dir.partition("://")[0]
        for file in sorted(Path(checkpoint.path).rglob("*")):
            if file.is_file():
                send(file, f"{scheme}://{place}/{file.relative_to(checkpoint.path).as_posix()}")
        return Checkpoint(str(place), filesystem=storage.storage_filesystem)

    def is_loaded(self, engine: Engine, job: TrainJob) -> None:
        """The engine has its weights: see whether there is room for what it is going to write. Collective.

        Raises:
            NoRoom: this node, or another, has less than the checkpoints and the model that are going to be written on it.
        """
        told: str | None = None
        needed = self._needed(engine, job)
        if needed:
            try:
                check_room(RunDir(path_of(self.run_dir)).path, needed, where=f"node {ray.util.get_node_ip_address()}")
            except InputError as error:
                told = str(error)
        told = first_of_ranks(told)
        if self.local_rank == 0:
            shutil.rmtree(self._resumed, ignore_errors=True)  # all ranks have been here
        if told is not None:
            raise NoRoom(told)

    def _needed(self, engine: Engine, job: TrainJob) -> int:
        """Bytes that this rank answers for: rank 0 for a disk that all share, the first of each node for a copy of a store."""
        one, model = checkpoint_bytes(engine, job.optimizer), model_bytes(engine, job)
        exported = model if engine.rank == 0 else 0
        if is_uri(self.run_dir):
            return one * self.local_world // engine.world + exported if self.local_rank == 0 else 0
        if engine.rank != 0:
            return 0
        there = len(list(RunDir(path_of(self.run_dir)).checkpoints.glob("*/step_*")))
        return one * max(0, job.train.keep_checkpoints + 1 - there) * job.train.saves + exported


def checkpoint_bytes(engine: Engine, optimizer: OptimizerConfig) -> int:
    """Of one whole checkpoint: trained weights and the optimizer's state, in fp32."""
    trained = sum(_numel(parameter) for parameter in engine.model.parameters() if parameter.requires_grad)
    return FP32 * trained * (1 + optimizer.state_tensors)


def model_bytes(engine: Engine, job: TrainJob) -> int:
    """Of the exported model."""
    width = 2 if job.export_dtype in ("bfloat16", "float16") else FP32
    return width * sum(map(_numel, engine.model.parameters()))


def _numel(parameter: Any) -> int:
    """Of the whole parameter, which ZeRO's third stage leaves empty."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
