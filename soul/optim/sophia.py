"""Sophia: momentum divided by a curvature diagonal, clipped element-wise (Liu et al. 2023, arXiv 2305.14342).

    h     <- b2 h + (1 - b2) scale g^2              update_hessian(), on gradients of a sampled-label loss (curvature.py)
    m     <- b1 m + (1 - b1) g                      step(), on gradients of the training loss
    theta <- theta (1 - lr wd) - lr clip(m / max(rho h / (1 - b2^n), eps), 1)

h starts at zero, so after n updates it is (1 - b2^n) of its mean. Dividing that out is what lets a run of a few hundred steps
leave the pure sign descent it would otherwise spend most of its life in. SophiaG's h is of squares, SophiaH's of the Hessian itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from soul.optim.base import Bucket, Group, ShardOptimizer
from soul.optim.rules import check_hyperparameters, clipped_ratio, descend_, fold_momentum_, fold_square_
from soul.optim.stats import NUM_BINS, CurvatureStats, log_histogram
from soul.records import InputError

Mode = Literal["step", "hessian", "ratios"]  # move parameters; fold curvature; look at the ratios that a step would clip


class SophiaG(ShardOptimizer):
    """Never calls a model and never counts: the caller owns the curvature interval and `set_hessian_updates`.

    ZeRO calls the optimizer once per group or sub-group, so a counter in here would run fast. ZeRO also knows only `step()`: what else
    is to be done with reduced gradients than moving parameters is a `mode` of it.

    State keys are `exp_avg` (m) and `exp_avg_sq` (h): DeepSpeed's universal checkpoints hard-code Adam's two names.
    """

    state_keys = ("exp_avg", "exp_avg_sq")
    mode: Mode = "step"
    _ratios: Tensor | None = None

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 0.04,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        state_dtype: torch.dtype = torch.float32,
        foreach: bool | None = None,
        eager_state: bool = True,
    ) -> None:
        check_hyperparameters(betas=betas, non_negative={"lr": lr, "weight_decay": weight_decay}, positive={"rho": rho, "eps": eps})
        if state_dtype == torch.bfloat16 and betas[1] > 0.99:
            raise InputError(f"bfloat16 state cannot follow an average with b2 > 0.99, got {betas[1]}. Lower b2 or use float32 state.")
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"bias_correction": bias_correction, "hessian_updates": 0}
        super().__init__(params, defaults, state_dtype=state_dtype, foreach=foreach, eager_state=eager_state)

    def hessian(self, p: Tensor) -> Tensor:
        """The curvature average of a parameter as stored, not bias-corrected."""
        return self._state_of(p)[1]

    def set_hessian_updates(self, num_updates: int) -> None:
        """Tell every group how many decayed curvature updates h has seen. With none, the step is a sign step."""
        for group in self.param_groups:
            group["hessian_updates"] = num_updates

    def set_rho(self, rho: float) -> None:
        for group in self.param_groups:
            group["rho"] = rho

    @torch.no_grad()
    def update_hessian(self, *, scale: float = 1.0) -> None:
        """Fold the gradients of a whole step into h and leave them as they are.

        `scale`: number of tokens behind a mean sampled-label loss, 1 for a sqrt-weighted one.
        """
        self._for_each_bucket(lambda group, bucket: self._fold_hessian_(group, bucket, scale=scale))

    @torch.no_grad()
    def reset_hessian(self) -> None:
        """As if no curvature had been measured; the caller sets the number of updates."""
        for _, hessians in self.state_buckets():
            torch._foreach_zero_(hessians)

    @torch.no_grad()
    def spoil_hessian(self) -> None:
        """Not a number everywhere, as folding such gradients would have made it: for a caller that keeps them from the optimizer."""
        for _, hessians in self.state_buckets():
            for h in hessians:
                h.fill_(math.nan)

    @contextmanager
    def doing(self, mode: Mode) -> Iterator[None]:
        """`step()` does this inside."""
        self.mode = mode
        try:
            yield
        finally:
            self.mode = "step"

    def take_ratios(self) -> Tensor:
        """A histogram, of this rank, of |m| / h as it would be behind the steps of mode "ratios", which are forgotten."""
        ratios, self._ratios = self._ratios, None
        return torch.zeros(NUM_BINS, dtype=torch.int64) if ratios is None else ratios

    def _update_(self, group: Group, bucket: Bucket) -> None:
        match self.mode:
            case "hessian":
                self._fold_hessian_(group, bucket, scale=1.0)
            case "ratios":
                self._look_(group, bucket)
            case _:
                self._move_(group, bucket)

    def _fold_hessian_(self, group: Group, bucket: Bucket, *, scale: float) -> None:
        """Fold a bucket's gradients into its h."""
        _, grads, _, hessians = bucket
        beta2 = group["betas"][1]
        fold_square_(hessians, grads, decay=beta2, weight=(1 - beta2) * scale)

    def _look_(self, group: Group, bucket: Bucket) -> None:
        """Count a bucket's ratios with the momentum that its gradients make; nothing else changes."""
        _, grads, exp_avgs, hessians = bucket
        momenta = [m.clone() for m in exp_avgs]
        fold_momentum_(momenta, grads, beta=group["betas"][0])
        counts = ratio_counts(momenta, hessians, factor=hessian_correction(group))
        self._ratios = counts if self._ratios is None else self._ratios.to(counts.device) + counts

    def _move_(self, group: Group, bucket: Bucket) -> None:
        """Move a bucket's parameters."""
        params, grads, exp_avgs, hessians = bucket
        fold_momentum_(exp_avgs, grads, beta=group["betas"][0])
        denominators = torch._foreach_mul(hessians, group["rho"] * hessian_correction(group))
        torch._foreach_clamp_min_(denominators, group["eps"])
        directions = clipped_ratio(exp_avgs, denominators)
        descend_(params, directions, lr=group["lr"], weight_decay=group["weight_decay"])
        self._record(directions, lr=group["lr"])

    @torch.no_grad()
    def curvature_stats(self, *, quantiles: bool = True) -> CurvatureStats:
        """Size and, with `quantiles`, spread of this rank's bias-corrected h: the histogram behind them is most of the cost."""
        factor = hessian_correction(self.param_groups[0])
        return CurvatureStats.of((h * factor for _, hessians in self.state_buckets() for h in hessians), quantiles=quantiles)


def ratio_counts(exp_avgs: Sequence[Tensor], hessians: Sequence[Tensor], *, factor: float) -> Tensor:
    """A histogram of |m| / h, h bias-corrected by `factor`, over the coordinates that move (m != 0) and have curvature (h > 0)."""
    total = torch.zeros(NUM_BINS, dtype=torch.int64)
    for m, h in zip(exp_avgs, hessians, strict=True):
        curved = (h * factor).clamp_min_(0)
        counts = log_histogram(torch.where((m != 0) & (curved > 0), m.abs() / curved, 0.0))
        total = total.to(counts.device) + counts
    total[0] = 0
    return total


def hessian_correction(group: Group) -> float:
    """What makes the stored h unbiased. 0 before its first update, when there is no curvature to divide by."""
    if not group["bias_correction"]:
        return 1.0
    num_updates = group["hessian_updates"]
    return 1.0 / (1.0 - group["betas"][1] ** num_updates) if num_updates else 0.0


class SophiaH(SophiaG):
    """Sophia with Hutchinson's estimate: what it is given as gradients to fold are samples of the Hessian's own diagonal, u * (H u).

    h may be negative, which no threshold of the step lets through: max(rho h, eps) makes such a coordinate's step a sign step.
    """

    def _fold_hessian_(self, group: Group, bucket: Bucket, *, scale: float) -> None:
        _, samples, _, hessians = bucket
        beta2 = group["betas"][1]
        torch._foreach_mul_(hessians, beta2)
        torch._foreach_add_(hessians, samples, alpha=(1 - beta2) * scale)
