"""Moved weights are counted against the start, resumed or not; weights kept in bf16 lose the steps that fp32 keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from soul.config import Config
from soul.train.engine import EngineConfig
from soul.train.moved import SAMPLED, MovedWeights
from tests.distributed import spawn
from tests.train.engine_runs import new_engine, straight_run

VARIANTS: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": {}, "deepspeed": {}}


def test_moved_weights_are_counted() -> None:
    engine = new_engine("single", "adamw", dtype=torch.float32)
    moved = MovedWeights(engine)
    assert moved.stride == 1 and moved.measure() == {"moved_fraction": 0.0, "moved_fraction_bf16": 0.0}
    with torch.no_grad():
        weights = dict(engine.model.named_parameters())["model.norm.weight"]  # ones
        weights[:10] += 1e-5  # less than bf16 can tell apart
        weights[10:15] += 0.5
    total = sum(parameter.numel() for parameter in engine.model.parameters())
    assert moved.measure() == {"moved_fraction": pytest.approx(15 / total), "moved_fraction_bf16": pytest.approx(5 / total)}


def test_large_models_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soul.train.moved.SAMPLED", 1000)
    engine = new_engine("single", "adamw", dtype=torch.float32)
    moved = MovedWeights(engine)
    pieces = len(engine.local_weights())
    assert SAMPLED > 1000 and 900 < len(moved.start) < 1000 + pieces
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter[: parameter.shape[0] // 2] += 1.0
    assert moved.measure()["moved_fraction"] == pytest.approx(0.5, abs=0.05)


def two_ranks(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in VARIANTS:
        engine = new_engine(name, "adamw", rank=rank, world=world, dtype=torch.float32)
        moved = MovedWeights(engine)
        straight_run(engine, "adamw")
        results[name] = moved.measure()
    for name in ("adamw", "sophia"):
        for offload in (None, "all"):
            engine = new_engine("fsdp", name, rank=rank, world=world, offload=offload)
            results[name, offload] = straight_run(engine, name)
    engine = new_engine("fsdp", "smooth sophia", rank=rank, world=world, dtype=torch.float32, precision="pure_bf16")
    results["pure"] = straight_run(engine, "smooth sophia")
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return spawn(two_ranks, 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_engine_counts_alike(name: str, ranks: list[dict[Any, Any]]) -> None:
    engine = new_engine("single", "adamw", dtype=torch.float32)
    moved = MovedWeights(engine)
    straight_run(engine, "adamw")
    expected = moved.measure()
    assert 0.5 < expected["moved_fraction_bf16"] < expected["moved_fraction"]
    for results in ranks:
        assert results[name] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", ["adamw", "sophia"])
def test_fsdp_in_cpu_memory_changes_nothing(name: str, ranks: list[dict[Any, Any]]) -> None:
    kept, moved = ranks[0][name, None], ranks[0][name, "all"]
    assert kept["losses"] == moved["losses"] and kept["norms"] == moved["norms"]
    assert all(torch.equal(value, moved["state"][key]) for key, value in kept["state"].items())


def test_pure_bf16_keeps_weights_in_bf16_and_our_state_in_fp32(ranks: list[dict[Any, Any]]) -> None:
    single = straight_run(new_engine("single", "smooth sophia", dtype=torch.float32, precision="pure_bf16"), "smooth sophia")
    for run in (single, ranks[0]["pure"]):
        kinds = {key.partition("/")[0]: value.dtype for key, value in run["state"].items()}
        assert kinds == {"param": torch.bfloat16, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    assert single["losses"] == pytest.approx(ranks[0]["pure"]["losses"], rel=0.1)


def test_bf16_weights_lose_the_steps_of_a_small_learning_rate(tmp_path: Path) -> None:
    shares = {}
    for precision in ("bf16", "pure_bf16"):
        engine = new_engine("single", "signum", dtype=torch.float32, precision=precision)
        moved = MovedWeights(engine)
        for group in engine.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-5, 0.0
        for parameter in engine.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        engine.step()
        shares[precision] = moved.measure()["moved_fraction"]
    assert shares["bf16"] > 0.98 and shares["pure_bf16"] < 0.1


def test_pure_bf16_is_warned_about_and_refused_where_it_means_nothing() -> None:
    config = Config.model_validate({"engine": {"precision": "pure_bf16"}, "optimizer": {"name": "sophia", "learning_rate": 5e-6}})
    [warning] = [text for text in config.warnings() if "pure_bf16" in text]
    assert "steps of 5e-06 leave most weights where they are" in warning
    assert config.engine.preparing_precision == "bf16"
    with pytest.raises(ValueError, match="deepspeed keeps fp32 weights, got precision pure_bf16"):
        EngineConfig(name="deepspeed", precision="pure_bf16")
