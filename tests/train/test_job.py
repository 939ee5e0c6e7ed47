"""A whole job on one rank: metrics.jsonl without repeated steps, checkpoints and cheap evaluations when they are due, the export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import soul.train.export
from soul.data.store import finish_store, write_part
from soul.models.load import load_model, save_model
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.objectives.methods import NPO, Finetune
from soul.optim.configs import SophiaConfig
from soul.train.config import Clock, TrainConfig
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


def run(job: TrainJob, *, resume_from: Path | None = None, stop_at: int | None = None, **hooks: Any) -> tuple[JobResult | None, list[int]]:
    """The job's result and the steps it left checkpoints of, in RUN_DIR/STEP; None if it was interrupted behind step `stop_at`, or its
    model could not be written."""
    saved: list[int] = []

    def save(engine: Engine, progress: Progress) -> None:
        saved.append(progress.step)
        engine.save(Path(job.run_dir) / str(progress.step), progress.to_json())

    def on_step(row: dict[str, Any], total: int) -> None:
        if row["step"] == stop_at:
            raise KeyboardInterrupt

    try:
        return run_job(
            job, SingleEngine(job.engine.decided("cpu")), resume_from=resume_from, save_checkpoint=save, on_step=on_step, **hooks
        ), saved
    except (KeyboardInterrupt, OSError):
        return None, saved


def metrics(job: TrainJob) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(job.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_model(job.export).state_dict()
    return state


@pytest.fixture(scope="module")
def straight(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, JobResult]:
    """A job without a checkpoint: it takes less than fifteen minutes."""
    job = job_in(folder, tmp_path_factory.mktemp("straight"))
    result, saved = run(job)
    assert result is not None and saved == []
    return job, result


def assert_same(job: TrainJob, result: JobResult | None, straight: tuple[TrainJob, JobResult]) -> None:
    """Weights and metrics bit for bit, and what is reported of them."""
    other, expected = straight
    assert result is not None
    assert (result.steps, result.tokens, result.epochs) == (expected.steps, expected.tokens, expected.epochs)
    assert metrics(job) == metrics(other) and [row["step"] for row in metrics(job)] == list(range(1, 10))
    for name, value in weights(job).items():
        assert torch.equal(value, weights(other)[name]), name


@pytest.mark.parametrize(
    ("cadence", "saved"),
    [
        ({"save_steps": 1}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"save_every": 1}, [3, 6]),
        ({"save_minutes": 1e-9}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"save_steps": 4, "save_every": 2, "save_minutes": None}, [4, 6, 8]),
        ({"save_minutes": 0}, []),
    ],
)
def test_a_run_is_the_same_however_often_it_is_saved(
    cadence: dict[str, Any], saved: list[int], straight: tuple[TrainJob, JobResult], folder: Path, tmp_path: Path
) -> None:
    job = job_in(folder, tmp_path, **cadence)
    result, found = run(job)
    assert found == saved  # none behind the last step
    assert_same(job, result, straight)


@pytest.mark.parametrize(("cadence", "last"), [({"save_every": 1}, 3), ({"save_steps": 2}, 4), ({"save_minutes": 1e-9}, 4)])
def test_an_interrupted_job_ends_like_an_uninterrupted_one(
    cadence: dict[str, Any], last: int, straight: tuple[TrainJob, JobResult], folder: Path, tmp_path: Path
) -> None:
    broken = job_in(folder, tmp_path, **cadence)
    result, saved = run(broken, stop_at=5)
    assert result is None and saved[-1] == last
    assert [row["step"] for row in metrics(broken)] == [1, 2, 3, 4, 5]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "terms": {"forget": 1.0}')  # what a power cut may leave
    heard: list[dict[str, Any]] = []
    result, saved = run(broken, resume_from=tmp_path / str(last), on_epoch=heard.append)
    assert saved[0] > last
    assert_same(broken, result, straight)
    assert heard == straight[1].epochs  # whoever listens now has not heard the first ones


@pytest.mark.parametrize("lost", ["export", "publish"])
def test_a_model_that_cannot_be_written_is_left_as_a_checkpoint(
    lost: str, straight: tuple[TrainJob, JobResult], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(folder, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    failing: dict[str, Any] = {"publish": full} if lost == "publish" else {}
    with monkeypatch.context() as patch:
        if lost == "export":
            patch.setattr(soul.train.export, "save_model", full)
        assert run(job, **failing) == (None, [9])
        assert run(job, resume_from=tmp_path / "9", **failing) == (None, [])  # it is there
    result, saved = run(job, resume_from=tmp_path / "9")
    assert saved == []
    assert_same(job, result, straight)
    assert result is not None and dataclasses.replace(result, peak_memory_bytes=0, train_s=0.0) == dataclasses.replace(
        straight[1], peak_memory_bytes=0, train_s=0.0
    )


class Second(SingleEngine):
    """The second of two ranks: what the first one's clock says comes with the sums."""

    first_is_late = False

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.rank = 1

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        votes = len(NPO().terms()) * 2 + 2  # counts of each term and its tokens, and two votes
        return tensor if len(tensor) != votes else tensor + torch.tensor([*[0.0] * (votes - 2), float(self.first_is_late), 0.0])


@pytest.mark.parametrize("late", [True, False])
def test_only_the_first_ranks_clock_counts(late: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Second, "first_is_late", late)
    job, saved = job_in(folder, tmp_path, max_steps=3, eval_every=0, save_minutes=None if late else 1e-9), []
    run_job(job, Second(job.engine.decided("cpu")), resume_from=None, save_checkpoint=lambda engine, progress: saved.append(progress.step))
    assert saved == ([1, 2] if late else [])


def test_the_clock_counts_minutes_since_the_last_checkpoint() -> None:
    now = [0.0]
    clock, off = Clock(15, now=lambda: now[0]), Clock(None, now=lambda: now[0])
    found = []
    for now[0] in (0.0, 899.9, 900.0, 1000.0):
        found.append(clock.is_late())
    clock.restart()
    for now[0] in (1899.0, 1900.0):
        found.append(clock.is_late())
    assert found == [False, False, True, True, False, True] and not off.is_late()


@pytest.mark.parametrize(
    ("settings", "evaluated"), [({}, [0, 1, 2, 3]), ({"eval_every": 2}, [0, 2, 3]), ({"eval_every": 0}, []), ({"max_steps": 4}, [0, 1, 2])]
)
def test_evaluations_come_when_they_are_due(settings: dict[str, int], evaluated: list[int], folder: Path, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    result, _ = run(job_in(folder, tmp_path, **settings), on_epoch=heard.append)
    assert result is not None and heard == result.epochs
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
