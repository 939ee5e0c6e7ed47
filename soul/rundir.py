"""The run directory: where every stage finds and leaves its files, how they are written, and which stages are done.

    config.json  manifest.json  metrics.jsonl  results.json  report.html  report.md  model/  checkpoints/  logs/  .stages/

checkpoints/ is there until the model is. Files appear whole or not at all. A stage's marker is written last: a finished stage is not
repeated, an unfinished one resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from soul.records import InputError
from soul.store import path_of, place_of, push

PACKAGES = ("torch", "ray", "transformers", "tokenizers", "datasets", "pyarrow", "numpy", "scipy")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; a crash at any moment leaves the old file or the new one. If it is a store's copy, the store gets it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(staging).chmod(0o644)
        os.replace(staging, path)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise
    push(path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def digest(value: Any, *, length: int = 16) -> str:
    """A short stable hash of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True)
class RunDir:
    """Paths of one run; for one on a store, of this node's copy of it."""

    path: Path

    @classmethod
    def at(cls, place: str) -> RunDir:
        """Of a folder or URI."""
        return cls(path_of(place))

    @property
    def place(self) -> str:
        """The folder or URI, for other processes and for people."""
        return place_of(self.path)

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def create(self) -> None:
        """Make the folder and prove that it can be written.

        Raises:
            InputError: it cannot.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise InputError(
                f"output {self.path} cannot be written ({error.strerror}). Choose another --output or change its permissions."
            ) from error

    def marker(self, stage: str) -> Path:
        """The file that says a stage has finished."""
        return self.path / ".stages" / f"{stage}.json"

    def finished(self, stage: str, key: str) -> dict[str, Any] | None:
        """What a finished stage left in its marker; None if it has not finished, or finished with other inputs (`key`)."""
        marker = self.marker(stage)
        if not marker.is_file():
            return None
        found: dict[str, Any] = json.loads(marker.read_text())
        return found["value"] if found["key"] == key else None

    def finish(self, stage: str, key: str, value: Mapping[str, Any]) -> None:
        write_json(self.marker(stage), {"key": key, "value": dict(value)})


def versions() -> dict[str, str]:
    """Library versions for the manifest, without importing any of them."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
