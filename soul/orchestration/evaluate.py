"""Evaluations as Ray tasks: the plan is made here, its fixed work items are shared out, so any number of tasks gives the same metrics."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, PreTrainedTokenizerBase

from soul.config import Config, EvaluateConfig
from soul.data.chat import ChatFormat
from soul.data.sources import fingerprint
from soul.device import Device, torch_device
from soul.evaluate.eval_log import EvalLog, finite_columns
from soul.evaluate.evaluator import Evaluation, finish, positions
from soul.evaluate.generate import stop_ids_of
from soul.evaluate.plan import EvalPlan, ItemResult, WorkItem, plan_evaluation, run_item
from soul.models.load import load_model, load_tokenizer
from soul.orchestration.data import Sources
from soul.orchestration.progress import Display
from soul.rundir import digest, write_atomically, write_json
from soul.store import local, place_of, pull_file

_LOG = TypeAdapter(EvalLog)
NUM_SAMPLES = 10


@dataclass(frozen=True)
class Judged:
    """One model's evaluation: the log from which every metric follows, and how long it took to make (0 where it was made before)."""

    log: EvalLog
    seconds: float


@ray.remote
class Examiner:
    """A process with one loaded model, which works through items of an evaluation plan."""

    def __init__(self, model: str, revision: str | None, trust_remote_code: bool, precision: str, device: Device) -> None:
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        self.device = torch_device(device)
        dtype = torch.float32 if precision == "fp32" or device == "cpu" else torch.bfloat16
        self.model = load_model(local(model), dtype=dtype, revision=revision, trust_remote_code=trust_remote_code).eval().to(self.device)

    def run(self, item: WorkItem) -> ItemResult:
        return run_item(self.model, item, device=self.device)


def plan_for(config: Config | EvaluateConfig, sources: Sources, model: str, tokenizer: PreTrainedTokenizerBase) -> EvalPlan:
    """The evaluation of a model on the rows of `sources`, cut into work items.

    Raises:
        InputError: a row does not fit into the model.
    """
    options: dict[str, Any] = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    return plan_evaluation(
        {split: rows for split, rows in sources.evaluated.items() if rows},
        tokenizer,
        config.evaluate,
        chat=ChatFormat(config.data.chat),
        eos_ids=stop_ids_of(model, tokenizer, options),
        max_length=positions(AutoConfig.from_pretrained(model, **options)),
        cut=config.data.max_length,
    )


@dataclass(frozen=True)
class Judge:
    """Evaluates models on one set of rows with one set of settings, and remembers what it has evaluated."""

    config: Config | EvaluateConfig
    sources: Sources
    display: Display
    num_tasks: int = 1

    def evaluate(self, name: str, model: str) -> Evaluation:
        """All metrics of one model."""
        given = self.config.model
        tokenizer = load_tokenizer(model, revision=given.revision, trust_remote_code=given.trust_remote_code)
        plan = plan_for(self.config, self.sources, model, tokenizer)
        results = self._examine(f"evaluate {name}", model, plan.items)
        return finish(plan, results, tokenizer, device=torch.device("cpu"), source=name)

    def _examine(self, stage: str, model: str, items: Sequence[WorkItem]) -> list[ItemResult]:
        """Share the items out over `num_tasks` examiners."""
        given = self.config.model
        decided = self.config if isinstance(self.config, EvaluateConfig) else self.config.engine
        precision, device = decided.precision, decided.device
        assert device != "auto"  # the driver has decided
        # from inside a trial of a grid, too, it finds its place on the cluster: the trial's own group holds none for it
        actor: Any = Examiner.options(num_cpus=1, num_gpus=1 if device == "gpu" else 0, scheduling_strategy="DEFAULT")  # type: ignore[attr-defined]
        count = min(self.num_tasks, len(items))
        examiners = [actor.remote(place_of(model), given.revision, given.trust_remote_code, precision, device) for _ in range(count)]
        try:
            waiting = [examiners[i % count].run.remote(item) for i, item in enumerate(items)]
            results: list[ItemResult] = []
            while waiting:
                self.display.update(stage, len(results), len(items))
                done, waiting = ray.wait(waiting, num_returns=1)
                results += ray.get(done)
            self.display.update(stage, len(items), len(items))
            return results
        finally:
            for examiner in examiners:
                ray.kill(examiner)

    def judge(self, name: str, model: str, *, key: str, folder: Path, samples: Path | None = None) -> Judged:
        """As `evaluate`; the log is kept in `folder` under a hash of `key` (what names the weights), rows and settings."""
        rows = {split: fingerprint(records) for split, records in self.sources.evaluated.items()}
        form = [self.config.data.chat, self.config.data.max_length]
        kept = folder / f"{digest([key, rows, self.config.evaluate.model_dump(), form], length=20)}.json"
        if pull_file(kept) and (samples is None or samples.is_file()):
            self.display.say(f"evaluation of {name}: made before")
            return Judged(_LOG.validate_json(kept.read_bytes()), 0.0)
        started = time.perf_counter()
        evaluation = self.evaluate(name, model)
        if samples is not None:
            self.write_samples(evaluation, samples)
        finite = {split: finite_columns(log) for split, log in evaluation.log.splits.items()}
        write_json(kept, dataclasses.asdict(dataclasses.replace(evaluation.log, splits=finite)))
        return Judged(evaluation.log, time.perf_counter() - started)

    def write_samples(self, evaluation: Evaluation, path: Path) -> None:
        """The first forget and retain questions with the true and the generated answer: text of the data, only where it was asked for."""
        rows = [
            {"split": split, "id": record.id, "prompt": record.prompt, "response": record.response, "generated": generated}
            for split in ("forget", "retain")
            for record, generated in zip(self.sources.evaluated[split][:NUM_SAMPLES], evaluation.generations.get(split, ()), strict=False)
        ]
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
