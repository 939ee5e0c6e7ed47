"""Runs that the engine tests compare: a tiny float64 Llama, ragged rows, the real training loop, on any engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import soul.train.curvature
from soul.batch import TokenRow
from soul.data.feed import LocalFeed
from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore
from soul.objectives.methods import NPO, GradDiff, Method
from soul.optim.configs import AdamWConfig, OptimizerConfig, SignumConfig, SophiaConfig, SoulReleaseConfig
from soul.train.config import TrainConfig
from soul.train.divisors import Divisors
from soul.train.engine import Engine, EngineConfig
from soul.train.engines import make_engine
from soul.train.loop import Hooks, NonFiniteCurvature, Progress, train

VOCAB = 61  # odd, so that shards are uneven
# Seven leading rows in steps of three: the last step of an epoch has one row, and the second of two ranks none.
STEPS_PER_EPOCH, NUM_STEPS, SAVED_AT = 3, 6, 2
CLIP = 0.5
OPTIMIZERS = {
    "adamw": AdamWConfig(learning_rate=1e-3),
    "sophia": SophiaConfig(learning_rate=1e-3, rho=3.0, hessian_every=2, hessian_data="both"),
}
# Where a step is a smooth function of the gradient, so that float32 rounding stays rounding: no signs of near-zeros.
SMOOTH = {
    "smooth adamw": AdamWConfig(learning_rate=1e-3, eps=1e-3),
    "smooth sophia": SophiaConfig(learning_rate=1e-3, rho=3.0, eps=1e-3, hessian_every=2, hessian_data="both"),
}
STEERED = {"steered sophia": SophiaConfig(learning_rate=1e-3, hessian_every=2, hessian_data="both")}
SIGNS = {"signum": SignumConfig(learning_rate=1e-3), "soul_release": SoulReleaseConfig(learning_rate=1e-3)}
CONFIGS: dict[str, OptimizerConfig] = {**OPTIMIZERS, **SMOOTH, **STEERED, **SIGNS}
METHODS: dict[str, Method] = {name: NPO(retain_weight=0.7) if "adamw" in name else GradDiff(retain_weight=0.7) for name in CONFIGS}
TRAIN = TrainConfig(epochs=2, batch_size=3, seed=3)
IN_EIGHTS = TrainConfig(epochs=2, batch_size=8, seed=3)


def tiny_llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Random weights, always the same. Norms in the model's own precision: transformers' round float64 to float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = LlamaForCausalLM(config)
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(owner, name, nn.RMSNorm(child.weight.shape[0], eps=1e-6))
    return model.to(dtype)


def ragged_stores(num_forget: int = 7, num_retain: int = 9) -> dict[str, TokenStore]:
    """Rows of 4 to 21 tokens."""
    rng = np.random.default_rng(11)

    def rows(num: int) -> list[TokenRow]:
        lengths = [int(length) for length in rng.integers(4, 22, num)]
        prompts = [int(rng.integers(1, length - 1)) for length in lengths]
        return [
            TokenRow(i, rng.integers(3, VOCAB, n).tolist(), p, -2.0 * (n - p))
            for i, (n, p) in enumerate(zip(lengths, prompts, strict=True))
        ]

    return {"forget": TokenStore.of_rows(rows(num_forget)), "retain": TokenStore.of_rows(rows(num_retain))}


def feed_of(engine: Engine, *, micro_batch: int | None = None, config: TrainConfig = TRAIN) -> LocalFeed:
    """`micro_batch`: forget rows of one on each rank. Unless given a single rank takes a step at once, and two take it row by row."""
    stores = ragged_stores() if config is TRAIN else ragged_stores(11, 13)
    plan = PairedPlan({split: store.lengths_R for split, store in stores.items()}, batch_size=config.batch_size, seed=TRAIN.seed, window=1)
    return LocalFeed(plan, stores, engine.rank, engine.world, micro_batch or (TRAIN.batch_size if engine.world == 1 else 1), 0)


def new_engine(name: str, optimizer: str, *, rank: int = 0, world: int = 1, dtype: torch.dtype = torch.float64, **settings: Any) -> Engine:
    settings = {"device": "cpu", **settings}  # also where there is a card: what these runs are compared with is float64 and two ranks
    config = EngineConfig(name=name, num_workers=world, max_grad_norm=CLIP, **settings)  # type: ignore[arg-type]
    engine = make_engine(config, rank=rank, world=world, local_rank=rank)
    engine.prepare(lambda: tiny_llama(dtype), lambda model: CONFIGS[optimizer].build(model.named_parameters()))
    return engine


def run_steps(
    engine: Engine, optimizer: str, progress: Progress, stop: int, *, micro_batch: int | None = None, config: TrainConfig = TRAIN
) -> list[dict[str, Any]]:
    """Train from `progress.step` to `stop`; the rows the loop reports."""
    rows: list[dict[str, Any]] = []
    feed = feed_of(engine, micro_batch=micro_batch, config=config)
    train(
        engine,
        method=METHODS[optimizer],
        optimizer=CONFIGS[optimizer],
        config=config,
        steps=feed.steps(progress.step, stop),
        steps_per_epoch=feed.plan.steps_per_epoch,
        progress=progress,
        hooks=Hooks(after_step=rows.append),
        divisors=Divisors.of(feed.plan, feed.stores),
    )
    assert progress.step == stop
    return rows


def full_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights, m and h by name; empty but on rank 0."""
    state: dict[str, torch.Tensor] = {}
    for name, entry in engine.iter_full_state():
        if engine.rank == 0:
            state |= {f"param/{name}": entry.param.clone()} | {f"{key}/{name}": value.clone() for key, value in entry.state.items()}
    return state


def straight_run(engine: Engine, optimizer: str, folder: Path | None = None, *, micro_batch: int | None = None) -> dict[str, Any]:
    """All steps without a break, leaving a checkpoint of step SAVED_AT in `folder`: losses, gradient norms and final state."""
    progress = Progress()
    rows = run_steps(engine, optimizer, progress, SAVED_AT, micro_batch=micro_batch)
    if folder is not None:
        engine.save(folder, progress.to_json())
    rows += run_steps(engine, optimizer, progress, NUM_STEPS, micro_batch=micro_batch)
    return summary(engine, rows)


def resumed_run(engine: Engine, optimizer: str, folder: Path) -> dict[str, Any]:
    """The steps after the checkpoint in `folder`, in an engine whose weights and state were other than the checkpoint's."""
    run_steps(engine, optimizer, Progress(), 1)
    progress = Progress(**engine.load(folder))
    assert progress.step == SAVED_AT
    return summary(engine, run_steps(engine, optimizer, progress, NUM_STEPS))


def poisoned_run(engine: Engine) -> str:
    """How a run ends in whose third curvature update one rank of two has an infinite loss."""
    real = soul.train.curvature.sampled_loss

    def poisoned(*args: Any, **names: Any) -> torch.Tensor:
        return real(*args, **names) * (math.inf if engine.rank == 1 and names["update"] == 2 else 1.0)

    with mock.patch.object(soul.train.curvature, "sampled_loss", poisoned):
        try:
            run_steps(engine, "smooth sophia", Progress(), NUM_STEPS)
        except NonFiniteCurvature as error:
            return f"curvature at step {error.step}"
    return "no error"


def cut_run(engine: Engine, micro_batch: int) -> dict[str, Any]:
    """Two epochs of steps of eight rows and of three, with steered rho, in micro-batches of so many forget rows on each rank."""
    return summary(engine, run_steps(engine, "steered sophia", Progress(), 4, micro_batch=micro_batch, config=IN_EIGHTS))


def summary(engine: Engine, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "losses": [row["loss"] for row in rows],
        "norms": [row["grad_norm"] for row in rows],
        "state": full_state(engine),
        "first": {name: rows[0].get(name) for name in ("unclipped_fraction", "rho")},
    }


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], prefix: str = "") -> float:
    """Largest absolute difference between the tensors whose names begin with `prefix`; the names must agree."""
    assert one.keys() == other.keys() and one, (sorted(one)[:3], sorted(other)[:3])
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one if key.startswith(prefix))
