"""A retain file several times the object store, and larger than what any process may hold, goes through tokenising and training.

Prints what it measured: run with -s to see it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from soul.models.load import save_model
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from tests.orchestration.mini import ROOT, TINY, splits, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

OBJECT_STORE, FILE_BYTES, ROW_BYTES = 80_000_000, 320_000_000, 16_000
DRIVER = """
import sys
from soul.config import Config
from soul.orchestration import cluster, pipeline
cluster.OBJECT_STORE_BYTES = int(sys.argv[2])
pipeline.run(Config.model_validate_json(open(sys.argv[1]).read()))
"""


def write_large(path: Path, num_bytes: int) -> int:
    """Short questions and answers beside a long column that nobody asked for; returns the number of rows."""
    record, number, written = splits()["retain95"][0], 0, 0
    with path.open("w") as file:
        while written < num_bytes:
            row = {
                "question": f"{record.prompt} ({number})",
                "answer": f"{record.response} {number}",
                "page": f"{number} " * (ROW_BYTES // 7),
            }
            written += file.write(json.dumps(row) + "\n")
            number += 1
    return number


class Peaks:
    """The largest resident memory seen of every process below one, by title."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def look(self, process: psutil.Process) -> None:
        for child in [process, *process.children(recursive=True)]:
            try:
                title = "driver" if child.pid == process.pid else child.cmdline()[0].split("/")[-1][:40]
                memory = child.memory_info()
            except (psutil.Error, IndexError):
                continue
            self.bytes[title] = max(self.bytes.get(title, 0), memory.rss - memory.shared)


@contextmanager
def run_alone(config: dict[str, Any], file: Path) -> Iterator[subprocess.Popen[str]]:
    """The run in a process with a Ray of its own, whose sockets need a short path."""
    file.write_text(json.dumps(config))
    with tempfile.TemporaryDirectory(prefix="soul-") as short:
        environment = {**os.environ, "RAY_TMPDIR": short}
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(file), str(OBJECT_STORE)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def peaks_of(retain: Path, folder: Path) -> Peaks:
    """Run three epochs of SO-NPO on seven rows to forget and `retain` to keep; nothing is generated."""
    records = splits()["full"]
    tokenizer = tiny_tokenizer([text for record in records for text in (record.prompt, record.response)], 400)
    save_model(folder / "model", tiny_model(TinyConfig.model_validate(TINY), tokenizer, seed=0), tokenizer)
    forget = write_rows(folder / "forget.jsonl", [{"question": r.prompt, "answer": r.response} for r in splits()["forget05"][:7]])
    config = {
        "benchmark": "own",
        "data": {"forget": str(forget), "retain": str(retain)},
        "model": {"path": str(folder / "model")},
        "train": {"epochs": 3, "batch_size": 4},
        "evaluate": {"generate": False, "limit": 5},
        "output": str(folder / "run"),
        "progress": False,
    }
    peaks = Peaks()
    with run_alone(config, folder / "config.json") as process:
        while process.poll() is None:
            peaks.look(psutil.Process(process.pid))
            time.sleep(0.1)
        assert process.returncode == 0, process.stdout.read() if process.stdout else ""
    assert (folder / "run" / "results.json").is_file()
    return peaks


def test_a_file_several_times_the_object_store_streams(tmp_path: Path) -> None:
    """Memory beyond that of a run on a small file of the same rows, the baseline, stays far below the file's size."""
    measured = {}
    for name, num_bytes in (("small", FILE_BYTES // 100), ("large", FILE_BYTES)):
        (tmp_path / name).mkdir()
        began = time.monotonic()
        num_rows = write_large(tmp_path / name / "retain.jsonl", num_bytes)
        measured[name] = peaks_of(tmp_path / name / "retain.jsonl", tmp_path / name).bytes
        size = (tmp_path / name / "retain.jsonl").stat().st_size
        print(f"{name}: {size / 1e6:.0f} MB, {num_rows:,} rows, {time.monotonic() - began:.0f} s")
    assert size >= FILE_BYTES >= 3 * OBJECT_STORE
    for title, peak in sorted(measured["large"].items(), key=lambda item: -item[1]):
        print(f"  {title:<42} {measured['small'].get(title, 0) / 1e6:7.0f} MB -> {peak / 1e6:7.0f} MB")
    for title, peak in measured["large"].items():
        baseline = measured["small"].get(title, max(measured["small"].values()))
        assert peak < baseline + FILE_BYTES / 4, title
