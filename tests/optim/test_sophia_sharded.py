"""SophiaG on the shards of two processes equals SophiaG on the whole, also where a shard is uneven or empty."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, init_device_mesh

from soul.optim.base import local_shard
from soul.optim.rho import log_ratio_histogram, rho_for
from soul.optim.sophia import SophiaG
from soul.records import InputError
from tests.distributed import spawn


def make_model() -> nn.Sequential:
    """Rows 5 and 7 shard unevenly; the last layer has one row, so one rank has none of it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def train(model: nn.Module, rows: slice, *, foreach: bool, divisor: int) -> SophiaG:
    """Six steps on this rank's rows of a batch of 8, curvature every second. The loss sums to the global mean over ranks."""
    generator = torch.Generator().manual_seed(1)
    optimizer = SophiaG(model.parameters(), lr=0.01, rho=0.05, weight_decay=0.1, foreach=foreach)
    optimizer.collect_stats = True
    for step in range(6):
        for is_curvature in (True, False) if step % 2 == 0 else (False,):
            features_BD = torch.randn(8, 3, generator=generator, dtype=torch.float64)[rows]
            (model(features_BD).square().sum() * divisor / 8).backward()
            if is_curvature:
                optimizer.update_hessian(scale=8.0)
                optimizer.set_hessian_updates(step // 2 + 1)
            else:
                optimizer.step()
            optimizer.zero_grad()
    return optimizer


def compare(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for foreach in (True, False):
        whole = make_model()
        oracle = train(whole, slice(0, 8), foreach=foreach, divisor=1)
        sharded = make_model()
        for layer in sharded:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        optimizer = train(sharded, slice(4 * rank, 4 * rank + 4), foreach=foreach, divisor=world)
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            for got, want in (
                (p, q),
                (optimizer.state[p]["exp_avg"], oracle.state[q]["exp_avg"]),
                (optimizer.hessian(p), oracle.hessian(q)),
            ):
                assert isinstance(got, DTensor)
                torch.testing.assert_close(got.full_tensor(), want.detach(), rtol=1e-12, atol=1e-13)
        sums, histogram = optimizer.take_stats().sums, log_ratio_histogram(optimizer)
        dist.all_reduce(sums)
        dist.all_reduce(histogram)
        expected = oracle.take_stats().sums
        assert 0 < expected[0] < expected[1]
        torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
        assert abs(rho_for(histogram, 0.3) / rho_for(log_ratio_histogram(oracle), 0.3) - 1) < 1e-6
        restored = SophiaG(sharded.parameters(), lr=9.0)
        storages = [local_shard(restored.hessian(p)).data_ptr() for p in sharded.parameters()]
        set_optimizer_state_dict(sharded, restored, optim_state_dict=get_optimizer_state_dict(sharded, optimizer))
        assert restored.param_groups[0]["rho"] == 0.05 and restored.param_groups[0]["hessian_updates"] == 3
        for p, storage in zip(sharded.parameters(), storages, strict=True):
            assert torch.equal(local_shard(restored.hessian(p)), local_shard(optimizer.hessian(p)))
            assert local_shard(restored.hessian(p)).data_ptr() == storage, "filled in place"
    unreduced = next(make_model().parameters())
    partial = nn.Parameter(DTensor.from_local(unreduced.detach(), mesh, [Partial()]))
    optimizer = SophiaG([partial], lr=0.1, eager_state=False)
    partial.grad = partial.detach()
    with pytest.raises(InputError, match="reduced"):
        optimizer.step()


def test_two_ranks_equal_one() -> None:
    spawn(compare, 2)
