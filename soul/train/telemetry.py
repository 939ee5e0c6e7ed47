"""What the optimizer did, measured every few steps: unclipped fraction, update norm, curvature."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from soul.optim.base import CHUNK_NUMEL, ShardOptimizer, local_shard
from soul.optim.one_shot import OneShot
from soul.optim.sophia import SophiaG, SophiaH
from soul.optim.stats import OptimizerStats
from soul.train.engine import Engine


class Telemetry:
    """Measures on steps 0, 1, 2, 4, ... below `every`, and on every `every`-th. Only looks: the weights do not depend on it."""

    def __init__(self, engine: Engine, *, every: int) -> None:
        self.engine, self.every = engine, every
        self._row: dict[str, float | None] = {}

    def due(self, step: int) -> bool:
        return step % self.every == 0 or (step < self.every and step & (step - 1) == 0)

    def before_step(self, step: int) -> None:
        optimizer = self.engine.optimizer
        if isinstance(optimizer, ShardOptimizer):
            optimizer.collect_stats = self.due(step) or (isinstance(optimizer, OneShot) and optimizer.is_last)

    def after_step(self, step: int) -> None:
        optimizer = self.engine.optimizer
        self._row = self._measure() if self.due(step) or (isinstance(optimizer, OneShot) and optimizer.is_last) else {}

    def row(self) -> dict[str, float | None]:
        """The last step's measurements, empty where none were due."""
        return self._row

    def _measure(self) -> dict[str, float | None]:
        optimizer = self.engine.optimizer
        if not isinstance(optimizer, ShardOptimizer):
            squared = self._over_shards(adamw_update_squared_norm(optimizer).to(self.engine.device))
            return {"update_norm": math.sqrt(float(squared)), "unclipped_fraction": None, "rho": None}
        steps = OptimizerStats(self._over_shards(optimizer.take_stats().sums.to(self.engine.device)))
        row: dict[str, float | None] = {
            "update_norm": math.sqrt(float(steps.update_squared_norm)),
            "unclipped_fraction": float(steps.unclipped_fraction),
            "rho": optimizer.param_groups[0].get("rho"),
        }
        if isinstance(optimizer, SophiaG):
            local = optimizer.curvature_stats(quantiles=False)
            curvature = replace(local, sums=self._over_shards(local.sums.to(self.engine.device)))
            row["hessian_mean"] = float(curvature.mean)
            row["hessian_zero_fraction"] = float(curvature.zero_fraction)
            if isinstance(optimizer, SophiaH):
                row["hessian_negative_fraction"] = float(curvature.negative_fraction)
        return row

    def _over_shards(self, tensor: Tensor) -> Tensor:
        return self.engine.all_reduce_sum(tensor) if self.engine.sharded else tensor


@torch.no_grad()
def adamw_update_squared_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Squared length of AdamW's last update on this rank's shards, weight decay left out, from its state."""
    total = torch.zeros((), dtype=torch.float64)
    group = optimizer.param_groups[0]  # they differ in weight decay only, and ZeRO-3 leaves them without parameters
    beta1, beta2 = group["betas"]
    for state in optimizer.state.values():
        if not state or not (step := float(state["step"])):
            continue
        m, v = (local_shard(state[key]).reshape(-1).split(CHUNK_NUMEL) for key in ("exp_avg", "exp_avg_sq"))
        for m_chunk, v_chunk in zip(m, v, strict=True):  # a flat partition of ZeRO-3 may be a billion weights
            direction = m_chunk / (1 - beta1**step) / ((v_chunk / (1 - beta2**step)).sqrt() + group["eps"])
            total = total.to(direction.device) + (group["lr"] * direction).double().square().sum()
    return total
