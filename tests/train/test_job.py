"""A whole job on one rank: metrics.jsonl without repeated steps, checkpoints and cheap evaluations when they are due, the export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soul.data.store import finish_store, write_part
from soul.models.load import load_model, save_model
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.objectives.methods import NPO, Finetune
from soul.optim.configs import SophiaConfig
from soul.train.config import TrainConfig
from soul.train.engine import Engine, EngineConfig
from soul.train.job import JobResult, TrainJob, _StepLog, run_job
from soul.train.loop import Progress
from soul.train.single import SingleEngine
from tests.train.loop_runs import ROWS, STEPS_PER_EPOCH

CANARY = "zanzibarquokka"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, two token stores and the forget rows' reference log-probabilities."""
    root = tmp_path_factory.mktemp("job")
    tokenizer = tiny_tokenizer([f"a b c {CANARY}"], 300)
    shape = TinyConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, vocab_size=300, max_length=32)
    save_model(root / "target", tiny_model(shape, tokenizer, seed=1), tokenizer)
    for split in ("forget", "retain"):
        write_part(root / split / "part-00000.arrow", ((row.ids, row.num_prompt) for row in ROWS[split]))
        finish_store(root / split)
    np.save(root / "reference.npy", np.array([row.reference_logp for row in ROWS["forget"]]))
    return root


def job_in(folder: Path, run_dir: Path, **train: Any) -> TrainJob:
    return TrainJob(
        model=str(folder / "target"),
        export=str(run_dir / "model"),
        run_dir=str(run_dir),
        method=NPO(),
        optimizer=SophiaConfig(learning_rate=1e-2, hessian_every=2),
        train=TrainConfig(**{"epochs": 3, "batch_size": 3, "micro_batch_size": 2, "bucket_window": 1, **train}),
        engine=EngineConfig(),
        stores={split: (str(folder / split),) for split in ("forget", "retain")},
        reference=str(folder / "reference.npy"),
        probes={split: str(folder / split) for split in ("forget", "retain")},
    )


def run(job: TrainJob, *, resume_from: Path | None = None, stop_at: int | None = None) -> tuple[JobResult | None, list[int]]:
    """The job's result and the steps it left checkpoints of, in RUN_DIR/STEP; None if it was interrupted behind step `stop_at`."""
    saved: list[int] = []

    def save(engine: Engine, progress: Progress) -> None:
        saved.append(progress.step)
        engine.save(Path(job.run_dir) / str(progress.step), progress.to_json())

    def on_step(row: dict[str, Any], total: int) -> None:
        if row["step"] == stop_at:
            raise KeyboardInterrupt

    try:
        return run_job(job, SingleEngine(job.engine.decided("cpu")), resume_from=resume_from, save_checkpoint=save, on_step=on_step), saved
    except KeyboardInterrupt:
        return None, saved


def metrics(job: TrainJob) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(job.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_model(job.export).state_dict()
    return state


def test_an_interrupted_job_ends_like_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    straight, broken = job_in(folder, tmp_path / "straight"), job_in(folder, tmp_path / "broken")
    expected, saved = run(straight)
    assert expected is not None and saved == [3, 6, 9]
    assert run(broken, stop_at=5) == (None, [3])
    assert [row["step"] for row in metrics(broken)] == [1, 2, 3, 4, 5]
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "terms": {"forget": 1.0}')  # what a power cut may leave
    found, saved = run(broken, resume_from=tmp_path / "broken" / "3")
    assert found is not None and saved == [6, 9]
    assert metrics(broken) == metrics(straight)
    assert [row["step"] for row in metrics(broken)] == list(range(1, 10))
    for name, value in weights(broken).items():
        assert torch.equal(value, weights(straight)[name]), name
    assert (found.steps, found.tokens, found.epochs) == (expected.steps, expected.tokens, expected.epochs)


def test_a_finished_job_only_exports_again(folder: Path, tmp_path: Path) -> None:
    job = job_in(folder, tmp_path, max_steps=2)
    expected, _ = run(job)
    before, rows = weights(job), metrics(job)
    found, saved = run(job, resume_from=tmp_path / "2")
    assert found is not None and expected is not None and saved == []
    assert dataclasses.replace(found, peak_memory_bytes=0) == dataclasses.replace(expected, peak_memory_bytes=0)
    assert metrics(job) == rows and all(torch.equal(value, before[name]) for name, value in weights(job).items())


@pytest.mark.parametrize(
    ("settings", "evaluated", "saved"),
    [
        ({}, [0, 1, 2, 3], [3, 6, 9]),
        ({"eval_every": 2, "save_every": 2}, [0, 2, 3], [6, 9]),
        ({"eval_every": 0, "save_every": 0}, [], [9]),
        ({"max_steps": 4}, [0, 1, 2], [3, 4]),
    ],
)
def test_evaluations_and_checkpoints_come_when_they_are_due(
    settings: dict[str, int], evaluated: list[int], saved: list[int], folder: Path, tmp_path: Path
) -> None:
    result, found = run(job_in(folder, tmp_path, **settings))
    assert result is not None and found == saved
    assert [row["epoch"] for row in result.epochs] == evaluated
    total = settings.get("max_steps", 3 * STEPS_PER_EPOCH)
    assert [row["step"] for row in result.epochs] == [min(epoch * STEPS_PER_EPOCH, total) for epoch in evaluated]
    for row in result.epochs:
        assert row.keys() == {"epoch", "step", "forget", "retain"}


def test_a_new_job_does_not_continue_old_metrics(folder: Path, tmp_path: Path) -> None:
    job = job_in(folder, tmp_path, max_steps=3)
    run(job)
    run(job)
    assert [row["step"] for row in metrics(job)] == [1, 2, 3]


def test_no_token_of_a_row_is_left_in_the_run_directory(folder: Path, tmp_path: Path) -> None:
    job = job_in(folder, tmp_path, max_steps=2)
    run(job)
    assert CANARY not in (tmp_path / "metrics.jsonl").read_text()
    assert CANARY not in repr(job)


def test_several_stores_are_one_split(folder: Path, tmp_path: Path) -> None:
    job = dataclasses.replace(
        job_in(folder, tmp_path, epochs=1),
        method=Finetune(),
        stores={"retain": (str(folder / "forget"), str(folder / "retain"))},
        reference=None,
        probes={},
    )
    result, _ = run(job)
    assert result is not None
    assert result.steps == -(-(len(ROWS["forget"]) + len(ROWS["retain"])) // 3)
    assert result.tokens == sum(row.num_supervised for split in ("forget", "retain") for row in ROWS[split])
    assert result.epochs == []


@pytest.mark.parametrize(("asked", "stored"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_export_has_the_type_of_the_start_or_the_one_asked_for(
    asked: str | None, stored: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    job = dataclasses.replace(job_in(folder, tmp_path, max_steps=1), export_dtype=asked)
    run(job)
    assert load_model(job.export, dtype="auto").dtype == stored  # type: ignore[arg-type]
    again = dataclasses.replace(job_in(folder, tmp_path / "again", max_steps=1), model=job.export)
    run(again)
    assert load_model(again.export, dtype="auto").dtype == stored  # type: ignore[arg-type]


def test_a_result_counts_what_the_job_cost(folder: Path, tmp_path: Path) -> None:
    job = job_in(folder, tmp_path, max_steps=2)
    result, _ = run(job)
    assert result is not None
    assert result.optimizer_state_bytes_per_rank == 2 * 4 * sum(value.numel() for value in load_model(job.model).parameters())
    assert result.train_s > 0 and result.peak_memory_bytes > 50 * 2**20
    assert result.tokens == metrics(job)[-1]["tokens"]


def test_the_step_log_drops_what_will_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    _StepLog(path, keep=0)
    assert path.read_text() == ""
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "terms": {"a": 1}\n{"st')
    log = _StepLog(path, keep=1)
    log.write({"step": 2, "loss": float("1.5")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2, "loss": 1.5}]
