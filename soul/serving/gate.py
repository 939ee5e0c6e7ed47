"""The gate: which models of a run directory may answer, decided by its report, and only while report and weights are the sealed ones."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from soul.models.hashes import file_sha256, model_files, model_sha256
from soul.records import InputError
from soul.report.results import Results, load_results
from soul.report.seal import Seal, read_seal
from soul.serving.policy import Check, judge
from soul.serving.settings import Hosting
from soul.serving.work import ModelSpec
from soul.store import attach, path_of, place_of, pull

Role = Literal["unlearned", "target", "retrained"]
REFERENCES: Final[tuple[Role, ...]] = ("target", "retrained")
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, slots=True)
class Hosted:
    """One model of a run. `spec` is None where it is refused, with `reason`; a `reason` beside a spec is what was waived.

    `role` follows from the seal, never from a name.
    """

    id: str
    run: str
    role: Role
    folder: Path
    spec: ModelSpec | None
    reason: str | None = None
    checks: tuple[Check, ...] = ()
    results: Results | None = None

    @property
    def evaluated(self) -> bool:
        return self.spec is not None and self.reason is None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything that was looked at, hosted or refused, by id."""

    models: Mapping[str, Hosted] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str) -> Hosted | None:
        """By id or alias; None for anything else, whatever it looks like."""
        if not _ID.fullmatch(name):
            return None
        return self.models.get(self.aliases.get(name, name))

    def hosted(self) -> list[Hosted]:
        return [model for model in self.models.values() if model.spec is not None]

    def specs(self) -> list[ModelSpec]:
        """What has to be in memory for them, each once."""
        return list(dict.fromkeys(model.spec for model in self.models.values() if model.spec is not None))


@dataclass(slots=True)
class Hashes:
    """Model hashes, computed again only where a file's size or time has changed."""

    _known: dict[Path, tuple[object, str]] = field(default_factory=dict)

    def of(self, folder: Path) -> str:
        stats = ((path.as_posix(), path.stat()) for path in model_files(folder))
        stamp = [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        known = self._known.get(folder)
        if known is None or known[0] != stamp:
            self._known[folder] = known = (stamp, model_sha256(folder))
        return known[1]


def check_folders(hosting: Hosting) -> None:
    """Before a server starts: every run is there. Later, one that goes away is refused like any other that fails.

    Raises:
        InputError: one is not.
    """
    for name, folder in hosting.runs.items():
        if not _folder_of(folder).is_dir():
            raise InputError(f"{name}: {folder} is no folder. Expected a run directory (soul tofu, soul unlearn) or a model folder.")


def stamp(hosting: Hosting) -> object:
    """Something that changes whenever a file that the gate reads has changed."""
    found: list[object] = []
    for folder in hosting.runs.values():
        run = path_of(folder)
        files = [run / "results.json", run / "manifest.json", *(path for path in model_files(run / "model"))]
        found += [(path.as_posix(), *_size_and_time(path)) for path in files]
    return found


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return status.st_size, status.st_mtime_ns


def read_catalogue(hosting: Hosting, *, on_loopback: bool, hashes: Hashes) -> Catalogue:
    """Pass every run through the gate.

    Raises:
        InputError: an alias names nothing, or two models have one name.
    """
    shows_references = hosting.policy.references == "always" or (hosting.policy.references == "loopback" and on_loopback)
    models = [
        model
        for name, folder in hosting.runs.items()
        for model in _models_of(name, _folder_of(folder), hosting, shows_references=shows_references, hashes=hashes)
    ]
    found = {model.id: model for model in models}
    if len(found) < len(models):
        doubled = sorted({model.id for model in models if sum(other.id == model.id for other in models) > 1})
        raise InputError(f"two models are called {', '.join(doubled)}. Name the runs apart: name=path/to/run.")
    for alias, name in hosting.aliases.items():
        if name not in found:
            raise InputError(f"alias {alias} points to {name}, which is no model here. There are: {', '.join(found)}.")
        if alias in found:
            raise InputError(f"alias {alias} is also the name of a model. Choose another.")
    return Catalogue(found, dict(hosting.aliases))


def _folder_of(place: str) -> Path:
    """A run directory; of one on a store, this node's copy as it is now."""
    folder = path_of(place)
    attach(folder)
    return folder


def _models_of(name: str, run: Path, hosting: Hosting, *, shows_references: bool, hashes: Hashes) -> Iterator[Hosted]:
    if not run.is_dir():
        yield Hosted(name, name, "unlearned", run, None, "the run directory is not there")
        return
    try:
        results, seal = _sealed_report(run)
    except InputError as error:
        yield _waived(Hosted(name, name, "unlearned", run, None, str(error)), hosting, hashes)
        return
    checks = tuple(judge(results, hosting.policy))
    failed = [check.text for check in checks if not check.passed]
    wrong = _wrong_weights(run, "unlearned", seal, hashes)
    reason = wrong or ("the report does not pass the policy: " + "; ".join(failed) if failed else None)
    spec = None if reason else _spec(run, "unlearned", seal)
    yield _waived(Hosted(name, name, "unlearned", run, spec, reason, checks, results), hosting, hashes)
    for role in REFERENCES:
        if role not in seal.models:
            continue
        wrong = _wrong_weights(run, role, seal, hashes)
        if wrong is None and not shows_references:
            wrong = f"the policy (references: {hosting.policy.references}) keeps the {role} model to itself here"
        yield Hosted(f"{name}.{role}", name, role, run, None if wrong else _spec(run, role, seal), wrong, results=results)


def _sealed_report(run: Path) -> tuple[Results, Seal]:
    """Report and seal, if they belong together.

    Raises:
        InputError: either is missing or broken, or the report is not the sealed one.
    """
    if not (run / "results.json").is_file():
        raise InputError("there is no evaluation report (results.json). Finish the run: soul resume.")
    try:
        results = load_results(run)
    except InputError as error:
        raise InputError(str(error).replace(f"{run}/", "")) from None  # callers need not know where runs lie
    seal = read_seal(run)
    if not hmac.compare_digest(file_sha256(run / "results.json"), seal.results_sha256):
        raise InputError("results.json is not the report that was sealed: it was changed afterwards. Evaluate the run again.")
    if "unlearned" not in seal.models:
        raise InputError("the seal names no unlearned model. Evaluate the run again.")
    return results, seal


def _wrong_weights(run: Path, role: Role, seal: Seal, hashes: Hashes) -> str | None:
    folder = run / seal.models[role].path
    if not pull(folder):
        return f"the {role} model's folder is not where the report left it"
    if not any(folder.glob("*.safetensors")):
        return f"the {role} model has no safetensors weights; nothing else is loaded"
    if not hmac.compare_digest(hashes.of(folder), seal.models[role].sha256):
        return f"the report is about other weights: the {role} model was changed after its evaluation"
    return None


def _spec(run: Path, role: Role, seal: Seal) -> ModelSpec:
    model = seal.models[role]
    return ModelSpec(model.sha256, place_of((run / model.path).resolve()), _chat_of(run))


def _chat_of(run: Path) -> str:
    """The prompt format that the run trained with."""
    try:
        settings: Any = json.loads((run / "config.json").read_text(encoding="utf-8"))
        chat = settings["data"]["chat"]
    except (OSError, ValueError, KeyError, TypeError):
        return "auto"
    return chat if isinstance(chat, str) else "auto"


def _waived(model: Hosted, hosting: Hosting, hashes: Hashes) -> Hosted:
    """A refused model is hosted all the same, and marked, where the operator allows it."""
    if model.spec is not None or not hosting.allow_unevaluated:
        return model
    inner = model.folder / "model"
    folder = inner if pull(inner) else model.folder
    if not any(folder.glob("*.safetensors")):
        return model
    spec = ModelSpec(hashes.of(folder), place_of(folder.resolve()), _chat_of(model.folder))
    return Hosted(model.id, model.run, model.role, model.folder, spec, model.reason, model.checks, model.results)
