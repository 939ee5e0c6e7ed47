"""Exact checkpoints, one format for every engine: `torch.distributed.checkpoint` of named tensors, plus `extra.json`.

Tensors are keyed by the parameter's own name (`model/NAME`, `exp_avg/NAME`, ...), so a checkpoint can be read back by another
engine or at another world size: the library reshards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from soul.optim.base import ShardOptimizer
from soul.train.engine import FullEntry, unwrap

EXTRA = "extra.json"


def named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor a run needs to continue: parameters, buffers kept in checkpoints, and the optimizer's state."""
    inner = unwrap(model)
    found = inner.state_dict(keep_vars=True).items()
    kept = {name: value for name, value in found if isinstance(value, Tensor) and not _is_frozen(value)}
    tensors = {f"model/{name}": value.detach() for name, value in kept.items()}
    for name, parameter in inner.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
    return tensors


def _is_frozen(value: Tensor) -> bool:
    """A parameter that is not trained; the model that a run starts from has it."""
    return isinstance(value, nn.Parameter) and not value.requires_grad


def materialise_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor] | None = None) -> None:
    """Create the zero state of `parameters` (None: of all groups') if it is missing, so that a checkpoint can be loaded in place."""
    if parameters is None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, ShardOptimizer):
        optimizer.init_state(parameters)
        return
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    on_device = any(group["fused"] or group["capturable"] for group in optimizer.param_groups)
    for parameter in parameters:
        if parameter.requires_grad and not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if on_device else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]) -> None:
    """Write this rank's tensors into `folder`, and rank 0 `extra`."""
    materialise_state(optimizer)
    save_tensors(folder, named_tensors(model, optimizer), extra)


def save_tensors(folder: Path, tensors: dict[str, Tensor], extra: Mapping[str, Any]) -> None:
    """Write this rank's tensors into `folder`; rank 0 adds the metadata and `extra`, last."""
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXTRA).unlink(missing_ok=True)  # written over, the folder is incomplete until the end
    dcp.save(tensors, checkpoint_id=str(folder), no_dist=not distributed)
    if not distributed or dist.get_rank() == 0:
        staging = folder / f".{EXTRA}"
        staging.write_text(json.dumps(dict(extra), sort_keys=True))
        os.replace(staging, folder / EXTRA)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill model and optimizer in place from a folder written by any engine; returns `extra`.

    Raises:
        FileNotFoundError: the folder holds no complete checkpoint.
    """
    materialise_state(optimizer)
    return load_tensors(folder, named_tensors(model, optimizer))


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors` in place, as `load_state` does.

    Raises:
        FileNotFoundError: the folder holds no complete checkpoint.
    """
    if not (folder / EXTRA).is_file() or not (folder / ".metadata").is_file():
        raise FileNotFoundError(f"{folder} holds no complete checkpoint (expected .metadata and {EXTRA})")
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    dcp.load(tensors, checkpoint_id=str(folder), no_dist=not distributed)
    extra: dict[str, Any] = json.loads((folder / EXTRA).read_text())
    return extra


def full_entries(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool) -> Iterator[tuple[str, FullEntry]]:
    """Each parameter with its state, gathered from its shards; `keep` is true on the rank that wants the values."""

    def whole(tensor: Tensor) -> Tensor:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.detach().cpu() if keep else torch.empty(0)

    for name, parameter in unwrap(model).named_parameters():
        state = {key: whole(value) for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)}
        yield name, FullEntry(whole(parameter), state)
