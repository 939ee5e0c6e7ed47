"""Signum: the sign of the momentum. The control without which no claim about second-order information is made.

It is what SophiaG becomes when every coordinate is clipped, with half of its state.
"""

from __future__ import annotations

from typing import Any

import torch

from soul.optim.base import Bucket, Group, ShardOptimizer
from soul.optim.rules import check_hyperparameters, descend_, fold_momentum_


class Signum(ShardOptimizer):
    """m <- b m + (1 - b) g with b = `momentum`; theta <- theta (1 - lr wd) - lr sign(m). Its unclipped fraction is always 0."""

    state_keys = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
        foreach: bool | None = None,
        eager_state: bool = True,
    ) -> None:
        check_hyperparameters(betas=(momentum,), non_negative={"lr": lr, "weight_decay": weight_decay}, positive={})
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, state_dtype=state_dtype, foreach=foreach, eager_state=eager_state)

    def _update_(self, group: Group, bucket: Bucket) -> None:
        params, grads, exp_avgs = bucket
        fold_momentum_(exp_avgs, grads, beta=group["momentum"])
        magnitudes = torch._foreach_abs(exp_avgs)  # m / |m|, because torch's sign of a nan is 0 and would hide it
        torch._foreach_clamp_min_(magnitudes, torch.finfo(torch.float32).tiny)
        directions = list(torch._foreach_div(exp_avgs, magnitudes))
        descend_(params, directions, lr=group["lr"], weight_decay=group["weight_decay"])
        self._record(directions, lr=group["lr"])
