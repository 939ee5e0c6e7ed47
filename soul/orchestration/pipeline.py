"""A whole run: rows -> token stores -> target and retrained model -> unlearned model(s) -> evaluation -> results and report.

Every stage leaves a marker; running the same command again continues where the last one stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from soul.config import Config, EvaluateConfig
from soul.evaluate.eval_log import EvalLog
from soul.evaluate.summary import score_log
from soul.models.hashes import recorded_sha256
from soul.models.load import load_tokenizer
from soul.objectives.methods import TITLES
from soul.orchestration.arm import unlearn
from soul.orchestration.capacity import card_kinds, room_for
from soul.orchestration.checks import check_local_workers, check_model, check_run, check_standard
from soul.orchestration.claim import check_claim, check_recipe, claim, decided_run, is_done, mark_done, run_dir
from soul.orchestration.cluster import cluster
from soul.orchestration.data import Sources, cache_of, open_sources, trained_splits
from soul.orchestration.evaluate import Asked, Judge, judge_together, plan_for
from soul.orchestration.gold import given_standard
from soul.orchestration.outcome import write_logs, write_outcome
from soul.orchestration.parallel import run_together
from soul.orchestration.prepare import Prepared, given_model, prepared_model, preparing_engine, starting_model
from soul.orchestration.progress import Display
from soul.orchestration.tokens import token_settings, tokenise
from soul.preflight import check_output
from soul.records import InputError
from soul.report.build import build_report
from soul.report.results import Results, load_results
from soul.report.table import terminal_table
from soul.report.tracking import track_all
from soul.rundir import RunDir, versions, write_json
from soul.store import attach, check_writable, local, place_of
from soul.train.engine import EngineConfig


def run(config: Config) -> Path:
    """Do everything that is not done yet; returns the run directory, for one on a store this machine's copy of it.

    Raises:
        InputError: bad input, nearly all of it found before Ray starts.
    """
    twin = config.twin_run()
    arms = [config] if twin is None else [config, twin]
    folders = [run_dir(arm) for arm in arms]
    check_local_workers(config.address, config.engine.num_workers, config.engine.device)
    for arm in arms:
        check_claim(arm)
    if config.model.path is not None:
        check_model(local(config.model.path), config.model)
    given = None if config.model.retrained is None else given_standard(config.model.retrained)
    sources = open_sources(config.data, benchmark=config.benchmark, seed=config.train.seed)
    display = Display(enabled=config.progress)
    start = starting_model(config, sources.benchmark, cache_of(config))
    standard = replace(given, source=place_of(given.source)) if isinstance(given, EvalLog) else given and given.key
    inputs = [sources.fingerprints(), sources.benchmark.fingerprints(), given_model(start, config.model.revision).key, repr(standard)]
    if all(is_done(arm, inputs) for arm in arms):
        display.say(f"done before: {', '.join(folder.place for folder in folders)}")
    else:
        check_run(config, sources, start, given)
        for arm in arms:
            check_recipe(arm)
            claim(arm)
        _work(config, arms, sources, start, given, display)
        for arm in arms:
            mark_done(arm, inputs)
    show([load_results(folder.path) for folder in folders])
    return folders[0].path


def _work(config: Config, arms: Sequence[Config], sources: Sources, start: str, given: Prepared | EvalLog | None, display: Display) -> None:
    """Everything that costs time, from token stores to reports."""
    engine = config.engine
    with cluster(config.address, num_workers=engine.num_workers, device=engine.device, verbose=config.verbose) as device, display.live():
        config, *arms = (decided_run(each, device) for each in (config, *arms))
        display.say(computes(config.engine, card_kinds()))
        slots = room_for(engine.num_workers, device)
        stores = _stores(config, sources, start)
        prepared = _prepare(config, start, stores, display)
        if isinstance(given, Prepared):
            prepared["retrained"] = given
        trained = run_together([partial(unlearn, arm, prepared["target"], stores, display) for arm in arms], slots=slots)
        judge = Judge(config, sources, display, num_examiners=engine.num_workers)
        asked = [*_asked_of_prepared(config, prepared), *_asked_of_arms(arms)]
        judged = judge_together([(judge, model) for model in asked], room=room_for(1, device))
    standards, unlearned = judged[: len(prepared)], judged[len(prepared) :]
    made = dict(zip(prepared, standards, strict=True)).get("retrained")
    retrained = made.log if made is not None else given if isinstance(given, EvalLog) else None
    folders_of = {kind: model.path for kind, model in prepared.items()}
    for arm, result, log in zip(arms, trained, unlearned, strict=True):
        write_outcome(arm, sources, result, unlearned=log, target=standards[0], retrained=retrained, standards=folders_of)
    folders = [run_dir(arm).path for arm in arms]
    for folder in folders[1:]:
        build_report([folder])
    build_report(folders, output=folders[0])
    if config.wandb is not None and (told := track_all(folders, project=config.wandb)):
        display.say(told)


def computes(engine: EngineConfig, cards: Sequence[str]) -> str:
    """The device decision, for the person who started the run."""
    where = f"{engine.num_workers} worker(s) on {engine.runs_on.upper()}s"
    if engine.runs_on == "gpu" and cards:
        where += f" ({cards[0]})" if len(cards) == 1 else f" of several kinds ({', '.join(cards)}: the slowest and smallest set the pace)"
    if engine.computes_in == "fp32":
        return f"{where}, in fp32" + (" with TF32 products" if engine.runs_on == "gpu" else "")
    return f"{where}, in bf16" + (" over fp32 weights" if engine.computes_in == "bf16" else "")


def show(results: Sequence[Results]) -> None:
    """The table, on stdout; a job's log is no terminal and gets the width that the table was made for."""
    Console(width=None if sys.stdout.isatty() else 110).print(terminal_table(results))


def _asked_of_prepared(config: Config, prepared: Mapping[str, Prepared]) -> list[Asked]:
    folder = cache_of(config) / "evaluations"
    return [Asked(kind, model.path, model.key, folder, revision=model.revision) for kind, model in prepared.items()]


def _asked_of_arms(arms: Sequence[Config]) -> list[Asked]:
    asked: list[Asked] = []
    for arm in arms:
        run = run_dir(arm)
        name = f"{TITLES[arm.method.name]} with {arm.optimizer.name}"
        samples = run.path / "samples.jsonl" if arm.samples else None
        asked.append(Asked(name, str(run.model), recorded_sha256(run.model), run.path / ".stages", samples))
    return asked


def resume(folder: Path) -> Path:
    """Continue the run in `folder` (a store's copy, for a run there) with the configuration it was started with."""
    path = RunDir(folder).config
    if not path.is_file():
        raise InputError(f"{folder} holds no run (no config.json). Pass a run directory.")
    config = Config.model_validate_json(path.read_text())
    return run(config.model_copy(update={"output": place_of(folder)}))  # it may have been moved, or named from elsewhere


def evaluate_folder(config: EvaluateConfig) -> Path:
    """Measure one model as it is: logs/ (TOFU's and OpenUnlearning's format) and evaluation.json in the output folder."""
    assert config.model.path is not None  # the config has checked it
    check_local_workers(config.address, config.num_workers, config.device)
    check_output(config.output)
    check_writable(config.output)
    model = local(config.model.path)
    check_model(model, config.model)
    given = None if config.model.retrained is None else given_standard(config.model.retrained)
    sources = open_sources(config.data, benchmark=config.benchmark, seed=0)
    tokenizer = load_tokenizer(model, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)
    check_standard(config, sources, plan_for(config, sources, model, tokenizer, config.model.revision), given)
    run = RunDir.at(config.output)
    attach(run.path, keep=True)
    run.create()
    display = Display(enabled=config.progress)
    with cluster(config.address, num_workers=config.num_workers, device=config.device, verbose=config.verbose) as device, display.live():
        judge = Judge(config.decided(device), sources, display, num_examiners=config.num_workers)
        judged = judge.evaluate("the model", model, config.model.revision)
        if config.samples:
            judge.write_samples(judged, run.path / "samples.jsonl")
        retrained = judge.evaluate("the retrained model", given.path, given.revision).log if isinstance(given, Prepared) else given
    write_logs(judged.log, run.logs)
    write_json(
        run.path / "evaluation.json",
        {
            "model": config.model.path,
            "benchmark": sources.benchmark.name,
            "forget": config.data.forget,
            "data": sources.fingerprints(),
            "versions": versions(),
            **score_log(judged.log, retrained, mean=config.evaluate.truth_ratio, allow_mismatch=config.model.allow_mismatch),
        },
    )
    return run.path


def _stores(config: Config, sources: Sources, start: str) -> dict[str, Path]:
    settings = token_settings(config.data, config.model, start)
    wanted = {"forget", "retain", *trained_splits(config)} | ({"real_authors", "world_facts"} & set(sources.rows))
    return {split: tokenise(sources.rows[split], split, settings, cache=cache_of(config)) for split in sorted(wanted)}


def _prepare(config: Config, start: str, stores: Mapping[str, Path], display: Display) -> dict[str, Prepared]:
    """Target and, where there is one as a model, retrained."""
    if not config.makes_target:
        return {"target": given_model(start, config.model.revision)}
    kinds = ("target", "retrained") if config.makes_retrained else ("target",)
    make = partial(prepared_model, config, start=start, stores=stores, cache=cache_of(config), display=display)
    made = run_together(
        [partial(make, kind) for kind in kinds], slots=room_for(preparing_engine(config).num_workers, config.engine.runs_on)
    )
    return dict(zip(kinds, made, strict=True))
