"""Asynchronous successive halving within every cell and seed of a grid.

One ASHA over the whole grid would compare methods and optimizers with each other and starve the weaker ones: each group is a search of
its own, with its own rungs, so that every cell keeps the budget it was promised.
"""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

TIME, SCORE = "epoch", "score"


class GroupedHalving(FIFOScheduler):
    """Starts trials in order; each group's own ASHA decides which of them go on."""

    def __init__(self, *, epochs: int, grace: int = 1, factor: int = 2) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._options: dict[str, Any] = {"max_t": max(epochs, grace + 1), "grace_period": grace, "reduction_factor": factor}
        self._groups: dict[str, ASHAScheduler] = {}

    def _group(self, trial: Trial) -> ASHAScheduler:
        name = str(trial.config["run"]["group"])
        if name not in self._groups:
            self._groups[name] = ASHAScheduler(time_attr=TIME, metric=SCORE, mode="max", stop_last_trials=False, **self._options)
        return self._groups[name]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._group(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result[TIME] == 0 or SCORE not in result:  # before the first step, and after the last
            return FIFOScheduler.CONTINUE
        return str(self._group(trial).on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._group(trial).on_trial_complete(tune_controller, trial, {})

    def debug_string(self) -> str:
        return f"successive halving in {len(self._groups)} groups"
