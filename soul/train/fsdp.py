"""The sharded engine (FSDP2): parameters, gradients and optimizer state in equal parts over the ranks, one unit per decoder block.

Memory per rank is 16 N / W bytes (fp32 weights, gradients and two moments of N parameters on W ranks), one block's whole parameters,
and the root's: embeddings, final norm and LM head stay whole from the forward to the end of the backward. Gradients are
reduce-scattered after every micro-batch: postponing that to the last one would save traffic, and hold 4 N bytes of whole gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from soul.train.engine import BuildModel, BuildOptimizer, EngineConfig, FullEntry, Precision, StepInfo
from soul.train.export import export_model
from soul.train.ranks import join_group, sum_over_ranks
from soul.train.sharding import fill, reshard, share_model
from soul.train.state import full_entries, load_state, save_state
from soul.train.update import clip_and_step, clip_gradients, enable_checkpointing, kept_dtype, optimized_shards, run_as

# No output_dtype: a block that returns fp32 to its bf16 neighbour fails, and the losses widen the root's logits themselves.
POLICIES: dict[Precision, MixedPrecisionPolicy] = {
    "fp32": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "pure_bf16": MixedPrecisionPolicy(reduce_dtype=torch.float32),
}


class FSDPEngine:
    """One rank's shards. The process group exists already."""

    sharded = True

    def __init__(self, config: EngineConfig, *, rank: int, world: int, local_rank: int) -> None:
        self.config = config
        self.rank, self.world = rank, world
        self.device = join_group(config, rank, world, local_rank)
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        mesh = init_device_mesh(self.device.type, (self.world,))
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.config.offload else OffloadPolicy()
        self.model, values = share_model(build_model)
        fill(
            self.model,
            values,
            device=self.device,
            dtype=kept_dtype(self.config.computes_in),
            shard=lambda unit: fully_shard(unit, mesh=mesh, mp_policy=POLICIES[self.config.computes_in], offload_policy=offload),
        )
        enable_checkpointing(self.model, self.config)
        self.optimizer = build_optimizer(self.model)

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the policy casts at the blocks' borders

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss * self.world).backward()  # FSDP averages over ranks

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
        reshard(self.model)
        save_state(folder, self.model, self.optimizer, extra)
        dist.barrier()  # whichever rank returns, the checkpoint is complete

    def load(self, folder: Path) -> dict[str, Any]:
        reshard(self.model)
        return load_state(folder, self.model, self.optimizer)

    def local_weights(self) -> list[Tensor]:
        return optimized_shards(self.optimizer)

    def iter_full_state(self) -> Iterator[tuple[str, FullEntry]]:
        reshard(self.model)
        return full_entries(self.model, self.optimizer, keep=self.rank == 0)

    def export(self, folder: Path, *, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
        reshard(self.model)
        export_model(folder, self.model, tokenizer=tokenizer, dtype=dtype, is_writer=self.rank == 0)
