"""Which learning rate of a search an optimizer is reported at, under two rules that mirror each other.

A rule decides much where a grid is coarse, and where forgetting is complete at several rates "the lowest forget probability" only says
which rate is the largest. A difference between optimizers that holds under one rule and not under the other belongs to the rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from soul.records import InputError

Rule = Literal["keep", "forget"]
RULES: Final[Mapping[Rule, str]] = {
    "keep": "the lowest forget probability among the rates that keep at least {floor:.0%} of the target's retain probability "
    "(if none does: the highest retain probability)",
    "forget": "the highest retain probability among the rates that leave at most {ceiling:.0%} of the target's forget probability "
    "(if none does: the lowest forget probability)",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """What the search saw at one learning rate, on the selection half; None where the run diverged."""

    learning_rate: float
    forget_probability: float | None
    retain_probability: float | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Forget and retain probability of the target, and which shares of them the rules ask for."""

    target_forget: float
    target_retain: float
    floor: float
    ceiling: float


@dataclass(frozen=True, slots=True)
class Selection:
    """`qualifies` is False where no rate met the rule's bound; `at_edge` warns that the best rate may lie outside the grid."""

    learning_rate: float
    qualifies: bool
    at_edge: bool


def select(trials: Sequence[Trial], rule: Rule, bounds: Bounds) -> Selection:
    """Apply a rule of RULES; of equal trials the smaller rate wins.

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
    least, most = bounds.floor * bounds.target_retain, bounds.ceiling * bounds.target_forget
    kept = [found for found in measured if (found[2] >= least if rule == "keep" else found[1] <= most)]
    wants_forgetting = (rule == "keep") == bool(kept)  # without a rate that meets the bound, come as near to it as possible
    chosen = min(kept or measured, key=lambda found: found[1] if wants_forgetting else -found[2])[0]
    rates = [trial.learning_rate for trial in trials]
    return Selection(chosen, bool(kept), chosen in (min(rates), max(rates)))
