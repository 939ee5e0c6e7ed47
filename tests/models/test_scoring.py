"""Scoring at supervised positions equals gathering from full logits, whatever a model does around its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
)

from soul.batch import Batch, TokenRow, collate
from soul.models.scoring import AnswerLogps, answer_logits, answer_logps, output_head, token_logps
from soul.records import InputError

VOCAB = 97
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(*, tied: bool) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.3))


def gemma2() -> nn.Module:
    config = Gemma2Config(**SHAPE, num_key_value_heads=1, head_dim=12, final_logit_softcapping=2.0, sliding_window=4, initializer_range=0.5)
    return Gemma2ForCausalLM(config)


def mistral() -> nn.Module:
    """Padding longer than the window: these positions have nothing to attend to."""
    return MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=3, initializer_range=0.3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama tied": lambda: llama(tied=True),
    "llama": lambda: llama(tied=False),
    "gemma2 with soft-capped logits": gemma2,
    "mistral with a sliding window": mistral,
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, initializer_range=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)),
}
EACH = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return MODELS[name]().eval()


def ragged(num: int = 5) -> Batch:
    rng = np.random.default_rng(2)
    rows = []
    for i in range(num):
        length = int(rng.integers(3, 17))
        rows.append(("forget", TokenRow(i, rng.integers(3, VOCAB, length).tolist(), int(rng.integers(1, length)))))
    return collate(rows, pad_id=0)


def full_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    output = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
    logits: torch.Tensor = output.logits
    return logits


@EACH
@torch.no_grad()
def test_logits_are_those_of_the_whole_forward(name: str) -> None:
    model, batch = made(name), ragged()
    everywhere = full_logits(model, batch)
    expected = torch.stack([everywhere[b, t] for b, t in batch.supervised_BT.nonzero().tolist()])
    torch.testing.assert_close(answer_logits(model, batch), expected, rtol=1e-5, atol=1e-6)
    if "gemma2" in name:
        assert 1.0 < float(expected.abs().max()) <= 2.0  # the cap is at work


@EACH
def test_the_head_sees_supervised_positions_only_and_is_left_as_it_was(name: str) -> None:
    model, batch, seen = made(name), ragged(), []
    handle = output_head(model).register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    answer_logits(model, batch)
    assert seen == [(1, int(batch.supervised_BT.sum()), VOCAB)]
    assert full_logits(model, batch).shape == (*batch.input_ids_BT.shape, VOCAB)
    handle.remove()


@EACH
def test_log_probabilities_per_row_equal_a_loop(name: str) -> None:
    model, batch = made(name), ragged()
    with torch.no_grad():
        scores, logps_BTV = answer_logps(model, batch), full_logits(model, batch).double().log_softmax(-1)
    expected = [
        sum(float(logps_BTV[b, t - 1, labels[t]]) for t in range(1, len(labels)) if labels[t] != -100)
        for b, labels in enumerate(batch.labels_BT.tolist())
    ]
    assert scores.sum_B().tolist() == pytest.approx(expected, rel=1e-4)
    assert scores.count_B().tolist() == (batch.labels_BT != -100).sum(1).tolist()


@EACH
def test_padding_and_company_do_not_change_a_score(name: str) -> None:
    model, batch = made(name), ragged()
    with torch.no_grad():
        together = answer_logps(model, batch).sum_B()
        for b in range(5):
            length = int(batch.attention_mask_BT[b].sum())
            labels = batch.labels_BT[b].tolist()
            row = TokenRow(b, batch.input_ids_BT[b, :length].tolist(), next(t for t, label in enumerate(labels) if label != -100))
            alone = answer_logps(model, collate([("forget", row)], pad_id=7, multiple=1)).sum_B()
            torch.testing.assert_close(alone[0], together[b], rtol=1e-4, atol=1e-4)


@EACH
def test_a_filler_row_gives_every_parameter_a_zero_gradient(name: str) -> None:
    model = made(name)
    scores = answer_logps(model, collate([], pad_id=0))
    assert scores.logps_N.shape == (0,) and scores.sum_B().tolist() == [0.0]
    scores.logps_N.sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key  # none at all would leave a rank out of the reduction


@EACH
def test_gradients_are_those_of_the_whole_forward(name: str) -> None:
    batch, gradients = ragged(), []
    for scored in (True, False):
        model = made(name)
        if scored:
            answer_logps(model, batch).logps_N.sum().backward()
        else:
            logps_BTV = full_logits(model, batch)[:, :-1].log_softmax(-1)
            labels_BT = batch.labels_BT[:, 1:]
            picked_BT = logps_BTV.gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
            picked_BT[labels_BT != -100].sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        expected = gradients[1][key]
        assert gradient is not None and expected is not None, key
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits_NV = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)) * 4
    targets_N = torch.arange(6)
    expected = logits_NV.bfloat16().double().log_softmax(-1)[torch.arange(6), targets_N]
    found = token_logps(logits_NV.bfloat16(), targets_N)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert token_logps(logits_NV.double(), targets_N).dtype == torch.float64


def test_rows_without_answer_count_as_zero() -> None:
    scores = AnswerLogps(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 2]), 4)
    assert scores.sum_B().tolist() == [-1.0, 0.0, -6.0, 0.0]
    assert scores.count_B().tolist() == [1, 0, 2, 0]


def test_a_model_without_head_is_refused() -> None:
    with pytest.raises(InputError, match="expected a causal language model with an LM head, got LlamaModel"):
        output_head(LlamaModel(LlamaConfig(**SHAPE)))
    with pytest.raises(InputError, match="got Linear"):
        output_head(nn.Linear(2, 2))
