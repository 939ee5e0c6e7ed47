"""What is reported of the optimizer's steps, against the weights' own movement and the state."""

from __future__ import annotations

import math

import pytest
import torch

import soul.train.telemetry
from perf._measure import peak_bytes
from soul.objectives.methods import GradDiff
from soul.optim.configs import AdamWConfig, OptimizerConfig, SignumConfig, SophiaConfig, SoulReleaseConfig
from soul.train.steering import Steering
from soul.train.telemetry import Telemetry, adamw_update_squared_norm
from tests.train.loop_runs import ADAMW, NUM_STEPS, TRAIN, Run, go, new_run

EVERY_STEP = TRAIN.model_copy(update={"telemetry_every": 1})
OPTIMIZERS: list[OptimizerConfig] = [
    AdamWConfig(learning_rate=1e-3, weight_decay=0.0),
    SophiaConfig(learning_rate=1e-3, weight_decay=0.0, rho=2.0, hessian_every=2),
    SoulReleaseConfig(learning_rate=1e-3, weight_decay=0.0),
    SignumConfig(learning_rate=1e-3, weight_decay=0.0),
]


def weights(run: Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.engine.model.parameters()]).clone()


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.name)
def test_the_update_is_as_long_as_the_way_the_weights_went(optimizer: OptimizerConfig) -> None:
    run = new_run(optimizer, dtype=torch.float64)
    for step in range(NUM_STEPS):
        before = weights(run)
        go(run, GradDiff(), optimizer, EVERY_STEP, stop=step + 1)
        moved = (weights(run) - before).abs()
        row = run.rows[-1]
        assert row["update_norm"] == pytest.approx(float(moved.norm()), rel=1e-6)
        if optimizer.name == "adamw":
            assert row["unclipped_fraction"] is None and row["rho"] is None
            continue
        unclipped = (moved > 0) & (moved < row["learning_rate"] * (1 - 1e-9))
        assert row["unclipped_fraction"] == pytest.approx(float(unclipped.sum() / (moved > 0).sum()), abs=1e-3)
        assert row["rho"] == getattr(optimizer, "rho", None)


def test_curvature_is_summed_up_over_all_coordinates() -> None:
    optimizer = SophiaConfig(learning_rate=1e-3, rho=2.0, hessian_every=2, hessian_data="retain")
    run = new_run(optimizer, dtype=torch.float64)
    with torch.no_grad():  # a dead block: no gradient reaches what leads into it
        run.engine.model.model.layers[0].mlp.down_proj.weight.zero_()  # type: ignore[union-attr, index]
    go(run, GradDiff(), optimizer, EVERY_STEP, stop=1)
    h = torch.cat([state["exp_avg_sq"].flatten() for state in run.engine.optimizer.state.values()]) / (1 - optimizer.betas[1])
    assert 0.05 < float((h == 0).double().mean()) < 0.9
    assert run.rows[0]["hessian_mean"] == pytest.approx(float(h.mean()), rel=1e-9)
    assert run.rows[0]["hessian_zero_fraction"] == pytest.approx(float((h == 0).double().mean()), rel=1e-9)


def test_measurements_are_due_early_and_then_at_their_interval() -> None:
    telemetry = Telemetry(new_run(ADAMW).engine, every=10)
    assert [step for step in range(41) if telemetry.due(step)] == [0, 1, 2, 4, 8, 10, 20, 30, 40]
    run = go(new_run(ADAMW), GradDiff(), ADAMW)
    assert ["update_norm" in row for row in run.rows] == [True, True, True, True, False]  # steps 0, 1, 2 and 3 of 5, every third


def test_rho_is_steered_towards_its_target_and_continues_from_a_checkpoint() -> None:
    optimizer = SophiaConfig(learning_rate=1e-4, hessian_every=1, target_unclipped=0.85)
    run = go(new_run(optimizer), GradDiff(), optimizer, EVERY_STEP)
    fractions = [row["unclipped_fraction"] for row in run.rows]
    assert fractions[0] == pytest.approx(0.85, abs=0.005), "solved for the gradient of the first step itself"
    assert all(abs(fraction - 0.85) < 0.15 for fraction in fractions)
    assert run.progress.rho == {"rho": run.engine.optimizer.param_groups[0]["rho"], "is_measured": True}
    engine = new_run(optimizer).engine
    Steering(engine, optimizer, run.progress.rho)
    assert [group["rho"] for group in engine.optimizer.param_groups] == [run.progress.rho["rho"]] * len(engine.optimizer.param_groups)
    assert all(math.isfinite(row["rho"]) for row in run.rows)


def test_measuring_adamw_needs_room_for_a_few_chunks_however_long_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 has up to a billion weights in one flat tensor: half a dozen copies of that would not fit beside it."""
    p = torch.nn.Parameter(torch.randn(2**18 + 5, generator=torch.Generator().manual_seed(0)))
    optimizer = AdamWConfig(learning_rate=1e-3, weight_decay=0.0).build([("p", p)])
    before = p.detach().clone()
    p.grad = p.detach().square() + 0.1
    optimizer.step()
    monkeypatch.setattr(soul.train.telemetry, "CHUNK_NUMEL", 1000)
    assert float(adamw_update_squared_norm(optimizer)) == pytest.approx(float((p.detach() - before).double().square().sum()), rel=1e-3)
    assert peak_bytes(lambda: adamw_update_squared_norm(optimizer), torch.device("cpu")) < 2**18
