"""The update rule of the released SOUL code as it is, so that its results can be reproduced and compared.

It differs from Sophia in three ways: h averages the squared gradient of the *unlearning* loss at every step instead of a
Gauss-Newton estimate; the momentum is folded twice per step, which makes it an average with b1^2; and the batch factor is a
constant whatever the batch.
"""

from __future__ import annotations

from typing import Any

import torch

from soul.optim.base import Bucket, Group, ShardOptimizer
from soul.optim.rules import check_hyperparameters, clipped_ratio, descend_, fold_momentum_, fold_square_


class SoulRelease(ShardOptimizer):
    """`bs`: the constant batch factor, the default of an argument the released trainer never passes.

    The release stores weights and state in bfloat16, where most weights cannot move at its learning rates; that is a choice of
    storage and not repeated here.
    """

    state_keys = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 0.04,
        bs: int = 5120,
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
        foreach: bool | None = None,
        eager_state: bool = True,
    ) -> None:
        positive = {"rho": rho, "bs": bs, "eps": eps}
        check_hyperparameters(betas=betas, non_negative={"lr": lr, "weight_decay": weight_decay}, positive=positive)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, **positive}
        super().__init__(params, defaults, state_dtype=state_dtype, foreach=foreach, eager_state=eager_state)

    def _update_(self, group: Group, bucket: Bucket) -> None:
        params, grads, exp_avgs, hessians = bucket
        beta1, beta2 = group["betas"]
        fold_square_(hessians, grads, decay=beta2, weight=1 - beta2)
        fold_momentum_(exp_avgs, grads, beta=beta1)
        fold_momentum_(exp_avgs, grads, beta=beta1)  # the release decays the weights between the two; they do not meet
        denominators = torch._foreach_mul(hessians, group["rho"] * group["bs"])
        torch._foreach_add_(denominators, group["eps"])
        directions = clipped_ratio(exp_avgs, denominators)
        descend_(params, directions, lr=group["lr"], weight_decay=group["weight_decay"])
        self._record(directions, lr=group["lr"])
