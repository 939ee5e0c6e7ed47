"""A grid as data: cells, the settings tried in each, and the seeds. What needs neither Ray nor a model.

A cell is one place of the table: a model, a method and an optimizer. A trial is one run: a cell with one choice of settings and a seed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final, Literal

from soul.records import InputError
from soul.rundir import digest

Value = float | int | str
Settings = Mapping[str, Value]
Search = Literal["grid", "random", "asha"]
Origin = Literal["published", "scaled", "ours"]

# Models without weights to download: shapes for soul.models.tiny.TinyConfig. Anything else is a folder or a hub id.
TINY_MODELS: Final[Mapping[str, Mapping[str, int]]] = {
    "tiny-s": {"hidden_size": 96, "intermediate_size": 256, "vocab_size": 2000},
    "tiny": {},
    "tiny-l": {"hidden_size": 192, "intermediate_size": 512, "num_layers": 3, "num_heads": 6},
}
# Hyperparameters that only one optimizer has, and what a search tries for them.
_UNCLIPPED: Final[tuple[str, tuple[Value, ...]]] = ("target_unclipped", (0.1, 0.3, 0.5))
OWN_CHOICES: Final[Mapping[str, tuple[str, tuple[Value, ...]]]] = {"sophia": _UNCLIPPED, "sophia_h": _UNCLIPPED}
WITHOUT_RETAIN: Final = frozenset({"ga"})


def model_slug(model: str) -> str:
    """A model's name in file names: a tiny one's own, else the last part of its path with what tells it from others of that name."""
    if model in TINY_MODELS:
        return model
    return f"{re.sub(r'[^A-Za-z0-9.]+', '_', PurePosixPath(model).name)[:40]}.{digest(model, length=4)}"


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    model: str
    method: str
    optimizer: str

    @property
    def slug(self) -> str:
        """Fits into a file name."""
        return f"{model_slug(self.model)}-{self.method}-{self.optimizer}"


@dataclass(frozen=True)
class Choice:
    """One choice of hyperparameters. `origin` says whose they are where that matters: published, published but scaled, or ours."""

    method: Settings = field(default_factory=dict)
    optimizer: Settings = field(default_factory=dict)
    origin: Origin | None = None

    @property
    def key(self) -> str:
        """Names the choice within its cell; empty for the defaults."""
        settings = [dict(self.method), dict(self.optimizer)]
        return digest(settings, length=6) if any(settings) else ""

    @property
    def settings(self) -> dict[str, Value]:
        return {**self.optimizer, **self.method}

    @property
    def words(self) -> str:
        """ "learning_rate 0.0001, retain_weight 2"; empty for the defaults."""
        return ", ".join(map(" ".join, self.said().items()))

    def said(self) -> dict[str, str]:
        """Every setting's value as it is written."""
        return {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in self.settings.items()}


@dataclass(frozen=True)
class Trial:
    cell: Cell
    choice: Choice
    seed: int

    @property
    def id(self) -> str:
        """The name of its run directory: the same for the same trial, however the grid around it grows."""
        key = f"-{self.choice.key}" if self.choice.key else ""
        return f"{self.cell.slug}{key}-s{self.seed}"

    def sections(self) -> dict[str, Any]:
        """What it sets of a run's config, beside what the grid sets for all."""
        return {
            "method": {"name": self.cell.method, **self.choice.method},
            "optimizer": {"name": self.cell.optimizer, **self.choice.optimizer},
        }


def cells_of(models: Sequence[str], methods: Sequence[str], optimizers: Sequence[str]) -> list[Cell]:
    """The full product, model by model."""
    return [Cell(model, method, optimizer) for model in models for method in methods for optimizer in optimizers]


def grid_choices(cell: Cell, *, learning_rates: Sequence[float], retain_weights: Sequence[float]) -> list[Choice]:
    """Every combination; an empty list leaves a setting at its default. A method without a retain term has no retain weight."""
    weights = [] if cell.method in WITHOUT_RETAIN else retain_weights
    return [
        Choice(method, optimizer)
        for optimizer in ([{"learning_rate": rate} for rate in learning_rates] or [{}])
        for method in ([{"retain_weight": weight} for weight in weights] or [{}])
    ]


def halton(index: int, base: int) -> float:
    """The radical inverse of `index` (from 1) in `base`: points that fill [0, 1) evenly, however many are taken."""
    value, scale = 0.0, 1.0
    while index:
        scale /= base
        index, digit = divmod(index, base)
        value += digit * scale
    return value


def random_choices(cell: Cell, number: int, *, learning_rates: tuple[float, float], retain_weights: tuple[float, float]) -> list[Choice]:
    """`number` points of the cell's space, log-uniform between the ends of each range.

    Every cell gets the same points of learning rate and retain weight, so no optimizer is luckier than another. What only one optimizer
    has is a further dimension of the same number of points: budgets are equal. A search that learns from its trials (Optuna) would draw
    other points for each.
    """
    choices = []
    for index in range(1, number + 1):
        optimizer: dict[str, Value] = {"learning_rate": _between(learning_rates, halton(index, 2))}
        if cell.optimizer in OWN_CHOICES:
            name, values = OWN_CHOICES[cell.optimizer]
            optimizer[name] = values[int(halton(index, 5) * len(values))]
        method = {} if cell.method in WITHOUT_RETAIN else {"retain_weight": _between(retain_weights, halton(index, 3))}
        choices.append(Choice(method, optimizer))
    return choices


def _between(ends: tuple[float, float], share: float) -> float:
    low, high = ends
    if not 0 < low <= high:
        raise InputError(f"a range needs two numbers above 0, the smaller first, got {low},{high}.")
    return float(f"{low * (high / low) ** share:.4g}")


def trials_of(cells: Mapping[Cell, Iterable[Choice]], *, seeds: int, first_seed: int = 0) -> Iterator[Trial]:
    """Seed by seed and choice by choice, so that an interrupted grid has tried about as much in every cell."""
    listed = {cell: list(choices) for cell, choices in cells.items()}
    for seed in range(first_seed, first_seed + seeds):
        for number in range(max(map(len, listed.values()), default=0)):
            yield from (Trial(cell, choices[number], seed) for cell, choices in listed.items() if number < len(choices))
