"""results.json: what is written is read back, what breaks the schema is refused, and a crash never leaves half a file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from soul.records import InputError
from soul.report.results import Results, load_results, save_results
from soul.report.words import ATTACKS, COSTS, METRICS, OVERALL

Factory = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("changes", [{}, {"retrained": False}, {"p_value": 0.0, "method": "po"}])
def test_round_trip_keeps_every_value(document: Factory, tmp_path: Path, changes: dict[str, Any]) -> None:
    written = document(**changes)
    path = tmp_path / "run" / "results.json"
    save_results(Results.model_validate(written), path)
    assert json.loads(path.read_text())["schema"] == 1
    assert json.loads(path.read_text()) == json.loads(Results.model_validate(written).model_dump_json(by_alias=True))
    again = load_results(path.parent)
    assert again == Results.model_validate(written)
    for kind, found in again.models.items():
        for split in ("forget", "retain", "real_authors", "world_facts") if found else ():
            for metric, value in written["models"][kind][split].items():
                assert found is not None and found.value(f"{split}.{metric}") == value


NULLS = [
    ("models", "unlearned", "forget", "truth_ratio"),
    ("models", "target", "real_authors"),
    ("models", "unlearned", "mia_auc"),
    ("models", "unlearned", "mia_auc", "zlib"),
    ("models", "target", "model_utility"),
    ("models", "target"),
    ("cost", "train_s"),
    ("epochs", 2, "forget", "probability"),
]


def _with_null(written: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    changed: Any = copy.deepcopy(written)
    place = changed
    for key in path[:-1]:
        place = place[key]
    assert place[path[-1]] is not None
    place[path[-1]] = None
    return changed  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", NULLS, ids=lambda path: ".".join(map(str, path)))
def test_a_null_needs_a_reason(document: Factory, path: tuple[str | int, ...]) -> None:
    changed = _with_null(document(), path)
    with pytest.raises(ValidationError, match="null without a reason"):
        Results.model_validate(changed)
    inside_model = path[0] == "models" and len(path) > 2
    owner = changed["models"][path[1]] if inside_model else changed
    owner["reasons"][".".join(map(str, path[2:] if inside_model else path))] = "left out on purpose"
    Results.model_validate(changed)


def test_one_reason_may_cover_all_epochs(document: Factory) -> None:
    changed = document()
    for row in changed["epochs"]:
        row["retain"]["rougeL_recall"] = None
    changed["reasons"]["epochs.retain.rougeL_recall"] = "generation is skipped while training"
    Results.model_validate(changed)


def test_a_reason_without_a_null_is_refused(document: Factory) -> None:
    changed = document()
    changed["models"]["unlearned"]["reasons"]["forget.truth_ration"] = "misspelt"
    with pytest.raises(ValidationError, match="not null"):
        Results.model_validate(changed)


BREAKS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("extra key", lambda d: d.update(extra=1)),
    ("extra model key", lambda d: d["models"]["unlearned"].update(note="x")),
    ("missing model", lambda d: d["models"].pop("retrained")),
    ("unknown model", lambda d: d["models"].update(other=None)),
    ("unknown metric", lambda d: d["models"]["target"]["forget"].update(rouge=0.1)),
    ("unknown attack", lambda d: d["models"]["target"]["mia_auc"].update(lira=0.1)),
    ("share above one", lambda d: d["models"]["target"]["forget"].update(probability=1.2)),
    ("negative", lambda d: d["models"]["target"]["forget"].update(probability=-0.2)),
    ("not finite", lambda d: d["models"]["target"].update(model_utility=float("nan"))),
    ("infinite loss", lambda d: d["models"]["target"]["forget"].update(nll=float("inf"))),
    ("missing cost", lambda d: d["cost"].pop("eval_s")),
    ("empty reason", lambda d: d["reasons"].update({"cost.peak_memory_bytes": " "})),
    ("row text as setting", lambda d: d["settings"].update(rows=["a"])),
]


@pytest.mark.parametrize(("what", "breaking"), BREAKS, ids=[what for what, _ in BREAKS])
def test_what_breaks_the_schema_is_refused(document: Factory, what: str, breaking: Callable[[dict[str, Any]], Any]) -> None:
    changed = document()
    breaking(changed)
    with pytest.raises(ValidationError):
        Results.model_validate(changed)


def test_a_loss_in_nats_may_exceed_one_and_rounding_is_forgiven(document: Factory) -> None:
    changed = document()
    changed["models"]["target"]["forget"] |= {"nll": 7.5, "probability": 1 + 1e-8}
    Results.model_validate(changed)


def test_errors_say_where_and_never_what(document: Factory, tmp_path: Path) -> None:
    changed = document()
    changed["models"]["unlearned"]["forget"]["probability"] = "the secret answer of a row"
    path = tmp_path / "results.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(InputError) as caught:
        load_results(path)
    assert "models.unlearned.forget.probability" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "schema"),
        ('{"schema": 2}', "schema 2, expected 1"),
        ('{"schema": 1}', "Field required"),
    ],
)
def test_missing_and_broken_files_are_input_errors(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=words):
        load_results(tmp_path / "results.json")


def test_a_crash_while_writing_leaves_the_old_file(
    results: Callable[..., Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    save_results(results(seed=1), path)
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, _crash)
            with pytest.raises(KeyboardInterrupt):
                save_results(results(seed=2), path)
        assert load_results(path).seed == 1
        assert [item.name for item in tmp_path.iterdir()] == ["results.json"]
    save_results(results(seed=2), path)
    assert load_results(path).seed == 2


def _crash(*_: object) -> None:
    raise KeyboardInterrupt


def test_every_word_is_explained_once() -> None:
    titles = [word.title for table in (METRICS, OVERALL) for word in table.values()]
    assert len(set(titles)) == len(titles)
    assert all(word.meaning for table in (METRICS, OVERALL, ATTACKS) for word in table.values())
    assert set(COSTS) == set(Results.model_fields["cost"].annotation.model_fields)  # type: ignore[union-attr]
