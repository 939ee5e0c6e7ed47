"""What a job runs: the command passes its own checks, results outlive the cluster, and its environment has no key that Ray ignores."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from pydantic import Field, ValidationError

from cluster.checks.common import ROOT, Strict, model_complaints, secret_complaints
from cluster.checks.store import store_for_checks

IMAGE_ROOT: Final = "/home/ray/soul/"  # where cluster/Dockerfile puts the project
_FILES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".gz")  # data of one's own is never on the hub
_VARIABLE: Final = r"^[A-Za-z_][A-Za-z0-9_]*$"
_LASTS: Final = re.compile(r"^(s3|gs|gcs)://[a-z0-9][a-z0-9._-]+/.+")


class RuntimeEnvironment(Strict):
    """The keys used here. Ray itself takes any key, misspelt ones too."""

    working_dir: str | None = None
    excludes: list[str] = Field(default_factory=list)
    env_vars: dict[str, str] = Field(default_factory=dict)


def runtime_env_complaints(document: Any, where: str = "") -> Iterator[str]:
    try:
        environment = RuntimeEnvironment.model_validate(document)
    except ValidationError as error:
        yield from model_complaints(error, where)
        return
    prefix = f"{where}." if where else ""
    for name in environment.env_vars:
        if not re.match(_VARIABLE, name):
            yield f"{prefix}env_vars: {name!r} is no name of a variable"
    yield from secret_complaints(document, where)
    if environment.excludes or environment.working_dir:
        missing = [name for name in (".env", "/runs", "/data") if name not in environment.excludes]
        if missing:
            yield f"{prefix}excludes: without {', '.join(missing)} secrets, results or data would be uploaded with every job"
        broad = [pattern for pattern in environment.excludes if pattern.strip("/") in ("data", "soul") and not pattern.startswith("/")]
        if broad:
            yield f"{prefix}excludes: {broad[0]!r} leaves out the package's soul/data too. Anchor it: /data"


def entrypoint_complaints(
    where: str, entrypoint: str, *, must_last: bool, capacity: Mapping[str, float] | None = None, notes: list[str] | None = None
) -> Iterator[str]:
    """`must_last`: the cluster goes with the job, so results have to be somewhere else. `capacity`: what the workers can grow to.

    The command is run as far as its last check before Ray starts; `notes` receives what could not be checked from here, and why.
    """
    words = shlex.split(entrypoint)
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        yield f"{where}: runs no script of this project. Expected e.g. python {IMAGE_ROOT}pipelines/tofu.py ..."
        return
    inside = script.removeprefix(IMAGE_ROOT)
    if not (ROOT / inside).is_file():
        yield f"{where}: there is no {inside} in this project"
        return
    if not inside.startswith("pipelines/"):
        return
    arguments = words[words.index(script) + 1 :]
    output = next((value for flag, value in pairwise(arguments) if flag == "--output"), "")
    if must_last and not _LASTS.match(output):
        yield f"{where}: --output {output or 'is not given'}: results would go with the cluster. Name a bucket: s3://bucket/run"
        return
    found, left_out = _run_complaints(inside, arguments, capacity)
    yield from (f"{where}: {message}" for message in found)
    if notes is not None:
        notes += [line for line in left_out if line not in notes]


def _run_complaints(script: str, arguments: list[str], capacity: Mapping[str, float] | None) -> tuple[list[str], list[str]]:
    """What the script itself would say before it starts Ray; and what was not looked at."""
    from pydantic import BaseModel

    from soul.cli import COMMANDS, build_parser, config_of  # seconds of imports: only where there is something to check
    from soul.records import InputError

    command = script.removeprefix("pipelines/").removesuffix(".py")
    if command not in COMMANDS:
        return [], []
    try:
        parsed = build_parser(command, prog=script).parse(arguments)
        if command not in ("tofu", "unlearn", "grid"):
            return [], []
        from soul.flags import grid_config_of
        from soul.orchestration.ready import check_grid, check_only

        config: BaseModel
        with store_for_checks():
            if command == "grid":
                config = grid = grid_config_of(parsed)
                left_out = check_grid(grid, unseen=_unseen)
            else:
                config = run = config_of(parsed)
                left_out = check_only(run, unseen=_unseen)
    except InputError as error:
        return str(error).splitlines(), []
    except OSError as error:
        return [f"{type(error).__name__}: {error}"], []
    return list(_room_complaints(config.engine, capacity)) if capacity is not None else [], left_out


def _room_complaints(engine: Any, capacity: Mapping[str, float]) -> Iterator[str]:
    """A run's workers against what the groups of its cluster can grow to."""
    device = engine.device if engine.device != "auto" else "gpu" if capacity.get("GPU") else "cpu"
    kind = device.upper()
    if engine.num_workers > capacity.get(kind, 0):
        yield f"--num-workers {engine.num_workers} needs {engine.num_workers} {kind}s, the workers can grow to {capacity.get(kind, 0):g}"


def _unseen(name: str) -> str | None:
    """Why an input is not looked at when a file is checked; None for what lies here."""
    from soul.data.sources import HUB_ID

    if "://" in name:
        return "on a store, which is not asked"
    if name.startswith(("/", "~")):
        return "on a disk of the nodes"
    if not Path(name).exists() and HUB_ID.fullmatch(name) and Path(name).suffix not in _FILES:
        return "on the hub, which is not asked"
    return None
