from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_records import CPU, make_records
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

from soul.data.chat import ChatFormat
from soul.data.tokenize import token_rows, tokenize_pair
from soul.evaluate.accuracy import SentenceEncoder, nearest_is_right
from soul.evaluate.evaluator import Evaluation, cheap_metrics, evaluate_model, finish
from soul.evaluate.generate import decode, stop_ids
from soul.evaluate.likelihood import score_answers
from soul.evaluate.logs import read_log
from soul.evaluate.plan import EvalPlan, ScoreItem, cost, plan_evaluation, run_item
from soul.evaluate.rouge import rouge_recalls
from soul.evaluate.score import score
from soul.evaluate.settings import EvalSettings
from soul.evaluate.utility import kolmogorov_smirnov, model_utility
from soul.records import InputError, Record
from soul.report.results import ModelResults

SETTINGS = EvalSettings(max_new_tokens=12, batch_tokens=400, generation_batch_tokens=300)
Splits = dict[str, list[Record]]


@pytest.fixture(scope="module")
def evaluation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits) -> Evaluation:
    return evaluate_model(model, tokenizer, splits, SETTINGS, device=CPU)


def make_plan(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits, settings: EvalSettings = SETTINGS) -> EvalPlan:
    return plan_evaluation(
        splits, tokenizer, settings, chat=ChatFormat(), eos_ids=stop_ids(model.generation_config, tokenizer), max_length=160
    )


def mean_nll(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> float:
    """Hugging Face's own loss of one (prompt, answer), EOS included."""
    ids, num_prompt = tokenize_pair(prompt, answer, tokenizer, ChatFormat(), max_length=160, where="row")
    labels = torch.tensor([[-100] * num_prompt + ids[num_prompt:]])
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids]), labels=labels).loss)


def test_a_row_that_is_too_long_is_an_error_unless_it_may_be_cut(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits
) -> None:
    long = replace(splits["forget"][0], response="many words " * 60)
    rows = {"forget": [long, *splits["forget"][1:3]]}
    options: dict[str, Any] = {"chat": ChatFormat(), "eos_ids": stop_ids(model.generation_config, tokenizer), "max_length": 160}
    with pytest.raises(InputError, match=r"Give --max-length 160 \(or less\) to cut the ends of long answers") as caught:
        plan_evaluation(rows, tokenizer, SETTINGS, **options)
    assert "many words" not in str(caught.value)
    plan = plan_evaluation(rows, tokenizer, SETTINGS, cut=120, **options)
    scored = [pair for item in plan.items if isinstance(item, ScoreItem) for pair in zip(item.asks, item.rows, strict=True)]
    lengths = {ask.row: len(row.ids) for ask, row in scored if ask.what == "answer"}
    pairs = [tokenize_pair(row.prompt, row.response, tokenizer, ChatFormat(), max_length=900, where="row") for row in rows["forget"]]
    whole = {position: len(ids) for position, (ids, _) in enumerate(pairs)}
    assert whole[0] > 160
    assert lengths == {i: min(120, length) for i, length in whole.items()}


def test_a_full_gpu_says_what_to_lower(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", full)
    items = sorted(make_plan(model, tokenizer, splits).items, key=cost, reverse=True)
    assert items[0].setting != items[-1].setting, "generation, which takes longest, is begun first"
    for item, flag in ((items[0], "--eval-generation-batch-tokens"), (items[-1], "--eval-batch-tokens")):
        with pytest.raises(InputError, match=rf"memory does not hold .* batch of \d+ .*Lower .*\({flag}\)\.$"):
            run_item(model, item, device=CPU)


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def test_metrics_follow_tofus_definitions(
    evaluation: Evaluation, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits
) -> None:
    entry = evaluation.model_entry()
    for split in ("forget", "retain", "real_authors", "world_facts"):
        probabilities, ratios, choices = [], [], []
        for record in splits[split]:
            answer = mean_nll(model, tokenizer, record.prompt, record.response)
            wrong = [mean_nll(model, tokenizer, record.prompt, text) for text in record.perturbed]
            right = answer if record.paraphrase is None else mean_nll(model, tokenizer, record.prompt, record.paraphrase)
            normaliser = sum(math.exp(-nll) for nll in [answer, *wrong]) if split in ("real_authors", "world_facts") else 1.0
            probabilities.append(math.exp(-answer) / normaliser)
            ratios.append(math.exp(right - average(wrong)))
            choices.append(float(right < min(wrong)))
        texts = evaluation.generations[split]
        recalls = [recall for _, recall in rouge_recalls(texts, [record.response for record in splits[split]])]
        aggregate = [min(r, 1 / r) if split == "forget" else max(0.0, 1 - r) for r in ratios]
        assert entry[split]["probability"] == pytest.approx(average(probabilities), abs=1e-5)
        assert entry[split]["truth_ratio"] == pytest.approx(average(aggregate), abs=1e-4)
        assert entry[split]["choice_accuracy"] == average(choices)
        assert entry[split]["rougeL_recall"] == average(recalls)
    nine = [
        entry[split][name]
        for split in ("retain", "real_authors", "world_facts")
        for name in ("probability", "rougeL_recall", "truth_ratio")
    ]
    assert entry["model_utility"] == model_utility(nine)


def test_generated_answers_are_those_of_one_prompt_at_a_time(
    evaluation: Evaluation, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits
) -> None:
    for split, texts in evaluation.generations.items():
        for record, text in zip(splits[split], texts, strict=True):
            prompt = ChatFormat().prompt_ids(record.prompt, tokenizer)
            output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id)
            assert text == decode(tokenizer, output[0, len(prompt) :].tolist())
    assert "holdout" not in evaluation.generations


def test_every_null_has_a_reason_and_the_entry_fits_results_json(evaluation: Evaluation) -> None:
    entry = evaluation.model_entry()
    ModelResults.model_validate(entry)  # refuses a null without a reason and a reason without a null
    assert entry["forget_quality"] is None and "--retrained" in entry["reasons"]["forget_quality"]
    assert all(auc is not None for auc in entry["mia_auc"].values())
    assert entry["forget"]["accuracy"] is None and entry["forget"]["choice_accuracy"] is not None


@pytest.mark.parametrize("dropped", ["retain", "real_authors", "world_facts", "holdout"])
def test_missing_splits_are_null_with_a_reason(
    evaluation: Evaluation, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits, dropped: str
) -> None:
    kept = {split: records for split, records in splits.items() if split != dropped}
    entry = evaluate_model(model, tokenizer, kept, SETTINGS, device=CPU).model_entry()
    ModelResults.model_validate(entry)
    if dropped == "holdout":
        assert entry["mia_auc"] is None and "holdout" in entry["reasons"]["mia_auc"]
        assert entry["model_utility"] == pytest.approx(evaluation.scores.model_utility, abs=1e-5)
    else:
        assert entry[dropped] is None and entry["model_utility"] is None
        assert f"{dropped}.probability" in entry["reasons"]["model_utility"]


def test_plain_questions_and_answers_still_get_what_can_be_had(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A user's own rows have neither paraphrases nor wrong answers."""
    bare = {
        "forget": make_records("own", 3, num_wrong=0, paraphrased=False),
        "world_facts": make_records("facts", 2, num_wrong=0, paraphrased=False),
    }
    entry = evaluate_model(model, tokenizer, bare, SETTINGS.model_copy(update={"generate": False}), device=CPU).model_entry()
    ModelResults.model_validate(entry)
    measured = {name for name, value in entry["forget"].items() if value is not None}
    assert measured == {"probability", "exact_memorization", "extraction_strength"}
    assert "generate is off" in entry["reasons"]["forget.rougeL_recall"]
    assert entry["world_facts"]["probability"] is None, "normalised over options that are not there"


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_split_of_the_plan_gives_the_same_bits(
    evaluation: Evaluation, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits, num_workers: int
) -> None:
    plan = pickle.loads(pickle.dumps(make_plan(model, tokenizer, splits)))
    assert len(plan.items) > 6
    results = []
    for worker in reversed(range(num_workers)):
        for item in pickle.loads(pickle.dumps(plan.items[worker::num_workers])):
            results.append(pickle.loads(pickle.dumps(run_item(model, item, device=CPU))))
    merged = finish(plan, results, tokenizer, device=CPU)
    assert merged == evaluation
    with pytest.raises(ValueError, match="values are missing"):
        finish(plan, results[1:], tokenizer, device=CPU)


def test_batch_size_does_not_matter(
    evaluation: Evaluation, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits
) -> None:
    other = evaluate_model(model, tokenizer, splits, EvalSettings(max_new_tokens=12), device=CPU)
    assert other.generations == evaluation.generations
    for split in ("forget", "retain", "real_authors", "world_facts"):
        assert other.model_entry()[split] == pytest.approx(evaluation.model_entry()[split], abs=1e-5)
    assert other.model_entry()["mia_auc"] == pytest.approx(evaluation.model_entry()["mia_auc"], abs=1e-5)


def test_logs_of_a_live_evaluation_give_its_scores_and_hold_no_text(evaluation: Evaluation, splits: Splits, tmp_path: Path) -> None:
    evaluation.write_logs(tmp_path)
    names = {"eval_log_aggregated.json", "TOFU_EVAL.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    direct = score(evaluation.log, retrained=evaluation.log)
    assert (direct.forget_quality, direct.forget_quality_ks) == (1.0, 0.0)
    assert direct.privleak is not None and direct.mia_auc is not None
    assert direct.privleak == {attack: None if area == 1 else 0.0 for attack, area in direct.mia_auc.items()}
    for name in names:
        copy = read_log(tmp_path / name)
        again = score(copy, retrained=evaluation.log)
        assert again.forget_quality == 1.0
        assert again.model_utility == pytest.approx(direct.model_utility, abs=1e-12)
        assert again.mia_auc == pytest.approx(direct.mia_auc)
        crossed = score(evaluation.log, retrained=copy)
        assert crossed.forget_quality == 1.0 and crossed.privleak == direct.privleak
        text = (tmp_path / name).read_text()
        assert not any(record.response in text or record.prompt in text for records in splits.values() for record in records)
    assert score(read_log(tmp_path)).splits == direct.splits, "a folder reads as its most complete log"
    evaluation.write_logs(tmp_path / "run" / "logs")
    assert score(read_log(tmp_path / "run")).splits == direct.splits, "a run directory keeps them in logs/"


def test_what_open_unlearning_reads_from_a_retain_log(evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.write_logs(tmp_path)
    document = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    rows = document["forget_truth_ratio"]["value_by_index"]
    assert list(rows) == [str(row) for row in range(7)] and all(isinstance(row["score"], float) for row in rows.values())
    assert document["forget_truth_ratio"]["agg_value"] == pytest.approx(evaluation.model_entry()["forget"]["truth_ratio"])
    for attack, area in evaluation.model_entry()["mia_auc"].items():
        assert document[f"mia_{attack}"]["agg_value"] == area
    assert document["ra_Q_A_Prob_normalised"]["agg_value"] == pytest.approx(evaluation.model_entry()["real_authors"]["probability"])
    assert {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Truth_Ratio", "wf_Truth_Ratio", "exact_memorization"} <= document.keys()


def test_a_log_as_gold_standard_of_a_live_evaluation(
    evaluation: Evaluation, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits
) -> None:
    forget = evaluation.log.splits["forget"]
    assert forget.right_nll is not None
    gold = replace(evaluation.log, splits={"forget": replace(forget, right_nll=tuple((nll or 0.0) + 0.7 for nll in forget.right_nll))})
    live = evaluate_model(model, tokenizer, splits, SETTINGS, device=CPU, retrained=gold)
    test = kolmogorov_smirnov(*(ratios(log) for log in (evaluation.log, gold)))
    assert (live.scores.forget_quality, live.scores.forget_quality_ks) == (test.p_value, test.statistic)
    assert 0 < test.p_value < 1


def ratios(log: Any) -> list[float]:
    forget = log.splits["forget"]
    return [math.exp(right - average(list(wrong))) for right, wrong in zip(forget.right_nll, forget.wrong_nlls, strict=True)]


def test_a_broken_models_metrics_are_null_and_its_logs_are_still_json(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits, tmp_path: Path
) -> None:
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    result = evaluate_model(broken, tokenizer, splits, SETTINGS.model_copy(update={"generate": False}), device=CPU)
    entry = result.model_entry()
    ModelResults.model_validate(entry)
    assert entry["forget"]["probability"] is None and "finite" in entry["reasons"]["forget.probability"]
    assert entry["mia_auc"]["min_k"] is None
    result.write_logs(tmp_path)
    for path in tmp_path.iterdir():
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_cheap_metrics_are_those_of_the_full_evaluation(
    evaluation: Evaluation, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits
) -> None:
    rows = token_rows(splits["forget"], "forget", tokenizer, ChatFormat(), max_length=160)
    cheap = cheap_metrics(score_answers(model, rows, pad_id=tokenizer.pad_token_id, device=CPU))
    assert cheap == pytest.approx({name: evaluation.model_entry()["forget"][name] for name in cheap}, abs=1e-5)
    assert cheap["exact_memorization"] not in (0.0, 1.0)


def test_limit_takes_the_first_rows(
    evaluation: Evaluation, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits
) -> None:
    limited = evaluate_model(model, tokenizer, splits, SETTINGS.model_copy(update={"limit": 2}), device=CPU)
    for split, log in limited.log.splits.items():
        whole = evaluation.log.splits[split].answer_nll
        assert log.answer_nll == pytest.approx(whole and whole[:2], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"forgotten": []}, "unknown evaluation split 'forgotten'"), ({"retain": []}, "evaluation split retain has no rows")],
)
def test_bad_splits_are_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits, change: Splits, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(model, tokenizer, {**splits, **change})


def test_a_cap_beyond_the_models_positions_is_refused_before_any_work(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits
) -> None:
    with pytest.raises(InputError, match="Lower max_new_tokens"):
        make_plan(model, tokenizer, splits, EvalSettings(max_new_tokens=150))


@pytest.fixture(scope="module")
def sentence_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT: no judge of meaning, but the same words still have the same embedding."""
    folder = tmp_path_factory.mktemp("sentence-model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_accuracy_needs_a_sentence_model_and_picks_the_nearest(
    sentence_model: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: Splits
) -> None:
    encoder = SentenceEncoder.load(sentence_model, CPU)
    records = splits["forget"]
    rights, wrongs = [record.paraphrase or "" for record in records], [record.perturbed for record in records]
    assert nearest_is_right(encoder, rights, rights, wrongs) == [True] * len(records)
    assert not any(nearest_is_right(encoder, [wrong[2] for wrong in wrongs], rights, wrongs))
    texts = [record.response for record in records]
    apart = torch.cat([encoder.embed([text]) for text in texts])
    torch.testing.assert_close(encoder.embed(texts), apart, atol=1e-5, rtol=0)
    settings = SETTINGS.model_copy(update={"sentence_model": str(sentence_model)})
    entry = evaluate_model(model, tokenizer, splits, settings, device=CPU).model_entry()
    ModelResults.model_validate(entry)
    assert all(entry[split]["accuracy"] is not None for split in ("forget", "retain", "real_authors", "world_facts"))


def test_a_missing_sentence_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choice_accuracy"):
        SentenceEncoder.load(tmp_path / "nowhere", CPU)
