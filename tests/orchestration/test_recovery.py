"""What a lost node costs a run, and what a person is told of cards and networks."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("ray")

import ray
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from soul.config import Config
from soul.objectives.methods import NPO
from soul.optim.configs import AdamWConfig
from soul.orchestration import recovery, trial
from soul.orchestration.capacity import card_kinds
from soul.orchestration.pipeline import computes
from soul.orchestration.recovery import (
    PeerLost,
    RankFailed,
    TrainingStopped,
    explained,
    located,
    newest_step,
    poll_workers,
    refuse_small,
    renews,
)
from soul.plan import ModelShape, plan_run
from soul.records import InputError
from soul.train.config import TrainConfig
from soul.train.engine import EngineConfig, Need
from soul.train.job import TrainJob

LOST = WorkerHealthCheckFailedError("rank 1", failure=ActorDiedError())
BROKEN = RuntimeError("Connection closed by peer")
ONE_B = ModelShape(1_235_814_400, 16, 60_821_504, 2048, 8192, 128_256)


def failed(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("failed", {int(name[1:]): failure for name, failure in failures.items()})


def test_a_lost_node_is_not_charged_while_the_run_gets_further() -> None:
    assert renews(failed(r0=BROKEN, r1=LOST), before=10, now=20)
    assert not renews(failed(r0=BROKEN, r1=LOST), before=20, now=20)  # lost again before it had come anywhere
    assert not renews(failed(r0=BROKEN), before=10, now=20)  # nothing was lost: a defect
    engine: Any = SimpleNamespace(rank=1)
    with pytest.raises(PeerLost) as heard, located(engine, ()):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:46778: Connection reset by peer.")
    assert renews(failed(r1=heard.value), before=10, now=20)  # its peer's end has not been told yet
    with pytest.raises(RuntimeError, match="a defect") as own, located(engine, ()):
        raise RuntimeError("a defect")
    assert not isinstance(own.value, RankFailed)
    chosen = recovery.failure_config(EngineConfig(max_failures=5))
    assert (chosen.max_failures, chosen.max_preemption_failures, chosen.relax_collectives_on_preemption) == (5, -1, True)


def test_the_newest_checkpoint_is_found(tmp_path: Path) -> None:
    assert newest_step(str(tmp_path), "x") == 0
    for name in ("step_00000007", "step_00000030", "checkpoint_manager_snapshot.json", "step_x"):
        (tmp_path / "checkpoints" / "x" / name).mkdir(parents=True)
    assert newest_step(str(tmp_path), "x") == 30 and newest_step(str(tmp_path), "y") == 0


def test_only_small_groups_are_asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "POLL_GIVEN", False)
    for workers, found in [(8, "0.2"), (9, None), (1, "0.2")]:
        poll_workers(workers)
        assert os.environ.get(recovery.POLL_VARIABLE) == found
    monkeypatch.setattr(recovery, "POLL_GIVEN", True)
    monkeypatch.setenv(recovery.POLL_VARIABLE, "7")
    poll_workers(64)
    assert os.environ[recovery.POLL_VARIABLE] == "7"


def test_a_cluster_gets_rays_own_watchers() -> None:
    from soul.orchestration import ENVIRONMENT

    assert not [name for name in ENVIRONMENT if "PREEMPTION" in name or "METRICS" in name or "HEALTH" in name]


def needs() -> tuple[Need, ...]:
    config = Config.model_validate({"engine": {"num_workers": 2}}).decided("gpu")
    return plan_run(config, num_forget=40, num_retain=400, shape=ONE_B, max_length=256).needs


def test_a_card_that_is_too_small_is_named_with_the_numbers() -> None:
    cards = [(80 * 2**30, "NVIDIA H100", 0, "a"), (8 * 2**30, "NVIDIA T4", 1, "b")]
    with pytest.raises(
        InputError, match=r"the NVIDIA T4 of rank 1 on b has 8\.0.GiB, a worker needs at least \d+\.\d.GiB: weights .*--lora-rank"
    ):
        refuse_small(cards, needs())
    refuse_small(cards[:1], needs())
    refuse_small([(2**20, "a card", 0, "a")], (Need("activations", 2**40, is_sure=False),))  # an upper bound refuses nobody


def test_out_of_memory_and_lost_peers_end_in_one_line() -> None:
    engine: Any = SimpleNamespace(rank=3)
    with pytest.raises(RankFailed) as full, located(engine, needs()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")
    with pytest.raises(RankFailed) as alone, located(engine, ()):
        raise dist.DistBackendError("NCCL error in: socket closed\nLast error: ...")
    line = str(explained(failed(r0=alone.value, r3=full.value)))
    assert line.startswith("rank 3 on ") and "ran out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in line
    assert "planned were weights" in line and "lower --micro-batch-size" in line and "\n" not in line
    line = str(explained(failed(r0=alone.value, r1=LOST)))
    assert "rank 3 on" in line and "DistBackendError: NCCL error in: socket closed" in line and "\n" not in line
    assert isinstance(explained(failed(r0=OSError(28, "No space left"))), TrainingStopped)
    assert explained(failed(r0=BROKEN)) is None


def test_several_kinds_of_card_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    node: dict[str, Any] = {"Alive": True, "Resources": {"GPU": 4.0, "accelerator_type:A10G": 1.0}}
    other = {"Alive": True, "Resources": {"GPU": 1.0, "accelerator_type:L4": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node, node, other, {**other, "Alive": False}])
    assert card_kinds() == ["A10G", "L4"]
    engine = EngineConfig(name="fsdp", num_workers=5).decided("gpu")
    assert computes(engine, ["A10G", "L4"]).startswith("5 worker(s) on GPUs of several kinds (A10G, L4: the slowest")
    assert computes(engine, ["A10G"]) == "5 worker(s) on GPUs (A10G), in bf16 over fp32 weights"
    assert computes(EngineConfig(precision="fp32").decided("gpu"), []) == "1 worker(s) on GPUs, in fp32 with TF32 products"
    assert computes(EngineConfig().decided("cpu"), []) == "1 worker(s) on CPUs, in fp32"


def test_a_trial_in_its_own_process_tells_of_a_full_card_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(trial, "run_job", full)
    engine = EngineConfig().decided("cpu")
    job = TrainJob(str(tmp_path), str(tmp_path), str(tmp_path), NPO(), AdamWConfig(), TrainConfig(), engine, {})
    with pytest.raises(RankFailed, match=r"rank 0 on .* ran out of GPU memory \(CUDA .* 2\.00 GiB\.\).*--micro-batch-size"):
        trial.fit_here(job, name="x", on_epoch=lambda row: None)
