"""A whole run: rows -> token stores -> target and retrained model -> unlearned model(s) -> evaluation -> results and report.

Every stage leaves a marker; running the same command again continues where the last one stopped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import ray
from rich.console import Console

from soul.config import Config, EvaluateConfig
from soul.evaluate.eval_log import EvalLog
from soul.evaluate.score import score_log
from soul.models.load import check_model_folder
from soul.objectives.methods import TITLES
from soul.orchestration.arm import unlearn
from soul.orchestration.cluster import cluster
from soul.orchestration.data import Sources, cache_of, open_sources, trained_splits
from soul.orchestration.evaluate import Judge, Judged
from soul.orchestration.gold import given_standard
from soul.orchestration.outcome import write_logs, write_outcome
from soul.orchestration.parallel import run_together
from soul.orchestration.prepare import Prepared, prepared_model, preparing_engine, starting_model
from soul.orchestration.progress import Display
from soul.orchestration.tokens import token_settings, tokenise
from soul.records import InputError
from soul.report.build import build_report
from soul.report.results import Results, load_results
from soul.report.table import terminal_table
from soul.report.tracking import track
from soul.rundir import RunDir, versions, write_atomically, write_json

# Where a run lies and how it is watched does not make it another run.
_INCIDENTAL = {"output", "cache", "address", "resume", "progress", "verbose"}


def run(config: Config) -> Path:
    """Do everything that is not done yet; returns the run directory.

    Raises:
        InputError: bad input, found before anything expensive starts.
    """
    twin = config.twin_run()
    arms = [config] if twin is None else [config, twin]
    for arm in arms:
        _claim(arm)
    given = None if config.model.retrained is None else given_standard(config.model.retrained)
    sources = open_sources(config.data, benchmark=config.benchmark, seed=config.train.seed)
    display = Display(enabled=config.progress)
    with cluster(config.address, num_workers=config.engine.num_workers, verbose=config.verbose), display.live():
        slots = _slots(config.engine.num_workers)
        start = starting_model(config, sources.benchmark, cache_of(config))
        stores = _stores(config, sources, start)
        prepared = _prepare(config, start, stores, display)
        if isinstance(given, Prepared):
            prepared["retrained"] = given
        trained = run_together([partial(unlearn, arm, prepared["target"], stores, display) for arm in arms], slots=slots)
        judge = Judge(config, sources, display)
        judged = run_together([*_judge_prepared(judge, config, prepared), *_judge_arms(judge, arms)], slots=_slots(1))
    standards, unlearned = judged[: len(prepared)], judged[len(prepared) :]
    made = dict(zip(prepared, standards, strict=True)).get("retrained")
    retrained = made.log if made is not None else given if isinstance(given, EvalLog) else None
    for arm, result, log in zip(arms, trained, unlearned, strict=True):
        write_outcome(arm, sources, result, unlearned=log, target=standards[0], retrained=retrained)
    folders = [Path(arm.output).resolve() for arm in arms]
    for folder in folders[1:]:
        build_report([folder])
    build_report(folders, output=folders[0])
    if config.wandb is not None:
        for folder in folders:
            track(folder, project=config.wandb)
    show([load_results(folder) for folder in folders])
    return folders[0]


def show(results: Sequence[Results]) -> None:
    """The table, on stdout; a job's log is no terminal and gets the width that the table was made for."""
    Console(width=None if sys.stdout.isatty() else 110).print(terminal_table(results))


def _judge_prepared(judge: Judge, config: Config, prepared: Mapping[str, Prepared]) -> list[Callable[[], Judged]]:
    folder = cache_of(config) / "evaluations"
    return [partial(judge.judge, kind, model.path, key=model.key, folder=folder) for kind, model in prepared.items()]


def _judge_arms(judge: Judge, arms: Sequence[Config]) -> list[Callable[[], Judged]]:
    calls: list[Callable[[], Judged]] = []
    for arm in arms:
        run = RunDir(Path(arm.output).resolve())
        name = f"{TITLES[arm.method.name]} with {arm.optimizer.name}"
        samples = run.path / "samples.jsonl" if arm.samples else None
        key = str(run.model.stat().st_mtime_ns)
        calls.append(partial(judge.judge, name, str(run.model), key=key, folder=run.path / ".stages", samples=samples))
    return calls


def resume(folder: Path) -> Path:
    """Continue the run in `folder` with the configuration it was started with."""
    path = RunDir(folder).config
    if not path.is_file():
        raise InputError(f"{folder} holds no run (no config.json). Pass a run directory.")
    return run(Config.model_validate_json(path.read_text()))


def evaluate_folder(config: EvaluateConfig) -> Path:
    """Measure one model as it is: logs/ (TOFU's and OpenUnlearning's format) and evaluation.json in the output folder."""
    run = RunDir(Path(config.output).resolve())
    run.create()
    assert config.model.path is not None  # the config has checked it
    check_model_folder(config.model.path)
    given = None if config.model.retrained is None else given_standard(config.model.retrained)
    sources = open_sources(config.data, benchmark=config.benchmark, seed=0)
    display = Display(enabled=config.progress)
    with cluster(config.address, num_workers=config.num_workers, verbose=config.verbose), display.live():
        judge = Judge(config, sources, display, num_tasks=config.num_workers)
        judged = judge.evaluate("the model", config.model.path)
        if config.samples:
            judge.write_samples(judged, run.path / "samples.jsonl")
        retrained = judge.evaluate("the retrained model", given.path).log if isinstance(given, Prepared) else given
    write_logs(judged.log, run.logs)
    write_json(
        run.path / "evaluation.json",
        {
            "model": config.model.path,
            "benchmark": sources.benchmark.name,
            "forget": config.data.forget,
            "data": sources.fingerprints(),
            "versions": versions(),
            **score_log(judged.log, retrained, mean=config.evaluate.truth_ratio),
        },
    )
    return run.path


def _claim(config: Config) -> None:
    """Make the run directory this run's own, unless another run has it."""
    folder = RunDir(Path(config.output).resolve())
    folder.create()
    ours = json.loads(config.model_dump_json())
    if folder.config.is_file():
        theirs = json.loads(folder.config.read_text())
        other = sorted(key for key in {*ours, *theirs} - _INCIDENTAL if ours.get(key) != theirs.get(key))
        if other:
            raise InputError(
                f"{config.output} holds another run: its {', '.join(other)} settings differ. "
                "Choose another --output, or delete that folder."
            )
    elif config.resume:
        raise InputError(f"--resume: {config.output} holds no run to continue. Remove --resume, or correct --output.")
    write_atomically(folder.config, config.model_dump_json(indent=2) + "\n")


def _slots(num_workers: int) -> int:
    """How many jobs of so many workers fit side by side."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if gpus:
        return max(1, gpus // num_workers)
    physical = os.cpu_count() or 1
    return max(1, min(physical, int(resources.get("CPU", 1))) // num_workers)


def _stores(config: Config, sources: Sources, start: str) -> dict[str, Path]:
    settings = token_settings(config.data, config.model, start)
    wanted = {"forget", "retain", *trained_splits(config)} | ({"real_authors", "world_facts"} & set(sources.rows))
    return {split: tokenise(sources.rows[split], split, settings, cache=cache_of(config)) for split in sorted(wanted)}


def _prepare(config: Config, start: str, stores: Mapping[str, Path], display: Display) -> dict[str, Prepared]:
    """Target and, where there is one as a model, retrained."""
    if not config.makes_target:
        return {"target": Prepared(start, start)}
    kinds = ("target", "retrained") if config.makes_retrained else ("target",)
    make = partial(prepared_model, config, start=start, stores=stores, cache=cache_of(config), display=display)
    made = run_together([partial(make, kind) for kind in kinds], slots=_slots(preparing_engine(config).num_workers))
    return dict(zip(kinds, made, strict=True))
