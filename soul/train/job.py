"""One training job on one rank: load, train, evaluate cheaply each epoch, checkpoint, export. The same under Ray, torchrun and tests."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from transformers import AutoConfig

from soul.batch import Batch
from soul.data.feed import LocalFeed
from soul.data.steps import StepSource
from soul.models.load import load_model, load_tokenizer
from soul.models.stored import StoredModel, stored_model
from soul.objectives.methods import Method, streamed_splits
from soul.optim.configs import OneShotConfig, OptimizerConfig
from soul.rundir import write_atomically
from soul.train.config import TrainConfig
from soul.train.divisors import Divisors, WholePass
from soul.train.engine import BuildModel, BuildOptimizer, Engine, EngineConfig, Need
from soul.train.loop import Hooks, Progress, train
from soul.train.lora import add_adapters, add_stored_adapters
from soul.train.moved import MovedWeights
from soul.train.probe import probe_splits
from soul.train.reference import make_reference

SaveCheckpoint = Callable[[Engine, Progress], None]
MakeSteps = Callable[[LocalFeed, int, int], Iterable[Sequence[Batch]]]


@dataclass(frozen=True)
class TrainJob:
    """Everything a rank needs, as paths and settings: no rows, so nothing of the data can leak through a log of it.

    `stores` maps each streamed split to its token stores, read one behind the other; `reference` is the .npy file of the leading
    split's reference log-probabilities, which the job makes if it is not there; `probes` maps a name to the store it is cheaply
    evaluated on after an epoch.
    """

    model: str
    export: str
    run_dir: str
    method: Method
    optimizer: OptimizerConfig
    train: TrainConfig
    engine: EngineConfig
    stores: Mapping[str, tuple[str, ...]]
    reference: str | None = None
    probes: Mapping[str, str] = field(default_factory=dict)
    probe_limit: int = 200
    revision: str | None = None
    trust_remote_code: bool = False
    export_dtype: str | None = None
    needs: tuple[Need, ...] = ()

    @property
    def source(self) -> StepSource:
        """The rows of every step."""
        splits = streamed_splits(self.method)
        stores = {split: tuple(self.stores[split]) for split in splits}
        return StepSource(stores, self.reference, self.train.batch_size, self.train.seed, self.train.bucket_window)


@dataclass
class JobResult:
    """What rank 0 reports of a finished job."""

    steps: int
    tokens: int
    train_s: float
    peak_memory_bytes: int
    optimizer_state_bytes_per_rank: int
    epochs: list[dict[str, Any]]


def run_job(
    job: TrainJob,
    engine: Engine,
    *,
    resume_from: Path | None,
    save_checkpoint: SaveCheckpoint,
    make_steps: MakeSteps | None = None,
    on_step: Callable[[dict[str, Any], int], None] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    on_ready: Callable[[Engine], None] = lambda engine: None,
    publish: Callable[[], None] = lambda: None,
    must_save: Callable[[], bool] = lambda: False,
) -> JobResult:
    """Train `job` on this rank. `make_steps` replaces the local feed (Ray Data's). All callables are called on every rank.

    `on_epoch` hears each row of cheap evaluations, those of a checkpoint first; `on_ready` the engine, before the first step; `must_save`
    is asked in every step, and one rank's yes is enough. `publish` is told that the model has been exported, and fails on all ranks or
    on none: a run whose model got lost behind the last step leaves a checkpoint of it.
    """
    tokenizer = load_tokenizer(job.model, revision=job.revision, trust_remote_code=job.trust_remote_code)
    engine.prepare(*_builders(job))
    if job.reference is not None:
        make_reference(engine, job.source)
    plan, stores = job.source.open()
    total = job.train.total_steps(plan.steps_per_epoch)

    moved = MovedWeights(engine)
    progress = Progress() if resume_from is None else Progress(**engine.load(resume_from))
    pad_id = _pad_id(tokenizer)
    log = _StepLog(Path(job.run_dir) / "metrics.jsonl", keep=progress.step) if engine.rank == 0 else None

    def after_step(row: dict[str, Any]) -> None:
        if row["step"] % plan.steps_per_epoch == 0 or row["step"] == total:
            row |= moved.measure()
        if log is not None:
            log.write(row)
        if on_step is not None:
            on_step(row, total)

    on_ready(engine)
    probes, resumed_at = _Probes(job, engine, pad_id, on_epoch), None if resume_from is None else progress.step
    probes.begin(progress)
    feed = LocalFeed(plan, stores, engine.rank, engine.world, job.train.micro_batch_size, pad_id)
    steps = feed.steps(progress.step, total) if make_steps is None else make_steps(feed, progress.step, total)
    progress = train(
        engine,
        method=job.method,
        optimizer=job.optimizer,
        config=job.train,
        steps=steps,
        steps_per_epoch=plan.steps_per_epoch,
        progress=progress,
        hooks=Hooks(after_step, partial(probes.after, total=total), partial(save_checkpoint, engine), must_save),
        divisors=WholePass.of_run(plan, stores, total) if isinstance(job.optimizer, OneShotConfig) else Divisors.of(plan, stores),
    )
    with _rescued(partial(save_checkpoint, engine, progress), needed=progress.step != resumed_at):
        engine.export(Path(job.export), tokenizer=tokenizer, dtype=_export_dtype(job))
        publish()
    return JobResult(progress.step, progress.tokens, progress.seconds, peak_memory_bytes(engine), state_bytes(engine), progress.epochs)


def _pad_id(tokenizer: Any) -> int:
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad_id, int)  # the tokenising stage has checked that there is an EOS
    return pad_id


@contextmanager
def _rescued(save: Callable[[], None], *, needed: bool) -> Iterator[None]:
    """A trained model that cannot be written where it belongs is kept as a checkpoint, if it is not one already."""
    try:
        yield
    except OSError:
        if needed:
            with suppress(OSError, CheckpointException):  # of the same full disk: the first reason is the one to tell
                save()
        raise


@dataclass(frozen=True)
class _Probes:
    """The cheap evaluations of a job: when they are due, and who hears of them."""

    job: TrainJob
    engine: Engine
    pad_id: int
    listener: Callable[[Mapping[str, Any]], None] | None

    def begin(self, progress: Progress) -> None:
        """Before the first step; of a run that is continued the listener hears what a checkpoint has brought."""
        for row in progress.epochs:
            self._tell(row)
        if self.job.probes and self.job.train.eval_every and progress.step == 0:
            self._probe(0, progress)

    def after(self, epoch: int, progress: Progress, *, total: int) -> None:
        every = self.job.train.eval_every
        if self.job.probes and every and (epoch % every == 0 or progress.step == total):
            self._probe(epoch, progress)

    def _probe(self, epoch: int, progress: Progress) -> None:
        probed = probe_splits(self.engine, self.job.probes, limit=self.job.probe_limit, pad_id=self.pad_id)
        progress.epochs.append({"epoch": epoch, "step": progress.step, **probed})
        self._tell(progress.epochs[-1])

    def _tell(self, row: Mapping[str, Any]) -> None:
        if self.listener is not None:
            self.listener(row)


def _builders(job: TrainJob) -> tuple[BuildModel, BuildOptimizer]:
    """How the engine is to make model and optimizer."""

    def build_model() -> nn.Module | StoredModel:
        rank, seed = job.train.lora_rank, job.train.seed
        stored = stored_model(job.model, revision=job.revision, trust_remote_code=job.trust_remote_code)
        if stored is not None:
            return stored if rank is None else add_stored_adapters(stored, rank, seed=seed)
        model = load_model(job.model, revision=job.revision, trust_remote_code=job.trust_remote_code)
        return model if rank is None else add_adapters(model, rank, seed=seed)

    eager_state = job.engine.name != "deepspeed"  # which replaces the parameters
    return build_model, lambda model: job.optimizer.build(model.named_parameters(), eager_state=eager_state)


def _export_dtype(job: TrainJob) -> torch.dtype:
    """As asked for, or the type the starting model was saved in."""
    if job.export_dtype is not None:
        chosen = getattr(torch, job.export_dtype)
    else:
        chosen = AutoConfig.from_pretrained(job.model, revision=job.revision, trust_remote_code=job.trust_remote_code).dtype
    return chosen if isinstance(chosen, torch.dtype) else torch.float32


class _StepLog:
    """metrics.jsonl: one line per step. Lines of steps that a resumed run repeats are dropped first."""

    def __init__(self, path: Path, *, keep: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= keep]
        write_atomically(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that a crash cut short."""
    try:
        return int(json.loads(line)["step"])
    except json.JSONDecodeError:
        return math.inf


def state_bytes(engine: Engine) -> int:
    """Bytes of optimizer state that live on this rank (the two moments; step counters left out)."""
    total = 0
    for state in engine.optimizer.state.values():
        for value in state.values():
            local = value.to_local() if hasattr(value, "to_local") else value
            total += local.numel() * local.element_size() if local.dim() > 0 else 0
    return total


def peak_memory_bytes(engine: Engine) -> int:
    """Peak GPU memory of this rank, or the process's peak resident memory on the CPU."""
    if engine.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(engine.device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
