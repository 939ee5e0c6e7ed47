"""Room for checkpoints is looked at where they are written, by the rank that answers for that disk."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.objectives.methods import NPO
from soul.optim.configs import SophiaConfig
from soul.orchestration.staging import NoRoom, Staging
from soul.store import COPIES_VARIABLE
from soul.train.config import TrainConfig
from soul.train.engine import EngineConfig, num_threads
from soul.train.job import TrainJob
from soul.train.single import SingleEngine

SHAPE = TinyConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, vocab_size=300, max_length=32)


@pytest.fixture(scope="module")
def engine() -> SingleEngine:
    optimizer = SophiaConfig()
    made = SingleEngine(EngineConfig().decided("cpu"))
    made.prepare(lambda: tiny_model(SHAPE, tiny_tokenizer(["a b c"], 300), seed=1), lambda model: optimizer.build(model.named_parameters()))
    return made


def job(run_dir: str, **train: Any) -> TrainJob:
    made = TrainConfig(**train)
    return TrainJob(
        "start", f"{run_dir}/model", run_dir, NPO(), SophiaConfig(), made, EngineConfig().decided("cpu"), {}, export_dtype="bfloat16"
    )


@pytest.mark.parametrize(
    ("run_dir", "train", "rank", "local_rank", "ranks", "checkpoints", "models"),
    [
        ("disk", {}, 0, 0, (1, 1), 3, 1),
        ("disk", {"keep_checkpoints": 1}, 0, 0, (2, 4), 2, 1),  # all ranks write to one disk, and the first one looks
        ("disk", {"save_minutes": 0}, 0, 0, (1, 1), 0, 1),
        ("disk", {}, 1, 1, (2, 4), 0, 0),
        ("s3://bucket/run", {}, 0, 0, (2, 4), 0.5, 1),  # on a store every node stages what its ranks write
        ("s3://bucket/run", {}, 2, 0, (2, 4), 0.5, 0),
        ("s3://bucket/run", {}, 1, 1, (2, 4), 0, 0),
    ],
)
def test_a_small_disk_is_told_by_the_node_that_has_it(
    run_dir: str,
    train: dict[str, Any],
    rank: int,
    local_rank: int,
    ranks: tuple[int, int],
    checkpoints: float,
    models: int,
    engine: SingleEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "copies"))
    place = run_dir if "://" in run_dir else str(tmp_path / run_dir)
    monkeypatch.setattr(engine, "rank", rank)
    monkeypatch.setattr(engine, "world", ranks[1])
    size = sum(parameter.numel() for parameter in engine.model.parameters())
    needed = int(checkpoints * 12 * size + models * 2 * size)
    usage, free = namedtuple("usage", "total used free"), [needed]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free[0]))
    staging = Staging(place, local_rank, ranks[0])
    staging.is_loaded(engine, job(place, **train))
    free[0] = needed - 1
    if not needed:
        staging.is_loaded(engine, job(place, **train))
        return
    with pytest.raises(NoRoom, match=r"^node [\d.]+: /.*/(disk|run) needs about .* for checkpoints and model, its disk has .* free\. .*$"):
        staging.is_loaded(engine, job(place, **train))


@pytest.mark.parametrize(
    ("offload", "device", "local_ranks", "threads"),
    [("all", "cuda", 4, 16), ("all", "cuda", 1, 64), ("all", "cuda", 100, 1), (None, "cuda", 4, 3), ("all", "cpu", 4, 3)],
)
def test_ranks_that_step_in_cpu_memory_share_the_cores(
    offload: Any, device: str, local_ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    found = num_threads(EngineConfig(name="fsdp", offload=offload), torch.device(device), local_ranks=local_ranks, otherwise=3)
    assert found == threads
