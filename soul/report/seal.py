"""What ties a report to the weights it judged: hashes of both in the run's manifest, and a signature where a key is set.

The hashes show accidents and careless edits. Somebody who may write the manifest can recompute them; against that, set SOUL_SEAL_KEY
where runs are made and where they are served: the hashes are then signed (HMAC-SHA256), and an unsigned run is not served.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from soul.models.hashes import file_sha256, recorded_sha256
from soul.records import InputError
from soul.report.results import ModelName

KEY_VARIABLE: Final = "SOUL_SEAL_KEY"


class SealedModel(BaseModel):
    """A model folder, relative to the run directory where that is possible, and the hash of what is in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    path: str
    sha256: str


class Seal(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    results_sha256: str
    models: dict[ModelName, SealedModel]
    signature: str | None = None


def make_seal(run_dir: Path, models: Mapping[str, Path]) -> Seal:
    """The seal of a run whose results.json is written. Models without a local folder (hub ids) are left out by the caller.

    Hashes come from the record beside the weights. Whoever serves them reads the weights themselves, so a record that is not true is
    a seal that does not fit.
    """
    sealed = {name: SealedModel(path=_relative(folder, run_dir), sha256=recorded_sha256(folder)) for name, folder in models.items()}
    seal = Seal.model_validate({"results_sha256": file_sha256(run_dir / "results.json"), "models": sealed})
    key = os.environ.get(KEY_VARIABLE)
    return seal.model_copy(update={"signature": _signature(seal, key)}) if key else seal


def read_seal(run_dir: Path) -> Seal:
    """The seal in a run's manifest, its signature checked if a key is set.

    Raises:
        InputError: there is none, or its signature is missing or wrong.
    """
    path = run_dir / "manifest.json"
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        given = manifest["seal"]
        seal = Seal.model_validate(given)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        raise InputError(
            "manifest.json is missing or cannot be read: nothing ties the report to the weights. Run the evaluation again."
        ) from None
    except (KeyError, TypeError, ValidationError):
        raise InputError(
            "manifest.json holds no seal: nothing ties the report to the weights. Evaluate with this version of soul."
        ) from None
    key = os.environ.get(KEY_VARIABLE)
    if key and not hmac.compare_digest(_signature(seal, key), seal.signature or ""):
        raise InputError(
            f"the seal's signature is missing or was not made with this {KEY_VARIABLE}. Seal the run with the key it is served with."
        )
    return seal


def _relative(folder: Path, run_dir: Path) -> str:
    """Run directory and cache are moved together more often than apart, so a path between them lasts longer than an absolute one."""
    return Path(os.path.relpath(folder.resolve(), run_dir.resolve())).as_posix()


def _signature(seal: Seal, key: str) -> str:
    body = json.dumps(seal.model_dump(exclude={"signature"}), sort_keys=True)
    return hmac.new(key.encode(), body.encode(), hashlib.sha256).hexdigest()
