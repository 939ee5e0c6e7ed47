"""From an engine's model to a Hugging Face folder, whole weights gathered on rank 0 one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from soul.models.load import save_model
from soul.train.engine import unwrap
from soul.train.lora import merged
from soul.train.ranks import first_of_ranks

Gather = Callable[[Tensor], Tensor]


def export_model(folder: Path, model: nn.Module, *, tokenizer: Any, dtype: torch.dtype | None, is_writer: bool) -> None:
    """Write `folder` on the rank with `is_writer`. Collective: whichever rank returns, the folder is complete.

    Raises:
        OSError: it could not be written; on every rank.
    """
    export_weights(folder, unwrap(model), whole_tensor, tokenizer=tokenizer, dtype=dtype, is_writer=is_writer)


def export_weights(folder: Path, model: nn.Module, whole: Gather, *, tokenizer: Any, dtype: torch.dtype | None, is_writer: bool) -> None:
    """As `export_model`, for an unwrapped model whose tensors `whole` makes whole."""
    adapted = any(".lora_" in name for name, _ in model.named_parameters())
    weights = whole_weights(model, whole, keep=is_writer, dtype=None if adapted else dtype)  # adapters are added before rounding
    failure: OSError | SafetensorError | None = None
    if is_writer:
        try:
            save_model(folder, model, tokenizer, state=merged(weights, model), dtype=dtype)  # type: ignore[arg-type]
        except (OSError, SafetensorError) as error:
            failure = error
    told = first_of_ranks(None if failure is None else f"the model cannot be written to {folder}: {failure}")
    if told is not None:
        raise OSError(told) from failure


def whole_tensor(tensor: Tensor) -> Tensor:
    """A DTensor gathered, any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module, whole: Gather, *, keep: bool, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The whole state dict on the CPU of the rank with `keep`; empty elsewhere. Tied parameters are one tensor here too.

    `dtype` is what floating-point tensors are cast to on the way (None: as they are).
    """
    gathered: dict[Tensor, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in gathered:
            value = whole(tensor)
            cast = dtype if value.is_floating_point() else None
            gathered[tensor] = value.detach().to("cpu", dtype=cast) if keep else torch.empty(0)
        if keep:
            weights[name] = gathered[tensor]
    return weights
