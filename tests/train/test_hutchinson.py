"""Hutchinson's curvature: the exact product, the exact diagonal in expectation, and nothing of how the rows were cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from soul.config import Config
from soul.objectives.methods import GradDiff
from soul.optim.configs import SophiaHConfig
from soul.optim.curvature import probe_signs
from soul.records import InputError
from soul.train.curvature import hessian_product
from tests.train.loop_runs import ROWS, TRAIN, Run, feed_of, go, new_run

METHOD = GradDiff(retain_weight=0.7)
SOPHIA_H = SophiaHConfig(learning_rate=1e-3, rho=2.0, hessian_every=3, hessian_data="both")


def curvature(run: Run) -> dict[str, Tensor]:
    return {name: run.engine.optimizer.state[p]["exp_avg_sq"].clone() for name, p in run.engine.model.named_parameters()}


def test_the_mean_over_all_probes_is_the_hessian_diagonal() -> None:
    """All 2^9 probes of a small net: E[u * (H u)] has no error but rounding."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    parameters = dict(net.named_parameters())
    inputs, targets = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)

    def loss_of(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in parameters.values()])
        values = {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
        return (torch.func.functional_call(net, values, (inputs,)) - targets).square().mean()

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    expected = torch.autograd.functional.hessian(loss_of, flat).diagonal()  # type: ignore[no-untyped-call]
    total, probes = torch.zeros_like(flat), list(itertools.product((-1.0, 1.0), repeat=flat.numel()))
    for probe in probes:
        signs = torch.tensor(probe, dtype=torch.float64)
        pieces = signs.split([p.numel() for p in parameters.values()])
        vector = {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
        product = hessian_product((net(inputs) - targets).square().mean(), parameters, vector)
        total += signs * torch.cat([product[name].flatten() for name in parameters])
    assert (expected < 0).any(), "an indefinite Hessian, or the test would not see a lost sign"
    torch.testing.assert_close(total / len(probes), expected, rtol=1e-12, atol=1e-14)


def naive_loss(model: nn.Module, method: GradDiff) -> Tensor:
    """Mean NLL of the first step's forget rows, plus the retain weight times that of its retain rows, row by row."""
    total = torch.zeros((), dtype=torch.float64)
    for split, indices in feed_of(method).plan.step(0).items():
        rows = [ROWS[split][i] for i in indices]
        for row in rows:
            logits = model(input_ids=torch.tensor([list(row.ids)])).logits[0, row.num_prompt - 1 : -1]
            nll = nn.functional.cross_entropy(logits, torch.tensor(list(row.ids[row.num_prompt :])), reduction="sum")
            total = total + (0.7 if split == "retain" else 1.0) * nll / mean_tokens(split)
    return total


def mean_tokens(split: str) -> float:
    """Answer tokens of a full step's rows, on average over the rows of the split."""
    return TRAIN.batch_size * sum(row.num_supervised for row in ROWS[split]) / len(ROWS[split])


def test_curvature_is_the_probe_times_the_derivative_of_the_gradient_along_it() -> None:
    """Against central differences of the gradient of a loss written row by row; the forget rows count as likelihood, not as ascent."""
    run = new_run(SOPHIA_H, dtype=torch.float64)
    model = run.engine.model
    parameters = dict(model.named_parameters())
    probes = {name: probe_signs(name, tuple(p.shape), seed=TRAIN.seed, update=0).double() for name, p in parameters.items()}
    step, sides = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in parameters.items():
                p.add_(probes[name], alpha=sign * step)
        sides.append(torch.autograd.grad(naive_loss(model, METHOD), list(parameters.values())))
        with torch.no_grad():
            for name, p in parameters.items():
                p.sub_(probes[name], alpha=sign * step)
    expected = {name: probes[name] * (above - below) / (2 * step) for name, above, below in zip(parameters, *sides, strict=True)}
    go(run, METHOD, SOPHIA_H, stop=1)
    for name, h in curvature(run).items():
        torch.testing.assert_close(h / (1 - SOPHIA_H.betas[1]), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2])
def test_the_cut_into_micro_batches_changes_nothing(size: int) -> None:
    """Micro-batches of one and two rows against the step at once."""
    whole = go(new_run(SOPHIA_H, dtype=torch.float64), METHOD, SOPHIA_H, TRAIN.model_copy(update={"micro_batch_size": 3}))
    cut = go(new_run(SOPHIA_H, dtype=torch.float64), METHOD, SOPHIA_H, TRAIN.model_copy(update={"micro_batch_size": size}))
    for name, h in curvature(cut).items():
        torch.testing.assert_close(h, curvature(whole)[name], rtol=1e-9, atol=1e-13)
    assert [row["loss"] for row in cut.rows] == pytest.approx([row["loss"] for row in whole.rows], rel=1e-9)


def test_recomputed_activations_change_nothing() -> None:
    plain, recomputed = (new_run(SOPHIA_H, dtype=torch.float64) for _ in range(2))
    recomputed.engine.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    recomputed.engine.model.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in recomputed.engine.model.modules())
    for run in (plain, recomputed):
        go(run, METHOD, SOPHIA_H, stop=1)
    for name, h in curvature(recomputed).items():
        torch.testing.assert_close(h, curvature(plain)[name], rtol=1e-12, atol=1e-14)


def test_telemetry_tells_what_share_of_the_curvature_is_negative() -> None:
    run = go(new_run(SOPHIA_H), METHOD, SOPHIA_H)
    assert run.progress.hessian_updates == 2
    row = run.rows[3]  # the second update's
    h = torch.cat([value.flatten() for value in curvature(run).values()])
    assert row["hessian_negative_fraction"] == pytest.approx(float((h < 0).double().mean()))
    assert 0.05 < row["hessian_negative_fraction"] < 0.95 and 0 < row["unclipped_fraction"] < 1 and row["rho"] == 2.0
    assert row["hessian_mean"] == pytest.approx(float(h.mean() / (1 - SOPHIA_H.betas[1] ** 2)), rel=1e-5)


def test_negative_curvature_gives_a_sign_step() -> None:
    layer = nn.Linear(3, 1, bias=False)
    optimizer = SophiaHConfig(learning_rate=0.1, weight_decay=0.0, rho=1.0).build(layer.named_parameters())
    start = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[-5.0, 20.0, 0.0]])
    optimizer.update_hessian()
    optimizer.set_hessian_updates(1)
    layer.weight.grad = torch.tensor([[2.0, 2.0, 2.0]])
    optimizer.step()
    torch.testing.assert_close(start - layer.weight.detach(), torch.tensor([[0.1, 0.1 * 0.2 / 20.0, 0.1]]))


def test_probes_depend_on_seed_update_and_name_alone() -> None:
    probe = probe_signs("a.weight", (13, 37), seed=3, update=2)
    assert torch.equal(probe, probe_signs("a.weight", (13, 37), seed=3, update=2)) and set(probe.unique().tolist()) == {-1.0, 1.0}
    others = [probe_signs(*other[:2], seed=other[2], update=other[3]) for other in
              (("b.weight", (13, 37), 3, 2), ("a.weight", (13, 37), 4, 2), ("a.weight", (13, 37), 3, 1))]  # fmt: skip
    for other in others:
        assert abs(float((probe * other).mean())) < 0.2
    large = probe_signs("large", (2**20,), seed=0, update=0)
    assert abs(float(large.mean())) < 5e-3 and abs(float((large[1:] * large[:-1]).mean())) < 5e-3
    assert torch.equal(probe_signs("large", (70,), seed=0, update=0), large[:70])
    assert probe_signs("empty", (0, 4), seed=0, update=0).shape == (0, 4)


class OnlyOnce(torch.autograd.Function):
    """As many fused kernels are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return 3 * x**2 * grad


def test_a_model_without_second_derivatives_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    loss = OnlyOnce.apply(weight).square().sum()  # type: ignore[no-untyped-call]
    with pytest.raises(InputError, match=r"second derivatives.*--optimizer sophia"):
        hessian_product(loss, {"weight": weight}, {"weight": torch.ones(2)})


def test_what_a_loss_does_not_bend_or_touch_has_no_product() -> None:
    used, linear, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    parameters = {"used": used, "linear": linear, "unused": unused}
    product = hessian_product((used**2).sum() + linear.sum(), parameters, {name: torch.ones(2) for name in parameters})
    assert product["used"].tolist() == [2.0, 2.0] and "unused" not in product
    assert hessian_product(linear.sum(), {"linear": linear}, {"linear": torch.ones(2)}) == {}


@pytest.mark.parametrize("values", [{"optimizer": "sophia_h"}, {"optimizer": "adamw", "twin": "sophia_h"}])
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_sharded_engines_refuse_it_before_anything_starts(engine: str, values: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=rf"sophia_h .*which {engine} reduces.*engine single or ddp.*or optimizer sophia"):
        Config.model_validate({"engine": {"name": engine, "num_workers": 2}, **values})
    for fine in ({"name": "single"}, {"name": "ddp", "num_workers": 2}):
        Config.model_validate({"engine": fine, **values})


@pytest.mark.parametrize(
    "values", [{"optimizer": {"name": "sophia_h", "hessian_data": "retain"}}, {"optimizer": {"hessian_data": "retain"}}]
)
def test_retain_curvature_without_a_retain_loss_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"hessian_data retain needs .* got ga without"):
        Config.model_validate({"method": "ga", **values})
    Config.model_validate({"method": "npo", **values})
