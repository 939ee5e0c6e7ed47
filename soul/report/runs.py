"""A run directory as a report reads it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soul.evaluate.logs import read_log
from soul.evaluate.removal import removal_tests
from soul.evaluate.tofu_log import AGGREGATED
from soul.records import InputError
from soul.report.results import RemovalTest, Results, load_results
from soul.report.steps import Steps, load_steps
from soul.rundir import RunDir


@dataclass(frozen=True, slots=True)
class Run:
    """`place` is the folder as a reader may type it: as given when relative, its name alone when absolute."""

    place: str
    results: Results
    steps: Steps = field(default_factory=Steps)
    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str | None:
        """What repeats the run: the command that the manifest recorded, else its config; None where there is neither."""
        recorded = self.manifest.get("command")
        if isinstance(recorded, list):
            words = [str(part) for part in recorded]
            script = words[0] if words and words[0].endswith(".py") and "/" not in words[0] else None
            return shlex.join(["python", f"pipelines/{script}", *words[1:]] if script else words)
        if isinstance(recorded, str):
            return recorded
        if not self.config:
            return None
        script = "unlearn" if self.config.get("benchmark") == "own" else "tofu"
        return shlex.join(["python", f"pipelines/{script}.py", "--config", f"{self.place}/config.json", "--output", f"{self.place}-again"])

    @property
    def versions(self) -> dict[str, str]:
        found = self.manifest.get("versions")
        return {str(name): str(version) for name, version in found.items()} if isinstance(found, dict) else {}


def load_run(folder: Path) -> Run:
    """Read what a run left.

    Raises:
        InputError: results.json is missing or invalid, or another of its files is not JSON.
    """
    files = RunDir(folder)
    if not folder.is_dir():
        raise InputError(
            f"expected a run directory, got {folder}, which is {'a file' if folder.exists() else 'not there'}. Check the path."
        )
    config = _optional_object(files.config)
    return Run(
        place=folder.name if folder.is_absolute() else folder.as_posix(),
        results=_with_tests(load_results(files.results), files, config),
        steps=load_steps(files.metrics),
        config=config,
        manifest=_optional_object(files.manifest),
    )


def _with_tests(results: Results, files: RunDir, config: Mapping[str, Any]) -> Results:
    """The results with the unlearned model's removal tests, from the rows in logs/ where the file is older than these."""
    unlearned = results.models["unlearned"]
    if unlearned is None or unlearned.tests is not None or not (files.logs / AGGREGATED).is_file():
        return results
    gold = files.logs / "retrained" / AGGREGATED
    retrained = read_log(gold) if gold.is_file() else None
    if retrained is None and results.models["retrained"] is not None:
        return results  # tests against guessing would be other tests than the run's
    settings = config.get("evaluate")
    mean = settings.get("truth_ratio") if isinstance(settings, dict) else None
    found = removal_tests(read_log(files.logs / AGGREGATED), retrained, "arithmetic" if mean == "arithmetic" else "geometric")
    tests = {name: RemovalTest.model_validate(entry) for name, entry in found.items()}
    return results.model_copy(update={"models": {**results.models, "unlearned": unlearned.model_copy(update={"tests": tests})}})


def _optional_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path} is not JSON. Restore it, or remove it: a report can do without.") from None
    return found if isinstance(found, dict) else {}
