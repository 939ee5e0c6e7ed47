"""The replicated engine: every rank holds the whole model and optimizer state, gradients meet in torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from soul.models.stored import StoredModel
from soul.train.engine import BuildModel, BuildOptimizer, EngineConfig, FullEntry, StepInfo
from soul.train.export import export_model
from soul.train.ranks import join_group, sum_over_ranks
from soul.train.sharding import replicate
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


class DDPEngine:
    """One replica. The process group exists already."""

    sharded = False

    def __init__(self, config: EngineConfig, *, rank: int, world: int, local_rank: int) -> None:
        self.config = config
        self.rank, self.world = rank, world
        self.device = join_group(config, rank, world, local_rank)
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        source, precision = build_model(), self.config.computes_in
        if isinstance(source, StoredModel):
            model = replicate(source, device=self.device, dtype=kept_dtype(precision))
        else:
            model = store_weights(source.to(self.device), precision)
        enable_checkpointing(model, self.config)
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        replica = DistributedDataParallel(
            model,
            device_ids=device_ids,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            init_sync=not isinstance(source, StoredModel),  # whose copies are equal already
        )
        # DDP decides in the forward whether the backward will reduce, where nobody knows yet if it is the last: `backward` decides.
        replica.require_backward_grad_sync = False
        self.model, self.optimizer = replica, build_optimizer(model)

    def autocast(self) -> AbstractContextManager[Any]:
        return forward_context(self.device, self.config.computes_in)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if last:
            self.model.reducer.prepare_for_backward([])  # type: ignore[union-attr, operator]
        (loss * self.world).backward()  # DDP averages over ranks

    def step(self) -> StepInfo:
        return clip_and_step(self.model, self.optimizer, max_norm=self.config.max_grad_norm)

    def hessian_step(self) -> None:
        run_as(self.optimizer, "hessian")

    def look_at_ratios(self) -> None:
        clip_gradients(self.model, max_norm=self.config.max_grad_norm)
        run_as(self.optimizer, "ratios")

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor, self.device)

    def save(self, folder: Path, extra: Mapping[str, Any]) -> None:
        save_state(folder, self.model, self.optimizer, extra)
        dist.barrier()  # whichever rank returns, the checkpoint is complete

    def load(self, folder: Path) -> dict[str, Any]:
        return load_state(folder, self.model, self.optimizer)

    def local_weights(self) -> list[Tensor]:
        return optimized_shards(self.optimizer)

    def iter_full_state(self) -> Iterator[tuple[str, FullEntry]]:
        return full_entries(self.model, self.optimizer, keep=self.rank == 0)

    def export(self, folder: Path, *, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
        export_model(folder, self.model, tokenizer=tokenizer, dtype=dtype, is_writer=self.rank == 0)
