"""Whoever shares the batch, and whenever they join, a row's tokens are those that it would have alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedModel

from soul.evaluate.generate import generate_batch
from soul.models.load import load_model
from soul.serving.decoder import Row, RunningBatch, Sampling, choose, describe, sample
from soul.serving.likelihood import likelihoods
from tests.serving_runs import write_model

ENDS = tuple(range(100, 125))  # many, so that rows end at all sorts of lengths


def llama(folder: Path) -> PreTrainedModel:
    return load_model(str(write_model(folder, 0))).eval()


def gpt2(folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=128, n_embd=32, n_layer=2, n_head=2)).eval()


def sliding(folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=300, sliding_window=6, max_position_embeddings=128, **shape)).eval()


@pytest.fixture(scope="module", params=[llama, gpt2, sliding])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    made: PreTrainedModel = request.param(tmp_path_factory.mktemp("model") / "m")
    return made


def prompts(count: int) -> list[tuple[int, ...]]:
    dice = random.Random(3)
    return [tuple(dice.randrange(3, 250) for _ in range(dice.choice([1, 2, 5, 11, 23]))) for _ in range(count)]


def finish(batch: RunningBatch) -> None:
    while batch.rows:
        batch.step()
        batch.release()


def test_rows_that_join_and_leave_equal_generate(model: PreTrainedModel) -> None:
    given = prompts(11)
    rows = [Row(ids, Sampling(max_tokens=3 + 4 * (place % 3)), eos_ids=ENDS) for place, ids in enumerate(given)]
    batch = RunningBatch(model)
    for start, stop, steps in ((0, 2, 4), (2, 7, 1), (7, 8, 0), (8, 11, 99)):
        batch.admit(rows[start:stop])
        batch.release()
        for _ in range(steps):
            if batch.rows:
                batch.step()
                batch.release()
    finish(batch)
    for row in rows:
        most = row.sampling.max_tokens
        alone = generate_batch(model, [row.prompt], pad_id=0, eos_ids=ENDS, max_new_tokens=most, device=torch.device("cpu"))
        assert tuple(row.tokens) == alone[0]
        assert row.end == ("length" if len(row.tokens) == most else "stop")
    assert len({len(row.tokens) for row in rows}) > 2


def test_a_cancelled_row_leaves_and_the_others_go_on(model: PreTrainedModel) -> None:
    given = prompts(4)
    rows = [Row(ids, Sampling(max_tokens=9), eos_ids=()) for ids in given]
    batch = RunningBatch(model)
    batch.admit(rows)
    rows[1].end = "cancelled"
    batch.release()
    finish(batch)
    assert len(rows[1].tokens) == 1
    for row in (rows[0], rows[2], rows[3]):
        assert (
            tuple(row.tokens) == generate_batch(model, [row.prompt], pad_id=0, eos_ids=[], max_new_tokens=9, device=torch.device("cpu"))[0]
        )


def test_sampled_tokens_follow_the_seed_and_not_the_company(model: PreTrainedModel) -> None:
    def tokens(company: int) -> list[int]:
        row = Row((5, 6, 7), Sampling(max_tokens=12, temperature=1.3, top_p=0.9, seed=4), eos_ids=())
        others = [Row(ids, Sampling(max_tokens=12, temperature=0.5, seed=seed), eos_ids=()) for seed, ids in enumerate(prompts(company))]
        batch = RunningBatch(model)
        batch.admit([*others, row])
        finish(batch)
        return row.tokens

    assert tokens(0) == tokens(3) == tokens(0)


def test_likelihoods_equal_a_plain_forward(model: PreTrainedModel) -> None:
    given = prompts(7)
    for ids, found in zip(given, likelihoods(model, given, 3), strict=True):
        with torch.inference_mode():
            logps = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
        want = [float(logps[place, token]) for place, token in enumerate(ids[1:])]
        assert found.logps == pytest.approx(want, abs=1e-5)
        for place, top in enumerate(found.tops):
            assert [value for _, value in top] == pytest.approx(logps[place].topk(3).values.tolist(), abs=1e-5)


def test_sampling_follows_the_distribution() -> None:
    """Against the probabilities themselves, temperature and nucleus worked out by hand."""
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    rows = [Row((1,), Sampling(1, temperature=1.0, top_p=0.8, seed=seed), ()) for seed in range(4000)]
    counts = torch.bincount(sample(logits.repeat(4000, 1), rows), minlength=4) / 4000
    assert counts.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    rows = [Row((1,), Sampling(1, temperature=0.5, seed=seed), ()) for seed in range(4000)]
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    counts = torch.bincount(sample(logits.repeat(4000, 1), rows), minlength=4) / 4000
    assert counts.tolist() == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)
    greedy = [Row((1,), Sampling(1, temperature=2.0, top_p=0.0, seed=seed), ()) for seed in range(50)]
    assert set(sample(logits.repeat(50, 1), greedy).tolist()) == {0}


def test_logits_that_are_not_finite_end_the_row_and_no_other() -> None:
    rows = [Row((1,), Sampling(5, num_top=1), ()) for _ in range(3)]
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    choose(logits, rows)
    assert [row.end for row in rows] == [None, "broken", "broken"]
    assert rows[0].tokens == [1] and not rows[1].tokens


def test_the_chosen_token_has_one_value_in_both_places() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    logps, tops = describe(logits, logits.argmax(-1), 4)
    assert [top[0][1] for top in tops] == logps
