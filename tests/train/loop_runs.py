"""A run of the loop on the single engine: a tiny Llama, ragged rows of every split, any method with any optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from soul.batch import Batch, TokenRow
from soul.data.feed import LocalFeed
from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore
from soul.objectives.methods import METHODS, Method, streamed_splits
from soul.optim.configs import OPTIMIZERS, AdamWConfig, OneShotConfig, OptimizerConfig, SophiaConfig, SophiaHConfig
from soul.train.config import TrainConfig
from soul.train.divisors import Divisors, WholePass
from soul.train.engine import EngineConfig
from soul.train.loop import Hooks, Progress, train
from soul.train.single import SingleEngine
from tests.train.engine_runs import VOCAB, tiny_llama

# Seven leading rows in steps of three: the last step of an epoch has one row. The run ends in the middle of its second epoch.
STEPS_PER_EPOCH, NUM_STEPS = 3, 5
TRAIN = TrainConfig(epochs=2, max_steps=NUM_STEPS, batch_size=3, micro_batch_size=2, seed=3, telemetry_every=3, bucket_window=1)
METHODS_BY_NAME: dict[str, Method] = {name: kind() for name, kind in METHODS.items()}
OPTIMIZERS_BY_NAME: dict[str, OptimizerConfig] = {
    name: kind(learning_rate=1e-3, hessian_every=3) if kind is SophiaConfig or kind is SophiaHConfig else kind(learning_rate=1e-3)
    for name, kind in OPTIMIZERS.items()
}


def ragged(seed: int, num: int) -> list[TokenRow]:
    """Rows of 4 to 13 tokens, with made-up reference log-probabilities."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        length = int(rng.integers(4, 14))
        num_prompt = int(rng.integers(1, length - 1))
        rows.append(TokenRow(i, rng.integers(3, VOCAB, length).tolist(), num_prompt, -4.0 * (length - num_prompt)))
    return rows


ROWS = {"forget": ragged(1, 7), "retain": ragged(2, 9), "refusal": ragged(3, 7)}


@dataclass
class Run:
    """What a run left: the rows it reported (seconds left out), its engine and counters, when its epochs ended."""

    engine: SingleEngine
    progress: Progress
    rows: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[tuple[int, int]] = field(default_factory=list)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and the optimizer's tensors by name."""
        found: dict[str, torch.Tensor] = {}
        for name, entry in self.engine.iter_full_state():
            found |= {f"param/{name}": entry.param.clone()} | {f"{key}/{name}": value.clone() for key, value in entry.state.items()}
        return found


def new_run(optimizer: OptimizerConfig, *, dtype: torch.dtype = torch.float32, max_grad_norm: float | None = 1.0) -> Run:
    def build_model() -> nn.Module:
        model = tiny_llama(dtype)
        del model.model.layers[1:]  # type: ignore[union-attr, operator]
        return model

    engine = SingleEngine(EngineConfig(max_grad_norm=max_grad_norm).decided("cpu"))
    engine.prepare(build_model, lambda model: optimizer.build(model.named_parameters()))
    return Run(engine, Progress())


def feed_of(method: Method, config: TrainConfig = TRAIN, rows: Mapping[str, Sequence[TokenRow]] = ROWS) -> LocalFeed:
    stores = {split: TokenStore.of_rows(rows[split]) for split in streamed_splits(method)}
    lengths = {split: store.lengths_R for split, store in stores.items()}
    plan = PairedPlan(lengths, batch_size=config.batch_size, seed=config.seed, window=config.bucket_window)
    return LocalFeed(plan, stores, 0, 1, config.micro_batch_size, 0)


def whole_pass(feed: LocalFeed, config: TrainConfig) -> WholePass:
    return WholePass.of_run(feed.plan, feed.stores, config.total_steps(feed.plan.steps_per_epoch))


def go(
    run: Run,
    method: Method,
    optimizer: OptimizerConfig,
    config: TrainConfig = TRAIN,
    *,
    rows: Mapping[str, Sequence[TokenRow]] = ROWS,
    stop: int = NUM_STEPS,
    steps: Iterable[Sequence[Batch]] | None = None,
    save_to: Path | None = None,
) -> Run:
    """Continue `run` up to step `stop`, saving a checkpoint behind every step into `save_to`."""
    feed = feed_of(method, config, rows)

    def after_step(row: dict[str, Any]) -> None:
        run.rows.append({name: value for name, value in row.items() if name != "seconds"})
        if save_to is not None:
            run.engine.save(save_to / str(row["step"]), run.progress.to_json())

    train(
        run.engine,
        method=method,
        optimizer=optimizer,
        config=config,
        steps=feed.steps(run.progress.step, stop) if steps is None else steps,
        steps_per_epoch=feed.plan.steps_per_epoch,
        progress=run.progress,
        hooks=Hooks(after_step, lambda epoch, progress: run.epochs.append((epoch, progress.step))),
        divisors=whole_pass(feed, config) if isinstance(optimizer, OneShotConfig) else Divisors.of(feed.plan, feed.stores),
    )
    return run


def assert_bit_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


ADAMW = AdamWConfig(learning_rate=1e-3)
