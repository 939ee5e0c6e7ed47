"""What a job runs: the script and its flags exist, results outlive the cluster, and its runtime environment has no key that Ray ignores."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

from pydantic import Field, ValidationError

from cluster.checks.common import ROOT, Strict, model_complaints, secret_complaints

IMAGE_ROOT: Final = "/home/ray/soul/"  # where cluster/Dockerfile puts the project
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


def entrypoint_complaints(where: str, entrypoint: str, *, must_last: bool) -> Iterator[str]:
    """`must_last`: the cluster goes with the job, so results have to be somewhere else."""
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
    yield from (f"{where}: {message}" for message in _flag_complaints(inside, arguments))
    output = next((value for flag, value in pairwise(arguments) if flag == "--output"), "")
    if must_last and not _LASTS.match(output):
        yield f"{where}: --output {output or 'is not given'}: results would go with the cluster. Name a bucket: s3://bucket/run"


def _flag_complaints(script: str, arguments: list[str]) -> Iterator[str]:
    """What the script itself would say to its flags."""
    from soul.cli import COMMANDS, build_parser, config_of  # seconds of imports: only where there is something to check
    from soul.records import InputError

    command = script.removeprefix("pipelines/").removesuffix(".py")
    if command not in COMMANDS:
        return
    try:
        parsed = build_parser(command, prog=script).parse(arguments)
        if command in ("tofu", "unlearn"):
            config_of(parsed)
    except InputError as error:
        yield str(error)
