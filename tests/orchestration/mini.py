"""A benchmark of sixty rows and a model of a few thousand parameters: whole runs cost seconds, most of them Ray's start-up."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from soul.config import Config
from soul.data.fictitious import fictitious_splits
from soul.records import Record
from soul.train.engine import EngineConfig
from soul.train.job import TrainJob
from tests.orchestration.held import Held

ROOT = Path(__file__).resolve().parents[2]
NUM_FORGET, NUM_RETAIN, NUM_OTHER = 20, 40, 6
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 400, "max_length": 256}

STEPS = 270
# Long enough to be killed in the middle on any machine: thirty steps between checkpoints, and every step of each is repeated.
TRAIN = {"epochs": 90, "save_every": 10, "save_minutes": None, "eval_every": 0}


@dataclass(frozen=True)
class Finished:
    """`jobs` maps an optimizer to the training job of its arm."""

    data: Path
    run: Path
    twin: Path
    config: Config
    jobs: dict[str, TrainJob]
    target: Path
    retrained: Path
    held: Held


def splits() -> dict[str, list[Record]]:
    return fictitious_splits(num_authors=3)


def write_tofu(folder: Path) -> Path:
    """Three invented authors in TOFU's layout, with every evaluation subset."""
    folder.mkdir()
    made = splits()
    plain = {"forget05": made["forget05"], "retain95": made["retain95"], "holdout05": made["holdout"][:NUM_OTHER]}
    perturbed = {
        "forget05_perturbed": made["forget05"],
        "retain_perturbed": made["retain95"][:NUM_OTHER],
        "real_authors_perturbed": made["real_authors"][:NUM_OTHER],
        "world_facts_perturbed": made["world_facts"][:NUM_OTHER],
    }
    for name, records in plain.items():
        write_rows(folder / f"{name}.json", [{"question": r.prompt, "answer": r.response} for r in records])
    for name, records in perturbed.items():
        rows = [
            {"question": r.prompt, "answer": r.response, "paraphrased_answer": r.paraphrase, "perturbed_answer": r.perturbed}
            for r in records
        ]
        write_rows(folder / f"{name}.json", rows)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(data: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """SO-NPO on `data` for two epochs; `sections` replace or, where they are mappings, extend."""
    made: dict[str, Any] = {
        "data": {"source": str(data)},
        "model": {"tiny": TINY},
        "prepare": {"max_steps": 20},
        "train": {"epochs": 2},
        "engine": {"precision": "fp32"},  # what is compared bit for bit; on the logical GPUs auto would be bf16
        "evaluate": {"max_new_tokens": 16},
        "output": str(output),
        "progress": False,
    }
    for name, value in sections.items():
        made[name] = {**made[name], **value} if isinstance(value, dict) and name in made else value
    return made


def mini(data: Path, output: Path, **sections: Any) -> Config:
    return Config.model_validate(settings(data, output, **sections))


def on_gpus(**engine: Any) -> EngineConfig:
    """An engine as the driver decides it on the session's Ray, whose GPUs are logical; fp32, because results are compared bit for bit."""
    return EngineConfig(precision="fp32", **engine).decided("gpu")


def long_job(finished: Finished, folder: Path) -> TrainJob:
    """The same run over many more epochs."""
    job = finished.jobs["sophia"]
    return replace(job, run_dir=str(folder), export=str(folder / "model"), train=job.train.model_copy(update=TRAIN))


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def steps(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def fingerprint(folder: Path) -> str:
    """Of the exported weights, bit for bit."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    """`soul ...` in a process and a session of its own, without the tests' import path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import sys; from soul.cli import main; sys.exit(main())", *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def wait_for(condition: Any, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {timeout_s:g} s")
        time.sleep(0.05)


def found_in(text: str, folder: Path) -> list[str]:
    """The files below `folder` that hold `text`."""
    needle = text.encode()
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file() and needle in path.read_bytes()]
