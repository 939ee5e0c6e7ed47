"""Loading and saving Hugging Face causal language models: a folder or a hub id in, a safetensors folder out."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

if not torch.cuda.is_available():  # what a library says of itself; nothing is decided here
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which says on stdout that it found no GPU
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from soul.models.hashes import record_hashes
from soul.records import InputError


def check_model_folder(name_or_path: str) -> None:
    """Refuse a local folder that cannot be loaded safely, before anything expensive starts. Hub ids pass.

    Raises:
        InputError: not a folder, no config.json, or weights that are not safetensors.
    """
    path = Path(name_or_path)
    looks_local = path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1
    if not path.exists():
        if looks_local:
            raise InputError(f"model folder {name_or_path} does not exist. Pass a folder with config.json and *.safetensors, or a hub id.")
        return
    if not (path / "config.json").is_file():
        raise InputError(f"model folder {path} has no config.json. Pass a Hugging Face model folder (save_pretrained writes one).")
    if not any(path.glob("*.safetensors")):
        pickled = sorted(item.name for item in path.glob("*.bin"))
        found = f"only pickled weights ({', '.join(pickled[:3])})" if pickled else "no weights"
        raise InputError(
            f"model folder {path} has {found}, expected *.safetensors. Convert it with save_pretrained (safetensors is its default)."
        )


def check_weights(name_or_path: str) -> None:
    """Refuse a local folder whose weights are cut short or no safetensors, from their headers alone. Hub ids pass.

    Raises:
        InputError: names the file.
    """
    for file in sorted(Path(name_or_path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # the header says how long the file should be
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is no whole safetensors file ({_first_line(error)}). Copy or download it again.") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws a progress bar for every load and save; a run has its own."""
    were_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            transformers_logging.enable_progress_bar()


def load_tokenizer(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        InputError: it cannot be found or read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"no tokenizer could be loaded from {name_or_path} ({type(error).__name__}): {_first_line(error)}") from error
    return tokenizer


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> PreTrainedModel:
    """Weights from safetensors only, in `dtype`, on the CPU, dropout off. `attention`: None is the best that the architecture has.

    Raises:
        InputError: the model is missing, is no causal language model, or has no safetensors weights.
    """
    check_model_folder(name_or_path)
    config = load_config(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    try:
        with _without_bars():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                config=config,
                revision=revision,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                attn_implementation=attention,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise not_loaded(name_or_path, error) from error
    model.config.use_cache = False
    return model


def load_config(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's own config, dropout off.

    Raises:
        InputError: it is missing, or of a kind that transformers does not know.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise not_loaded(name_or_path, error) from error
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "dropout"):
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    return config


def not_loaded(name_or_path: str, error: Exception) -> InputError:
    """What to raise of a model that cannot be read."""
    return InputError(f"no causal language model could be loaded from {name_or_path} ({type(error).__name__}): {_first_line(error)}")


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    state: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `folder` so that it appears whole or not at all; `state` replaces the model's own weights, cast to `dtype`.

    A folder that is there already is replaced once the new one is complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if state is None else state
    if dtype is not None:
        weights = _cast(weights, dtype)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as parent:
        staging, old = Path(parent) / "new", Path(parent) / "old"
        staging.mkdir()
        with _without_bars():
            model.save_pretrained(staging, state_dict=weights)
        config = copy.deepcopy(model.config)
        config.use_cache, config.dtype = True, dtype or config.dtype
        config.save_pretrained(staging)  # over the one of training, which names the type that the weights have in memory
        tokenizer.save_pretrained(staging)
        record_hashes(staging)
        if folder.exists():
            os.replace(folder, old)
        os.replace(staging, folder)


def _cast(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating-point weights in `dtype`; what was one tensor under two names (tied weights) stays one."""
    done: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for value in weights.values():
        done.setdefault((value.data_ptr(), value.shape), value.to(dtype) if value.is_floating_point() else value)
    return {name: done[value.data_ptr(), value.shape] for name, value in weights.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
