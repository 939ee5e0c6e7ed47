"""The learning-rate factor: a table of values, and what must hold for every schedule."""

from __future__ import annotations

from typing import get_args

import pytest

from soul.optim.schedule import Schedule, lr_factor
from soul.records import InputError


@pytest.mark.parametrize(
    ("schedule", "warmup", "floor", "expected"),
    [
        ("linear", 0.0, 0.0, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 0.4, 0.0, [0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
        ("linear", 0.01, 0.0, [1.0, 1.0, 0.75, 0.5, 0.25]),
        ("linear", 0.0, 0.5, [1.0, 0.9, 0.8, 0.7, 0.6]),
        ("constant", 0.4, 0.0, [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", 0.2, 0.0, [1.0, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ("linear", 1.0, 0.0, [0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_values(schedule: Schedule, warmup: float, floor: float, expected: list[float]) -> None:
    got = [lr_factor(step, total_steps=5, warmup_fraction=warmup, schedule=schedule, floor=floor) for step in range(5)]
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_every_step_moves_rises_then_falls_and_never_exceeds_one(schedule: Schedule, total_steps: int, warmup: float) -> None:
    factors = [lr_factor(step, total_steps=total_steps, warmup_fraction=warmup, schedule=schedule) for step in range(total_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(factors) == 1.0


def test_beyond_the_end_the_floor_holds() -> None:
    assert lr_factor(9, total_steps=5, warmup_fraction=0.0, schedule="linear", floor=0.25) == 0.25


@pytest.mark.parametrize(
    "bad", [{"step": -1}, {"total_steps": 0}, {"warmup_fraction": 1.5}, {"warmup_fraction": -0.1}, {"floor": 1.1}], ids=str
)
def test_nonsense_is_refused(bad: dict[str, float]) -> None:
    arguments = {"step": 0, "total_steps": 5, "warmup_fraction": 0.1, "schedule": "linear", "floor": 0.0, **bad}
    with pytest.raises(InputError):
        lr_factor(**arguments)  # type: ignore[arg-type]
