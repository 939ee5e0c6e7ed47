"""From an engine's model to a Hugging Face folder, whole weights gathered on rank 0 one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from soul.models.load import save_model
from soul.train.engine import unwrap


def export_model(folder: Path, model: nn.Module, *, tokenizer: Any, dtype: torch.dtype | None, is_writer: bool) -> None:
    """Write `folder` on the rank with `is_writer`. Collective where parameters are sharded."""
    inner = unwrap(model)
    weights = whole_weights(inner, keep=is_writer, dtype=dtype)
    if is_writer:
        save_model(folder, inner, tokenizer, state=weights, dtype=dtype)  # type: ignore[arg-type]


def whole_weights(model: nn.Module, *, keep: bool, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The whole state dict on the CPU of the rank with `keep`; empty elsewhere. Tied parameters are one tensor here too.

    `dtype` is what floating-point tensors are cast to on the way (None: as they are).
    """
    gathered: dict[Tensor, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in gathered:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            cast = dtype if whole.is_floating_point() else None
            gathered[tensor] = whole.detach().to("cpu", dtype=cast) if keep else torch.empty(0)
        if keep:
            weights[name] = gathered[tensor]
    return weights
