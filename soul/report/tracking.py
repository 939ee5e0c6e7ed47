"""A finished run for Weights & Biases: numbers and settings from an allow-list, never a row. Works offline and without an account.

Set WANDB_MODE=offline to keep the run on disk; `wandb sync` sends it later.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from soul.report.results import load_results
from soul.rundir import RunDir


def track(folder: Path, *, project: str) -> None:
    """Log the run directory's steps, epochs and results as one W&B run."""
    import wandb  # two seconds, for those who ask for it

    run, results = RunDir(folder), load_results(folder)
    config = {"benchmark": results.benchmark, "method": results.method, "optimizer": results.optimizer, "seed": results.seed}
    with wandb.init(project=project, name=folder.name, dir=str(folder), config=config | dict(results.settings)) as tracked:
        for line in run.metrics.read_text().splitlines():
            row = json.loads(line)
            tracked.log({f"train/{key}": value for key, value in _flat(row).items() if key != "step"}, step=row["step"])
        for epoch in results.epochs:
            tracked.log({f"epoch/{key}": value for key, value in _flat(epoch.model_dump()).items()})
        for name, model in results.models.items():
            if model is not None:
                tracked.summary.update({f"{name}/{key}": value for key, value in _flat(model.model_dump(exclude={"reasons"})).items()})


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers as `a/b: number`; everything else is dropped."""
    flat: dict[str, float] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{key}/")
        elif isinstance(item, int | float):
            flat[f"{prefix}{key}"] = item
    return flat
