"""Which learning rate of a search an optimizer is reported at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from soul.records import InputError

RULE = (
    "the lowest forget probability among the rates that keep at least {floor:.0%} of the target's retain probability; "
    "if none does, the rate with the highest retain probability"
)


@dataclass(frozen=True, slots=True)
class Trial:
    """What the search saw at one learning rate, on the selection half; None where the run diverged."""

    learning_rate: float
    forget_probability: float | None
    retain_probability: float | None


@dataclass(frozen=True, slots=True)
class Selection:
    """`qualifies` is False where no rate kept enough of retain; `at_edge` warns that the best rate may lie outside the grid."""

    learning_rate: float
    qualifies: bool
    at_edge: bool
    trials: tuple[Trial, ...]


def select(trials: Sequence[Trial], *, target_retain: float, floor: float) -> Selection:
    """Apply RULE; of equal trials the smaller rate wins.

    Raises:
        InputError: every rate diverged.
    """
    measured = [
        (trial.learning_rate, trial.forget_probability, trial.retain_probability)
        for trial in sorted(trials, key=lambda trial: trial.learning_rate)
        if trial.forget_probability is not None
        and trial.retain_probability is not None
        and math.isfinite(trial.forget_probability + trial.retain_probability)
    ]
    if not measured:
        raise InputError("every learning rate of the search diverged. Give smaller ones (--learning-rates).")
    kept = [(rate, forget) for rate, forget, retain in measured if retain >= floor * target_retain]
    if kept:
        chosen = min(kept, key=lambda found: found[1])[0]
    else:
        chosen = max(measured, key=lambda found: found[2])[0]
    rates = [trial.learning_rate for trial in trials]
    return Selection(chosen, bool(kept), chosen in (min(rates), max(rates)), tuple(trials))
