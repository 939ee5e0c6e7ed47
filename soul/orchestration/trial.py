"""One trial of a grid: a run like any other, in its own run directory, inside a process that Ray Tune started.

With one worker the trial trains and evaluates in that process, which the next trial uses again: starting processes would cost more than
a tiny model's run. With several, or where asked for, it is a Ray Train run of its own. Both give the same results.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray import tune

from soul.benchmarks.objective import cheap_objective
from soul.benchmarks.outcomes import CRASHED, FAILED, MARK_KEY, STOPPED
from soul.config import Config
from soul.device import NoDevice
from soul.evaluate.evaluator import finish
from soul.evaluate.plan import run_item
from soul.models.hashes import recorded_sha256
from soul.models.load import load_tokenizer
from soul.object_store import find
from soul.orchestration.arm import unlearn
from soul.orchestration.attempts import Attempt
from soul.orchestration.claim import decided_run, is_done, mark_done, run_dir
from soul.orchestration.data import Sources
from soul.orchestration.evaluate import Asked, Judge, Judged, plan_for
from soul.orchestration.examiners import Exam
from soul.orchestration.outcome import write_outcome
from soul.orchestration.prepare import Prepared
from soul.orchestration.progress import Display
from soul.orchestration.recovery import TrainingBroken, TrainingStopped, located
from soul.orchestration.shared import Shared, judge_shared, retrained_of, share, target_of
from soul.orchestration.train import METRICS, fit, on_this_node
from soul.records import InputError
from soul.report.results import load_results
from soul.rundir import RunDir
from soul.store import attach, discard, holds, is_uri, place_of, publish, pull, pull_file, push
from soul.train.engine import Engine
from soul.train.engines import make_engine
from soul.train.job import JobResult, TrainJob, run_job
from soul.train.loop import NonFinite, Progress
from soul.train.reference import NonFiniteReference

OnEpoch = Callable[[Mapping[str, Any]], None]


def run_trial(params: dict[str, Any], common: dict[str, Any]) -> None:
    """The function that Tune calls. `params["run"]` names the run directory; the rest of it is for people who read Tune's tables.

    Whatever an attempt before this one left, on this node or another, is in the run directory, and so is what this one leaves. A failure
    that would come again (bad input, a loss that is not finite) is the trial's result: its reason is kept there.
    """
    torch.set_num_threads(1)
    told = params["run"]
    run = RunDir.at(told["folder"])
    attach(run.path)
    asked = Config.model_validate_json(run.config.read_text()).model_copy(update={"output": told["folder"], "cache": common["cache"]})
    attempt = Attempt.begin(run, common["session"])
    if attempt.is_one_too_many:
        return _give_up(run, CRASHED, attempt.reason, asked)
    with attempt:
        config = decided_run(asked, common["device"], common["precision"])
        report, sources = Reporter(floor=common["floor"]), common["rows"][config.train.seed]
        try:
            work(asked, config, sources, command=common["command"], isolated=told["isolated"], report=report)
        except (NoDevice, TrainingBroken):  # another node, or the next attempt, may do better
            raise
        except (InputError, TrainingStopped, NonFinite, NonFiniteReference) as error:
            _give_up(run, FAILED, str(error), asked)


def _give_up(run: RunDir, mark: str, reason: str, config: Config) -> None:
    run.finish(mark, MARK_KEY, {"reason": reason})
    tune.report({"failed": 1.0, "epoch": config.train.epochs + 1})


class Reporter:
    """Tells Tune (its scheduler, its TensorBoard and JSON files) numbers, and after every epoch the score that halving compares."""

    def __init__(self, *, floor: float) -> None:
        self.floor = floor
        self._before: Mapping[str, Any] | None = None

    def epoch(self, row: Mapping[str, Any]) -> None:
        """A row of results.json's epochs; the first one is the model before the first step."""
        self._before = self._before or row
        tune.report({**flat_epoch(row), "score": cheap_objective(row, self._before, floor=self.floor)})

    def end(self, metrics: Mapping[str, float]) -> None:
        tune.report(dict(metrics))


def failure_of(run: RunDir) -> str | None:
    """Why the trial in `run` failed for good; None if it did not."""
    found = run.finished(FAILED, MARK_KEY)
    return None if found is None else str(found["reason"])


def stopped_at(run: RunDir) -> dict[str, Any] | None:
    """What a trial that the search stopped early had reached: its epochs' rows."""
    return run.finished(STOPPED, MARK_KEY)


def work(asked: Config, config: Config, sources: Sources, *, command: list[str], isolated: bool, report: Reporter) -> None:
    """The whole run that was `asked` for, with the driver's decision in `config`; or what `report` hears of one that is done.

    A scheduler that was started again has forgotten it.
    """
    run, display = run_dir(config), Display(enabled=False)
    shared = share(config, sources)
    stopped = stopped_at(run)
    if stopped is not None:
        for row in stopped["epochs"]:
            report.epoch(row)
        return
    if is_done(asked, shared.inputs(asked)):
        for row in load_results(run.path).epochs:
            report.epoch(row.model_dump())
    else:
        target = target_of(config, shared, display)
        trained = unlearn(config, target, shared.stores, display, fit=fit if isolated else partial(fit_here, on_epoch=report.epoch))
        if isolated:
            for epoch in trained.epochs:
                report.epoch(epoch)
        unlearned = _judge(config, shared, run, display, isolated=isolated)
        target_judged, retrained = judge_shared(config, shared, display)
        gold = retrained_of(config, shared, display)
        write_outcome(
            config,
            shared.sources,
            trained,
            unlearned=unlearned,
            target=target_judged,
            retrained=retrained,
            command=command,
            standards={"target": target.path} | ({"retrained": gold.path} if isinstance(gold, Prepared) else {}),
        )
        mark_done(asked, shared.inputs(asked))
    report.end({**_final_metrics(run), "epoch": config.train.epochs + 1})


def flat_epoch(row: Mapping[str, Any]) -> dict[str, float]:
    """An epoch's row as Tune wants it: `forget/probability`. The epoch before the first step is 0."""
    splits = {name: value for name, value in row.items() if isinstance(value, Mapping)}
    flat = {f"{split}/{metric}": value for split, metrics in splits.items() for metric, value in metrics.items() if value is not None}
    return {**flat, "epoch": row["epoch"], "step": row["step"]}


def nested_epoch(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`flat_epoch` undone; what else Tune has put in the row is left out."""
    splits: dict[str, dict[str, float]] = {"forget": {}, "retain": {}}
    for name, value in flat.items():
        split, _, metric = name.partition("/")
        if split in splits and metric:
            splits[split][metric] = float(value)
    return {"epoch": int(flat["epoch"]), "step": int(flat["step"]), **splits}


def _final_metrics(run: RunDir) -> dict[str, float]:
    unlearned = load_results(run.path).models["unlearned"]
    assert unlearned is not None  # a finished run has evaluated its model
    values = {f"{split}/{metric}": unlearned.value(f"{split}.{metric}") for split in ("forget", "retain") for metric in _SHOWN}
    return {name: value for name, value in {**values, "model_utility": unlearned.model_utility}.items() if value is not None}


_SHOWN = ("rougeL_recall", "probability", "exact_memorization")


def _judge(config: Config, shared: Shared, run: RunDir, display: Display, *, isolated: bool) -> Judged:
    name = f"{config.method.name} with {config.optimizer.name}"
    samples = run.path / "samples.jsonl" if config.samples else None
    if isolated:
        judge = Judge(config, shared.sources, display, num_examiners=config.engine.num_workers)
        return judge.judge(Asked(name, str(run.model), recorded_sha256(run.model), run.path / ".stages", samples))
    pull(run.model)  # another node may have trained it
    return judge_here(config, shared.sources, str(run.model), name, samples)


def judge_here(config: Config, sources: Sources, model: str, name: str, samples: Path | None) -> Judged:
    """As `Judge.judge`, in this process: the plan's batches are fixed, so the values are the same bit for bit."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(model, revision=None, trust_remote_code=config.model.trust_remote_code)
    plan = plan_for(config, sources, model, tokenizer, None)
    loaded, device = Exam.of(config, model, None).load()
    evaluation = finish(
        plan, [run_item(loaded, item, device=device) for item in plan.items], tokenizer, device=torch.device("cpu"), source=name
    )
    if samples is not None:
        Judge(config, sources, Display(enabled=False)).write_samples(evaluation, samples)
    return Judged(evaluation.log, time.perf_counter() - started)


def fit_here(job: TrainJob, *, name: str, on_progress: object = None, on_epoch: OnEpoch) -> JobResult:
    """As `soul.orchestration.train.fit`, on one rank in this process, continuing from the last checkpoint if there is one."""
    del on_progress  # a grid shows whole trials
    job = on_this_node(job)
    folder, metrics = Path(job.run_dir) / "checkpoints" / name, Path(job.run_dir) / METRICS
    engine = make_engine(job.engine, rank=0, world=1, local_rank=0)
    on_gpu = engine.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(engine.device)
    pull_file(metrics)
    kept = [path for path in checkpoints(folder)[-1:] if pull(path)]
    with located(engine, job.needs):
        result = run_job(
            job,
            engine,
            resume_from=kept[-1] if kept else None,
            save_checkpoint=partial(_save, metrics=metrics, folder=folder, keep=job.train.keep_checkpoints),
            on_epoch=on_epoch,
            publish=partial(_publish, metrics, Path(job.export)),
        )
    if not on_gpu:
        result.peak_memory_bytes = 0  # the process's peak, to which the trials before this one belong as well
    return result


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones, oldest first; of a run on a store those that every node can have."""
    if not is_uri(place := place_of(folder)):
        return sorted(folder.glob("step_*"))
    names = {name.partition("/")[0] for name in find(place) or {}}
    return [folder / name for name in sorted(names) if name.startswith("step_") and holds(folder / name)]


def _publish(metrics: Path, model: Path) -> None:
    """What a store is to have of a training that is over."""
    push(metrics)
    publish(model)


def _save(engine: Engine, progress: Progress, *, metrics: Path, folder: Path, keep: int) -> None:
    """Written beside its place and moved there: what is called step_* is whole. A store gets it as a whole folder."""
    push(metrics)  # first, so that there is no checkpoint without the lines of its steps
    staging, place = folder / f".step_{progress.step:08d}", folder / f"step_{progress.step:08d}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    engine.save(staging, progress.to_json())
    if place.is_dir():
        shutil.rmtree(staging)  # a resumed run repeats no step before its checkpoint, but may stop on it
    else:
        os.replace(staging, place)
    publish(place)
    for old in checkpoints(folder)[:-keep]:
        discard(old)
