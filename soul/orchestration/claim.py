"""Whose run directory it is: one run's from its first stage on, and known to be done when nothing of it has changed since."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from soul.config import Config
from soul.device import Device
from soul.orchestration.attempts import STAGE as ATTEMPTS
from soul.preflight import check_output
from soul.records import InputError
from soul.rundir import RunDir, digest, write_atomically
from soul.store import attach, check_writable, holds
from soul.train.config import CADENCE, RECIPE
from soul.train.engine import PLACEMENT, Precision

# Where a run lies and how it is watched does not make it another run.
_INCIDENTAL = {"output", "cache", "address", "resume", "progress", "verbose"}
_STAGE, _PRECISION, _RECIPE = "outcome", "precision", "recipe"
_AUTO = "auto"


def run_dir(config: Config) -> RunDir:
    return RunDir.at(config.output)


def check_claim(config: Config) -> None:
    """Changes nothing that lasts. A run on a store is looked at in this machine's copy, which is no other process's from here on.

    Raises:
        InputError: the run directory is another run's, cannot be written, or holds no run to --resume.
    """
    check_output(config.output)
    check_writable(config.output)
    attach(run_dir(config).path, keep=True)
    check_unclaimed(config)


def check_unclaimed(config: Config) -> None:
    """The part of `check_claim` that reads this machine's copy alone.

    Raises:
        InputError: the run directory is another run's, or holds no run to --resume.
    """
    folder = run_dir(config)
    if not folder.config.is_file():
        if config.resume:
            raise InputError(f"--resume: {config.output} holds no run to continue. Remove --resume, or correct --output.")
        return
    ours, theirs = _without_cadence(_settings(config)), _without_cadence(_read(folder))
    if begun := begun_in(config):  # it goes on in that, and may be told so
        for settings in (ours, theirs):
            settings["engine"]["precision"] = settings["engine"]["precision"].replace("auto", begun)
    if config.resume:
        ours, theirs = _without_placement(ours), _without_placement(theirs)
    other = sorted(key for key in {*ours, *theirs} - _INCIDENTAL if ours.get(key) != theirs.get(key))
    if other and _has_begun(folder):
        moved = {*other} == {"engine"} and _without_placement(ours) == _without_placement(theirs)
        instead = (
            "--resume continues it on this engine, or choose another --output."
            if moved
            else "Choose another --output, or delete that folder."
        )
        raise InputError(f"{config.output} holds another run: its {', '.join(other)} settings differ. {instead}")
    if not is_finished(folder):
        check_recipe(config)


def is_finished(folder: RunDir) -> bool:
    """Whether the run in `folder` has come to its end, with whatever settings."""
    return folder.marker(_STAGE).is_file()


def check_recipe(config: Config) -> None:
    """Raises:
    InputError: the run directory holds a run of a version that made other weights of the same settings, and would go on with it.
    """
    folder = run_dir(config)
    if _has_begun(folder) and folder.finished(_RECIPE, str(RECIPE)) is None:
        raise InputError(
            f"{config.output} holds a run of an earlier version of soul, which put rows into steps in another order and measured "
            "curvature otherwise: half of each would be neither. Choose another --output, or delete that folder, or finish the run with "
            "that version. Its report and its model can still be read."
        )


def claim(config: Config) -> None:
    """Make the run directory this run's own."""
    folder = run_dir(config)
    folder.create()
    if (begun := begun_in(config)) is not None:  # config.json will no longer say it
        folder.finish(_PRECISION, _AUTO, {"precision": begun})
    folder.finish(_RECIPE, str(RECIPE), {})
    write_atomically(folder.config, config.model_dump_json(indent=2) + "\n")


def is_done(config: Config, inputs: Any) -> bool:
    """Whether the run has finished with these settings and `inputs` (what names its data and models)."""
    folder = run_dir(config)
    if not folder.config.is_file():
        return False
    written = json.loads(folder.config.read_text())  # an earlier version has written fewer settings, and a marker with their key
    return folder.finished(_STAGE, _key(written, inputs)) is not None and folder.results.is_file() and holds(folder.model)


def mark_done(config: Config, inputs: Any) -> None:
    run_dir(config).finish(_STAGE, _key(_settings(config), inputs), {})


def decided_run(config: Config, device: Device, precision: Precision | None = None) -> Config:
    """The run with the driver's decision in it. One that is continued keeps the precision that it began with, on whatever device.

    `precision`: that of a grid, whose trials are to be compared; None is what the device is made for.
    """
    kept = begun_in(config) if config.engine.precision == "auto" else None
    decided = config.decided(device, kept or precision)
    if config.engine.precision == "auto" and kept is None:
        run_dir(config).finish(_PRECISION, _AUTO, {"precision": decided.engine.precision})
    return decided


def begun_in(config: Config) -> Precision | None:
    """The precision that the run in this folder began with; None where none has begun: what a run that broke off before it computed had
    decided binds nobody.
    """
    folder = run_dir(config)
    if not folder.config.is_file() or not _has_begun(folder):
        return None
    written = _read(folder)["engine"]["precision"]
    kept = folder.finished(_PRECISION, _AUTO) or {"precision": None if written == "auto" else written}
    found: Precision | None = kept["precision"]
    return found


def _key(settings: dict[str, Any], inputs: Any) -> str:
    kept = _without_placement(settings)
    return digest([{name: value for name, value in kept.items() if name not in _INCIDENTAL}, inputs])


def _read(folder: RunDir) -> dict[str, Any]:
    """The settings of the run in `folder`; what an earlier version did not know of has its default.

    Raises:
        InputError: they are of another version, or damaged.
    """
    try:
        return _settings(Config.model_validate_json(folder.config.read_text()))
    except ValidationError as error:
        names = ", ".join(sorted({".".join(map(str, item["loc"])) for item in error.errors(include_input=False)}))
        raise InputError(
            f"{folder.place} holds a run that this version cannot read (config.json: {names}). Choose another --output, or delete that "
            "folder."
        ) from None


def _settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(config.model_dump_json())
    return settings


def _without_cadence(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without when a run is saved, which may change each time that it is continued."""
    return {**settings, "train": {name: value for name, value in settings["train"].items() if name not in CADENCE}}


def _without_placement(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without what may change when a run is resumed: where it lives."""
    engine = {name: value for name, value in settings.get("engine", {}).items() if name not in PLACEMENT}
    return {**settings, "engine": engine}


def _has_begun(folder: RunDir) -> bool:
    """A run that failed before it trained leaves nothing worth keeping: its settings may be corrected."""
    return (
        folder.metrics.is_file()
        or folder.checkpoints.is_dir()
        or any(marker.stem not in (_PRECISION, _RECIPE, ATTEMPTS) for marker in (folder.path / ".stages").glob("*"))
    )
