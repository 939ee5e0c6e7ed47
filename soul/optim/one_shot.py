"""The optimizer of influence unlearning: sums gradients and curvature over a whole pass, and moves the weights once, at its end.

    h     <- h + scale g^2                    update_hessian()
    m     <- m + g                            step(), every time
    theta <- theta - lr m / (h + damping)     step(), when `is_last`

The sums are the state, so that a checkpoint may fall anywhere in the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from soul.optim.base import Bucket, Group, ShardOptimizer
from soul.optim.rules import descend_
from soul.optim.sophia import SophiaG
from soul.optim.stats import OptimizerStats


class OneShot(SophiaG):
    """Has SophiaG's state, modes and curvature statistics. Before the last step, `set_step` says how far to go."""

    is_last: bool = False

    def __init__(
        self, params: Any, *, state_dtype: torch.dtype = torch.float32, foreach: bool | None = None, eager_state: bool = True
    ) -> None:
        defaults = {"lr": 0.0, "damping": 0.0, "bias_correction": False, "hessian_updates": 0}
        ShardOptimizer.__init__(self, params, defaults, state_dtype=state_dtype, foreach=foreach, eager_state=eager_state)

    def set_step(self, *, is_last: bool, damping: float) -> None:
        """`damping`: what is added to h."""
        self.is_last = is_last
        for group in self.param_groups:
            group["damping"] = damping

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if self.is_last:  # also what the last rows did not reach (an expert) has gradients of the rows before
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is None):
                p.grad = torch.zeros_like(p)
        return super().step(closure)

    def _fold_hessian_(self, group: Group, bucket: Bucket, *, scale: float) -> None:
        _, grads, _, hessians = bucket
        torch._foreach_addcmul_(hessians, grads, grads, value=scale)

    def _move_(self, group: Group, bucket: Bucket) -> None:
        params, grads, sums, hessians = bucket
        torch._foreach_add_(sums, grads)
        if not self.is_last:
            return
        denominators = torch._foreach_add(hessians, group["damping"])
        torch._foreach_clamp_min_(denominators, torch.finfo(torch.float32).tiny)  # no curvature, no damping, no gradient: no step
        directions = list(torch._foreach_div(sums, denominators))
        descend_(params, directions, lr=group["lr"], weight_decay=0.0)
        if self.collect_stats:
            self._add_sums(OptimizerStats.unclipped(directions, lr=group["lr"]).sums)
