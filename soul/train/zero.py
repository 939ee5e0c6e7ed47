"""Where ZeRO keeps what: the fp32 weights and optimizer state of each parameter that are on this rank, for all stages.

Every stage flattens parameters and cuts the result: stages 1 and 2 each group of parameters, stage 3 each parameter. A rank's share
of a parameter is one run of its elements either way. DeepSpeed's own accessors are not used: they are collective, miss the state of
all groups but the first until it is stepped, and gather whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soul.train.fragments import Fragment


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's run of one parameter: `numel` elements from `start`, which lie in the flat fp32 tensor `flat` from `flat_start`.

    `flat` is what the optimizer steps and keys its state by; None where the rank has no element.
    """

    shape: tuple[int, ...]
    start: int = 0
    numel: int = 0
    flat: Tensor | None = None
    flat_start: int = 0

    def of(self, flat: Tensor | None) -> Tensor:
        """The run in `flat`, which is the weights' tensor or one of the state's; a view."""
        return torch.empty(0) if flat is None else flat.detach()[self.flat_start : self.flat_start + self.numel]


def flat_partitions(zero: Any) -> list[Tensor]:
    """What the optimizer steps on this rank: a flat fp32 tensor per group (stages 1 and 2) or sub-group (stage 3)."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            found: list[Tensor] = list(getattr(zero, name))
            return found
    raise AssertionError(f"{type(zero).__name__} is no ZeRO optimizer of DeepSpeed 0.19")


def shares(zero: Any, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Share]:
    """Each trained parameter's share of this rank."""
    flats = flat_partitions(zero)
    return {p: _share_of_partition(zero, p, flats) if hasattr(p, "ds_id") else _share_of_group(p, flats) for p in parameters}


def _share_of_partition(zero: Any, parameter: Any, flats: list[Tensor]) -> Share:
    """Stage 3: every rank has an equal part, the last one padded."""
    group, flat_start, length = zero.grad_position[zero.get_param_id(parameter)]
    start = min(dist.get_rank() * length, parameter.ds_numel)
    numel = min(length, parameter.ds_numel - start)
    return Share(tuple(parameter.ds_shape), start, numel, flats[group] if numel else None, flat_start)


def _share_of_group(parameter: Any, flats: list[Tensor]) -> Share:
    """Stages 1 and 2: the overlap of the parameter with the rank's part of its group, if any."""
    link = parameter._hp_mapping
    if link is None:
        return Share(tuple(parameter.shape))
    run, place = link.lp_fragment_address, link.hp_fragment_address
    return Share(tuple(parameter.shape), run.start, run.numel, flats[link.param_group_index], place.start)


def refresh_weights(zero: Any) -> None:
    """Bring the model's weights in line with the fp32 ones, after those were written. Collective."""
    if not hasattr(zero, "fp16_groups"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for i in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(i)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def named_fragments(model: nn.Module, optimizer: torch.optim.Optimizer, found: dict[nn.Parameter, Share]) -> dict[str, Tensor]:
    """Every tensor a run needs to continue, under the names that `soul.train.state` gives them."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, nn.Parameter):
            tensors[f"model/{name}"] = value
        elif value in found:
            share = found[value]
            tensors[f"model/{name}"] = Fragment(share.of(share.flat), start=share.start, shape=share.shape)
    keys = state_keys(optimizer)
    for name, parameter in model.named_parameters():
        for key in keys if parameter in found else ():
            tensors[f"{key}/{name}"] = _state_fragment(optimizer, found[parameter], key)
    return tensors


def _state_fragment(optimizer: torch.optim.Optimizer, share: Share, key: str) -> Tensor:
    """One state tensor of a parameter; a scalar (AdamW's step) is whole wherever there is a share, and empty elsewhere."""
    flat = None if share.flat is None else optimizer.state[share.flat][key]
    if _is_scalar(optimizer, key):
        return Fragment(torch.empty(0) if flat is None else flat.view(1), start=0, shape=())
    return Fragment(share.of(flat), start=share.start, shape=share.shape)


def state_keys(optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's state tensors, which exist for every flat partition."""
    state: dict[str, Any] = next(iter(optimizer.state.values()))
    return [key for key, value in state.items() if isinstance(value, Tensor)]


def _is_scalar(optimizer: torch.optim.Optimizer, key: str) -> bool:
    return bool(next(iter(optimizer.state.values()))[key].dim() == 0)


def gather(local: Tensor, *, start: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A whole tensor from the ranks' runs of it. Collective; the same on every rank."""
    whole = torch.zeros(shape, dtype=torch.float32, device=device)
    whole.view(-1)[start : start + local.numel()] = local.to(device)
    dist.all_reduce(whole)
    return whole


def full_states(
    model: nn.Module, optimizer: torch.optim.Optimizer, found: dict[nn.Parameter, Share], device: torch.device
) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """Name, whole weights and whole state of each trained parameter, one at a time. Collective."""
    keys = state_keys(optimizer)
    for name, parameter in model.named_parameters():
        if parameter not in found:
            continue
        share = found[parameter]
        state = {}
        for key in keys:
            flat = None if share.flat is None else optimizer.state[share.flat][key]
            if _is_scalar(optimizer, key):
                value = torch.zeros((), device=device) if flat is None else flat.to(device, copy=True)
                dist.all_reduce(value, op=dist.ReduceOp.MAX)
                state[key] = value
            else:
                state[key] = gather(share.of(flat), start=share.start, shape=share.shape, device=device)
        yield name, gather(share.of(share.flat), start=share.start, shape=share.shape, device=device), state
