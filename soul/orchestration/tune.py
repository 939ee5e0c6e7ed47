"""A grid of runs through Ray Tune: what they share is made once, every cell is a run directory, and a killed grid goes on where it was.

Tune decides what runs when and where; what has been done is known from the run directories alone, so the same command continues a grid
after anything, with more seeds, methods or models too.
"""

from __future__ import annotations

import os
import sys
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback, ResultGrid
from ray.tune.logger import JsonLoggerCallback, TBXLoggerCallback

from soul.benchmarks.grid import Trial
from soul.benchmarks.outcomes import CRASHED, MARK_KEY, REFERENCES, STOPPED, reference_folder
from soul.config import Config
from soul.evaluate.open_unlearning_log import FILE
from soul.grid_config import GridConfig
from soul.object_store import find
from soul.orchestration.attempts import BACKSTOP
from soul.orchestration.capacity import room_for
from soul.orchestration.claim import begun_in, claim, is_done, run_dir
from soul.orchestration.cluster import cluster
from soul.orchestration.data import Sources, cache_of
from soul.orchestration.disks import check_disks
from soul.orchestration.halving import GroupedHalving
from soul.orchestration.outcome import write_logs
from soul.orchestration.parallel import run_together
from soul.orchestration.progress import Display
from soul.orchestration.ready import AT_ONCE, check_grid
from soul.orchestration.shared import Shared, judge_shared, make_shared, share
from soul.orchestration.trial import failure_of, nested_epoch, run_trial, stopped_at
from soul.rundir import RunDir
from soul.store import attach, is_uri, path_of, place_of, ray_storage
from soul.train.engine import EngineConfig

# Tune's own tables and bars would print settings line by line; its handler of Ctrl-C would swallow it.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "64",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Planned:
    """A trial, the config of its run, and whether it shares its process with others."""

    trial: Trial
    config: Config
    isolated: bool

    @property
    def params(self) -> dict[str, Any]:
        """What Tune is told: names and numbers. The rows stay where they are."""
        cell, choice = self.trial.cell, self.trial.choice
        return {
            "id": self.trial.id,
            "group": f"{cell.slug}-s{self.trial.seed}",
            "folder": run_dir(self.config).place,
            "method": cell.method,
            "optimizer": cell.optimizer,
            "seed": self.trial.seed,
            "isolated": self.isolated,
            **{name: value for name, value in {**choice.optimizer, **choice.method}.items() if isinstance(value, int | float)},
        }


def plan(config: GridConfig) -> list[Planned]:
    return [Planned(trial, config.run_config(trial), config.runs_alone) for trial in config.all_trials()]


def run_grid(config: GridConfig) -> list[Planned]:
    """Run every trial that is not done; returns all of them.

    Raises:
        InputError: bad input, nearly all of it found before Ray starts.
    """
    check_grid(config)
    planned, engine = plan(config), config.engine
    display = Display(enabled=config.progress)
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with cluster(config.address, num_workers=engine.num_workers, device=engine.device, verbose=config.verbose) as device, display.live():
        given = {f"--models {item.trial.cell.model}": item.config.model.path for item in planned}
        check_disks(written={"--output": config.output, "--cache": config.cache}, read={**given, "--retrained": config.retrained})
        slots = room_for(engine.num_workers, device)
        precision = next((begun for item in planned if (begun := begun_in(item.config)) is not None), None)  # one for the whole grid
        decided = [item.config.decided(device, precision) for item in planned]
        views = make_shared(decided, display, trainings=slots, room=room_for(1, device))
        for model, run in {item.trial.cell.model: run for item, run in zip(planned, decided, strict=True)}.items():
            _keep_references(path_of(config.output), model, run, display)
        undone = [item for item, view in zip(planned, views, strict=True) if _is_undone(item, view)]
        run_together([partial(claim, item.config) for item in undone], slots=AT_ONCE)
        if len(undone) < len(planned):
            display.say(f"{len(planned) - len(undone)} of {len(planned)} runs: done before")
        if undone:
            # halving compares with all that went before, so the finished ones are heard again
            again = planned if config.search == "asha" else undone
            rows = {item.config.train.seed: view.sources for item, view in zip(planned, views, strict=True)}
            _search(config, again, rows, display, decided[0].engine, slots=min(slots, config.max_concurrent or slots))
    return planned


def _keep_references(output: Path, model: str, config: Config, display: Display) -> None:
    """The logs of target and retrained model: the report measures them on the rows on which it measures the trials."""
    attach(output / REFERENCES)
    target, retrained = judge_shared(config, share(config), display)
    for kind, log in (("target", target.log), ("retrained", retrained)):
        folder = reference_folder(output, model, kind)
        if log is not None and not (folder / FILE).is_file():  # the last one that is written
            write_logs(log, folder)


def _is_undone(item: Planned, view: Shared) -> bool:
    run = run_dir(item.config)
    return not is_done(item.config, view.inputs(item.config)) and failure_of(run) is None and stopped_at(run) is None


def _search(
    config: GridConfig, planned: Sequence[Planned], rows: Mapping[int, Sources], display: Display, engine: EngineConfig, *, slots: int
) -> None:
    """`rows` by seed. They travel as arguments do, from the memory of the driver: a node may not have the disk that they were read from."""
    isolated = planned[0].isolated
    # A Ray Train run's workers take CPUs of their own: a trial that held even a hundredth of one would wait for ever where they need all.
    needs = {"memory": 2.0**20} if isolated else {"CPU": 1.0}
    if not isolated and engine.runs_on == "gpu":
        needs["GPU"] = 1.0
    common = {
        "floor": config.utility_floor,
        "device": engine.runs_on,
        "precision": engine.computes_in,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "cache": place_of(cache_of(planned[0].config)),
        "rows": dict(rows),
        "session": uuid.uuid4().hex,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, common=common), needs),
            param_space={"run": tune.grid_search([item.params for item in planned])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=slots,
                reuse_actors=not isolated,
                scheduler=GroupedHalving(epochs=config.train.epochs) if config.search == "asha" else None,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=_kept_by_tune(path_of(config.output) / "tune", _Shown(display, len(planned))),
        )
        results = tuner.fit()
    run_together([partial(attach, run_dir(item.config).path) for item in planned], slots=AT_ONCE)
    _note_unfinished(results)


def _kept_by_tune(folder: Path, shown: _Shown) -> tune.RunConfig:
    """What Tune knows goes under the next free name of `folder`, for people only."""
    storage = ray_storage(place_of(folder))
    if is_uri(place_of(folder)):
        before = {name.partition("/")[0] for name in find(place_of(folder)) or {}}
    else:
        folder.mkdir(parents=True, exist_ok=True)
        before = {path.name for path in folder.iterdir()}
    return tune.RunConfig(
        name=f"session-{sum(name.startswith('session-') for name in before) + 1:03d}",
        verbose=0,
        callbacks=[JsonLoggerCallback(), TBXLoggerCallback(), shown],
        failure_config=tune.FailureConfig(max_failures=BACKSTOP),
        **storage,
    )


def _name(trial: Any) -> str:
    return str(trial.config["run"]["id"])


def _note_unfinished(results: ResultGrid) -> None:
    """Leave in the run directory of each trial that has no result why it has none."""
    for result in map(results.__getitem__, range(len(results))):
        run = run_dir_of(result.config)
        if result.error is not None:
            cause = getattr(result.error, "cause", None) or result.error
            run.finish(CRASHED, MARK_KEY, {"reason": f"it broke off ({type(cause).__name__}); see error.txt in tune/, and run again"})
        elif not run.results.is_file() and "failed" not in (result.metrics or {}) and result.metrics_dataframe is not None:
            rows = {row["epoch"]: nested_epoch(row) for row in result.metrics_dataframe.to_dict("records")}  # of the last attempt
            run.finish(STOPPED, MARK_KEY, {"epochs": list(rows.values())})


def run_dir_of(config: dict[str, Any] | None) -> RunDir:
    assert config is not None  # every trial of ours has one
    return RunDir.at(config["run"]["folder"])


class _Shown(Callback):
    """How many trials have ended, for the person who waits."""

    def __init__(self, display: Display, total: int) -> None:
        self.display, self.total, self.ended = display, total, 0

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps its callbacks on disk; a display is of this process."""
        return {**self.__dict__, "display": None}

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        self.display.update("grid", 0, self.total)

    def _more(self) -> None:
        self.ended += 1
        self.display.update("grid", self.ended, self.total)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._more()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.display.say(f"{_name(trial)}: broke off")
        self._more()
