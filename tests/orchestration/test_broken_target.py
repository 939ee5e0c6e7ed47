"""A target whose log-probabilities are not finite ends a training worker with a line for the user, and a trial with its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

import ray.train

from soul.config import Config
from soul.models.load import load_model, load_tokenizer, save_model
from soul.orchestration import train, trial
from soul.rundir import RunDir
from soul.train.reference import NonFiniteReference
from tests.train.reference_runs import job_in, write_target


def test_a_worker_returns_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_target(tmp_path)
    model = load_model(str(tmp_path / "target"))
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    save_model(tmp_path / "broken", model, load_tokenizer(str(tmp_path / "target")))
    only = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0, get_local_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: only)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(train, "Staging", lambda *args: SimpleNamespace(open=lambda checkpoint: None))
    job = replace(job_in(tmp_path, tmp_path / "run", name="single"), model=str(tmp_path / "broken"))
    found = train.train_worker({"job": job, "threads": torch.get_num_threads()})
    assert found == {"error": "the target gives some forget rows a log-probability that is not finite; check the model's weights"}


def test_a_trial_keeps_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def broken(*args: object, **kwargs: object) -> None:
        raise NonFiniteReference

    config = Config.model_validate({"method": "npo", "output": str(tmp_path), "train": {"epochs": 2, "seed": 3}})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    monkeypatch.setattr(trial, "work", broken)
    monkeypatch.setattr(trial.tune, "report", told.update)
    monkeypatch.setattr(trial, "decided_run", lambda asked, *told: asked)
    common = {
        "floor": 0.0,
        "command": [],
        "device": "cpu",
        "precision": "fp32",
        "cache": str(tmp_path / "cache"),
        "session": "one",
        "rows": {3: None},
    }
    threads = torch.get_num_threads()
    trial.run_trial({"run": {"folder": str(tmp_path), "isolated": False}}, common)
    torch.set_num_threads(threads)
    assert trial.failure_of(RunDir(tmp_path)) == str(NonFiniteReference())
    assert told == {"failed": 1.0, "epoch": 3}
