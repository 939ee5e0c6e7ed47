"""From a model's builder to the model in shards (FSDP2's or ZeRO's), with the whole of it in memory nowhere; or to equal copies (DDP's).

Rank 0 builds the model and sends every rank its skeleton: the pickled module with parameters that have a shape but no storage, and
everything else (buffers, config, ties between parameters) as it is. Block by block, the skeleton then gets storage on the device,
rank 0's values, and is cut into shards, so that a device holds its shards and one whole block at a time. Rank 0 reads the values from
their files when it is a block's turn; only a model that is built some other way is whole on rank 0's CPU meanwhile.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from soul.models.stored import BuildModel, StoredModel, give_storage
from soul.records import InputError


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: the module list that holds the most parameters (experts are lists too, inside a block).

    Raises:
        InputError: the model has no module list.
    """

    def num_parameters(blocks: nn.ModuleList) -> int:
        return sum(parameter.numel() for parameter in blocks.parameters())

    lists: list[nn.ModuleList] = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not lists:
        raise InputError(f"expected a model with a list of decoder blocks, got {type(model).__name__}. Use --engine ddp or single.")
    longest = max(map(num_parameters, lists))
    return list(next(blocks for blocks in lists if num_parameters(blocks) == longest))


def share_model(build_model: BuildModel) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
    """The skeleton of the model that `build_model` gives on rank 0, which alone calls it, and there its parameters; {} elsewhere.

    Raises:
        InputError: on every rank, if `build_model` raises it.
    """
    source = _build_on_rank_zero(build_model)
    if isinstance(source, StoredModel):
        return _share_skeleton(source.skeleton), source.weights
    return _share_skeleton(source), {} if source is None else dict(source.named_parameters())


def fill(
    model: nn.Module,
    values: Mapping[str, torch.Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    shard: Callable[[nn.Module], object],
) -> None:
    """Give a skeleton storage on `device` and rank 0's `values`, as `dtype` if given, unit by unit: each block, then the whole model.

    `shard` is called with every unit once it is filled, and may free most of it.

    Raises:
        InputError: the model has no blocks.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}

    def receive(parameter: nn.Parameter) -> torch.Tensor:
        return _from_rank_zero(parameter, values.get(names[parameter]), device, dtype)

    for unit in (*decoder_blocks(model), model):
        give_storage(unit, receive, device=device)
        shard(unit)  # a block's whole parameters are freed before the next block's are made


def replicate(source: StoredModel, *, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The whole model on every rank's `device`, from the skeleton that each rank has made and the values that rank 0 alone reads."""
    names = {parameter: name for name, parameter in source.skeleton.named_parameters()}

    def receive(parameter: nn.Parameter) -> torch.Tensor:
        value = source.weights[names[parameter]] if dist.get_rank() == 0 else None
        return _from_rank_zero(parameter, value, device, dtype)

    give_storage(source.skeleton, receive, device=device)
    return source.skeleton


def reshard(model: nn.Module) -> None:
    """Free what a forward without backward left whole (the root's parameters), so that names lead to shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _build_on_rank_zero(build_model: BuildModel) -> nn.Module | StoredModel | None:
    """Rank 0's model; None elsewhere. Rank 0's bad input is every rank's, or the others would wait for a model that never comes."""
    source: nn.Module | StoredModel | None = None
    outcome: list[InputError | None] = [None]
    if dist.get_rank() == 0:
        try:
            source = build_model()
        except InputError as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]
    return source


def _share_skeleton(source: nn.Module | None) -> nn.Module:
    """Rank 0's model on every rank, its parameters without storage."""
    payload: list[bytes | None] = [None]
    if source is not None:
        stream = io.BytesIO()
        _SkeletonPickler(stream).dump(source)
        payload[0] = stream.getvalue()
    dist.broadcast_object_list(payload)
    assert payload[0] is not None
    model = pickle.loads(payload[0])
    assert isinstance(model, nn.Module)
    return model


class _SkeletonPickler(pickle.Pickler):
    """Pickles a module without its parameters' values. The memo of a pickle keeps tied parameters tied."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, nn.Parameter):
            return _storageless, (obj.shape, obj.dtype, obj.requires_grad)
        return NotImplemented


def _storageless(shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)


def _from_rank_zero(parameter: nn.Parameter, value: torch.Tensor | None, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """Rank 0's `value` (None on the other ranks) of a storageless parameter, on `device`. Collective."""
    dtype = dtype or parameter.dtype
    whole = torch.empty_like(parameter, device=device, dtype=dtype) if value is None else value.detach().to(device, dtype, copy=True)
    dist.broadcast(whole, src=0)
    return whole
