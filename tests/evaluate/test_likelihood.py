from __future__ import annotations

import pytest
import torch
from eval_records import CPU
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul.batch import TokenRow
from soul.data.chat import ChatFormat
from soul.data.tokenize import token_rows
from soul.evaluate.likelihood import AnswerScore, plan_batches, score_answers, score_batch, score_share
from soul.records import Record


@pytest.fixture(scope="module")
def rows(splits: dict[str, list[Record]], tokenizer: PreTrainedTokenizerFast) -> list[TokenRow]:
    return token_rows([*splits["forget"], *splits["holdout"]], "forget", tokenizer, ChatFormat("plain"), max_length=160)


def oracle(model: LlamaForCausalLM, row: TokenRow) -> AnswerScore:
    """One row, no padding, all logits, float64 statistics by their definition."""
    ids = torch.tensor([list(row.ids)])
    with torch.no_grad():
        logps_TV = model(input_ids=ids).logits[0].double().log_softmax(-1)
    logps, correct, standardised = [], [], []
    for position in range(row.num_prompt, len(row.ids)):
        distribution_V = logps_TV[position - 1]
        logp = distribution_V[row.ids[position]]
        mean = (distribution_V.exp() * distribution_V).sum()
        std = (distribution_V.exp() * (distribution_V - mean) ** 2).sum().sqrt()
        logps.append(float(logp))
        correct.append(int(distribution_V.argmax()) == row.ids[position])
        standardised.append(float((logp - mean) / std))
    return AnswerScore(tuple(logps), tuple(correct), tuple(standardised))


@pytest.mark.parametrize("batch_tokens", [1, 100, 333, 100_000])
def test_one_pass_equals_item_by_item_full_logits(
    model: LlamaForCausalLM, rows: list[TokenRow], tokenizer: PreTrainedTokenizerFast, batch_tokens: int
) -> None:
    scores = score_answers(model, rows, pad_id=tokenizer.pad_token_id, device=CPU, batch_tokens=batch_tokens)
    assert len(scores) == len(rows)
    for row, score in zip(rows, scores, strict=True):
        expected = oracle(model, row)
        assert score.logps == pytest.approx(expected.logps, abs=1e-5)
        assert score.standardised == pytest.approx(expected.standardised, abs=1e-4)
        assert score.correct == expected.correct
        assert score.num_tokens == row.num_supervised
        assert score.mean_nll == pytest.approx(-sum(expected.logps) / len(expected.logps), abs=1e-5)
    assert len({flag for score in scores for flag in score.correct}) == 2, "the test model must be right and wrong somewhere"


def test_bf16_models_are_scored_in_fp32(model: LlamaForCausalLM, rows: list[TokenRow], tokenizer: PreTrainedTokenizerFast) -> None:
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    row = rows[0]
    with torch.no_grad():
        logits_TV = half(input_ids=torch.tensor([list(row.ids)])).logits[0, row.num_prompt - 1 : -1]
    expected_T = logits_TV.float().log_softmax(-1)[range(row.num_supervised), row.ids[row.num_prompt :]]
    score = score_batch(half.eval(), [row], pad_id=tokenizer.pad_token_id, device=CPU)[0]
    assert score.logps == pytest.approx(expected_T.tolist(), abs=0.05)
    assert any(logp != float(torch.tensor(logp).to(torch.bfloat16)) for logp in score.logps)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_the_pass_with_equal_numbers_of_forwards(
    model: LlamaForCausalLM, rows: list[TokenRow], tokenizer: PreTrainedTokenizerFast, world: int
) -> None:
    pad_id = tokenizer.pad_token_id
    whole = score_share(model, rows, pad_id=pad_id, device=CPU, batch_tokens=200)
    merged: dict[int, AnswerScore] = {}
    forwards = []
    for rank in range(world):
        calls: list[int] = []
        merged |= score_share(model, rows, pad_id=pad_id, device=CPU, batch_tokens=200, rank=rank, world=world, progress=calls.append)
        forwards.append(len(calls))
    assert merged == whole
    assert len(set(forwards)) == 1


def test_a_masked_vocabulary_gives_no_nan(model: LlamaForCausalLM, rows: list[TokenRow], tokenizer: PreTrainedTokenizerFast) -> None:
    """Models that forbid tokens by -inf logits."""
    forbidden = next(token for token in range(5, 300) if all(token not in row.ids for row in rows))

    def forbid(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output[..., forbidden] = -torch.inf
        return output

    handle = model.lm_head.register_forward_hook(forbid)
    try:
        scores = score_answers(model, rows, pad_id=tokenizer.pad_token_id, device=CPU)
    finally:
        handle.remove()
    assert all(value == value and abs(value) < 1e6 for score in scores for value in score.standardised)


@pytest.mark.parametrize("batch_tokens", [1, 64, 100, 10_000])
def test_plan_batches(batch_tokens: int) -> None:
    lengths = [5, 17, 3, 64, 40, 41, 8, 9, 1, 64, 33]
    batches = plan_batches(lengths, batch_tokens)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    padded = [max(-(-lengths[i] // 8) * 8 for i in batch) for batch in batches]
    assert all(len(batch) == 1 or width * len(batch) <= batch_tokens for batch, width in zip(batches, padded, strict=True))
    assert padded == sorted(padded, reverse=True)
    assert batches == plan_batches(lengths, batch_tokens)
    assert plan_batches([], batch_tokens) == []


def test_the_models_mode_is_kept(model: LlamaForCausalLM, rows: list[TokenRow], tokenizer: PreTrainedTokenizerFast) -> None:
    for training in (True, False):
        model.train(training)
        score_answers(model, rows[:1], pad_id=tokenizer.pad_token_id, device=CPU)
        assert model.training is training
