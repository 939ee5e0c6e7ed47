"""What engines of several ranks ask of the process group, which Ray Train, torchrun or a test made before them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from soul.device import torch_device
from soul.train.engine import EngineConfig


def join_group(config: EngineConfig, rank: int, world: int, local_rank: int) -> torch.device:
    """Check that this process is rank `rank` of a group of `world`; returns its device, made current."""
    assert dist.is_initialized(), (
        "an engine of several ranks needs a process group: start it with Ray Train, torchrun or init_process_group"
    )
    found = (dist.get_rank(), dist.get_world_size())
    assert found == (rank, world), f"the engine was made for rank {rank} of {world}, the process group says rank {found[0]} of {found[1]}"
    device = torch_device(config.runs_on, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def sum_over_ranks(tensor: Tensor, device: torch.device) -> Tensor:
    """A new tensor on `device`, the same on every rank."""
    total = tensor.detach().to(device, copy=True)
    dist.all_reduce(total)
    return total


def first_of_ranks(text: str | None) -> str | None:
    """The first rank's text that has one, the same on every rank: what went wrong somewhere stops all of them. A barrier, too."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return text
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return next((found for found in texts if found is not None), None)
