"""One training job as a Ray Train run: ranks, the streamed feed, checkpoints that survive a killed worker, progress for the driver."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointConfig, LoggingConfig, WorkerGroupError, collective
from ray.train.torch import TorchConfig

from soul.device import on_cpu_for_tests
from soul.orchestration.board import Board
from soul.orchestration.parallel import run_beside
from soul.orchestration.recovery import (
    Notice,
    SmallCard,
    TrainingBroken,
    TrainingStopped,
    check_card,
    explained,
    failure_config,
    located,
    newest_step,
    poll_workers,
    renews,
)
from soul.orchestration.staging import NoRoom, Staging
from soul.orchestration.stream import ray_steps
from soul.records import InputError
from soul.store import is_uri, local, path_of, publish, pull_file, push, ray_storage
from soul.train.engine import Engine, EngineConfig, num_threads
from soul.train.engines import make_engine
from soul.train.job import JobResult, TrainJob, run_job
from soul.train.loop import NonFinite, Progress
from soul.train.reference import NonFiniteReference

# Ray chooses the V2 classes at import; what type checkers see under these names is V1's.
TorchTrainer: Any = ray.train.torch.TorchTrainer
RunConfig: Any = ray.train.RunConfig
ScalingConfig: Any = ray.train.ScalingConfig

OnProgress = Callable[[int, int], None]
METRICS = "metrics.jsonl"
MOST_TEXT = 500  # what Ray passes between ranks is to stay under a kilobyte


def on_this_node(job: TrainJob) -> TrainJob:
    """The job with this node's own paths in it, its model and probes fetched. The step rows are fetched when they are opened."""
    return dataclasses.replace(
        job,
        model=local(job.model),
        export=str(path_of(job.export)),
        run_dir=str(path_of(job.run_dir)),
        probes={name: local(place) for name, place in job.probes.items()},
    )


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank. Returns a JobResult as a dict, or {kind: message} for a failure that a restart would repeat."""
    job: TrainJob = config["job"]
    context = ray.train.get_context()
    engine = make_engine(job.engine, rank=context.get_world_rank(), world=context.get_world_size(), local_rank=context.get_local_rank())
    local_ranks = context.get_local_world_size()
    torch.set_num_threads(num_threads(job.engine, engine.device, local_ranks=local_ranks, otherwise=config["threads"]))
    here, board = on_this_node(job), Board(job.run_dir)
    metrics = Path(here.run_dir) / METRICS
    staging, notice = Staging(job.run_dir, context.get_local_rank(), local_ranks), Notice()

    def save(engine: Engine, progress: Progress) -> None:
        if engine.rank == 0:
            push(metrics)  # first, so that there is no checkpoint without the lines of its steps
        staging.save(engine, progress)
        notice.answered()

    try:
        check_card(engine, job.needs)
        resume_from = staging.open(ray.train.get_checkpoint())
        if engine.rank == 0:
            pull_file(metrics)
        with located(engine, job.needs):
            result = run_job(
                here,
                engine,
                resume_from=resume_from,
                save_checkpoint=save,
                make_steps=lambda feed, start, stop: ray_steps(job, feed, start, stop),
                on_step=lambda row, total: board.write(row["step"], total) if engine.rank == 0 else None,
                on_ready=lambda engine: staging.is_loaded(engine, job),
                publish=partial(_publish, engine, metrics, Path(here.export)),
                must_save=notice,
            )
        return dataclasses.asdict(result)
    except (NonFinite, NonFiniteReference, NoRoom, SmallCard) as error:  # on every rank
        if engine.rank == 0 and metrics.exists():
            push(metrics)
        kind = "bad input" if isinstance(error, SmallCard) else "broken" if isinstance(error, NoRoom) else "error"
        return {kind: str(error)}


def _publish(engine: Engine, metrics: Path, model: Path) -> None:
    """Rank 0 lets the store have what it wrote; the others wait as long as that takes, and fail if it does."""
    failure: OSError | None = None
    if engine.rank == 0:
        try:
            push(metrics)
            publish(model)
        except OSError as error:
            failure = error
    told = collective.broadcast_from_rank_zero(None if failure is None else str(failure)[:MOST_TEXT])
    if told is not None:
        raise failure or OSError(told)


def fit(job: TrainJob, *, name: str, on_progress: OnProgress | None = None) -> JobResult:
    """Run `job` to its end, continuing from its last checkpoint if it has one, whatever engine and workers wrote that.

    Raises:
        TrainingStopped: a loss or the target's scores became NaN or infinite, or a file could not be read or written.
        ray.train.TrainingFailedError: workers failed more than `max_failures` times, and the run came no further between them.
    """
    poll_workers(job.engine.num_workers)
    metrics, board = path_of(job.run_dir) / METRICS, Board(job.run_dir)
    board.clear()
    with _watch(board.read if is_uri(job.run_dir) else partial(last_step, metrics), on_progress):
        result = _until_done(job, name)
    pull_file(metrics)
    value = result.return_value
    for kind, error in (("error", TrainingStopped), ("broken", TrainingBroken), ("bad input", InputError)):
        if kind in value:
            raise error(value[kind])
    return JobResult(**value)


def _until_done(job: TrainJob, name: str) -> Any:
    """Ray Train's result. A run whose budget is used up begins a new one as long as it loses nodes and gets further all the same."""
    reached = newest_step(job.run_dir, name)
    while True:
        try:
            return run_beside(_trainer(job, name).fit)
        except WorkerGroupError as error:
            before, reached = reached, newest_step(job.run_dir, name)
            if not renews(error, before, reached):
                raise explained(error) or error from None


def _trainer(job: TrainJob, name: str) -> Any:
    """One that continues the run of this name, if there is one."""
    engine = job.engine
    least = engine.min_workers or engine.num_workers
    use_gpu = engine.runs_on == "gpu"
    threads = max(1, (torch.get_num_threads() if engine.num_workers == 1 else 1)) if use_gpu else 1
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "threads": threads},
        torch_config=TorchConfig(backend=_backend(engine, use_gpu=use_gpu), timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=engine.num_workers if least == engine.num_workers else (least, engine.num_workers),
            use_gpu=use_gpu,
            resources_per_worker=None if use_gpu else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=name,
            **ray_storage(f"{job.run_dir}/checkpoints"),
            failure_config=failure_config(engine),
            checkpoint_config=CheckpointConfig(num_to_keep=job.train.keep_checkpoints),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _backend(engine: EngineConfig, *, use_gpu: bool) -> str:
    """What ranks talk through. Weights in CPU memory need a way of their own."""
    if not use_gpu or on_cpu_for_tests():
        return "gloo"
    return "nccl" if engine.offload is None else "cpu:gloo,cuda:nccl"


@contextmanager
def _watch(last: Callable[[], tuple[int, int]], on_progress: OnProgress | None) -> Iterator[None]:
    """Report the last (step, total) twice a second: free for the workers, unlike a report to Ray."""
    if on_progress is None:
        yield
        return
    done = threading.Event()

    def poll() -> None:
        while not done.wait(0.5):
            step, total = last()
            if total:
                on_progress(step, total)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
    step, total = last()
    if total:
        on_progress(step, total)


def last_step(metrics: Path) -> tuple[int, int]:
    """(step, total steps) of the last whole line; zeros where there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(0, 2)
            start = max(0, file.tell() - 4096)
            file.seek(start)
            lines = file.read().split(b"\n")[1 if start else 0 : -1]  # the first and the last may be torn
    except FileNotFoundError:
        return 0, 0
    if not lines:
        return 0, 0
    row = json.loads(lines[-1])
    return int(row["step"]), int(row["total_steps"])
