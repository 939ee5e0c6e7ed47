"""A model whose weights stay in their files: the skeleton without storage, and the weights read from safetensors one at a time.

What shards a model asks for one parameter after the other, so that no process ever holds all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from soul.models.load import check_model_folder, load_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class StoredModel:
    """`skeleton`: parameters on the meta device, buffers in memory. `weights`: parameters by name, as float32."""

    skeleton: nn.Module
    weights: Mapping[str, Tensor]


BuildModel = Callable[[], nn.Module | StoredModel]


class StoredWeights(Mapping[str, Tensor]):
    """Reads a parameter each time it is asked for. `places`: parameter name -> file and the tensor's name in it."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._places[name]
        with safe_open(file, framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(key)
        return value.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def stored_model(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> StoredModel | None:
    """The model in a folder or on the hub, or None where files and parameters do not match one to one (weights that transformers
    converts when it loads them, quantised ones): such a model has to be loaded whole.

    Raises:
        InputError: the model is missing, or is no causal language model.
    """
    check_model_folder(name_or_path)
    config = load_config(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        return None
    folder = Path(name_or_path)
    if not folder.exists():
        folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    files = _files_of_tensors(folder)
    with _parameters_without_storage():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.config.use_cache = False
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    places = _places_of_parameters(model, files)
    return None if places is None or not _fill_buffers(model, files) else StoredModel(model.eval(), StoredWeights(places))


def in_memory(model: nn.Module | StoredModel) -> nn.Module:
    """The model with its weights, whichever way it came."""
    if isinstance(model, nn.Module):
        return model
    filled: dict[nn.Parameter, nn.Parameter] = {}
    names = {parameter: name for name, parameter in model.skeleton.named_parameters()}
    for owner in model.skeleton.modules():
        for key, parameter in owner.named_parameters(recurse=False):
            if parameter not in filled:
                filled[parameter] = nn.Parameter(model.weights[names[parameter]], requires_grad=parameter.requires_grad)
            setattr(owner, key, filled[parameter])
    return model.skeleton


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor; empty where the folder has another layout than transformers writes."""
    if (folder / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        return {key: folder / file for key, file in weight_map.items()}
    if not (folder / SINGLE).is_file():
        return {}
    with safe_open(folder / SINGLE, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), folder / SINGLE)


@contextmanager
def _parameters_without_storage() -> Iterator[None]:
    """While open, modules register their parameters on the meta device; buffers, which no file may hold, are computed as ever."""
    register = nn.Module.register_parameter

    def register_without_storage(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one that is tied comes a second time
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_without_storage  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _places_of_parameters(model: nn.Module, files: Mapping[str, Path]) -> dict[str, tuple[Path, str]] | None:
    """Where each parameter lies, under its own name or one it is tied to; None if one is nowhere, or of another shape."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    places: dict[str, tuple[Path, str]] = {}
    for parameter, own in names.items():
        found = [name for name in own if name in files]
        if not found or _shape_in(files[found[0]], found[0]) != tuple(parameter.shape):
            return None
        places[own[0]] = (files[found[0]], found[0])
    return places


def _fill_buffers(model: nn.Module, files: Mapping[str, Path]) -> bool:
    """Read the buffers that are saved with a model; False if one is missing."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, buffer in model.state_dict(keep_vars=True).items():
        if name in parameters:
            continue
        if name not in files or _shape_in(files[name], name) != tuple(buffer.shape):
            return False
        with safe_open(files[name], framework="pt") as tensors:
            buffer.copy_(tensors.get_tensor(name))
    return True


def _shape_in(file: Path, key: str) -> tuple[int, ...]:
    with safe_open(file, framework="pt") as tensors:
        shape: Any = tensors.get_slice(key).get_shape()
    return tuple(shape)
