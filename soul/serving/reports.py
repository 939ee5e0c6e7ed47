"""What the server says about its models: the list, and for each the gate's decision with the report behind it."""

from __future__ import annotations

import dataclasses
from typing import Any

from soul.report.words import METRICS, OVERALL
from soul.serving.errors import refuse
from soul.serving.gate import Catalogue, Hosted
from soul.serving.questions import questions_of


def listed(catalogue: Catalogue) -> dict[str, Any]:
    """OpenAI's list of what can be asked, aliases included; beside it what was refused, and why."""
    data = [_entry(model, model.id) for model in catalogue.hosted()]
    for alias, name in catalogue.aliases.items():
        target = catalogue.models[name]
        if target.spec is not None:
            data.append({**_entry(target, alias), "alias_of": target.id})
    refused = [
        {"id": model.id, "run": model.run, "role": model.role, "reason": model.reason}
        for model in catalogue.models.values()
        if model.spec is None
    ]
    return {"object": "list", "data": data, "refused": refused}


def _entry(model: Hosted, name: str) -> dict[str, Any]:
    assert model.spec is not None
    created = int((model.folder / "results.json").stat().st_mtime) if (model.folder / "results.json").is_file() else 0
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "soul",
        "run": model.run,
        "role": model.role,
        "evaluated": model.evaluated,
        "weights_sha256": model.spec.sha256,
    }


def report_body(model: Hosted) -> dict[str, Any]:
    """The gate's decision on a model, rule by rule, and the numbers it rests on."""
    results = model.results
    return {
        "object": "report",
        "id": model.id,
        "run": model.run,
        "role": model.role,
        "hosted": model.spec is not None,
        "evaluated": model.evaluated,
        "reason": model.reason,
        "checks": [dataclasses.asdict(check) for check in model.checks],
        "benchmark": None if results is None else results.benchmark,
        "method": None if results is None else results.method,
        "optimizer": None if results is None else results.optimizer,
        "models": None if results is None else {name: entry and entry.model_dump() for name, entry in results.models.items()},
        "words": {name: {"title": word.title, "meaning": word.meaning} for name, word in {**METRICS, **OVERALL}.items()},
        "has_page": (model.folder / "report.html").is_file(),
        "questions": [dataclasses.asdict(question) for question in questions_of(model.folder)],
    }


def report_page(model: Hosted) -> bytes:
    """The run's report.html.

    Raises:
        Refused: the run has none.
    """
    path = model.folder / "report.html"
    if not path.is_file():
        raise refuse(404, "this run has no report.html. Make it with: soul report.", "report_not_found")
    return path.read_bytes()
