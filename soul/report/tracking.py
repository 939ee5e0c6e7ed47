"""A finished run for Weights & Biases: numbers and settings from an allow-list, never a row. Works offline and without an account.

Without an account, or with WANDB_MODE=offline, the run is kept in its own folder; `wandb sync` sends it later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from soul.records import InputError
from soul.report.results import load_results
from soul.rundir import RunDir, digest
from soul.store import push

TRACKED: Final = "tracked"
NAME: Final = re.compile(r"[\w.\-]{1,40}")  # one word: what a setting is called, never a text


def track(folder: Path, *, project: str) -> bool:
    """Log the run directory's steps, epochs and results as one W&B run. Returns whether it went to the server.

    Raises:
        InputError: the server did not take it.
    """
    import wandb  # two seconds, for those who ask for it

    run, results = RunDir(folder), load_results(folder)
    config = {"benchmark": results.benchmark, "method": results.method, "optimizer": results.optimizer, "seed": results.seed}
    # of the process it is told nothing: no console, no code, no git, no machine load
    quiet = wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True, x_disable_stats=True)
    try:
        as_set = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
        with wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            config=config | allowed(results.settings),
            mode=None if as_set else "offline",
            settings=quiet,
        ) as tracked:
            for line in run.metrics.read_text().splitlines():
                row = json.loads(line)
                tracked.log({f"train/{key}": value for key, value in _flat(row).items() if key != "step"}, step=row["step"])
            for epoch in results.epochs:
                tracked.log({f"epoch/{key}": value for key, value in _flat(epoch.model_dump()).items()})
            for name, model in results.models.items():
                if model is not None:
                    tracked.summary.update({f"{name}/{key}": value for key, value in _flat(model.model_dump(exclude={"reasons"})).items()})
    except wandb.Error as error:
        raise InputError(
            f"Weights & Biases did not take the run ({type(error).__name__}); its results are complete in {folder}. "
            "Run the same command again, or with WANDB_MODE=offline."
        ) from error
    return not tracked.offline


def track_all(folders: Sequence[Path], *, project: str) -> str | None:
    """Every finished run among them, once for each of its results. Returns what to tell the user; None where there was nothing new."""
    finished = [run for run in map(RunDir, folders) if run.results.is_file()]
    keys = {run.path: digest([project, run.results.read_text()]) for run in finished}
    new = [run for run in finished if run.finished(TRACKED, keys[run.path]) is None]
    online = []
    for run in new:
        online.append(track(run.path, project=project))
        if (run.path / "wandb").is_dir():  # a run on a store keeps there what is not sent yet
            push(run.path / "wandb")
        run.finish(TRACKED, keys[run.path], {})
    if not new:
        return None
    place = "sent" if all(online) else "kept on disk, in the runs' wandb/ folders: `wandb sync FOLDER` sends one"
    return f"{len(new)} run(s) for W&B project {project}: {place}"


def allowed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, switches and names; a text is left out whatever it is called."""
    return {key: value for key, value in settings.items() if isinstance(value, int | float) or _is_name(value)}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers as `a/b: number`; everything else is dropped."""
    flat: dict[str, float] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}/")
        elif isinstance(item, int | float):
            flat[f"{prefix}{key}"] = item
    return flat
