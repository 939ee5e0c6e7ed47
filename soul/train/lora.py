"""Low-rank adapters (LoRA) through peft: on every linear layer of the blocks, trained instead of the weights, merged when exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from soul.models.stored import StoredModel
from soul.records import InputError
from soul.train.sharding import decoder_blocks

SCALING = 2.0  # alpha / rank
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(model: nn.Module, rank: int, *, seed: int) -> nn.Module:
    """Put adapters beside the linear layers of the blocks, in place, and freeze everything else. They begin as no change at all.

    Raises:
        InputError: peft is not installed, or there is no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("--lora-rank needs the peft package, which is not installed. Install soul-unlearning[peft].") from error
    names = list(_linear_layers(model))
    settings = LoraConfig(r=rank, lora_alpha=round(SCALING * rank), lora_dropout=0.0, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs, which are not restored
        adapted: nn.Module = inject_adapter_in_model(settings, model)
    return adapted


def add_stored_adapters(model: StoredModel, rank: int, *, seed: int) -> StoredModel:
    """As `add_adapters`, with the same adapters: the model's weights stay in their files, the adapters' are in memory."""
    weights = {module: module.get_parameter("weight") for module in _linear_layers(model.skeleton).values()}
    for module, weight in weights.items():  # peft makes adapters on the device of the weight, and theirs are to have values
        module.weight = nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    adapted = add_adapters(model.skeleton, rank, seed=seed)
    for module, weight in weights.items():
        module.weight = weight.requires_grad_(False)
    adapters: dict[str, Tensor] = {}
    for name, parameter in list(adapted.named_parameters()):
        if not parameter.is_meta:
            adapters[name] = parameter.detach()
            owner, _, key = name.rpartition(".")
            setattr(adapted.get_submodule(owner), key, nn.Parameter(adapters[name].to("meta"), requires_grad=parameter.requires_grad))
    return StoredModel(adapted, _AdaptedWeights(model.weights, adapters, [name for name, _ in adapted.named_parameters()]))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While open, the model computes what it would without its adapters, whatever those have become.

    peft's own `enable_adapters` also freezes and thaws them: FSDP2 remembers from its first forward what is to have gradients.
    """
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "_disable_adapters")]
    was = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for layer, value in zip(layers, was, strict=True):
            layer._disable_adapters = value


def merged(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict with adapters as one of the model without: W + scaling x B A. One without adapters as it is."""
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        owner = name.partition(BASE)[0]
        down, up = weights.get(owner + DOWN), weights.get(owner + UP)
        if BASE in name and name.endswith(".weight") and down is not None and up is not None:
            change = SCALING * (up.float() @ down.float())
            turned = owner + BASE.rstrip(".") in transposed
            value = (value.float() + (change.T if turned else change)).to(value.dtype)
        found[name.replace(BASE, ".")] = value
    return found


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the blocks by name.

    Raises:
        InputError: there are none.
    """
    inside = {module for block in decoder_blocks(model) for module in block.modules()}
    layers = model.named_modules()
    found: dict[str, nn.Module] = {name: module for name, module in layers if isinstance(module, nn.Linear | Conv1D) and module in inside}
    if not found:
        raise InputError(f"--lora-rank needs linear layers in the blocks, {type(model).__name__} has none. Remove --lora-rank.")
    return found


class _AdaptedWeights(Mapping[str, Tensor]):
    """Adapters from memory, every other weight from its file, where it has no `base_layer` in its name."""

    def __init__(self, base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self._base, self._adapters, self._names = base, adapters, names

    def __getitem__(self, name: str) -> Tensor:
        return self._adapters[name].detach() if name in self._adapters else self._base[name.replace(BASE, ".")]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
