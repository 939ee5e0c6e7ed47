"""Every row of OPTIMIZERS: what it builds, what it refuses, and when it wants curvature."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from soul.optim.configs import OPTIMIZERS, AdamWConfig, OneShotConfig, OptimizerConfig, SignumConfig, SophiaConfig, SoulReleaseConfig
from soul.optim.sophia import SophiaG

ADAPTER: TypeAdapter[AdamWConfig | SophiaConfig | SoulReleaseConfig | SignumConfig] = TypeAdapter(OptimizerConfig)


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))
    net[3].requires_grad_(False)
    return net


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_decay_and_biases_and_norms_do_not(name: str) -> None:
    net = model()
    optimizer = OPTIMIZERS[name](weight_decay=0.25, learning_rate=3e-4).build(net.named_parameters())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {n: decay.get(id(p)) for n, p in net.named_parameters()} == {
        "0.weight": 0.25,
        "1.weight": 0.25,
        "1.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
        "3.weight": None,
    }
    assert all(group["lr"] == 3e-4 for group in optimizer.param_groups)


def test_the_stacked_biases_of_experts_are_biases() -> None:
    experts = {"experts.up_proj": nn.Parameter(torch.zeros(4, 3, 3)), "experts.up_proj_bias": nn.Parameter(torch.zeros(4, 3))}
    optimizer = SophiaConfig().build(experts.items())
    assert [[p.shape for p in group["params"]] for group in optimizer.param_groups] == [[(4, 3, 3)], [(4, 3)]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_parameters_that_zero_3_has_partitioned_are_judged_by_their_full_shape() -> None:
    matrix = nn.Parameter(torch.zeros(0))
    setattr(matrix, "ds_shape", torch.Size((5, 5)))  # noqa: B010 - not a declared attribute
    assert SignumConfig().build([("weight", matrix)]).param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_as_many_tensors_as_planned(name: str) -> None:
    net = model()
    config = OPTIMIZERS[name]()
    optimizer = config.build(net.named_parameters())
    net[2](net[1](net[0](torch.arange(5)))).square().sum().backward()
    optimizer.step()
    for p in net.parameters():
        if p.requires_grad:
            assert sum(value.shape == p.shape for value in optimizer.state[p].values()) == config.state_tensors


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_quadratic_goes_down(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 1)
    features_BD = torch.randn(64, 8)
    # the release's threshold is far below gradients of size one: there it hardly moves
    config = ADAPTER.validate_python(
        {"name": name, "learning_rate": 1e-2, "weight_decay": 0.0} | ({"rho": 1e-6} if name == "soul_release" else {})
    )
    targets_B1 = features_BD @ torch.randn(8, 1)
    optimizer = config.build(layer.named_parameters())
    losses, num_updates = [], 0
    for step in range(150):
        if config.curvature_due(step):
            assert isinstance(optimizer, SophiaG)
            optimizer.zero_grad()
            outputs_B1 = layer(features_BD)
            (0.5 * (outputs_B1 - outputs_B1.detach() - torch.randn_like(outputs_B1)) ** 2).mean().backward()
            optimizer.update_hessian(scale=64)
            num_updates += 1
            optimizer.set_hessian_updates(num_updates)
        optimizer.zero_grad()
        loss = 0.5 * (layer(features_BD) - targets_B1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_the_union_and_the_names_agree(name: str) -> None:
    config = ADAPTER.validate_python({"name": name})
    assert type(config) is OPTIMIZERS[name]
    assert config.name == name
    assert {*OPTIMIZERS.values(), OneShotConfig} == set(get_args(get_args(OptimizerConfig)[0]))
    assert ADAPTER.validate_json(ADAPTER.dump_json(config)) == config
    assert all(field.description for key, field in OPTIMIZERS[name].model_fields.items() if key != "name"), (
        "descriptions are the help texts"
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [{"learning_rate": 0.0}, {"learning_rate": -1.0}, {"weight_decay": -0.1}, {"unknown": 1}])
def test_bad_settings_are_refused_for_every_optimizer(name: str, bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({"name": name, **bad})


@pytest.mark.parametrize(
    "bad",
    [{"rho": 0.0}, {"rho": "some"}, {"hessian_every": 0}, {"hessian_data": "holdout"}, {"target_unclipped": 1.0}, {"betas": (0.9, 1.0)}],
    ids=str,
)
def test_bad_sophia_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({"name": "sophia", **bad})


def test_settings_of_other_optimizers_do_not_exist() -> None:
    for name in ("adamw", "signum"):
        with pytest.raises(ValidationError, match="rho"):
            ADAPTER.validate_python({"name": name, "rho": 0.1})


def test_curvature_is_due_before_step_zero_and_at_the_interval() -> None:
    assert [step for step in range(9) if SophiaConfig(hessian_every=4).curvature_due(step)] == [0, 4, 8]
    for name, config in OPTIMIZERS.items():
        assert config().second_order == (name in ("sophia", "sophia_h")) == any(config().curvature_due(step) for step in range(20))


def test_families_shown_in_tables() -> None:
    assert {name: config().order for name, config in OPTIMIZERS.items()} == {
        "adamw": "FO",
        "sophia": "SO",
        "sophia_h": "SO",
        "soul_release": "SO",
        "signum": "FO",
    }


def test_rho_auto_has_a_controller_and_a_number_does_not() -> None:
    controller = SophiaConfig(target_unclipped=0.2).rho_controller()
    assert controller is not None and controller.target == 0.2
    fixed = SophiaConfig(rho=0.5)
    assert fixed.rho_controller() is None
    optimizer = fixed.build(model().named_parameters())
    assert all(group["rho"] == 0.5 for group in optimizer.param_groups)
