"""Own files are checked as a benchmark's are, although retain is only read where it is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from soul.config import DataConfig
from soul.orchestration.data import open_sources
from soul.orchestration.tokens import FileSplit, row_hash
from soul.records import InputError


def rows(start: int, stop: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"What is number {i}?", "answer": f"It is secret-{i}.", **more} for i in range(start, stop)]


def own(folder: Path, **splits: list[dict[str, Any]]) -> DataConfig:
    for name, made in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return DataConfig.model_validate({name: str(folder / f"{name}.jsonl") for name in splits})


BAD = {
    "no row to forget": ({"forget": [], "retain": rows(4, 9)}, "forget"),
    "a row to forget and keep": ({"forget": rows(0, 4), "retain": rows(3, 9)}, r"1 row\(s\) of forget are also in retain"),
    "a holdout row that is trained on": (
        {"forget": rows(0, 4), "retain": rows(4, 9), "holdout": rows(2, 3)},
        r"1 row\(s\) of holdout are also in forget",
    ),
    "an id twice": ({"forget": rows(0, 2, id="same"), "retain": rows(4, 9)}, "rows 1 and 2 the same id"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_in_own_files_are_named(case: str, tmp_path: Path) -> None:
    splits, expected = BAD[case]
    with pytest.raises(InputError, match=expected) as caught:
        open_sources(own(tmp_path, **splits), benchmark="own", seed=0)
    assert "secret" not in str(caught.value)


def test_streamed_retain_rows_may_be_neither_forgotten_nor_held_out(tmp_path: Path) -> None:
    data = own(tmp_path, forget=rows(0, 4), retain=rows(4, 900), holdout=rows(1000, 1003))
    opened = open_sources(data, benchmark="own", seed=0)
    retain = opened.rows["retain"]
    assert isinstance(retain, FileSplit)
    assert retain.forbidden == {row_hash(row) for split in ("forget", "holdout") for row in opened.benchmark.splits[split]}
    assert len(opened.evaluated["retain"]) == 400
