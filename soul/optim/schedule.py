"""The learning rate of a step as a factor of the configured one: a pure function, so that nothing has to be resumed."""

from __future__ import annotations

import math
from typing import Literal

from soul.records import InputError

Schedule = Literal["linear", "cosine", "constant"]


def lr_factor(step: int, *, total_steps: int, warmup_fraction: float, schedule: Schedule, floor: float = 0.0) -> float:
    """In (0, 1]: linear warm-up to 1, then decay towards `floor`, which would be reached one step after the last.

    `step` counts from 0 and already moves the weights: its factor is one warm-up step's, not zero.
    """
    if total_steps < 1 or step < 0:
        raise InputError(f"A schedule needs total_steps >= 1 and step >= 0, got total_steps={total_steps}, step={step}.")
    if not (0 <= warmup_fraction <= 1 and 0 <= floor <= 1):
        raise InputError(f"warmup_fraction and floor must lie in [0, 1], got {warmup_fraction} and {floor}.")
    num_warmup = max(1, int(warmup_fraction * total_steps)) if warmup_fraction > 0 else 0
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = min(1.0, (step - num_warmup) / max(1, total_steps - num_warmup))
    match schedule:
        case "linear":
            decay = 1.0 - progress
        case "cosine":
            decay = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "constant":
            decay = 1.0
    return floor + (1.0 - floor) * decay
