from __future__ import annotations

import pytest
import torch
from eval_records import CPU
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from soul.data.chat import ChatFormat
from soul.evaluate.generate import check_room, decode, generate_batch, stop_ids
from soul.evaluate.likelihood import plan_batches
from soul.records import InputError, Record

CAP = 24


@pytest.fixture(scope="module")
def prompts(splits: dict[str, list[Record]], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [ChatFormat("plain").prompt_ids(record.prompt, tokenizer) for split in splits.values() for record in split]


def one_by_one(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: list[int], eos_ids: list[int]) -> str:
    """Hugging Face's own generation of a single prompt, nothing padded."""
    output = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=CAP, eos_token_id=eos_ids, pad_token_id=tokenizer.pad_token_id
    )
    return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
def test_batched_generation_equals_one_by_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], batch_tokens: int
) -> None:
    first = generate_batch(model, prompts, pad_id=tokenizer.pad_token_id, eos_ids=(), max_new_tokens=CAP, device=CPU)
    # name a token as EOS that ends the answers at as many different places as possible
    frequent = max(
        {token for answer in first for token in answer},
        key=lambda token: (len({answer.index(token) for answer in first if token in answer}), token),
    )
    eos_ids = [tokenizer.eos_token_id, frequent]
    answers: dict[int, tuple[int, ...]] = {}
    for batch in plan_batches([len(prompt) + CAP for prompt in prompts], batch_tokens):
        rows = [prompts[i] for i in batch]
        answers.update(
            zip(
                batch,
                generate_batch(model, rows, pad_id=tokenizer.pad_token_id, eos_ids=eos_ids, max_new_tokens=CAP, device=CPU),
                strict=True,
            )
        )
    lengths = {len(answer) for answer in answers.values()}
    assert len(lengths) > 1 and all(frequent not in answer for answer in answers.values()), "some rows must stop before the others"
    for position, prompt in enumerate(prompts):
        expected = one_by_one(model, tokenizer, prompt, eos_ids)
        stop = decode(tokenizer, [frequent])
        assert decode(tokenizer, answers[position]) == expected.removesuffix(stop).strip()


def test_settings_saved_with_the_model_do_not_apply(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    plain = generate_batch(model, prompts[:3], pad_id=tokenizer.pad_token_id, eos_ids=(2,), max_new_tokens=CAP, device=CPU)
    saved = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, max_length=20)
    try:
        assert generate_batch(model, prompts[:3], pad_id=tokenizer.pad_token_id, eos_ids=(2,), max_new_tokens=CAP, device=CPU) == plain
        assert model.generation_config.repetition_penalty == 9.0
    finally:
        model.generation_config = saved


def test_stop_ids_join_the_models_and_the_tokenizers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    saved = model.generation_config
    try:
        model.generation_config = GenerationConfig(eos_token_id=[7, 5])
        assert stop_ids(model.generation_config, tokenizer) == tuple(sorted({5, 7, tokenizer.eos_token_id}))
        model.generation_config = GenerationConfig()
        assert stop_ids(model.generation_config, tokenizer) == (tokenizer.eos_token_id,)
    finally:
        model.generation_config = saved


def test_a_prompt_without_room_is_refused_with_the_number_that_would_fit() -> None:
    check_room([[1] * 10], max_new_tokens=6, positions=16)
    with pytest.raises(InputError, match="Lower max_new_tokens to 6"):
        check_room([[1] * 3, [1] * 10], max_new_tokens=7, positions=16)
