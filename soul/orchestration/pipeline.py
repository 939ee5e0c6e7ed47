"""A whole run: rows -> token stores -> target and retrained model -> unlearned model(s) -> evaluation -> results and report.

Every stage leaves a marker; running the same command again continues where the last one stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import ray
from rich.console import Console

from soul.config import Config
from soul.evaluate.eval_log import EvalLog
from soul.evaluate.logs import read_log
from soul.objectives.methods import TITLES
from soul.orchestration.arm import unlearn
from soul.orchestration.cluster import cluster
from soul.orchestration.data import Sources, cache_of, open_sources, trained_splits
from soul.orchestration.evaluate import Judge, Judged
from soul.orchestration.outcome import write_outcome
from soul.orchestration.parallel import run_together
from soul.orchestration.prepare import Prepared, prepared_model, starting_model
from soul.orchestration.progress import Display
from soul.orchestration.tokens import token_settings, tokenise
from soul.records import InputError
from soul.report.build import build_report
from soul.report.results import load_results
from soul.report.table import terminal_table
from soul.rundir import RunDir, write_atomically

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
    sources = open_sources(config.data, benchmark=config.benchmark, seed=config.train.seed)
    display = Display(enabled=config.progress)
    with cluster(config.address, num_workers=config.engine.num_workers, verbose=config.verbose), display.live():
        slots = _slots(config.engine.num_workers)
        start = starting_model(config, sources.benchmark, cache_of(config))
        stores = _stores(config, sources, start)
        prepared = _prepare(config, start, stores, slots, display)
        trained = run_together([partial(unlearn, arm, prepared["target"], stores, display) for arm in arms], slots=slots)
        judge = Judge(config, sources, display)
        judged = run_together([*_judge_prepared(judge, config, prepared), *_judge_arms(judge, arms)], slots=_slots(1))
    standards, unlearned = judged[: len(prepared)], judged[len(prepared) :]
    retrained, why = _gold_standard(config, dict(zip(prepared, standards, strict=True)))
    for arm, result, log in zip(arms, trained, unlearned, strict=True):
        write_outcome(arm, sources, result, unlearned=log, target=standards[0], retrained=retrained, why_no_retrained=why)
    folders = [Path(arm.output).resolve() for arm in arms]
    for folder in folders[1:]:
        build_report([folder])
    build_report(folders, output=folders[0])
    Console().print(terminal_table([load_results(folder) for folder in folders]))
    return folders[0]


def _judge_prepared(judge: Judge, config: Config, prepared: Mapping[str, Prepared]) -> list[Callable[[], Judged]]:
    folder = cache_of(config) / "evaluations"
    return [partial(judge.judge, kind, model.path, key=model.key, folder=folder) for kind, model in prepared.items()]


def _judge_arms(judge: Judge, arms: Sequence[Config]) -> list[Callable[[], Judged]]:
    calls: list[Callable[[], Judged]] = []
    for arm in arms:
        run = RunDir(Path(arm.output).resolve())
        name = f"{TITLES[arm.method.name]} with {arm.optimizer.name}"
        calls.append(partial(judge.judge, name, str(run.model), key=str(run.model.stat().st_mtime_ns), folder=run.path / ".stages"))
    return calls


def _gold_standard(config: Config, judged: Mapping[str, Judged]) -> tuple[EvalLog | None, str]:
    """The retrained model's log, made here or given, or why there is none."""
    if "retrained" in judged:
        return judged["retrained"].log, ""
    if config.model.retrained is None:
        return None, "no retrained model was given: pass --retrained with a model folder, a run directory or a published log"
    return read_log(config.model.retrained), ""


def resume(folder: Path) -> Path:
    """Continue the run in `folder` with the configuration it was started with."""
    path = RunDir(folder).config
    if not path.is_file():
        raise InputError(f"{folder} holds no run (no config.json). Pass a run directory.")
    return run(Config.model_validate_json(path.read_text()))


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


def _prepare(config: Config, start: str, stores: Mapping[str, Path], slots: int, display: Display) -> dict[str, Prepared]:
    """Target and, where there is one as a model, retrained."""
    if not config.makes_target:
        return {"target": Prepared(start, start)}
    kinds = ("target", "retrained") if config.makes_retrained else ("target",)
    make = partial(prepared_model, config, start=start, stores=stores, cache=cache_of(config), display=display)
    made = run_together([partial(make, kind) for kind in kinds], slots=slots)
    return dict(zip(kinds, made, strict=True))
