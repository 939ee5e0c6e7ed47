"""What every engine does alike: the precision of a forward, and what becomes of gradients that are summed over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from soul.optim.base import local_shard
from soul.optim.sophia import Mode, SophiaG
from soul.train.engine import EngineConfig, Precision, StepInfo


def forward_context(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 autocast over fp32 weights, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def kept_dtype(precision: Precision) -> torch.dtype | None:
    """The type that weights are kept in, if it is not the model's own."""
    return torch.bfloat16 if precision == "pure_bf16" else None


def store_weights(model: nn.Module, precision: Precision) -> nn.Module:
    """The model, its parameters in the type they are kept in; buffers stay as they are (rotary frequencies do not survive bf16)."""
    if precision == "pure_bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


def optimized_shards(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The rank's part of what the optimizer steps."""
    return [local_shard(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def enable_checkpointing(model: nn.Module, config: EngineConfig) -> None:
    """Have the model's blocks recompute their activations, if the config asks for it."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def clip_gradients(model: nn.Module, *, max_norm: float | None) -> float:
    """Clip the global gradient norm; returns what it was. Collective where parameters are sharded."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf") if max_norm is None else max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, *, max_norm: float | None) -> StepInfo:
    """Clip, update the weights, drop the gradients."""
    norm = clip_gradients(model, max_norm=max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepInfo(grad_norm=norm)


def run_as(optimizer: torch.optim.Optimizer, mode: Mode) -> None:
    """What Sophia does with gradients in this mode; drop them."""
    assert isinstance(optimizer, SophiaG)
    with optimizer.doing(mode):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
