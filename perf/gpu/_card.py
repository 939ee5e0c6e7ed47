"""What the scripts for one card share: its flags, random Llamas drawn where they are used, a report with a head."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from perf._measure import Comparison, table
from perf._workload import SHAPES
from soul.device import torch_device
from soul.models.stored import StoredModel, in_memory, parameters_without_storage
from soul.plan import ModelShape, shape_of
from soul.records import InputError

TINY = {"hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 4000}
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {**TINY, "tie_word_embeddings": True},  # 0.9 M, the demo's
    "135m": {**SMALL, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": SHAPES["1b"],  # 1.2 G
    "7b": SHAPES["7b"],  # 6.7 G
}
POSITIONS = 2048


class RandomWeights(Mapping[str, Tensor]):
    """Draws a parameter each time it is asked for, on the device: the same numbers for the same seed, whoever asks and how often."""

    def __init__(self, shapes: Mapping[str, torch.Size], *, seed: int, device: torch.device) -> None:
        self._shapes, self._seed, self._device = dict(shapes), seed, device

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self._device)
        generator = torch.Generator(self._device).manual_seed(self._seed * 2**32 + zlib.crc32(name.encode()))
        return torch.empty(shape, device=self._device).normal_(0.0, 0.02, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def random_llama(name: str, *, seed: int, device: torch.device) -> StoredModel:
    """A Llama of one of `MODELS`, which engines fill parameter by parameter."""
    sizes = {**MODELS[name], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": POSITIONS}
    with parameters_without_storage():
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.config.use_cache = False
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    return StoredModel(model, RandomWeights(shapes, seed=seed, device=device))


def loaded_llama(name: str, *, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    """The same model with its weights on the device, to evaluate or serve."""
    source = random_llama(name, seed=seed, device=device)
    return in_memory(source, device=device, dtype=dtype).eval().requires_grad_(False)


def shape(name: str) -> ModelShape:
    sizes = {key: MODELS[name][key] for key in ("hidden_size", "intermediate_size", "vocab_size")}
    return shape_of(random_llama(name, seed=0, device=torch.device("cpu")).skeleton, **sizes)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu shows that a script runs, and no speed [default: gpu]")
    parser.add_argument("--models", default="", metavar="NAME,...", help=f"of {','.join(MODELS)} [default: all that fit]")
    parser.add_argument("--rounds", type=int, default=5, help="paired repetitions [default: 5]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and rows [default: 0]")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    return parser


def begin(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """The flags, and the device they ask for; without it one line and exit 2, never another device."""
    options = parser.parse_args(argv)
    try:
        device = torch_device(options.device)
    except InputError as error:
        refuse(str(error))
    if options.device == "gpu" and device.type != "cuda":
        refuse("--device gpu, but SOUL_COMPUTE keeps tensors on the CPU. Unset it, or choose --device cpu.")
    chosen = options.models.split(",") if options.models else list(MODELS)
    unknown = sorted(set(chosen) - MODELS.keys())
    if unknown:
        refuse(f"--models is {options.models!r}, expected some of {','.join(MODELS)}")
    if options.rounds < 1:
        refuse(f"--rounds must be at least 1, got {options.rounds}")
    options.models = chosen
    torch.manual_seed(options.seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return options, device


def refuse(why: str) -> Any:
    print(" ".join(why.split()), file=sys.stderr)
    raise SystemExit(2)


def memory_bytes(device: torch.device) -> int:
    """Of the card, or of the machine where the CPU stands in."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def head(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a number means nothing without."""
    on_gpu = device.type == "cuda"
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {
        "is_performance": on_gpu,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU: a check that the script runs, no speed",
        "memory_bytes": memory_bytes(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "tf32": torch.get_float32_matmul_precision() != "highest",
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "flags": flags,
    }


def _commit() -> str | None:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


class Report:
    """What a script prints and writes; written anew after every part, so that a long run that is ended leaves what it has."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._file: Path | None = options.json
        self._found: dict[str, Any] = {"head": head(options, device), "comparisons": [], "measured": [], "skipped": []}
        print(json.dumps(self._found["head"], indent=1), flush=True)

    def skip(self, what: str, why: str) -> None:
        print(f"\nSKIPPED {what}: {why}", flush=True)
        self._found["skipped"].append({"what": what, "why": why})
        self._write()

    def add(self, comparisons: Sequence[Comparison], measured: Sequence[Mapping[str, Any]]) -> None:
        print(f"\n{table(comparisons)}", flush=True)
        for row in measured:
            print(
                "    "
                + "  ".join(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}" for name, value in row.items())
            )
        self._found["comparisons"] += [item.to_json() for item in comparisons]
        self._found["measured"] += [dict(row) for row in measured]
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            self._file.write_text(json.dumps(self._found, indent=1) + "\n")
