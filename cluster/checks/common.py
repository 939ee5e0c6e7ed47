"""What every check shares: pinned images, secrets written out, pydantic's errors. A complaint is one line: where, what, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROOT: Final = Path(__file__).resolve().parents[2]
Port = Annotated[int, Field(ge=1, le=65_535, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]

_IMAGE: Final = re.compile(r"(?P<name>[^:@]+(?::\d+/[^:@]+)?)(?::(?P<tag>[\w][\w.-]*))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?")
_MOVING: Final = re.compile(r"^(latest|nightly|main|master|dev|stable)\b")
_SECRET_NAME: Final = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEYS?|ACCESS_?KEY(_ID)?|CREDENTIALS)$", re.IGNORECASE)
_SECRET_VALUE: Final = re.compile(
    r"(AKIA|ASIA)[A-Z0-9]{16}|\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# NAME=value in a shell command; a value that the shell itself looks up is fine
_ASSIGNED: Final = re.compile(r"\b([A-Z][A-Z0-9_]*)=(?!\$)(['\"]?)([^\s'\";]+)")


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


def pinned_version(package: str) -> str:
    """The version of `package` that constraints.txt holds."""
    found = re.search(rf"^{re.escape(package)}==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise KeyError(package)
    return found[1]


def image_complaints(where: str, image: str) -> Iterator[str]:
    """A tag that moves is another image tomorrow; Ray's own image has to hold the Ray of constraints.txt."""
    parts = _IMAGE.fullmatch(image)
    if parts is None:
        yield f"{where}: {image!r} is no image name"
        return
    tag = parts["tag"]
    if parts["digest"] is None and (tag is None or _MOVING.match(tag)):
        yield f"{where}: image {image} is not pinned. Name a version (never latest or nightly) or a sha256 digest"
    elif parts["name"].endswith("rayproject/ray") and tag is not None and tag.split("-")[0] != pinned_version("ray"):
        ray = pinned_version("ray")
        yield f"{where}: image {image} has another Ray than constraints.txt ({ray}): nodes and jobs would not understand each other"


def secret_complaints(document: Any, where: str = "") -> Iterator[str]:
    """Secrets written into a file that is committed and sent to every node. The value is never quoted."""
    if isinstance(document, Mapping):
        name, value = document.get("name"), document.get("value")
        if isinstance(name, str) and _SECRET_NAME.search(name) and isinstance(value, str) and value:  # env of a container
            yield f"{where}: {name} is written out. Refer to a Secret with valueFrom.secretKeyRef"
        for key, inner in document.items():
            path = f"{where}.{key}" if where else str(key)
            if isinstance(inner, str) and inner and _SECRET_NAME.search(str(key)) and not inner.startswith(("~", "/", "$")):
                yield f"{path}: a secret is written out. Use a role, a service account, a Secret or a file that is not committed"
            else:
                yield from secret_complaints(inner, path)
    elif isinstance(document, list):
        for index, inner in enumerate(document):
            yield from secret_complaints(inner, f"{where}[{index}]")
    elif isinstance(document, str):
        assigned = [name for name, _, _ in _ASSIGNED.findall(document) if _SECRET_NAME.search(name)]
        if assigned or _SECRET_VALUE.search(document):
            what = ", ".join(assigned) or "a secret"
            yield f"{where}: {what} is written out. Use a role, a service account, a Secret or a file that is not committed"


def model_complaints(error: ValidationError, where: str = "") -> Iterator[str]:
    for problem in error.errors(include_input=False, include_url=False):
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
        message = {"extra_forbidden": "unknown key", "missing": "missing"}.get(
            problem["type"], problem["msg"].removeprefix("Value error, ")
        )
        yield f"{(where + path).lstrip('.') or 'document'}: {message}"
