"""First- against second-order optimizers, honestly: the same learning-rate search for each, then fresh seeds on rows the search never saw.

Stage 1 tries every learning rate of one grid with every optimizer on one seed and looks at likelihoods of the selection half of the rows.
Stage 2 runs other seeds, at equal learning rates and at the ones selected for each optimizer, and evaluates the report half in full.
Every finished cell is a file, so an interrupted comparison continues where it stopped.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from soul.benchmarks.preparation import Prepared, Say, prepare
from soul.benchmarks.selection import RULES, Bounds, Rule, Selection, Trial, select
from soul.data.sources import Benchmark
from soul.device import seen, torch_device
from soul.evaluate.eval_log import EvalLog
from soul.evaluate.evaluator import Evaluation, evaluate_model
from soul.evaluate.settings import EvalSettings
from soul.models.load import load_model, load_tokenizer
from soul.models.tiny import TinyConfig
from soul.objectives.methods import METHODS, Method, needs_reference, streamed_splits
from soul.optim.configs import OPTIMIZERS
from soul.records import InputError
from soul.rundir import digest, write_json
from soul.train.config import TrainConfig
from soul.train.engine import EngineConfig
from soul.train.job import TrainJob, run_job
from soul.train.loop import NonFinite
from soul.train.single import SingleEngine

SEARCH_SEED = 0  # the report's seeds are 1, 2, ...

MethodName = Literal["ga", "grad_diff", "po", "npo"]
OptimizerName = Literal["adamw", "sophia", "soul_release", "signum"]
Kind = Literal["equal", "keep", "forget"]


class ComparisonSettings(BaseModel):
    """What is compared. The first optimizer is the baseline that the others are compared with."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    methods: tuple[MethodName, ...] = Field(("npo", "grad_diff"), min_length=1, description="unlearning objectives")
    optimizers: tuple[OptimizerName, ...] = Field(
        ("adamw", "sophia", "soul_release", "signum"), min_length=2, description="optimizers; the first one is the baseline"
    )
    learning_rates: tuple[float, ...] = Field(
        (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3), min_length=1, description="the search grid, the same for every optimizer"
    )
    equal_learning_rates: tuple[float, ...] = Field(
        (1e-4,), description="rates at which all optimizers are also compared, besides those that the baseline selects"
    )
    seeds: int = Field(3, ge=1, description="seeds of the report; none of them is the search's")
    retain_weight: float = Field(1.0, ge=0, description="weight of the retain loss, the same for every optimizer")
    retain_floor: float = Field(0.9, gt=0, le=1, description="share of the target's retain probability that a rate has to keep")
    forget_ceiling: float = Field(0.1, gt=0, le=1, description="share of the target's forget probability that a rate may leave")
    epochs: int = Field(5, ge=1, description="passes over the forget rows")
    batch_size: int = Field(4, ge=1, description="forget rows per step; as many retain rows join them")
    prepare_steps: int = Field(1000, ge=1, description="optimizer steps that make the target and the retrained model")
    max_new_tokens: int | None = Field(None, ge=1, description="cap of a generated answer, tokens (null: the longest reference answer)")
    tiny: TinyConfig = Field(TinyConfig(), description="shape of the tiny Llama")

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in ("methods", "optimizers", "learning_rates", "equal_learning_rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names something twice, got {', '.join(map(str, values))}. Name each once.")
        if min((*self.learning_rates, *self.equal_learning_rates)) <= 0:
            raise ValueError("learning rates have to be above 0. Remove the others.")
        return self

    @property
    def baseline(self) -> OptimizerName:
        return self.optimizers[0]

    @property
    def report_seeds(self) -> tuple[int, ...]:
        return tuple(range(SEARCH_SEED + 1, SEARCH_SEED + 1 + self.seeds))


@dataclass(frozen=True, slots=True)
class Cell:
    """One unlearning run of one stage."""

    stage: Literal["search", "report"]
    method: MethodName
    optimizer: OptimizerName
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.method}-{self.optimizer}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Group:
    """Runs that are compared with each other: one learning rate per optimizer, and each one's cells in the order of the seeds.

    `kinds` says how the rates came about: "equal" is one for all, a rule's name is what the rule selects for each. Several where they
    come to the same rates.
    """

    method: MethodName
    kinds: tuple[Kind, ...]
    learning_rates: Mapping[str, float]
    cells: Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Search:
    """One optimizer's search with one method."""

    trials: tuple[Trial, ...]
    selections: Mapping[Rule, Selection]


@dataclass(frozen=True)
class ComparisonResult:
    """Everything the tables show; no text of any row. `models` holds the entries of target and retrained."""

    settings: ComparisonSettings
    benchmark: str
    sizes: Mapping[str, int]
    max_new_tokens: int
    longest_answer: int
    steps: int
    shared_groups: tuple[str, ...]
    models: Mapping[str, Mapping[str, Any]]
    bounds: Bounds
    searches: Mapping[tuple[str, str], Search]
    groups: Sequence[Group]


class Bench:
    """Runs cells against one prepared pair of models, each at most once."""

    def __init__(self, benchmark: Benchmark, settings: ComparisonSettings, folder: Path, say: Say) -> None:
        self.settings, self.folder, self._say = settings, folder, say
        self.prepared: Prepared = prepare(benchmark, folder, tiny=settings.tiny, steps=settings.prepare_steps, say=say)
        self.max_new_tokens = settings.max_new_tokens or self.prepared.longest_answer
        gold = self._evaluate(self.prepared.retrained, None)
        self._retrained: EvalLog = gold.log
        target = self._evaluate(self.prepared.target, gold.log)
        self.models = {"target": _entry(target), "retrained": _entry(gold)}

    def run(self, cell: Cell) -> dict[str, Any]:
        """The cell's numbers, from its file if it was finished before with the same settings, rows and models."""
        job = self._job(cell)
        facts = [asdict(cell), job.method.model_dump(), job.optimizer.model_dump(), job.train.model_dump(), job.engine.model_dump()]
        key = digest([self.prepared.key, facts, self.max_new_tokens])
        path = self.folder / "cells" / f"{cell.name}.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text())
            if found["key"] == key:
                return found
        started = time.perf_counter()
        result = {"key": key, "cell": asdict(cell), **self._measure(cell, job)}
        write_json(path, result)
        self._say(f"{cell.name}: {_headline(result)}, {time.perf_counter() - started:.0f} s")
        return result

    def _job(self, cell: Cell) -> TrainJob:
        """SOUL's schedule and clipping, which are the defaults of the training and engine settings."""
        method = method_of(cell.method, self.settings.retain_weight)
        prepared, settings = self.prepared, self.settings
        return TrainJob(
            model=str(prepared.target),
            export="",
            run_dir="",
            method=method,
            optimizer=OPTIMIZERS[cell.optimizer](learning_rate=cell.learning_rate),
            train=TrainConfig(
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                micro_batch_size=settings.batch_size,
                seed=cell.seed,
                eval_every=settings.epochs if cell.stage == "search" else 0,
            ),
            engine=EngineConfig(precision="fp32").decided(seen()),
            stores={split: (str(prepared.stores[split]),) for split in streamed_splits(method)},
            reference=str(prepared.reference) if needs_reference(method) else None,
            probes={split: str(store) for split, store in prepared.probes.items()} if cell.stage == "search" else {},
            probe_limit=10**9,
        )

    def _measure(self, cell: Cell, job: TrainJob) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory(prefix="soul-compare-") as scratch:
            model = Path(scratch) / "model"
            here = TrainJob(**{**vars(job), "export": str(model), "run_dir": scratch})
            try:
                done = run_job(
                    here,
                    SingleEngine(here.engine),
                    resume_from=None,
                    save_checkpoint=lambda engine, progress: None,
                    on_step=lambda row, total: rows.append(row),
                )
            except NonFinite as failure:
                return {"diverged_at_step": failure.step, "steps": failure.step, "train_s": None, "telemetry": _telemetry(rows)}
            found = {"diverged_at_step": None, "steps": done.steps, "train_s": done.train_s, "telemetry": _telemetry(rows)}
            if cell.stage == "search":
                return {**found, "start": done.epochs[0], "end": done.epochs[-1]}
            return {**found, "scores": _entry(self._evaluate(model, self._retrained))}

    def _evaluate(self, model: Path, retrained: EvalLog | None) -> Evaluation:
        device = torch_device(seen())
        loaded = load_model(str(model)).eval().to(device)
        tokenizer = load_tokenizer(str(model))
        settings = EvalSettings(max_new_tokens=self.max_new_tokens)
        return evaluate_model(loaded, tokenizer, self.prepared.report_rows, settings, device=device, retrained=retrained)


def method_of(name: MethodName, retain_weight: float) -> Method:
    kind = METHODS[name]
    return kind(retain_weight=retain_weight) if "retain_weight" in kind.model_fields else kind()  # type: ignore[call-arg]


def compare(benchmark: Benchmark, settings: ComparisonSettings, folder: Path, *, say: Say = lambda line: None) -> ComparisonResult:
    """Run what is missing in `folder`, and gather everything. `say` hears a line per finished cell."""
    bench = Bench(benchmark, settings, folder, say)
    found = {
        (method, optimizer): [bench.run(Cell("search", method, optimizer, rate, SEARCH_SEED)) for rate in settings.learning_rates]
        for method in settings.methods
        for optimizer in settings.optimizers
    }
    start = next((cell["start"] for cells in found.values() for cell in cells if "start" in cell), None)
    if start is None:
        raise InputError("every run of the search diverged. Give smaller learning rates (--learning-rates).")
    target_forget, target_retain = (start[split]["probability"] for split in ("forget", "retain"))
    bounds = Bounds(target_forget, target_retain, settings.retain_floor, settings.forget_ceiling)
    searches: dict[tuple[str, str], Search] = {}
    for pair, cells in found.items():
        trials = tuple(_trial(rate, cell) for rate, cell in zip(settings.learning_rates, cells, strict=True))
        searches[pair] = Search(trials, {rule: select(trials, rule, bounds) for rule in RULES})
    rows = bench.prepared.report_rows
    return ComparisonResult(
        settings=settings,
        benchmark=benchmark.name,
        sizes={f"{split} (report half)" if split in ("forget", "retain") else split: len(records) for split, records in rows.items()}
        | {f"{split} (trained on)": len(benchmark.splits[split]) for split in ("forget", "retain")},
        max_new_tokens=bench.max_new_tokens,
        longest_answer=bench.prepared.longest_answer,
        shared_groups=bench.prepared.shared_groups,
        steps=settings.epochs * -(-len(benchmark.splits["forget"]) // settings.batch_size),
        models=bench.models,
        bounds=bounds,
        searches=searches,
        groups=[group for method in settings.methods for group in _groups(bench, method, searches)],
    )


def _groups(bench: Bench, method: MethodName, searches: Mapping[tuple[str, str], Search]) -> list[Group]:
    """Equal rates in rising order, then what each rule selects; equal choices of rates are one group."""
    settings = bench.settings
    selected = {
        rule: tuple(searches[method, optimizer].selections[rule].learning_rate for optimizer in settings.optimizers) for rule in RULES
    }
    equal = sorted({*settings.equal_learning_rates, *(rates[0] for rates in selected.values())})
    kinds: dict[tuple[float, ...], list[Kind]] = {(rate,) * len(settings.optimizers): ["equal"] for rate in equal}
    for rule, rates in selected.items():
        kinds.setdefault(rates, []).append(rule)
    groups = []
    for rates, names in kinds.items():
        rate_of: dict[str, float] = dict(zip(settings.optimizers, rates, strict=True))
        cells: dict[str, Sequence[Mapping[str, Any]]] = {
            optimizer: [bench.run(Cell("report", method, optimizer, rate, seed)) for seed in settings.report_seeds]
            for optimizer, rate in zip(settings.optimizers, rates, strict=True)
        }
        groups.append(Group(method, tuple(names), rate_of, cells))
    return groups


def _trial(rate: float, cell: Mapping[str, Any]) -> Trial:
    if cell["diverged_at_step"] is not None:
        return Trial(rate, None, None)
    return Trial(rate, cell["end"]["forget"]["probability"], cell["end"]["retain"]["probability"])


def _telemetry(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over the measured steps: how far a step went, and which share of the coordinates was not clipped."""
    means: dict[str, float | None] = {}
    for name in ("update_norm", "unclipped_fraction"):
        values = [row[name] for row in rows if row.get(name) is not None]
        means[name] = statistics.fmean(values) if values else None
    return means


def _entry(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.model_entry()


def _headline(result: Mapping[str, Any]) -> str:
    """The progress line's two numbers."""
    if result["diverged_at_step"] is not None:
        return f"diverged at step {result['diverged_at_step']}"
    found, metric = (result["end"], "probability") if "end" in result else (result["scores"], "rougeL_recall")
    return ", ".join(f"{split} {metric} {found[split][metric]:.2f}" for split in ("forget", "retain"))
