"""All that a command checks before Ray starts, and nothing else: for a grid, for `--dry-run`, and for files that will submit a command.

Who checks a file for a cluster sees neither that cluster's disks nor the hub: `unseen` says of a model or a data set why it is not looked
at, and what could not be checked without it comes back as a list.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from soul.config import Config
from soul.data.sources import FICTITIOUS
from soul.grid_config import GridConfig
from soul.orchestration.checks import check_local_workers, check_model, check_run
from soul.orchestration.claim import check_claim, check_recipe, check_unclaimed, is_finished, run_dir
from soul.orchestration.data import open_sources
from soul.orchestration.gold import given_standard
from soul.orchestration.parallel import run_together
from soul.orchestration.prepare import starting_model
from soul.preflight import check_output
from soul.store import attach, check_writable, is_uri, keep_folder, local, path_of

Unseen = Callable[[str], str | None]
AT_ONCE = 16  # requests to a store


def everything(name: str) -> None:
    """For a run on this machine: nothing is left out."""
    del name


def check_only(config: Config, *, unseen: Unseen = everything) -> list[str]:
    """A run's checks; returns what was left out, one line each.

    Raises:
        InputError: what the run itself would say.
    """
    twin = config.twin_run()
    check_local_workers(config.address, config.engine.num_workers, config.engine.device)
    for arm in [config] if twin is None else [config, twin]:
        check_claim(arm)
    return _check_inputs(config, unseen)


def check_grid(config: GridConfig, *, unseen: Unseen = everything) -> list[str]:
    """A grid's checks; returns what was left out, one line each. What the store has of its trials is in this machine's copies then.

    Raises:
        InputError: what the grid itself would say.
    """
    runs = [config.run_config(trial) for trial in config.all_trials()]
    check_local_workers(config.address, config.engine.num_workers, config.engine.device)
    check_output(config.output)
    check_writable(config.output)
    if config.cache is not None:
        check_output(config.cache)
        check_writable(config.cache)
    keep_folder(path_of(config.output))
    if is_uri(config.output):
        run_together([partial(attach, run_dir(run).path) for run in runs], slots=AT_ONCE)
    for run in runs:
        check_unclaimed(run)
    if not all(is_finished(run_dir(run)) for run in runs):  # what is still to be done is compared with what was
        for run in runs:
            check_recipe(run)
    firsts = {run.model.model_dump_json(): run for run in reversed(runs)}
    return list(dict.fromkeys(line for first in firsts.values() for line in _check_inputs(first, unseen)))


def _check_inputs(config: Config, unseen: Unseen) -> list[str]:
    """Model, gold standard and rows, each by itself, then together."""
    model, standard = config.model.path, config.model.retrained
    data = config.data
    files: list[str | None] = [data.source] if config.benchmark != "own" else [data.forget, data.retain, data.holdout]
    given: dict[str, list[str | None]] = {"model": [model], "gold standard": [standard], "rows": files}
    hidden = {
        kind: [f"{kind} {name}: {why}" for name in names if name not in (None, FICTITIOUS) and (why := unseen(str(name))) is not None]
        for kind, names in given.items()
    }
    if model is not None and not hidden["model"]:
        check_model(local(model), config.model)
    given_gold = given_standard(standard) if standard is not None and not hidden["gold standard"] else None
    left_out = [line for lines in hidden.values() for line in lines]
    if hidden["rows"]:
        return left_out
    sources = open_sources(data, benchmark=config.benchmark, seed=config.train.seed)
    if hidden["model"]:
        return left_out
    with tempfile.TemporaryDirectory(prefix="soul-check-") as folder:  # a tiny model is made to be looked at, and not kept
        check_run(config, sources, starting_model(config, sources.benchmark, Path(folder)), given_gold)
    return left_out
