"""What must hold on every device: the same numbers as on the CPU, a nan that stays visible, temporaries within the chunk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from soul.optim.base import CHUNK_NUMEL, ShardOptimizer
from soul.optim.rho import log_ratio_histogram
from soul.optim.signum import Signum
from soul.optim.sophia import SophiaG
from soul.optim.soul_release import SoulRelease

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RULES = [SophiaG, SoulRelease, Signum]


def run(rule: type[ShardOptimizer], device: str, *, foreach: bool) -> tuple[list[nn.Parameter], ShardOptimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device)) for shape in ((9, 31), (7,), ())]
    optimizer = rule(params, lr=0.01, weight_decay=0.1, foreach=foreach)  # type: ignore[call-arg]
    optimizer.collect_stats = True
    for step in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(device)
        if isinstance(optimizer, SophiaG):
            optimizer.update_hessian(scale=30.0)
            optimizer.set_hessian_updates(step + 1)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_every_device_and_path_agree_with_the_plain_cpu_path(rule: type[ShardOptimizer], device: str) -> None:
    wanted, oracle = run(rule, "cpu", foreach=False)
    got, optimizer = run(rule, device, foreach=True)
    for p, q in zip(got, wanted, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(optimizer.take_stats().sums.cpu(), oracle.take_stats().sums, rtol=1e-9, atol=0)
    if isinstance(optimizer, SophiaG) and isinstance(oracle, SophiaG):
        assert (log_ratio_histogram(optimizer).cpu() - log_ratio_histogram(oracle)).abs().sum() <= 2, "at most one value on a bin's edge"
        torch.testing.assert_close(optimizer.curvature_stats().mean.cpu(), oracle.curvature_stats().mean)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_the_clip_does_not_hide_a_nan(rule: type[ShardOptimizer], foreach: bool, device: str) -> None:
    p = nn.Parameter(torch.zeros(9, device=device))
    p.grad = torch.ones(9, device=device)
    p.grad[4] = torch.nan
    rule([p], lr=0.1, foreach=foreach).step()  # type: ignore[call-arg]
    assert p.isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.gpu
def test_a_step_needs_room_for_a_few_chunks_however_large_the_model() -> None:
    p = nn.Parameter(torch.zeros(16 * CHUNK_NUMEL // 1024, 1024, device="cuda"))
    optimizer = SophiaG([p], lr=0.1)
    p.grad = torch.ones_like(p)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 4 * CHUNK_NUMEL * 4
