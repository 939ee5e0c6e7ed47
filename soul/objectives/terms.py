"""Loss terms: each returns a *sum* over what it was given and names its unit; only the engine's caller divides.

Law 1 of the design: dividing outside, by what a step of the run has on average, makes gradient and curvature independent of how rows
were put into steps, and a step into micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from soul.models.scoring import AnswerLogps

Unit = Literal["tokens", "sequences"]
LossSum = Callable[[AnswerLogps, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Term:
    """`weight * loss(rows of split) / number of units` is one summand of the objective, the number that of a step on average.

    `loss` maps the split's answer log-probabilities and its reference log-probabilities (per row, NaN where absent) to a sum.
    """

    name: str
    split: str
    unit: Unit
    weight: float
    loss: LossSum
    needs_reference: bool = False


def nll(policy: AnswerLogps, reference_B: Tensor) -> Tensor:
    """Negative log-likelihood of the answers, summed over tokens."""
    return -policy.logps_N.sum()


def negated_nll(policy: AnswerLogps, reference_B: Tensor) -> Tensor:
    """Gradient ascent on the answers: unbounded below."""
    return policy.logps_N.sum()


def npo(beta: float, reduction: Literal["sum", "mean"]) -> LossSum:
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868), summed over sequences.

    (2/beta) * softplus(beta * (log p - log p_ref)), which is -(2/beta) log sigmoid(-beta * log(p / p_ref)). With `reduction="sum"`
    log p is a sequence's sum over tokens, as in that paper; "mean" divides both by the token count, which equals SOUL's released loss
    at its batch size of one and hardly leaves the gradient-ascent regime.
    """

    def loss(policy: AnswerLogps, reference_B: Tensor) -> Tensor:
        ratio_B = policy.sum_B() - reference_B.to(policy.logps_N.dtype)
        present_B = policy.count_B() > 0
        if reduction == "mean":
            ratio_B = ratio_B / policy.count_B().clamp(min=1)
        return (2 / beta) * F.softplus(beta * ratio_B[present_B]).sum()

    return loss
