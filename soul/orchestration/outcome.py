"""What a finished arm leaves: evaluation logs, results.json and the manifest."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soul.config import Config
from soul.evaluate.eval_log import EvalLog
from soul.evaluate.open_unlearning_log import FILE, write_open_unlearning_log
from soul.evaluate.removal import removal_tests
from soul.evaluate.same_rows import differences, zlibs_apart
from soul.evaluate.score import score
from soul.evaluate.tofu_log import AGGREGATED, write_tofu_log
from soul.orchestration.data import Sources
from soul.orchestration.evaluate import Judged
from soul.orchestration.gold import gold_folder
from soul.report.results import Cost, EpochRow, ModelResults, Results, save_results
from soul.report.seal import make_seal
from soul.rundir import RunDir, versions, write_json
from soul.store import push
from soul.train.job import JobResult

SHARED_PROCESS = "the run shared its process with others, whose memory counts too; runs of their own measure it (--isolated)"
NO_RETRAINED = "no retrained model was given: pass --retrained with a model folder, a run directory or a published log"


def write_outcome(
    config: Config,
    sources: Sources,
    trained: JobResult,
    *,
    unlearned: Judged,
    target: Judged,
    retrained: EvalLog | None,
    command: Sequence[str] | None = None,
    standards: Mapping[str, str] | None = None,
) -> None:
    """Write one arm's logs/, results.json and manifest.json.

    `command` is what repeats the run (None: this process's own). `standards` says where target and retrained model lie, folders or hub
    ids: a folder is sealed with the report, so that it can be served beside the unlearned model.
    """
    run = RunDir.at(config.output)
    write_logs(unlearned.log, run.logs)
    if retrained is not None:
        write_logs(retrained, gold_folder(run))
    reasons = {} if retrained is not None else {"models.retrained": NO_RETRAINED}
    if not trained.peak_memory_bytes:
        reasons["cost.peak_memory_bytes"] = SHARED_PROCESS
    gold = None if retrained is None else _entry(retrained, retrained, config)
    results = Results(
        benchmark=config.benchmark if config.benchmark == "own" else f"{sources.benchmark.name}/{config.data.forget}",
        method=config.method.name,
        optimizer=config.optimizer.name,
        seed=config.train.seed,
        splits={split: len(rows) for split, rows in sources.evaluated.items() if rows},
        models={
            "target": _entry(target.log, retrained, config),
            "unlearned": _entry(unlearned.log, retrained, config),
            "retrained": gold,
        },
        epochs=[EpochRow(**row) for row in trained.epochs],
        cost=_cost(trained, unlearned),
        settings=_settings(config) | _compared(unlearned.log, retrained, config),
        reasons=reasons,
    )
    save_results(results, run.results)
    local = {name: Path(path) for name, path in (standards or {}).items() if Path(path).is_dir()}
    write_json(
        run.manifest,
        {
            "versions": versions(),
            "data": sources.fingerprints(),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]] if command is None else list(command),
            "seconds": {"train": trained.train_s, "evaluate": unlearned.seconds},
            "steps": trained.steps,
            "tokens": trained.tokens,
            # what soul.serving's gate compares: this report, and the models it judged
            "seal": make_seal(run.path, {"unlearned": run.model, **local}).model_dump(),
        },
    )


def _cost(trained: JobResult, unlearned: Judged) -> Cost:
    return Cost(
        train_s=trained.train_s,
        eval_s=unlearned.seconds,
        tokens_per_s=trained.tokens / max(trained.train_s, 1e-9),
        peak_memory_bytes=trained.peak_memory_bytes or None,
        optimizer_state_bytes_per_rank=trained.optimizer_state_bytes_per_rank,
    )


def write_logs(log: EvalLog, folder: Path) -> None:
    """A model's row values in TOFU's and in OpenUnlearning's format, for other tools and as somebody's gold standard."""
    write_tofu_log(log, folder / AGGREGATED)
    write_open_unlearning_log(log, folder / FILE)
    for name in (AGGREGATED, FILE):
        push(folder / name)


def _entry(log: EvalLog, retrained: EvalLog | None, config: Config) -> ModelResults:
    mean, insists = config.evaluate.truth_ratio, config.model.allow_mismatch
    tests = None if log is retrained else removal_tests(log, retrained, mean, allow_mismatch=insists)
    scores = score(log, retrained=retrained, mean=mean, allow_mismatch=insists)
    return ModelResults.model_validate({**scores.model_entry(), "tests": tests})


def _compared(log: EvalLog, retrained: EvalLog | None, config: Config) -> dict[str, Any]:
    """What the metrics were made with, and what of the gold standard did not fit but was insisted on."""
    names = {name: log.made_with[name] for name in ("rouge_tokenizer", "zlib") if name in log.made_with}
    found: tuple[str, ...] = ()
    if retrained is not None and config.model.allow_mismatch:
        apart = zlibs_apart(log, retrained)
        found = (*differences(log, retrained), *([f"zlib attack: {apart}"] if apart else []))
    return {**names, **({"compared_despite": "; ".join(found)} if found else {})}


def _settings(config: Config) -> dict[str, Any]:
    """What a reader needs to compare runs: numbers and names, no paths and nothing of the data."""
    sections: Mapping[str, Any] = {
        **config.method.model_dump(exclude={"name"}),
        **config.optimizer.model_dump(exclude={"name", "betas"}),
        **config.train.model_dump(include={"epochs", "max_steps", "batch_size", "schedule", "warmup_fraction"}),
        "engine": config.engine.name,
        **config.engine.model_dump(include={"num_workers", "precision", "max_grad_norm"}),
    }
    return {name: value for name, value in sections.items() if value is None or isinstance(value, bool | int | float | str)}
