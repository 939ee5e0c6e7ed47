"""The run directory: files appear whole or not at all, and a finished stage is known by its inputs."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from soul.records import InputError
from soul.rundir import RunDir, digest, versions, write_atomically, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "results.json"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(os, step, fail)
            write_atomically(path, "new")
        assert path.read_text() == "old" and names(path.parent) == ["results.json"]
    write_atomically(path, "new\u2028 – 東京")
    assert path.read_text(encoding="utf-8") == "new\u2028 – 東京"
    assert path.stat().st_mode & 0o777 == 0o644


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path, done = tmp_path / "value.json", threading.Event()
    write_json(path, {"value": "a" * 50_000})
    seen: list[str] = []

    def read() -> None:
        while not done.is_set():
            seen.append(json.loads(path.read_text())["value"])

    reader = threading.Thread(target=read)
    reader.start()
    for letter in "bcdefgh":
        write_json(path, {"value": letter * 50_000})
    done.set()
    reader.join(20)
    assert seen and all(len(set(value)) == 1 and len(value) == 50_000 for value in seen)


def test_json_is_stable_and_ends_with_a_line_break(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    write_json(tmp_path / "b.json", {"a": [1.5, None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.json").read_text().endswith("}\n")


def test_digests_name_values() -> None:
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert len({digest(value) for value in ({"a": 1}, {"a": 2}, {"a": "1"}, [1, 2], [2, 1], [[1], 2], [1, [2]], "", None)}) == 9
    assert len(digest("x")) == 16 and len(digest("x", length=64)) == 64


def test_a_stage_is_finished_for_the_inputs_it_had(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.finished("train", "key") is None
    run.create()
    run.finish("train", "key", {"steps": 3})
    assert run.finished("train", "key") == {"steps": 3}
    assert run.finished("train", "other inputs") is None
    assert run.finished("evaluate", "key") is None
    run.finish("train", "other inputs", {"steps": 4})
    assert run.finished("train", "key") is None and run.finished("train", "other inputs") == {"steps": 4}


def test_its_files_lie_inside(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    paths = [run.config, run.manifest, run.metrics, run.results, run.model, run.checkpoints, run.logs]
    assert [path.name for path in paths] == [
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "results.json",
        "model",
        "checkpoints",
        "logs",
    ]
    assert all(path.parent == tmp_path for path in paths)


def test_creating_leaves_no_trace_and_may_be_repeated(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "x")
    run.create()
    run.create()
    assert names(run.path) == []


@pytest.mark.parametrize("blocked", ["x", "x/y"])
def test_a_folder_that_cannot_be_made_is_refused(blocked: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file")
    with pytest.raises(InputError, match=r"output .*x.* cannot be written \(.+\)\. Choose another --output"):
        RunDir(tmp_path / blocked).create()


def test_versions_name_what_is_installed() -> None:
    import torch

    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"].count(".") == 2 and all(found.values())
