"""Evaluations on Ray: the plan is made here, its fixed items are dealt out to examiners, so any number of them gives the same metrics."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, PreTrainedTokenizerBase

from soul.config import Config, EvaluateConfig
from soul.data.chat import ChatFormat
from soul.data.sources import fingerprint
from soul.evaluate.eval_log import EvalLog, finite_columns
from soul.evaluate.evaluator import Evaluation, finish, positions
from soul.evaluate.generate import stop_ids_of
from soul.evaluate.plan import EvalPlan, plan_evaluation
from soul.evaluate.rouge import TOKENIZER
from soul.evaluate.same_rows import zlib_name
from soul.models.load import load_tokenizer
from soul.orchestration.data import Sources
from soul.orchestration.examiners import Exam, examine, shares
from soul.orchestration.parallel import run_together
from soul.orchestration.progress import Display
from soul.rundir import digest, write_atomically, write_json
from soul.store import place_of, pull_file

_LOG = TypeAdapter(EvalLog)
NUM_SAMPLES = 10
METRICS_VERSION = 2  # one more whenever a metric, or what a log says, changes: older evaluations are then made again


@dataclass(frozen=True)
class Judged:
    """One model's evaluation: the log from which every metric follows, and how long it took to make (0 where it was made before)."""

    log: EvalLog
    seconds: float


@dataclass(frozen=True)
class Asked:
    """One model to judge. The log is kept in `folder` under a hash of `key` (what names the weights), rows and settings."""

    name: str
    model: str
    key: str
    folder: Path
    samples: Path | None = None
    revision: str | None = None


def plan_for(
    config: Config | EvaluateConfig, sources: Sources, model: str, tokenizer: PreTrainedTokenizerBase, revision: str | None
) -> EvalPlan:
    """The evaluation of a model on the rows of `sources`, cut into work items.

    Raises:
        InputError: a row does not fit into the model.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": config.model.trust_remote_code}
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
    """Evaluates models on one set of rows with one set of settings, and remembers what it has evaluated.

    `config` is decided. `num_examiners`: processes that share a model's items, at most.
    """

    config: Config | EvaluateConfig
    sources: Sources
    display: Display
    num_examiners: int = 1

    def evaluate(self, name: str, model: str, revision: str | None = None) -> Evaluation:
        """All metrics of one model."""
        given = self.config.model
        tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=given.trust_remote_code)
        plan = plan_for(self.config, self.sources, model, tokenizer, revision)
        stage = f"evaluate {name}"
        self.display.update(stage, 0, len(plan.items))
        results = examine(
            Exam.of(self.config, place_of(model), revision),
            plan.items,
            stage=stage,
            num_examiners=self.num_examiners,
            update=lambda done: self.display.update(stage, done, len(plan.items)),
            say=self.display.say,
        )
        return finish(plan, results, tokenizer, device=torch.device("cpu"), source=name)

    def kept(self, asked: Asked) -> Path:
        """Where the evaluation is kept, which may be there already."""
        return asked.folder / f"{digest(self.facts(asked), length=20)}.json"

    def facts(self, asked: Asked) -> dict[str, object]:
        """Everything that changes a number of the evaluation; what is not here does not."""
        exam = Exam.of(self.config, asked.model, asked.revision)
        return {
            "weights": asked.key,
            "revision": exam.revision,
            "trust_remote_code": exam.trust_remote_code,
            "rows": {split: fingerprint(records) for split, records in self.sources.evaluated.items()},
            "settings": self.config.evaluate.model_dump(),
            "chat": self.config.data.chat,
            "max_length": self.config.data.max_length,
            "device": exam.device,
            "dtype": str(exam.dtype),
            "rouge_tokenizer": TOKENIZER,
            "zlib": zlib_name(),
            "metrics": METRICS_VERSION,
        }

    def has_judged(self, asked: Asked) -> bool:
        """Whether it need not be made again."""
        return pull_file(self.kept(asked)) and (asked.samples is None or asked.samples.is_file())

    def judge(self, asked: Asked) -> Judged:
        """As `evaluate`, unless it has been made before."""
        kept = self.kept(asked)
        if self.has_judged(asked):
            self.display.say(f"evaluation of {asked.name}: made before")
            return Judged(_LOG.validate_json(kept.read_bytes()), 0.0)
        started = time.perf_counter()
        evaluation = self.evaluate(asked.name, asked.model, asked.revision)
        if asked.samples is not None:
            self.write_samples(evaluation, asked.samples)
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


def judge_together(asked: Sequence[tuple[Judge, Asked]], *, room: int) -> list[Judged]:
    """All of them, sharing the cluster out: those that are still to make have no more examiners together than there is room for."""
    new = [place for place, (judge, model) in enumerate(asked) if not judge.has_judged(model)]
    wanted = max((judge.num_examiners for judge, _ in asked), default=1)
    given = dict(zip(new, shares(len(new), wanted=wanted, room=room), strict=True))
    calls = [
        partial(dataclasses.replace(judge, num_examiners=given.get(place, 1)).judge, model) for place, (judge, model) in enumerate(asked)
    ]
    return run_together(calls, slots=room)
