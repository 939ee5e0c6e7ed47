"""The optimizers a run can name: each one's settings, and how to build it. A new one is a config here and a row of OPTIMIZERS."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from soul.optim.one_shot import OneShot
from soul.optim.rho import RhoController
from soul.optim.signum import Signum
from soul.optim.sophia import SophiaG, SophiaH
from soul.optim.soul_release import SoulRelease

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NamedParameters = Iterable[tuple[str, nn.Parameter]]
HessianData = Literal["retain", "forget", "both"]
Estimator = Literal["gnb", "fisher", "hutchinson"]


class _Optimizer(BaseModel, ABC):
    """Abstract: what every optimizer has."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    order: ClassVar[Literal["FO", "SO"]] = "FO"
    """The family in which tables show the optimizer, as in FO-NPO and SO-NPO."""
    state_tensors: ClassVar[int] = 2
    """State tensors of a parameter's size, for memory planning."""

    @property
    def estimator(self) -> Estimator | None:
        """How training measures curvature: Gauss-Newton-Bartlett, empirical Fisher or Hutchinson's estimate. None: it does not."""
        return None

    @property
    def second_order(self) -> bool:
        """Whether training makes curvature passes: steps for which `curvature_due` is true."""
        return self.estimator is not None

    def curvature_due(self, step: int) -> bool:
        """Whether h is to be updated before step `step` (from 0)."""
        return False

    @abstractmethod
    def build(self, named_parameters: NamedParameters, *, eager_state: bool = True) -> torch.optim.Optimizer:
        """The optimizer of the parameters that require a gradient. `eager_state=False`: for ZeRO, see ShardOptimizer."""


class _Stepwise(_Optimizer, ABC):
    """Abstract: what optimizers of many steps have."""

    learning_rate: float = Field(
        1e-5,
        gt=0,
        description="Peak learning rate (5e-4 for the tiny model trained from scratch unless given). "
        "For sophia, sophia_h, signum and soul_release also the furthest a weight can move in one step.",
    )
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay per unit of learning rate; biases and norms are exempt.")

    def _groups(self, named_parameters: NamedParameters) -> list[dict[str, Any]]:
        """Matrices decay, biases and one-dimensional weights (norms) do not."""
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 flattens what it partitions
                groups[len(shape) < 2 or name.endswith("bias")].append(parameter)
        decays = (self.weight_decay, 0.0)
        return [{"params": params, "weight_decay": decay} for params, decay in zip(groups, decays, strict=True) if params]


class AdamWConfig(_Stepwise):
    """AdamW, the first-order baseline."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="Decay per step of the averages of the gradient and of its square.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the squared-gradient average.")

    def build(self, named_parameters: NamedParameters, *, eager_state: bool = True) -> torch.optim.Optimizer:
        groups = self._groups(named_parameters)
        fused = all(p.is_cuda for group in groups for p in group["params"])  # needs no copy of the gradients, as foreach does
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=fused or None)


class _SophiaConfig(_Stepwise, ABC):
    """Abstract: what Sophia has with either estimate of the curvature."""

    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.95), description="Decay of the gradient average per step and of the curvature average per curvature update."
    )
    eps: float = Field(1e-12, gt=0, description="Least value of rho x curvature; below it a step is a sign step.")
    rho: Positive | Literal["auto"] = Field(
        "auto", description="Scale of the curvature: larger leaves more coordinates unclipped. auto: steer towards target_unclipped."
    )
    target_unclipped: float = Field(0.3, gt=0, lt=1, description="Fraction of the moving coordinates rho=auto leaves unclipped.")
    hessian_every: int = Field(10, ge=1, description="Steps between curvature updates, the first one before step 0.")
    hessian_data: HessianData | None = Field(
        None, description="Rows whose loss defines the curvature. Default: retain where the method trains on retain rows, else forget."
    )

    order: ClassVar[Literal["FO", "SO"]] = "SO"
    kind: ClassVar[type[SophiaG]]

    def curvature_due(self, step: int) -> bool:
        return step % self.hessian_every == 0

    def rho_controller(self) -> RhoController | None:
        """What steers rho, None for a fixed one."""
        return RhoController(target=self.target_unclipped) if self.rho == "auto" else None

    def build(self, named_parameters: NamedParameters, *, eager_state: bool = True) -> SophiaG:
        rho = RhoController().rho if self.rho == "auto" else self.rho
        groups = self._groups(named_parameters)
        return self.kind(groups, lr=self.learning_rate, betas=self.betas, rho=rho, eps=self.eps, eager_state=eager_state)


class SophiaConfig(_SophiaConfig):
    """Sophia-G: momentum over a Gauss-Newton diagonal, clipped (second-order)."""

    name: Literal["sophia"] = "sophia"

    kind: ClassVar[type[SophiaG]] = SophiaG

    @property
    def estimator(self) -> Estimator:
        return "gnb"


class SophiaHConfig(_SophiaConfig):
    """Sophia-H: momentum over the Hessian's diagonal by Hutchinson's estimate, clipped (second-order; engines single and ddp)."""

    name: Literal["sophia_h"] = "sophia_h"

    kind: ClassVar[type[SophiaG]] = SophiaH

    @property
    def estimator(self) -> Estimator:
        return "hutchinson"


class SoulReleaseConfig(_Stepwise):
    """The optimizer of the released SOUL code, to the letter; labelled SO as its authors do, though it makes no curvature pass."""

    name: Literal["soul_release"] = "soul_release"
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="Decay per step; the first one is applied twice per step.")
    eps: float = Field(1e-15, gt=0, description="Added to rho x batch factor x squared-gradient average.")
    rho: float = Field(0.04, gt=0, description="Scale of the squared-gradient average.")

    order: ClassVar[Literal["FO", "SO"]] = "SO"

    def build(self, named_parameters: NamedParameters, *, eager_state: bool = True) -> SoulRelease:
        groups = self._groups(named_parameters)
        return SoulRelease(groups, lr=self.learning_rate, betas=self.betas, rho=self.rho, eps=self.eps, eager_state=eager_state)


class SignumConfig(_Stepwise):
    """Sign of the momentum: what sophia is when everything is clipped (first-order control)."""

    name: Literal["signum"] = "signum"
    momentum: Fraction = Field(0.9, description="Decay of the gradient average per step.")

    state_tensors: ClassVar[int] = 1

    def build(self, named_parameters: NamedParameters, *, eager_state: bool = True) -> Signum:
        return Signum(self._groups(named_parameters), lr=self.learning_rate, momentum=self.momentum, eager_state=eager_state)


class OneShotConfig(_Optimizer):
    """The single step of method influence: the gradient of a whole pass over its damped curvature; chosen with that method."""

    name: Literal["one_shot"] = "one_shot"
    step_length: float | None = Field(
        None, gt=0, description="Factor of the step (null: forget tokens / all tokens, as removing the forget rows' weight asks for)."
    )
    damping: float = Field(
        10.0,
        ge=0,
        description="Added to the curvature, as a multiple of its mean over the weights. Smaller goes further: a model that fits its data "
        "has hardly any curvature.",
    )
    curvature: Literal["gnb", "fisher"] = Field(
        "gnb",
        description="Gauss-Newton diagonal with sampled labels (gnb), or squared gradients of the rows' own labels (fisher), which takes "
        "the rows one at a time.",
    )
    hessian_data: HessianData = Field(
        "both", description="Rows whose loss defines the curvature. Both: each split with its share of all tokens."
    )

    order: ClassVar[Literal["FO", "SO"]] = "SO"

    @property
    def estimator(self) -> Estimator:
        return self.curvature

    def curvature_due(self, step: int) -> bool:
        return True

    def build(self, named_parameters: NamedParameters, *, eager_state: bool = True) -> OneShot:
        return OneShot([parameter for _, parameter in named_parameters if parameter.requires_grad], eager_state=eager_state)


# The optimizers to choose from; one_shot comes with its method.
OPTIMIZERS: dict[str, type[AdamWConfig] | type[SophiaConfig] | type[SophiaHConfig] | type[SoulReleaseConfig] | type[SignumConfig]] = {
    "adamw": AdamWConfig,
    "sophia": SophiaConfig,
    "sophia_h": SophiaHConfig,
    "soul_release": SoulReleaseConfig,
    "signum": SignumConfig,
}

OptimizerConfig = Annotated[
    AdamWConfig | SophiaConfig | SophiaHConfig | SoulReleaseConfig | SignumConfig | OneShotConfig, Field(discriminator="name")
]
