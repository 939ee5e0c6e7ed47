"""The pieces update rules are made of: in-place maths on lists of equally shaped tensors, one kernel for many tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from soul.records import InputError


def fold_momentum_(exp_avgs: list[Tensor], grads: list[Tensor], *, beta: float) -> None:
    """m <- beta m + (1 - beta) g."""
    torch._foreach_mul_(exp_avgs, beta)
    torch._foreach_add_(exp_avgs, grads, alpha=1 - beta)


def fold_square_(hessians: list[Tensor], grads: list[Tensor], *, decay: float, weight: float) -> None:
    """h <- decay h + weight g^2."""
    torch._foreach_mul_(hessians, decay)
    torch._foreach_addcmul_(hessians, grads, grads, value=weight)


def clipped_ratio(exp_avgs: list[Tensor], denominators: tuple[Tensor, ...]) -> list[Tensor]:
    """clip(m / d, 1) as new tensors; equal to sign(m) min(|m| / d, 1) bit for bit, in one pass less."""
    directions = list(torch._foreach_div(exp_avgs, denominators))
    torch._foreach_clamp_min_(directions, -1.0)
    torch._foreach_clamp_max_(directions, 1.0)
    return directions


def descend_(params: list[Tensor], directions: list[Tensor], *, lr: float, weight_decay: float) -> None:
    """Decoupled weight decay, then a step of length `lr` per unit of direction."""
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, directions, alpha=-lr)


def check_hyperparameters(*, betas: tuple[float, ...], non_negative: dict[str, float], positive: dict[str, float]) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"betas must lie in [0, 1), got {betas}.")
    for name, value in non_negative.items():
        if not value >= 0:
            raise InputError(f"{name} must be >= 0, got {value}.")
    for name, value in positive.items():
        if not value > 0:
            raise InputError(f"{name} must be > 0, got {value}.")
