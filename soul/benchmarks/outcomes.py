"""What the trials of a grid left in their run directories, read back: metrics of both halves of the rows, costs, or why there are none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

from soul.benchmarks.grid import Trial, model_slug
from soul.data.groups import Halves, halves
from soul.evaluate.eval_log import EvalLog, SplitLog
from soul.evaluate.logs import read_log
from soul.evaluate.score import Scores, score
from soul.rundir import RunDir
from soul.store import attach, is_uri, place_of

# Marks beside the stages of a run: a trial that failed for good, broke off, or was stopped early by the search.
FAILED, CRASHED, STOPPED, MARK_KEY = "failed", "crashed", "stopped", "trial"
REFERENCES: Final = "references"
HALVED: Final = ("forget", "retain")
SMALLEST_P: Final = 1e-300
AT_ONCE: Final = 16  # requests to a store

State = Literal["done", "failed", "crashed", "stopped", "missing"]
Values = Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """`validation` is what a choice is selected by, `values` what is reported; both are of all rows where nothing is selected.

    Target and retrained model are measured on the rows of `values`, the target on those of `validation` too.

    Keys are paths such as "forget.rougeL_recall", "model_utility" or "mia_auc.min_k"; what was not measured has no key.
    """

    trial: Trial
    state: State
    reason: str = ""
    validation: Values = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    target: Values = field(default_factory=dict)
    target_validation: Values = field(default_factory=dict)
    retrained: Values = field(default_factory=dict)
    epochs: tuple[Mapping[str, Any], ...] = ()
    cost: Mapping[str, float | None] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    benchmark: str = ""
    shared_groups: tuple[str, ...] = ()
    """The splits whose halves had to share an author."""


def reference_folder(output: Path, model: str, kind: str) -> Path:
    """Where a grid keeps the evaluation log of a model's target or retrained model."""
    return output / REFERENCES / model_slug(model) / kind


def trial_folder(trial: Trial, output: Path) -> Path:
    """Where a trial of the grid in `output` has its run directory."""
    return output / "trials" / trial.id


def fetch_trials(trials: Sequence[Trial], output: Path) -> None:
    """Have here what a report reads of a grid on a store: no models and no checkpoints. A folder's trials are there already."""
    if is_uri(place_of(output)):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(attach, [output / REFERENCES, *(trial_folder(trial, output) for trial in trials)]))


def read_outcome(trial: Trial, output: Path, *, halved: bool) -> Outcome:
    """`halved`: a choice is to be selected, on half of the authors of forget and retain; the rows of the others are for the report."""
    run = RunDir(trial_folder(trial, output))
    if not run.results.is_file():
        return _without_results(trial, run)
    results = json.loads(run.results.read_text())
    logs = {kind: _reference_log(reference_folder(output, trial.cell.model, kind)) for kind in ("target", "retrained")}
    log, gold = read_log(run.logs), logs["retrained"]
    insists = "compared_despite" in results.get("settings", {})
    cut = {split: halves_of(log.splits[split]) for split in HALVED if split in log.splits} if halved else {}
    validation = {split: half.selection for split, half in cut.items()}
    report = {split: half.report for split, half in cut.items()}
    return Outcome(
        trial,
        "done",
        validation=_values(log, gold, validation, insists),
        values=_values(log, gold, report, insists),
        target=_values(logs["target"], gold, report, insists),
        target_validation=_values(logs["target"], gold, validation, insists),
        retrained=_values(gold, gold, report, insists),
        epochs=tuple(results["epochs"]),
        cost=results["cost"],
        sizes=results["splits"],
        benchmark=results["benchmark"],
        shared_groups=tuple(split for split, half in cut.items() if half.share_groups),
    )


def _reference_log(folder: Path) -> EvalLog | None:
    return _read_once(folder) if folder.is_dir() else None


_read_once = lru_cache(maxsize=64)(read_log)  # every trial of a model asks for the same two


def _without_results(trial: Trial, run: RunDir) -> Outcome:
    failed = run.finished(FAILED, MARK_KEY)
    if failed is not None:
        return Outcome(trial, "failed", str(failed["reason"]))
    stopped = run.finished(STOPPED, MARK_KEY)
    if stopped is not None:
        rows = tuple(stopped["epochs"])
        return Outcome(trial, "stopped", f"stopped by the search after epoch {rows[-1]['epoch']}", epochs=rows)
    crashed = run.finished(CRASHED, MARK_KEY)  # the one that does not last: the same command tries again
    if crashed is not None:
        return Outcome(trial, "crashed", str(crashed["reason"]))
    return Outcome(trial, "missing", "it has not run to its end; the same command continues it")


def halves_of(log: SplitLog) -> Halves:
    """By author; a log that does not know its rows' authors (an earlier version's, a published one) is cut as if all had one."""
    return halves(log.groups or [0] * len(log.keys))


def _values(log: EvalLog | None, retrained: EvalLog | None, rows: Mapping[str, Sequence[int]], insists: bool) -> Values:
    """A log's metrics on these rows of some splits and on all of the others; nothing without a log."""
    if log is None:
        return {}
    gold = None if retrained is None else part_of(retrained, rows)
    return values_of(score(part_of(log, rows), retrained=gold, allow_mismatch=insists))


def part_of(log: EvalLog, rows: Mapping[str, Sequence[int]]) -> EvalLog:
    """These rows of some splits; the other splits whole."""
    if not rows:
        return log
    splits = {name: _chosen(split, rows[name]) if name in rows else split for name, split in log.splits.items()}
    return replace(log, splits=splits, recorded_auc={})


def _chosen(log: SplitLog, rows: Sequence[int]) -> SplitLog:
    def take(column: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(column[row] for row in rows if row < len(column))

    columns: dict[str, Any] = {f.name: take(value) for f in fields(log) if isinstance(value := getattr(log, f.name), tuple)}
    return replace(log, **columns, attacks={name: take(column) for name, column in log.attacks.items()})


def values_of(scores: Scores) -> dict[str, float]:
    """A model's metrics and SOUL's own variants as one flat mapping."""
    legacy = {name: value for name, value in scores.legacy.items() if value is not None}
    return {**flat(scores.model_entry()), **legacy}


def flat(entry: Mapping[str, Any]) -> dict[str, float]:
    """A model's entry of results.json by paths; forget quality as log10 too, in which alone it can be averaged."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping) and name != "reasons":
            found |= {f"{name}.{inner}": number for inner, number in value.items() if isinstance(number, int | float)}
        elif isinstance(value, int | float):
            found[name] = value
    if "forget_quality" in found:
        found["log10_forget_quality"] = math.log10(max(found["forget_quality"], SMALLEST_P))
    return found
