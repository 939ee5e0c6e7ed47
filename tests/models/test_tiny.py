"""The tiny model and its tokenizer are functions of their inputs, and leave the global random state alone."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul.models.tiny import BOS, EOS, PAD, TinyConfig, tiny_model, tiny_tokenizer

TEXTS = [
    "Question: Where was Ada Lind born?\nAnswer:",
    " Ada Lind was born in Bergen, Norway.",
    " naïve – 東京",
    "Question: Which prize?\nAnswer:",
]
SHAPE = TinyConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, vocab_size=300, max_length=32)


def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(TEXTS, 300)


def weights_digest(model: LlamaForCausalLM) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def made_here() -> list[str]:
    tokens = tokenizer()
    return [weights_digest(tiny_model(SHAPE, tokens, seed=3)), hashlib.sha256(tokens.backend_tokenizer.to_str().encode()).hexdigest()]


def test_weights_follow_from_config_and_seed() -> None:
    torch.manual_seed(1)
    first = weights_digest(tiny_model(SHAPE, tokenizer(), seed=3))
    torch.manual_seed(2)
    assert weights_digest(tiny_model(SHAPE, tokenizer(), seed=3)) == first
    assert weights_digest(tiny_model(SHAPE, tokenizer(), seed=4)) != first


def test_another_process_makes_the_same_model_and_tokenizer() -> None:
    script = "from tests.models.test_tiny import made_here; print(*made_here())"
    output = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": "5"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.split() == made_here()


def test_global_random_states_are_left_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    tiny_model(SHAPE, tokenizer(), seed=9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert repr(np.random.get_state()) == before[2]


def test_the_model_has_the_shape_of_its_config() -> None:
    model, tokens = tiny_model(SHAPE, tokenizer(), seed=0), tokenizer()
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads) == (16, 24, 1, 2)
    assert config.vocab_size == len(tokens) <= 300
    assert config.max_position_embeddings == 32
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (
        tokens.pad_token_id,
        tokens.bos_token_id,
        tokens.eos_token_id,
    )
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_any_text_survives_the_tokenizer() -> None:
    tokens = tokenizer()
    assert tokens.convert_ids_to_tokens([0, 1, 2]) == [PAD, BOS, EOS]
    for text in [*TEXTS, "words it never saw: Ğ 🙂\t\n", ""]:
        assert tokens.decode(tokens.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(("hidden_size", "num_heads"), [(10, 4), (12, 4), (16, 3)])
def test_heads_that_do_not_divide_the_width_are_refused(hidden_size: int, num_heads: int) -> None:
    with pytest.raises(ValidationError, match=rf"hidden_size must be a multiple of {2 * num_heads}.* got {hidden_size}"):
        TinyConfig(hidden_size=hidden_size, num_heads=num_heads)


@pytest.mark.parametrize("settings", [{"vocab_size": 258}, {"num_layers": 0}, {"layers": 2}, {"name": "small"}])
def test_other_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        TinyConfig.model_validate(settings)
