"""Our training step under a clock: the loop, engine and feed of a real run, from a fresh model, and part (a), SO against FO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from perf._measure import Comparison, Moment, compare, interleaved, peak_bytes
from perf._workload import Workload
from soul.data.feed import LocalFeed
from soul.objectives.methods import NPO, GradDiff, Method
from soul.optim.configs import AdamWConfig, OptimizerConfig, SophiaConfig
from soul.train.config import TrainConfig
from soul.train.divisors import Divisors
from soul.train.engine import EngineConfig
from soul.train.loop import Hooks, Progress, train
from soul.train.single import SingleEngine

WARM_UP = 10  # steps before the clock starts: one curvature interval, and past the first steps' extra measurements
NEVER = 10**9


@dataclass
class Run:
    """What a run leaves: the loss of each step, and the clock after each."""

    losses: list[float] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    def per_step(self, steps: int) -> Moment:
        """Mean over the last `steps` steps."""
        return self.moments[-1].since(self.moments[-1 - steps]).per(steps)


def run_steps(
    workload: Workload, feed: LocalFeed, method: Method, optimizer: OptimizerConfig, *, steps: int, telemetry_every: int | None = None
) -> Run:
    """`steps` steps at a constant rate on one device, batches made as they are used."""
    run = Run()

    def after_step(row: dict[str, Any]) -> None:
        run.losses.append(row["loss"])
        run.moments.append(Moment.now(workload.device))

    train_config = TrainConfig(
        batch_size=workload.batch_size,
        micro_batch_size=workload.micro_batch_size,
        schedule="constant",
        warmup_fraction=0.0,
        epochs=NEVER,
        max_steps=steps,
        telemetry_every=telemetry_every or TrainConfig().telemetry_every,
    )
    engine = SingleEngine(
        EngineConfig(precision="bf16" if workload.precision == "bf16" else "fp32").decided(
            "gpu" if workload.device.type == "cuda" else "cpu"
        )
    )
    engine.device = workload.device
    engine.prepare(workload.build_model, lambda model: optimizer.build(model.named_parameters()))
    train(
        engine,
        method=method,
        optimizer=optimizer,
        config=train_config,
        steps=feed.steps(0, steps),
        steps_per_epoch=feed.plan.steps_per_epoch,
        progress=Progress(),
        hooks=Hooks(after_step=after_step),
        divisors=Divisors.of(feed.plan, feed.stores),
    )
    return run


def compare_orders(workload: Workload, *, rounds: int, steps: int) -> list[Comparison]:
    """Part (a): Sophia (k = 10, curvature of the retain rows, rho steered) against AdamW, same engine, same batches."""
    adamw, sophia = AdamWConfig(), SophiaConfig(hessian_every=10, hessian_data="retain")
    found = []
    for method in (GradDiff(), NPO()):
        feed = workload.feed(reference=method.name == "npo")

        def timed(optimizer: OptimizerConfig, every: int | None = None, *, feed: LocalFeed = feed, method: Method = method) -> Moment:
            return run_steps(workload, feed, method, optimizer, steps=WARM_UP + steps, telemetry_every=every).per_step(steps)

        variants = {"FO": lambda: timed(adamw), "SO": lambda: timed(sophia)}
        if method.name == "grad_diff":
            variants["SO, nothing measured"] = lambda: timed(sophia, NEVER)
            variants["SO, no curvature pass"] = lambda: timed(sophia.model_copy(update={"hessian_every": NEVER}))
        moments = interleaved(variants, rounds=rounds)
        found += _ratios(method.name, moments)
        found.append(_memory(workload, feed, method, (adamw, sophia)))
    return found


def _ratios(method: str, moments: dict[str, list[Moment]]) -> list[Comparison]:
    fo, so = moments["FO"], moments["SO"]
    found = []
    for clock, aim in (("wall", 1.05), ("cpu", None)):
        values = [[getattr(moment, clock) for moment in side] for side in (so, fo)]
        found.append(compare("a", f"{method} step, {clock} time", ("SO", values[0]), ("FO", values[1]), unit="s", aim=aim))
    for name in moments.keys() - {"FO", "SO"}:
        pair = [[moment.cpu for moment in side] for side in (moments[name], fo)]
        found.append(compare("a", f"{method} step, cpu time", (name, pair[0]), ("FO", pair[1]), unit="s"))
    return found


def _memory(workload: Workload, feed: LocalFeed, method: Method, optimizers: Sequence[OptimizerConfig]) -> Comparison:
    """Model, gradients, state and activations together, over two curvature passes."""
    first, second = (
        peak_bytes(lambda optimizer=optimizer: run_steps(workload, feed, method, optimizer, steps=11), workload.device)  # type: ignore[misc]
        for optimizer in optimizers
    )
    return compare("a", f"{method.name} peak memory", ("SO", [second]), ("FO", [first]), unit="bytes", aim=1.0)
