"""rho="auto": when the ratios of momentum to curvature are looked at and rho is set. What is logged has no part in it.

Before the first step rho is solved for the gradient of that step, which costs one more backward pass a run (two with adapters, whose
curvature begins with the second step); after that whenever curvature was measured, behind the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from soul.optim.configs import OptimizerConfig, SophiaConfig, SophiaHConfig
from soul.optim.rho import RhoController, log_ratio_histogram
from soul.optim.sophia import SophiaG
from soul.train.engine import Engine


class Steering:
    """Holds the controller; none where rho is fixed or the optimizer has none."""

    def __init__(self, engine: Engine, optimizer: OptimizerConfig, state: dict[str, Any]) -> None:
        self.engine = engine
        steers = isinstance(optimizer, SophiaConfig | SophiaHConfig) and optimizer.rho == "auto"
        self.controller = RhoController(target=optimizer.target_unclipped) if steers else None  # type: ignore[union-attr]
        if self.controller is not None:
            if state:
                self.controller.load_state_dict(state)
            self._stepper.set_rho(self.controller.rho)

    @property
    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {} if self.controller is None else self.controller.state_dict()

    def before_first(self, backward: Callable[[], object]) -> None:
        """Solve for the step that is about to be made, whose gradients `backward` accumulates. They are dropped again."""
        if self.controller is not None:
            backward()
            self.engine.look_at_ratios()
            self.controller.is_measured = False
            self._update(self._stepper.take_ratios())

    def after_curvature(self) -> None:
        """Behind a step that curvature was measured for."""
        if self.controller is not None:
            self._update(log_ratio_histogram(self._stepper))

    def _update(self, histogram: Tensor) -> None:
        assert self.controller is not None
        counts = histogram.to(self.engine.device)
        self._stepper.set_rho(self.controller.update(self.engine.all_reduce_sum(counts) if self.engine.sharded else counts))

    @property
    def _stepper(self) -> SophiaG:
        assert isinstance(self.engine.optimizer, SophiaG)
        return self.engine.optimizer
