"""Low-rank adapters (LoRA) through peft: on every linear layer of the blocks, trained instead of the weights, merged when exported."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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
    inside = {module for block in decoder_blocks(model) for module in block.modules()}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module in inside]
    if not names:
        raise InputError(f"--lora-rank needs linear layers in the blocks, {type(model).__name__} has none. Remove --lora-rank.")
    settings = LoraConfig(r=rank, lora_alpha=round(SCALING * rank), lora_dropout=0.0, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: nn.Module = inject_adapter_in_model(settings, model)
    return adapted


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
