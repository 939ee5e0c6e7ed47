"""The two rules without a curvature pass: released SOUL against a transcription of its formulas, Signum against the sign of an EMA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from soul.optim.signum import Signum
from soul.optim.soul_release import SoulRelease
from soul.records import InputError

SHAPES = [(5, 7), (13,), (), (0, 4), (64, 33)]


def released_step(p: Tensor, g: Tensor, m: Tensor, h: Tensor, *, lr: float, b1: float, b2: float, rho: float, bs: int, wd: float) -> None:
    """Formulas 1-5 of the release, in its order and with its sign-and-magnitude form of the clip."""
    h.mul_(b2).addcmul_(g, g, value=1 - b2)
    m.mul_(b1).add_(g, alpha=1 - b1)
    p.mul_(1 - lr * wd)
    m.mul_(b1).add_(g, alpha=1 - b1)
    magnitude = (m.abs() / (rho * bs * h + 1e-15)).clamp(max=1)
    p.addcmul_(m.sign(), magnitude, value=-lr)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5, 1e-9])
def test_released_rule_bit_for_bit(foreach: bool, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    plain = [(p.detach().clone(), torch.zeros_like(p.detach()), torch.zeros_like(p.detach())) for p in params]
    optimizer = SoulRelease(params, lr=1e-3, weight_decay=0.1, foreach=foreach)
    for _ in range(20):
        for p, (q, m, h) in zip(params, plain, strict=True):
            p.grad = size * torch.randn(p.shape, generator=generator)
            released_step(q, p.grad, m, h, lr=1e-3, b1=0.9, b2=0.95, rho=0.04, bs=5120, wd=0.1)
        optimizer.step()
    for p, (q, m, h) in zip(params, plain, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg"], m)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], h)


def test_the_floor_is_added_to_the_threshold() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SoulRelease([p], lr=1.0)
    optimizer.state[p]["exp_avg"].fill_(1e-15)
    optimizer.state[p]["exp_avg_sq"].fill_(3e-15 / (0.04 * 5120 * 0.95))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.item() == pytest.approx(-0.81 / 4, rel=1e-12)


def test_folding_twice_is_one_average_with_the_squared_decay() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SoulRelease([p], lr=1e-3)
    for step in range(1, 6):
        p.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].item() == pytest.approx(1 - 0.81**step, rel=1e-12)


def test_at_the_gradient_sizes_of_a_clipped_large_model_it_is_sign_descent() -> None:
    """Gradients of rms 1e-5, the bound that norm clipping puts on a 7B model: more than 99 % of the coordinates are clipped."""
    generator = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.zeros(50_000))
    optimizer = SoulRelease([p], lr=1e-3)
    for _ in range(40):
        optimizer.collect_stats = True
        p.grad = 1e-5 * torch.randn(p.shape, generator=generator)
        optimizer.take_stats()
        optimizer.step()
    assert 0 < optimizer.take_stats().unclipped_fraction < 0.01


def test_signum_moves_by_the_sign_of_the_average() -> None:
    generator = torch.Generator().manual_seed(2)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
    optimizer = Signum(params, lr=0.03, weight_decay=0.2)
    optimizer.collect_stats = True
    history: list[list[Tensor]] = [[] for _ in params]
    for step in range(6):
        expected = []
        for p, grads in zip(params, history, strict=True):
            grads.append(torch.randn(p.shape, generator=generator, dtype=torch.float64))
            p.grad = grads[-1].clone()
            average = sum(0.1 * 0.9 ** (step - i) * grad for i, grad in enumerate(grads))
            expected.append(p.detach() * (1 - 0.03 * 0.2) - 0.03 * torch.sign(torch.as_tensor(average)))
        optimizer.step()
        for p, want in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-15)
    stats = optimizer.take_stats()
    assert stats.num_unclipped == 0
    assert stats.num_moved == stats.numel == 6 * sum(p.numel() for p in params)


def test_signum_holds_one_state_tensor_and_leaves_unseen_weights_alone() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Signum([p], lr=0.1)
    p.grad = torch.tensor([0.0, 1.0, -1.0])
    optimizer.step()
    assert list(optimizer.state[p]) == ["exp_avg"]
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, 0.9, 1.1]))


@pytest.mark.parametrize("bad", [{"rho": 0.0}, {"bs": 0}, {"eps": 0.0}, {"lr": -1.0}, {"betas": (1.0, 0.9)}])
def test_released_rule_refuses_bad_hyperparameters(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        SoulRelease([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, **bad})  # type: ignore[arg-type]
