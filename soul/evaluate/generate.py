"""Greedy answers, many prompts at a time, with a KV cache.

A batch is padded on the left and ends when its last row has emitted EOS or the cap is reached. A model that unlearning has broken
often never emits EOS: every row then costs the whole cap, ten times what a good model needs, and that is the price of an honest ROUGE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from soul.evaluate.likelihood import evaluation_mode
from soul.records import InputError


def stop_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's EOS, and the end-of-turn tokens that chat models name beside it."""
    named = generation.eos_token_id if generation is not None else None
    ids = named if isinstance(named, list) else [named]
    return tuple(sorted({token for token in [tokenizer.eos_token_id, *ids] if isinstance(token, int)}))


def stop_ids_of(folder: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """As `stop_ids`, from the folder's (or hub id's) generation config, without loading the weights."""
    try:
        generation = GenerationConfig.from_pretrained(folder, **(options or {}))
    except OSError:  # it has none: EOS alone ends an answer
        generation = None
    return stop_ids(generation, tokenizer)


def check_room(prompts: Sequence[Sequence[int]], *, max_new_tokens: int, positions: int) -> None:
    """Refuse prompts that leave no room for the answer, before anything is generated.

    Raises:
        InputError: the longest prompt and the cap exceed the model's positions.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + max_new_tokens > positions:
        raise InputError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, but the model has {positions} positions. "
            f"Lower max_new_tokens to {max(positions - longest, 0)} or less."
        )


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    device: torch.device,
) -> list[tuple[int, ...]]:
    """The greedy continuation of every prompt, without its EOS and what follows. Settings saved with the model do not apply."""
    length = max(len(prompt) for prompt in prompts)
    input_ids_BT = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    mask_BT = torch.zeros_like(input_ids_BT)
    for b, prompt in enumerate(prompts):
        input_ids_BT[b, length - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask_BT[b, length - len(prompt) :] = 1
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad_id, eos_token_id=list(eos_ids)
    )
    generator: Any = model  # the generation methods are mixed in by the concrete class
    with evaluation_mode(model), _own_settings(model):
        output = generator.generate(input_ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=config)
    assert isinstance(output, torch.Tensor)  # a config without return_dict_in_generate
    return [_until(row, eos_ids) for row in output[:, length:].tolist()]


@contextmanager
def _own_settings(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model's saved generation settings (repetition penalty, ...) do not fill what our config leaves unset."""
    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved


def _until(tokens: list[int], eos_ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens before the first EOS; padding only ever stands behind one."""
    end = next((position for position, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tuple(tokens[:end])


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
