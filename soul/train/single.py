"""The reference engine: one process, one device. Every other engine is tested against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soul.device import torch_device
from soul.models.stored import in_memory
from soul.records import InputError
from soul.train.engine import BuildModel, BuildOptimizer, EngineConfig, FullEntry, StepInfo
from soul.train.export import export_model
from soul.train.state import full_entries, load_state, save_state
from soul.train.update import (
    clip_and_step,
    clip_gradients,
    enable_checkpointing,
    forward_context,
    kept_dtype,
    optimized_shards,
    run_as,
    store_weights,
)


class SingleEngine:
    """One rank that holds everything.

    Raises:
        InputError: made for one of several ranks.
    """

    sharded = False

    def __init__(self, config: EngineConfig, *, rank: int = 0, world: int = 1, local_rank: int = 0) -> None:
        if world != 1:
            raise InputError(f"the single engine runs on 1 worker, got {world}. Use --engine ddp or fsdp, or --num-workers 1.")
        self.config = config
        self.rank, self.world = rank, world
        self.device = torch_device(config.runs_on, local_rank)
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        precision = self.config.computes_in
        self.model = store_weights(in_memory(build_model(), device=self.device, dtype=kept_dtype(precision)), precision)
        enable_checkpointing(self.model, self.config)
        self.optimizer = build_optimizer(self.model)

    def autocast(self) -> AbstractContextManager[Any]:
        return forward_context(self.device, self.config.computes_in)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> StepInfo:
        return clip_and_step(self.model, self.optimizer, max_norm=self.config.max_grad_norm)

    def hessian_step(self) -> None:
        run_as(self.optimizer, "hessian")

    def look_at_ratios(self) -> None:
        clip_gradients(self.model, max_norm=self.config.max_grad_norm)
        run_as(self.optimizer, "ratios")

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def save(self, folder: Path, extra: Mapping[str, Any]) -> None:
        save_state(folder, self.model, self.optimizer, extra)

    def load(self, folder: Path) -> dict[str, Any]:
        return load_state(folder, self.model, self.optimizer)

    def local_weights(self) -> list[Tensor]:
        return optimized_shards(self.optimizer)

    def iter_full_state(self) -> Iterator[tuple[str, FullEntry]]:
        return full_entries(self.model, self.optimizer, keep=True)

    def export(self, folder: Path, *, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
        export_model(folder, self.model, tokenizer=tokenizer, dtype=dtype, is_writer=True)
