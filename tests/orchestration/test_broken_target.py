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

from soul.models.load import load_model, load_tokenizer, save_model
from soul.orchestration import trial
from soul.orchestration.train import train_worker
from soul.train.reference import NonFiniteReference
from tests.train.reference_runs import job_in, write_target


def test_a_worker_returns_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_target(tmp_path)
    model = load_model(str(tmp_path / "target"))
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    save_model(tmp_path / "broken", model, load_tokenizer(str(tmp_path / "target")))
    only = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0)
    monkeypatch.setattr(ray.train, "get_context", lambda: only)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    job = replace(job_in(tmp_path, tmp_path / "run", name="single"), model=str(tmp_path / "broken"))
    found = train_worker({"job": job, "threads": torch.get_num_threads()})
    assert found == {"error": "the target gives some forget rows a log-probability that is not finite; check the model's weights"}


def test_a_trial_keeps_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def broken(*args: object, **kwargs: object) -> None:
        raise NonFiniteReference

    config, kept = SimpleNamespace(train=SimpleNamespace(epochs=2)), SimpleNamespace(finish=lambda *args: told.update(finish=args[-1]))
    monkeypatch.setattr(trial, "work", broken)
    monkeypatch.setattr(trial, "run_dir", lambda config: kept)
    monkeypatch.setattr(trial.Config, "model_validate_json", lambda text: config)
    monkeypatch.setattr(trial, "decided_run", lambda config, device: config)
    monkeypatch.setattr(trial.tune, "report", lambda row: told.update(report=row))
    (tmp_path / "config.json").write_text("{}")
    threads = torch.get_num_threads()
    trial.run_trial({"run": {"folder": str(tmp_path), "isolated": False}}, {"floor": 0.0, "command": [], "device": "cpu"})
    torch.set_num_threads(threads)
    assert told["finish"] == {"reason": str(NonFiniteReference())} and told["report"] == {"failed": 1.0, "epoch": 3}
