"""Second order on two ranks is what it is on one: Sophia-H under ddp, the influence step under every engine. One spawn.

The same ranks tell what the memory plan says of them, and what they hold while a model is cut into shards.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import soul.train.fsdp
from soul.config import Config
from soul.models.load import load_model
from soul.models.scoring import answer_logits
from soul.models.stored import stored_model
from soul.objectives.methods import GradDiff, Influence, Method
from soul.optim.configs import OneShotConfig, OptimizerConfig, SophiaHConfig
from soul.plan import memory_per_worker, shape_of
from soul.train.divisors import Divisors, WholePass
from soul.train.engine import BuildModel, Engine, EngineConfig
from soul.train.engines import make_engine
from soul.train.job import state_bytes
from soul.train.loop import Hooks, Progress, train
from tests.distributed import spawn
from tests.train.engine_runs import STEPS_PER_EPOCH, TRAIN, VOCAB, feed_of, full_state, largest_difference, tiny_llama

PARTS = ("param/", "exp_avg/", "exp_avg_sq/")
CASES: dict[str, tuple[Method, OptimizerConfig]] = {
    "sophia_h": (GradDiff(retain_weight=0.7), SophiaHConfig(learning_rate=1e-3, rho=3.0, hessian_every=2, hessian_data="both")),
    "gnb": (Influence(), OneShotConfig(damping=1.0)),
    "fisher": (Influence(), OneShotConfig(curvature="fisher", damping=1.0, hessian_data="retain", step_length=0.01)),
}
RUNS = [("ddp", {}, "sophia_h"), ("ddp", {}, "gnb"), ("ddp", {}, "fisher"), ("fsdp", {}, "gnb"), ("fsdp", {}, "fisher")]
IN_FLOAT32 = [("deepspeed", {"zero_stage": 1}, "gnb"), ("deepspeed", {"zero_stage": 3}, "fisher")]


def run(name: str, case: str, dtype: torch.dtype, *, rank: int = 0, world: int = 1, **settings: Any) -> dict[str, Any]:
    """One pass, in micro-batches of two forget rows over all ranks: losses and final state."""
    method, optimizer = CASES[case]
    config = EngineConfig(name=name, num_workers=world, max_grad_norm=None, **{"device": "cpu", **settings})  # type: ignore[arg-type]
    engine = make_engine(config, rank=rank, world=world, local_rank=rank)
    engine.prepare(
        lambda: tiny_llama(dtype), lambda model: optimizer.build(model.named_parameters(), eager_state=config.name != "deepspeed")
    )
    feed, rows = feed_of(engine), []  # type: ignore[var-annotated]
    train(
        engine,
        method=method,
        optimizer=optimizer,
        config=TRAIN.model_copy(update={"epochs": 1}),
        steps=feed.steps(0, STEPS_PER_EPOCH),
        steps_per_epoch=STEPS_PER_EPOCH,
        progress=Progress(),
        hooks=Hooks(after_step=rows.append),
        divisors=WholePass.of_run(feed.plan, feed.stores, STEPS_PER_EPOCH)
        if isinstance(optimizer, OneShotConfig)
        else Divisors.of(feed.plan, feed.stores),
    )
    return {"losses": [row["loss"] for row in rows], "state": full_state(engine), "bytes": held_bytes(engine)}


def held_bytes(engine: Engine) -> dict[str, int]:
    """What this rank holds of weights, gradients and optimizer state, after a backward pass."""

    def local(tensor: torch.Tensor) -> int:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

    held = {"states": state_bytes(engine), "master": sum(map(local, engine.local_weights()))}
    if engine.config.name == "deepspeed":
        return held
    engine.backward(answer_logits(engine.model, feed_of(engine).step(0)[0]).square().sum(), last=True)
    parameters = list(engine.model.parameters())
    held["weights"] = sum(map(local, parameters))
    held["gradients"] = sum(local(parameter.grad) for parameter in parameters if parameter.grad is not None)
    return held


def peak_while_sharding(rank: int, world: int, build_model: BuildModel) -> int:
    """The most bytes of tensors alive in this process when a unit of the model is about to be cut, beyond those alive before."""

    def alive() -> int:
        tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and not item.is_meta]
        plain = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in plain}.values())

    gc.collect()
    before, peak, cut = alive(), 0, soul.train.fsdp.fully_shard

    def counting(unit: nn.Module, **settings: Any) -> Any:
        nonlocal peak
        peak = max(peak, alive() - before)
        return cut(unit, **settings)

    soul.train.fsdp.fully_shard = counting
    engine = make_engine(EngineConfig(name="fsdp", device="cpu", num_workers=world), rank=rank, world=world, local_rank=rank)
    engine.prepare(build_model, lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    soul.train.fsdp.fully_shard = cut
    return peak


def two_ranks(rank: int, world: int, folder: str) -> dict[Any, Any]:
    results: dict[Any, Any] = {"stored": peak_while_sharding(rank, world, lambda: stored_model(folder) or load_model(folder))}
    results["loaded"] = peak_while_sharding(rank, world, lambda: load_model(folder))
    return results | some_runs(rank, world, torch.float64, RUNS)


def two_ranks_of_zero(rank: int, world: int) -> dict[Any, Any]:
    return some_runs(rank, world, torch.float32, IN_FLOAT32)


def some_runs(rank: int, world: int, dtype: torch.dtype, runs: Any) -> dict[Any, Any]:
    return {(name, case): run(name, case, dtype, rank=rank, world=world, **settings) for name, settings, case in runs}


DEEP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 300}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("deep")
    LlamaForCausalLM(LlamaConfig(**DEEP)).save_pretrained(folder)
    return spawn(two_ranks, 2, str(folder), timeout_s=280)


@pytest.fixture(scope="module")
def ranks_of_zero() -> list[Any]:
    return spawn(two_ranks_of_zero, 2, timeout_s=280)


@pytest.fixture(scope="module")
def pair(ranks: list[Any]) -> Any:
    return ranks[0]


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    return {case: run("single", case, torch.float64) for case in CASES}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, _, case in RUNS])
def test_two_ranks_compute_what_one_does(name: str, case: str, pair: Any, oracle: dict[str, Any]) -> None:
    found, expected = pair[name, case], oracle[case]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    for part in PARTS:
        assert largest_difference(found["state"], expected["state"], part) < 1e-11, part
    assert float(max(value.abs().max() for key, value in expected["state"].items() if key.startswith("exp_avg_sq/"))) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), [(name, case) for name, _, case in IN_FLOAT32])
def test_zero_does_too_up_to_float32(name: str, case: str, ranks_of_zero: Any, oracle: dict[str, Any]) -> None:
    found, expected = ranks_of_zero[0][name, case], oracle[case]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for part in PARTS:
        size = max(float(value.abs().max()) for key, value in expected["state"].items() if key.startswith(part))
        assert largest_difference(found["state"], expected["state"], part) < 1e-4 * size, part


def test_the_influence_step_moved_the_weights(oracle: dict[str, Any]) -> None:
    start = {f"param/{name}": p.detach() for name, p in tiny_llama(torch.float64).named_parameters()}
    for case in ("gnb", "fisher"):
        moved = {key: value for key, value in oracle[case]["state"].items() if key in start}
        assert largest_difference(moved, start) > 1e-4


def planned(engine: dict[str, Any]) -> dict[str, int]:
    config = Config.model_validate({"method": "influence", "engine": {"num_workers": 2, **engine}}).decided("cpu")
    shape = shape_of(tiny_llama(), hidden_size=24, intermediate_size=36, vocab_size=VOCAB)
    return {item.name: item.num_bytes for item in memory_per_worker(config, shape, tokens=1, num_forget=1)}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_memory_plan_is_what_ranks_hold(name: str, ranks: list[Any]) -> None:
    plan = planned({"name": name})
    for results in ranks:  # in float64: twice the bytes
        held = results[name, "gnb"]["bytes"]
        assert held["states"] == pytest.approx(2 * plan["optimizer state (2 x fp32)"], rel=0.02)
        assert held["weights"] == held["master"] == pytest.approx(2 * plan["weights (fp32)"], rel=0.02)
        assert held["gradients"] == pytest.approx(2 * plan["gradients (fp32)"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings", "case"), IN_FLOAT32)
def test_the_memory_plan_is_what_ranks_of_zero_hold(name: str, settings: dict[str, Any], case: str, ranks_of_zero: list[Any]) -> None:
    plan = planned({"name": name, **settings})
    for results in ranks_of_zero:
        held = results[name, case]["bytes"]
        assert held["states"] == pytest.approx(plan["optimizer state (2 x fp32)"], rel=0.02)
        assert held["master"] == pytest.approx(plan["master weights (fp32)"], rel=0.02)


def test_no_rank_holds_the_whole_model_while_it_is_cut(ranks: list[Any]) -> None:
    """A half of the model and one unit, of which there are eight blocks and a root; the way of a model in memory is seen to be worse."""
    whole = 4 * sum(parameter.numel() for parameter in LlamaForCausalLM(LlamaConfig(**DEEP)).parameters())
    for results in ranks:
        assert 0.45 * whole < results["stored"] < 0.7 * whole
    assert ranks[0]["loaded"] > whole
