"""The training loop: the same function in a unit test, under torchrun and inside a Ray Train worker.

It owns the learning rate, the curvature interval and every counter; engines own placement and reduction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from soul.batch import Batch
from soul.objectives.methods import Method
from soul.optim.configs import OneShotConfig, OptimizerConfig
from soul.optim.one_shot import OneShot
from soul.optim.schedule import lr_factor
from soul.optim.sophia import SophiaG
from soul.train.config import Clock, TrainConfig
from soul.train.curvature import curvature_mean, measure_curvature
from soul.train.divisors import Divisors, WholePass
from soul.train.engine import Engine, StepInfo
from soul.train.objective import global_counts, term_sums
from soul.train.steering import Steering
from soul.train.telemetry import Telemetry


class NonFinite(ArithmeticError):
    """A number of step `step` became NaN or infinite."""

    step: int


class NonFiniteLoss(NonFinite):
    """A loss became NaN or infinite. Raised on every rank before the weights are touched."""

    def __init__(self, step: int, terms: Sequence[str]) -> None:
        self.step, self.terms = step, tuple(terms)
        super().__init__(
            f"the {' and '.join(terms)} loss is not finite at step {step}; the weights are those of the step before, and the last "
            "checkpoint is kept. Lower --learning-rate, or use a bounded method (npo, po)."
        )


class NonFiniteCurvature(NonFinite):
    """A curvature estimate became NaN or infinite. Raised on every rank before the weights are touched."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(
            f"the curvature is not finite at step {step}; the weights are those of the step before, and the last checkpoint is kept. "
            "Lower --learning-rate, or compute with --precision fp32."
        )


class NonFiniteGradient(NonFinite):
    """A gradient became NaN or infinite under a finite loss. The weights in memory are lost; no checkpoint holds them."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(
            f"the gradient is not finite at step {step}, though the loss is; the last checkpoint is kept. "
            "Lower --learning-rate, or compute with --precision fp32."
        )


@dataclass
class Progress:
    """Every counter a run continues from; saved in each checkpoint as JSON."""

    step: int = 0
    hessian_updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rho: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Hooks:
    """What happens beside the steps, in this order. All are called on every rank (they may be collective)."""

    after_step: Callable[[dict[str, Any]], None] = lambda row: None
    after_epoch: Callable[[int, Progress], None] = lambda epoch, progress: None
    save: Callable[[Progress], None] = lambda progress: None
    """A resumable checkpoint is due: never behind the last step, when the run is done."""
    must_save: Callable[[], bool] = lambda: False
    """Asked on every rank in every step: one rank that says so is enough for a checkpoint."""


@dataclass(frozen=True, slots=True)
class _Descent:
    """The global value of each term and of the objective, the tokens seen, and whether rank 0's clock asks for a checkpoint."""

    values: dict[str, float]
    loss: float
    tokens: float
    save_due: bool


def _descend(
    engine: Engine,
    batches: Sequence[Batch],
    method: Method,
    step: int,
    divisors: Divisors,
    *,
    is_late: bool = False,
    is_broken: bool = False,
) -> _Descent:
    """Backward of the objective over all micro-batches.

    The gradient is of sums over the step divided by constants of the run; the reported values are means over the step. That a rank
    wants a checkpoint, or has a curvature that is not finite, travels with the counts, which are whole numbers: no reduction more, and
    no sum that it could change.
    """
    terms = method.terms()
    wanted = [(term.split, term.unit) for term in terms] + [(term.split, "tokens") for term in terms]
    *counts, late, broken = global_counts(engine, batches, wanted, int(is_late), int(is_broken))
    if broken:
        raise NonFiniteCurvature(step)
    own, tokens = counts[: len(terms)], sum(counts[len(terms) :])
    totals = torch.zeros(len(terms), dtype=torch.float64, device=engine.device)
    for i, batch in enumerate(batches):
        sums = term_sums(engine, batch, terms)
        parts = [term.weight / divisors.of_term(term) * value for term, value in zip(terms, sums, strict=True)]
        engine.backward(torch.stack(parts).sum(), last=i == len(batches) - 1)
        totals += torch.stack([value.detach().double() for value in sums])
    means = engine.all_reduce_sum(totals).cpu() / torch.tensor(own, dtype=torch.float64).clamp(min=1)
    values = dict(zip((term.name for term in terms), means.tolist(), strict=True))
    if not all(map(math.isfinite, values.values())):
        raise NonFiniteLoss(step, [name for name, value in values.items() if not math.isfinite(value)])
    return _Descent(values, sum(term.weight * values[term.name] for term in terms), tokens, late > 0)


def _starts_anew(optimizer: OptimizerConfig, config: TrainConfig) -> bool:
    """Whether the curvature average begins with the second step: half of an adapter is zero in the first, and the other half has none."""
    return config.lora_rank is not None and optimizer.second_order and not isinstance(optimizer, OneShotConfig)


def _update_curvature(
    engine: Engine,
    batches: Sequence[Batch],
    method: Method,
    optimizer: OptimizerConfig,
    config: TrainConfig,
    divisors: Divisors,
    progress: Progress,
) -> tuple[bool, bool]:
    """Whether curvature was due before this step and has been measured, and whether that has left it finite on this rank."""
    anew = progress.step == 1 and _starts_anew(optimizer, config)
    if not (anew or optimizer.curvature_due(progress.step)):
        return False, True
    if anew:
        assert isinstance(engine.optimizer, SophiaG)
        engine.optimizer.reset_hessian()
    is_finite = measure_curvature(engine, batches, method, optimizer, divisors, seed=config.seed, update=progress.hessian_updates)
    progress.hessian_updates += 1
    return True, is_finite


def _prepare_step(
    engine: Engine, optimizer: OptimizerConfig, config: TrainConfig, progress: Progress, total: int, divisors: Divisors
) -> float:
    """Tell the optimizer what only the loop counts; returns the learning rate of this step."""
    stepper = engine.optimizer
    if isinstance(stepper, SophiaG):
        discarded = _starts_anew(optimizer, config) and progress.step > 0
        stepper.set_hessian_updates(progress.hessian_updates - discarded)  # not in checkpoints: a resumed run counts from here
    if isinstance(optimizer, OneShotConfig):
        assert isinstance(stepper, OneShot) and isinstance(divisors, WholePass) and engine.config.max_grad_norm is None
        is_last = progress.step == total - 1
        stepper.set_step(is_last=is_last, damping=optimizer.damping * curvature_mean(engine) if is_last else 0.0)
        rate = divisors.forget_share if optimizer.step_length is None else optimizer.step_length
    else:
        schedule = lr_factor(progress.step, total_steps=total, warmup_fraction=config.warmup_fraction, schedule=config.schedule)
        rate = optimizer.learning_rate * schedule
    for group in stepper.param_groups:
        group["lr"] = rate
    return rate


def _row(progress: Progress, total: int, steps_per_epoch: int, found: _Descent, rate: float, info: StepInfo) -> dict[str, Any]:
    """What is logged of the step that has just been made."""
    return {
        "step": progress.step,
        "total_steps": total,
        "epoch": progress.step / steps_per_epoch,
        "loss": found.loss,
        "terms": found.values,
        "learning_rate": rate,
        "grad_norm": info.grad_norm,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
    }


def train(
    engine: Engine,
    *,
    method: Method,
    optimizer: OptimizerConfig,
    config: TrainConfig,
    steps: Iterable[Sequence[Batch]],
    steps_per_epoch: int,
    progress: Progress,
    hooks: Hooks,
    divisors: Divisors,
) -> Progress:
    """Run from `progress.step` to the end. `steps` yields this rank's micro-batches from that step on. one_shot asks for a WholePass.

    Raises:
        NonFiniteLoss, NonFiniteCurvature, NonFiniteGradient: a term's value or the curvature is NaN or infinite, or the gradient is
            though neither was.
    """
    total = config.total_steps(steps_per_epoch)
    telemetry, steering = Telemetry(engine, every=config.telemetry_every), Steering(engine, optimizer, progress.rho)
    clock = Clock(config.save_minutes)
    engine.model.train()
    for batches in steps:
        if progress.step >= total:
            break
        started = time.perf_counter()
        batches = [batch.to(engine.device) for batch in batches]
        measured, is_finite = _update_curvature(engine, batches, method, optimizer, config, divisors, progress)
        rate = _prepare_step(engine, optimizer, config, progress, total, divisors)
        is_late = (clock.is_late() and engine.rank == 0) or hooks.must_save()
        descend = partial(_descend, engine, batches, method, progress.step, divisors, is_late=is_late, is_broken=not is_finite)
        if measured and progress.step <= _starts_anew(optimizer, config):
            steering.before_first(descend)
        found = descend()
        telemetry.before_step(progress.step)
        if not math.isfinite((info := engine.step()).grad_norm):
            raise NonFiniteGradient(progress.step)
        telemetry.after_step(progress.step)
        if measured:
            steering.after_curvature()
        progress.rho = steering.state
        progress.step += 1
        progress.tokens += int(found.tokens)
        progress.seconds += time.perf_counter() - started
        hooks.after_step(_row(progress, total, steps_per_epoch, found, rate, info) | telemetry.row())
        if progress.step % steps_per_epoch == 0 or progress.step == total:
            hooks.after_epoch(-(-progress.step // steps_per_epoch), progress)
        if progress.step < total and (found.save_due or config.save_due(progress.step, steps_per_epoch)):
            hooks.save(progress)
            clock.restart()
    return progress
