"""Ready-made grids: SOUL's published cells as a literal list, an equal search for every optimizer, and a quick one for a laptop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from soul.benchmarks.grid import Cell, Choice, Origin

# SOUL's cells on TOFU forget10 (arXiv 2404.18239, its released configurations): first and second order differ in learning rate and
# retain weight as well as in optimizer. GA and NPO were published without a configuration: those settings are ours.
PAPER_CHOICES: Final[Mapping[tuple[str, str], Choice]] = {
    ("ga", "adamw"): Choice({}, {"learning_rate": 5e-6, "weight_decay": 0.1}, "ours"),
    ("grad_diff", "adamw"): Choice({"retain_weight": 0.3}, {"learning_rate": 5e-6, "weight_decay": 0.1}, "published"),
    ("grad_diff", "soul_release"): Choice({"retain_weight": 2.0}, {"learning_rate": 5e-6, "weight_decay": 0.1, "rho": 0.04}, "published"),
    ("po", "adamw"): Choice({"retain_weight": 1.0}, {"learning_rate": 2e-5, "weight_decay": 0.1}, "published"),
    ("po", "soul_release"): Choice({"retain_weight": 5.0}, {"learning_rate": 1e-5, "weight_decay": 0.1, "rho": 0.04}, "published"),
    ("npo", "adamw"): Choice(
        {"reduction": "mean", "beta": 0.1, "retain_weight": 1.0}, {"learning_rate": 1e-5, "weight_decay": 0.1}, "ours"
    ),
    ("npo", "soul_release"): Choice(
        {"reduction": "mean", "beta": 0.1, "retain_weight": 1.0}, {"learning_rate": 1e-5, "weight_decay": 0.1, "rho": 0.04}, "ours"
    ),
}

# Settings below the user's own, by preset.
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "paper": {
        "data": {"forget": "forget10"},
        "train": {"epochs": 5, "batch_size": 4, "micro_batch_size": 4, "warmup_fraction": 0.1, "schedule": "linear"},
        "output": "runs/paper",
    },
    "equal": {
        "methods": ("ga", "grad_diff", "po", "npo"),
        "optimizers": ("adamw", "sophia", "soul_release", "signum"),
        "seeds": 3,
        "search": "random",
        "trials": 8,
        "output": "runs/equal",
    },
    "quick": {
        "methods": ("grad_diff", "npo"),
        "optimizers": ("adamw", "sophia"),
        "models": ("tiny-s",),
        "seeds": 2,
        "data": {"num_authors": 20, "limit_retain": 80},
        "prepare": {"max_steps": 400},
        "train": {"epochs": 3},
        "output": "runs/quick",
    },
}
# What a preset's section in a results log is called.
HEADINGS: Final[Mapping[str, str]] = {"paper": "The paper's cells", "equal": "Grid with equal budgets"}


def paper_cells(models: tuple[str, ...], *, learning_rate_scale: float = 1.0) -> dict[Cell, list[Choice]]:
    """The paper's rows for each model. A model of another size than the paper's 7B needs other learning rates: all are scaled alike."""
    return {
        Cell(model, method, optimizer): [_scaled(choice, learning_rate_scale)]
        for model in models
        for (method, optimizer), choice in PAPER_CHOICES.items()
    }


def _scaled(choice: Choice, scale: float) -> Choice:
    if scale == 1.0:
        return choice
    rate = choice.optimizer["learning_rate"]
    assert isinstance(rate, float)
    origin: Origin = "scaled" if choice.origin == "published" else "ours"
    return replace(choice, optimizer={**choice.optimizer, "learning_rate": float(f"{rate * scale:.4g}")}, origin=origin)
