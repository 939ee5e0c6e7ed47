"""A model's hash from its record is the hash of its bytes, and a record that is not of the files that are there is not believed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import soul.models.hashes
from soul.models.hashes import RECORD, file_sha256, model_files, model_sha256, record_hashes, recorded_sha256
from soul.models.load import save_model
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.records import InputError

SHAPE = TinyConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, vocab_size=300, max_length=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer(["a b c"], 300)
    save_model(tmp_path / "model", tiny_model(SHAPE, tokenizer, seed=1), tokenizer)
    return tmp_path / "model"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read for a hash."""
    names: list[str] = []
    monkeypatch.setattr(soul.models.hashes, "file_sha256", lambda path: names.append(path.name) or file_sha256(path))
    return names


def test_a_saved_model_has_its_record_and_nothing_is_read_for_it(folder: Path, read: list[str]) -> None:
    found = recorded_sha256(folder)
    assert read == []
    assert found == model_sha256(folder)
    assert sorted(read) == sorted(path.name for path in model_files(folder)) and "model.safetensors" in read and RECORD not in read


def test_the_card_changes_nothing(folder: Path, read: list[str]) -> None:
    before = recorded_sha256(folder)
    (folder / "README.md").write_text("what it is")
    assert recorded_sha256(folder) == before and read == []


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a bit": (lambda folder: flip_a_bit(folder / "model.safetensors"), ["model.safetensors"]),
    "a new file": (lambda folder: (folder / "extra.json").write_text("{}"), ["extra.json"]),
    "a file less": (lambda folder: (folder / "generation_config.json").unlink(), []),
    "no time": (lambda folder: os.utime(folder / "config.json", ns=(1, 1)), ["config.json"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_behind_the_record_is_read(change: str, folder: Path, read: list[str]) -> None:
    before, (make, expected) = model_sha256(folder), CHANGES[change]
    make(folder)
    read.clear()
    found = recorded_sha256(folder)
    assert read == expected
    assert found == model_sha256(folder)
    assert (found == before) == (change == "no time")


@pytest.mark.parametrize("record", [None, "", "[]", "{", '{"model.safetensors": 1}', '{"model.safetensors": [[1], "x"]}'])
def test_a_folder_without_a_record_that_can_be_read_is_read_itself(record: str | None, folder: Path) -> None:
    (folder / RECORD).unlink()
    if record is not None:
        (folder / RECORD).write_text(record)
    assert recorded_sha256(folder) == model_sha256(folder)


def test_a_record_is_never_what_the_gate_believes(folder: Path) -> None:
    """Forged, it makes another seal; the bytes have the hash they have."""
    honest, record = model_sha256(folder), json.loads((folder / RECORD).read_text())
    record["model.safetensors"][1] = "0" * 64
    (folder / RECORD).write_text(json.dumps(record))
    assert recorded_sha256(folder) != honest == model_sha256(folder)
    record_hashes(folder)
    assert recorded_sha256(folder) == honest


def test_an_empty_folder_has_no_hash(tmp_path: Path) -> None:
    for function in (model_sha256, recorded_sha256):
        with pytest.raises(InputError, match="found no files"):
            function(tmp_path / "none")
