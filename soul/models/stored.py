"""A model whose weights stay in their files: the skeleton without storage, and the weights read from safetensors one at a time.

Engines ask for one parameter after the other and put each where it belongs, so that no process ever holds all of them but on the device
that is to have them all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from soul.models.load import check_model_folder, load_config, not_loaded

INDEX, SINGLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_config.json"


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


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a hub id is at; None where neither the hub nor its cache on this machine can tell."""
    try:
        file = Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError):  # no such model, no network, no hub id: loading it says which
        return None
    return file.parent.name if file.parent.parent.name == "snapshots" else None


def stored_model(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> StoredModel | None:
    """The model in a folder or on the hub, or None where files and parameters do not match one to one (weights that transformers
    converts when it loads them, quantised ones, adapters): such a model has to be loaded whole.

    Raises:
        InputError: the model is missing, is no causal language model, or its files cannot be read.
    """
    check_model_folder(name_or_path)
    config = load_config(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        return None
    try:
        folder = Path(name_or_path)
        if not folder.exists():
            folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=["*.json", "model*.safetensors"]))
        files = {} if (folder / ADAPTER).is_file() else _files_of_tensors(folder)
        if not files:
            return None
        with parameters_without_storage():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        model.config.use_cache = False
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        places = _places_of_parameters(model, files)
        return None if places is None or not _fill_buffers(model, files) else StoredModel(model.eval(), StoredWeights(places))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise not_loaded(name_or_path, error) from error


def in_memory(model: nn.Module | StoredModel, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The model with its weights on `device`, whichever way it came. One that is stored is read straight to it, as `dtype` if given."""
    if isinstance(model, nn.Module):
        return model.to(device)
    names = {parameter: name for name, parameter in model.skeleton.named_parameters()}

    def read(parameter: nn.Parameter) -> Tensor:
        return model.weights[names[parameter]].detach().to(device, dtype, copy=True)

    give_storage(model.skeleton, read, device=device)
    return model.skeleton


def give_storage(model: nn.Module, value_of: Callable[[nn.Parameter], Tensor], *, device: torch.device | str) -> None:
    """Put `value_of(parameter)` in the place of each parameter without storage, one tensor for those that are tied; move the buffers."""
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for owner in model.modules():
        for key, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                if parameter not in filled:
                    filled[parameter] = nn.Parameter(value_of(parameter), requires_grad=parameter.requires_grad)
                setattr(owner, key, filled[parameter])
        for key, buffer in owner.named_buffers(recurse=False):
            setattr(owner, key, buffer.to(device))


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor; empty where the folder has another layout than transformers writes."""
    if (folder / SINGLE).is_file():  # which transformers' loader prefers
        with safe_open(folder / SINGLE, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), folder / SINGLE)
    if not (folder / INDEX).is_file():
        return {}
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    files = {key: folder / file for key, file in weight_map.items()}
    return files if all(file.is_file() for file in set(files.values())) else {}


@contextmanager
def parameters_without_storage() -> Iterator[None]:
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
        if any(not _same_in_files(files, found[0], name) for name in found[1:]):
            return None  # transformers does not tie what differs
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


def _same_in_files(files: Mapping[str, Path], one: str, other: str) -> bool:
    with safe_open(files[one], framework="pt") as some, safe_open(files[other], framework="pt") as more:
        return torch.equal(some.get_tensor(one), more.get_tensor(other))


def _shape_in(file: Path, key: str) -> tuple[int, ...]:
    with safe_open(file, framework="pt") as tensors:
        shape: Any = tensors.get_slice(key).get_shape()
    return tuple(shape)
