"""What `--retrained` names: a model to evaluate, a run that has a gold standard, or a published log. Looked at before anything starts."""

from __future__ import annotations

from pathlib import Path

from soul.evaluate.eval_log import EvalLog
from soul.evaluate.logs import read_log
from soul.models.load import check_model_folder
from soul.orchestration.prepare import Prepared, given_model
from soul.records import InputError
from soul.rundir import RunDir
from soul.store import checkout, is_uri, local

RUN_LOG = "retrained"


def gold_folder(run: RunDir) -> Path:
    """Where a run keeps the log of the retrained model that it was measured against."""
    return run.logs / RUN_LOG


def hub_id(name: str) -> tuple[str, str | None]:
    """`owner/name@revision` in two; --revision is the target's and says nothing about the gold standard."""
    name, _, revision = name.partition("@")
    return name, revision or None


def given_standard(name: str) -> Prepared | EvalLog:
    """A model that is still to be evaluated, or a log that says everything.

    Raises:
        InputError: there is nothing of that name, or it is neither.
    """
    path = checkout(name)
    if path.is_file():
        return read_log(path)
    if not path.exists():
        if name.partition("@")[0].count("/") == 1 and not name.startswith((".", "~", "/")):
            return given_model(*hub_id(name))
        raise InputError(
            f"--retrained {name} does not exist. Expected a model folder, a run directory, a log (.json, .json.gz) "
            "or a hub id (owner/name, or owner/name@revision)."
        )
    run = RunDir(path)
    if gold_folder(run).is_dir():
        return read_log(gold_folder(run))
    if run.config.is_file() and (run.path / ".stages").is_dir():
        raise InputError(
            f"--retrained {name} is a run that was measured against no gold standard. If its own model is meant, pass {name}/model; "
            f"if it is unfinished: soul resume {name}"
        )
    if run.logs.is_dir():  # what `soul evaluate` left of the one model it looked at
        return read_log(run.logs)
    folder = local(name) if is_uri(name) else str(path)
    check_model_folder(folder)
    return given_model(folder)
