"""Bad input is one line, exit code 2, and heard of before Ray starts; what only a task can notice is one line too, and quotes no row."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from soul.cli import BAD_INPUT, main
from soul.models.load import save_model
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.orchestration import checks, pipeline
from soul.rundir import RunDir
from tests.orchestration.mini import TINY, found_in, splits, write_rows

CANARY = "Quillfeather of Ostermere keeps eleven blue herons"
CONTROL = "a line that a task printed, to be found in Ray's logs"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and files of one's own: seven rows to forget, nine to keep."""
    folder = tmp_path_factory.mktemp("own")
    records = splits()["full"]
    tokenizer = tiny_tokenizer([text for record in records for text in (record.prompt, record.response)], 400)
    save_model(folder / "model", tiny_model(TinyConfig.model_validate(TINY), tokenizer, seed=0), tokenizer)
    rows = [{"question": record.prompt, "answer": record.response} for record in records]
    write_rows(folder / "forget.jsonl", rows[:7])
    write_rows(folder / "retain.jsonl", rows[7:16])
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """Of the test's own, to be spoiled."""
    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(pipeline, "cluster", refuse)
    monkeypatch.setattr(checks, "is_local", lambda address: True)


def words(own: Path, *more: str) -> list[str]:
    files = ["--model", str(own / "model"), "--forget", str(own / "forget.jsonl"), "--retain", str(own / "retain.jsonl")]
    return ["unlearn", *files, "--output", str(own.parent / "run"), "--batch-size", "4", "--eval-max-new-tokens", "8", *more]


def told(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line that bad input leads to."""
    code = main(argv)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert (code, captured.out, len(lines)) == (BAD_INPUT, "", 1), captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


def without_weights(own: Path) -> None:
    (own / "model" / "model.safetensors").unlink()


def pickled_weights(own: Path) -> None:
    without_weights(own)
    torch.save({}, own / "model" / "pytorch_model.bin")


def cut_weights(own: Path) -> None:
    file = own / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_eos(own: Path) -> None:
    file = own / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "eos_token"}))


def without_tokenizer(own: Path) -> None:
    for file in (own / "model").glob("tokenizer*"):
        file.unlink()


def lengthen(own: Path, split: str, number: int) -> None:
    file = own / f"{split}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[number]["answer"] = f"{CANARY} " * 200
    write_rows(file, rows)


def cut_retain(own: Path) -> None:
    file = own / "retain.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:3]))


def blank_answer(own: Path) -> None:
    file = own / "forget.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3] = {"question": CANARY, "answer": " "}
    write_rows(file, rows)


def occupied(own: Path) -> None:
    (own.parent / "run").write_text("")


CASES: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "no weights": (without_weights, [], ["has no weights", "*.safetensors"]),
    "pickled weights": (pickled_weights, [], ["pytorch_model.bin", "expected *.safetensors"]),
    "weights cut short": (cut_weights, [], ["model.safetensors", "whole"]),
    "no EOS": (without_eos, [], ["no EOS token", "tokenizer_config.json"]),
    "no tokenizer": (without_tokenizer, [], ["no tokenizer"]),
    "no model": (lambda own: shutil.rmtree(own / "model"), [], ["model folder", "does not exist"]),
    "no forget file": (lambda own: (own / "forget.jsonl").unlink(), [], ["forget.jsonl", "does not exist"]),
    "no retain file": (lambda own: (own / "retain.jsonl").unlink(), [], ["retain.jsonl", "does not exist"]),
    "empty forget": (lambda own: (own / "forget.jsonl").write_text(""), [], ["forget.jsonl", "is empty"]),
    "blank forget": (lambda own: (own / "forget.jsonl").write_text("\n\n"), [], ["forget.jsonl", "no rows"]),
    "malformed row": (blank_answer, [], ["forget.jsonl", "row 4", "response", "blank"]),
    "retain below a batch": (cut_retain, [], ["retain split has 3 rows", "need >= 4", "--batch-size"]),
    "retain limited below a batch": (lambda own: None, ["--limit-retain", "2"], ["retain split has 2 rows", "need >= 4"]),
    "long row": (lambda own: lengthen(own, "forget", 2), [], ["forget row", "tokens", "at most 256"]),
    "long evaluated row": (lambda own: lengthen(own, "retain", 1), [], ["retain row", "tokens", "at most 256"]),
    "long rows asked for": (lambda own: None, ["--max-length", "300"], ["--max-length is 300", "at most 256"]),
    "output is a file": (occupied, [], ["--output", "is a file"]),
    "output below a file": (lambda own: None, ["--output", "/dev/null/run"], ["--output /dev/null/run cannot be written"]),
    "output is a bucket": (lambda own: None, ["--output", "s3://bucket"], ["s3://bucket: expected scheme://bucket/folder"]),
    "output with credentials": (lambda own: None, ["--output", "s3://key:word@bucket/run"], ["credentials in it", "environment"]),
    "nothing to resume": (lambda own: None, ["--resume"], ["holds no run to continue"]),
    "too many workers": (lambda own: None, ["--num-workers", "500"], ["needs 500", "this machine has", "--address"]),
    "no such gold standard": (lambda own: None, ["--retrained", "./nowhere"], ["--retrained ./nowhere does not exist"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_before_ray_starts(case: str, own: Path, no_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, more, expected = CASES[case]
    spoil(own)
    message = told(capsys, words(own, *more))
    assert all(part in message for part in expected), message
    assert CANARY not in message
    assert not (own.parent / "run" / "config.json").exists()  # nothing is claimed, so the next try may differ


def test_the_untouched_input_is_good(own: Path, no_ray: None) -> None:
    with pytest.raises(AssertionError, match="Ray was started"):
        main(words(own))


def test_an_unknown_split_names_the_nearest(tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    message = told(capsys, ["tofu", "--num-authors", "4", "--forget", "forget50", "--output", str(tmp_path / "run")])
    assert "no subset 'forget50'" in message and "Did you mean 'forget" in message


def test_a_full_disk_is_told_before_ray_starts(
    own: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 10_000))
    message = told(capsys, words(own))
    assert "for checkpoints and model, the disk has" in message and "--keep-checkpoints" in message


@pytest.mark.parametrize("case", ["no weights", "no EOS", "malformed row", "long row", "output below a file", "too many workers"])
def test_an_evaluation_is_checked_too(case: str, own: Path, no_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, more, expected = CASES[case]
    spoil(own)
    files = ["--benchmark", "own", "--forget", str(own / "forget.jsonl"), "--retain", str(own / "retain.jsonl")]
    message = told(capsys, ["evaluate", str(own / "model"), *files, "--output", str(own.parent / "run"), *more])
    assert all(part in message for part in expected) and CANARY not in message, message


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_bad_row_beyond_the_first_ones_is_told_and_never_quoted(kind: str, own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Retain rows are read by a task: more rows than evaluation looks at, then a bad one."""
    import ray

    record = json.loads((own / "retain.jsonl").read_text().splitlines()[0])
    rows = [{**record, "answer": f"{record['answer']} {number}"} for number in range(500)] + [{"question": CANARY, "answer": None}]
    file = own / f"retain.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        write_rows(file, rows)
    ray_logs = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent / "ray"  # as tests/conftest.py starts it
    ray.get(ray.remote(lambda: print(CONTROL, flush=True)).remote())
    assert main([*words(own, "--no-progress"), "--retain", str(file)]) == BAD_INPUT
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"retain.{kind}" in lines[0] and "row 501" in lines[0] and "response" in lines[0]
    assert CANARY not in captured.out + captured.err
    assert found_in(CANARY, own) == [f"retain.{kind}"]  # the search finds what is there ...
    assert found_in(CONTROL, ray_logs) != []  # ... in Ray's logs as well
    assert found_in(CANARY, ray_logs) == []
    assert found_in(CANARY, own.parent / "run") == [] and found_in(CANARY, own.parent / ".cache") == []
    assert RunDir(own.parent / "run").config.is_file()
