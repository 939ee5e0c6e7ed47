"""Random Llamas of a published shape, in no more memory than an engine makes of them, and what of the device's memory they may have."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from perf._workload import SHAPES
from soul.models.stored import StoredModel
from soul.models.tiny import TinyConfig
from soul.plan import ModelShape, shape_of

POSITIONS = 1024
SCALE = 0.02


class RandomWeights(Mapping[str, Tensor]):
    """Draws a parameter each time it is asked for, always the same one: a model that is nowhere as a whole but in its engine."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device, seed: int) -> None:
        self._shapes, self._device, self._seed = shapes, device, seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:  # norms
            return torch.ones(shape, device=self._device)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:7]))
        return torch.randn(shape, device=self._device, generator=generator).mul_(SCALE)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def random_model(name: str, tokenizer: PreTrainedTokenizerFast, *, device: torch.device, seed: int) -> StoredModel:
    """As a model in files comes to an engine: a skeleton, and weights to be had one at a time."""
    config = llama_config(name, tokenizer)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    skeleton.model.rotary_emb = LlamaRotaryEmbedding(config)  # frequencies are computed, not drawn
    skeleton.config.use_cache = False
    shapes = {key: parameter.shape for key, parameter in skeleton.named_parameters()}
    return StoredModel(skeleton.eval(), RandomWeights(shapes, device, seed))


def llama_config(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    sizes: dict[str, Any] = _tiny_sizes(tokenizer) if name == "tiny" else SHAPES[name]
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return LlamaConfig(**sizes, **ids, max_position_embeddings=POSITIONS)


def _tiny_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The demo's Llama."""
    tiny = TinyConfig()
    heads = {"num_attention_heads": tiny.num_heads, "num_key_value_heads": tiny.num_heads, "num_hidden_layers": tiny.num_layers}
    widths = {"hidden_size": tiny.hidden_size, "intermediate_size": tiny.intermediate_size, "vocab_size": len(tokenizer)}
    return {**heads, **widths, "tie_word_embeddings": True}


def shape_of_skeleton(skeleton: nn.Module) -> ModelShape:
    config: Any = skeleton.config
    return shape_of(skeleton, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, vocab_size=config.vocab_size)


def room(device: torch.device) -> int:
    """Bytes that a model may have: what is free of the card's memory; of a CPU's machine, what it has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
