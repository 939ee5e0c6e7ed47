"""Evaluating a model: one likelihood pass and one generation pass over all splits, then every metric from their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soul.data.chat import ChatFormat
from soul.data.groups import groups_of
from soul.evaluate.accuracy import SentenceEncoder, nearest_is_right
from soul.evaluate.eval_log import EvalLog, SplitLog
from soul.evaluate.generate import decode, stop_ids
from soul.evaluate.likelihood import AnswerScore
from soul.evaluate.memorization import exact_memorization, extraction_strength
from soul.evaluate.open_unlearning_log import FILE as OPEN_UNLEARNING_FILE
from soul.evaluate.open_unlearning_log import write_open_unlearning_log
from soul.evaluate.plan import GENERATED_SPLITS, PARAPHRASED_SPLITS, Ask, EvalPlan, ItemResult, plan_evaluation, run_item
from soul.evaluate.privacy import min_k_score, zlib_score
from soul.evaluate.rouge import NO_WORDS, rouge_recalls
from soul.evaluate.same_rows import rows_digest
from soul.evaluate.score import Scores, score
from soul.evaluate.settings import EvalSettings
from soul.evaluate.tofu_log import AGGREGATED, write_tofu_log
from soul.records import Record

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model's metrics, the row values behind them, and in memory only the generated answers (split -> text per row)."""

    scores: Scores
    log: EvalLog
    generations: dict[str, tuple[str, ...]]

    def model_entry(self) -> dict[str, Any]:
        """The model's entry of results.json."""
        return self.scores.model_entry()

    def write_logs(self, folder: Path) -> None:
        """The row values in TOFU's and in OpenUnlearning's format; no text of any row."""
        write_tofu_log(self.log, folder / AGGREGATED)
        write_open_unlearning_log(self.log, folder / OPEN_UNLEARNING_FILE)


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[Record]],
    settings: EvalSettings,
    *,
    device: torch.device,
    chat: ChatFormat | None = None,
    retrained: EvalLog | None = None,
    progress: Progress | None = None,
    source: str = "this model",
) -> Evaluation:
    """Evaluate in this process a model that lies on `device`. `progress` hears (batches done, batches in all)."""
    plan = plan_evaluation(
        splits,
        tokenizer,
        settings,
        chat=chat or ChatFormat(),
        eos_ids=stop_ids(model.generation_config, tokenizer),
        max_length=positions(model.config),
    )
    results: list[ItemResult] = []
    for item in plan.items:
        results.append(run_item(model, item, device=device))
        if progress is not None:
            progress(len(results), len(plan.items))
    return finish(plan, results, tokenizer, retrained=retrained, device=device, source=source)


def positions(config: Any) -> int:
    """How many tokens a model can see; unlimited (a million) where its config names no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else 1_000_000


def finish(
    plan: EvalPlan,
    results: Iterable[ItemResult],
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device,
    retrained: EvalLog | None = None,
    source: str = "this model",
) -> Evaluation:
    """Metrics from the results of all items, in any order. `device` is for the sentence-embedding model, if there is one."""
    values: dict[Ask, AnswerScore | tuple[int, ...]] = {}
    for result in results:
        values.update(result)
    missing = sum(ask not in values for item in plan.items for ask in item.asks)
    if missing:
        raise ValueError(f"expected a result for every item of the plan, {missing} values are missing. Run all items before finish().")
    scores = {ask: value for ask, value in values.items() if isinstance(value, AnswerScore)}
    texts = {ask: decode(tokenizer, value) for ask, value in values.items() if not isinstance(value, AnswerScore)}
    sentence_model = plan.settings.sentence_model if plan.settings.generate else None
    encoder = None if sentence_model is None else SentenceEncoder.load(sentence_model, device)
    logs = {split: _split_log(split, records, scores, texts, plan.settings, encoder) for split, records in plan.splits.items()}
    log = EvalLog(source, logs, notes=_notes(plan), made_with=plan.made_with)
    generations = {
        split: tuple(texts[Ask(split, row, "prompt")] for row in range(len(plan.splits[split])))
        for split in GENERATED_SPLITS
        if split in plan.splits and plan.settings.generate
    }
    return Evaluation(score(log, retrained=retrained, mean=plan.settings.truth_ratio), log, generations)


def _notes(plan: EvalPlan) -> dict[str, str]:
    """Why something was not measured."""
    notes: dict[str, str] = {}
    for split in plan.splits:
        if not plan.settings.generate:
            notes[f"{split}.rougeL_recall"] = notes[f"{split}.accuracy"] = "no answers were generated (generate is off)"
            continue
        notes[f"{split}.rougeL_recall"] = NO_WORDS  # read where the split has no value, and with answers it has none for this reason only
        if plan.settings.sentence_model is None:
            notes[f"{split}.accuracy"] = "no sentence-embedding model given (sentence_model); choice_accuracy works without one"
        else:
            notes[f"{split}.accuracy"] = "no right and wrong answers to compare the generated answer with"
    if "holdout" not in plan.splits:
        notes["mia_auc"] = "no holdout set: rows like the forget rows that no model was trained on"
    return notes


def _split_log(
    split: str,
    records: Sequence[Record],
    scores: Mapping[Ask, AnswerScore],
    texts: Mapping[Ask, str],
    settings: EvalSettings,
    encoder: SentenceEncoder | None,
) -> SplitLog:
    rows = range(len(records))
    answers = [scores[Ask(split, row, "answer")] for row in rows]
    keys, groups = tuple(map(str, rows)), groups_of([record.id for record in records])
    nlls = tuple(answer.mean_nll for answer in answers)
    tokens = tuple(answer.num_tokens for answer in answers)
    attacks = {} if split not in ("forget", "holdout") else _attacks(records, answers, settings.min_k)
    if split == "holdout":
        return SplitLog(keys, answer_nll=nlls, answer_tokens=tokens, rows=rows_digest(records), attacks=attacks, groups=groups)
    rights = [scores.get(Ask(split, row, "right")) if split in PARAPHRASED_SPLITS else answers[row] for row in rows]
    wrongs = [[scores[Ask(split, row, "wrong", choice)] for choice in range(len(records[row].perturbed))] for row in rows]
    recalls = None
    if settings.generate:
        recalls = rouge_recalls([texts[Ask(split, row, "prompt")] for row in rows], [record.response for record in records])
    return SplitLog(
        keys,
        answer_nll=nlls,
        right_nll=_or_none([None if right is None else right.mean_nll for right in rights]),
        wrong_nlls=_or_none([tuple(wrong.mean_nll for wrong in row) or None for row in wrongs]),
        answer_tokens=tokens,
        right_tokens=None if not any(rights) else tuple(0 if right is None else right.num_tokens for right in rights),
        wrong_tokens=None if not any(wrongs) else tuple(tuple(wrong.num_tokens for wrong in row) for row in wrongs),
        rouge1_recall=None if recalls is None else _or_none([recall for recall, _ in recalls]),
        rougeL_recall=None if recalls is None else _or_none([recall for _, recall in recalls]),
        exact_memorization=tuple(exact_memorization(_without_eos(answer.correct)) for answer in answers),
        extraction_strength=tuple(extraction_strength(_without_eos(answer.correct)) for answer in answers),
        accuracy=None if encoder is None else _accuracy(split, records, texts, encoder),
        rows=rows_digest(records),
        attacks=attacks,
        groups=groups,
    )


def _or_none(column: list[Any]) -> tuple[Any, ...] | None:
    """A column in which no row has a value is no column."""
    return tuple(column) if any(value is not None for value in column) else None


def _without_eos(values: Sequence[Any]) -> Sequence[Any]:
    """The answer's own tokens: every row of `token_rows` ends with EOS, whose prediction says nothing about memory."""
    return values[:-1]


def _attacks(records: Sequence[Record], answers: Sequence[AnswerScore], min_k: float) -> dict[str, tuple[float, ...]]:
    return {
        "loss": tuple(answer.mean_nll for answer in answers),
        "zlib": tuple(zlib_score(answer.mean_nll, record.response) for answer, record in zip(answers, records, strict=True)),
        "min_k": tuple(min_k_score(_without_eos(answer.logps), min_k) for answer in answers),
        "min_k_plus_plus": tuple(min_k_score(_without_eos(answer.standardised), min_k) for answer in answers),
    }


def _accuracy(split: str, records: Sequence[Record], texts: Mapping[Ask, str], encoder: SentenceEncoder) -> tuple[float | None, ...] | None:
    """SOUL's accuracy of the rows with a right and wrong answers, asked in other words where the row has them."""
    rights = [record.paraphrase if split in PARAPHRASED_SPLITS else record.response for record in records]
    rows = [row for row, record in enumerate(records) if rights[row] is not None and record.perturbed]
    if not rows:
        return None
    generated = [texts.get(Ask(split, row, "paraphrased_prompt"), texts[Ask(split, row, "prompt")]) for row in rows]
    found = nearest_is_right(encoder, generated, [rights[row] or "" for row in rows], [records[row].perturbed for row in rows])
    verdicts = dict(zip(rows, found, strict=True))
    return tuple(float(verdicts[row]) if row in verdicts else None for row in range(len(records)))


def cheap_metrics(scores: Sequence[AnswerScore]) -> dict[str, float | None]:
    """What the likelihood of the answers alone tells, for an evaluation after every epoch. None where a log-probability is not finite."""
    probabilities = [math.exp(-answer.mean_nll) for answer in scores]
    flags = [_without_eos(answer.correct) for answer in scores]
    columns: dict[str, list[float | None]] = {
        "probability": list(probabilities),
        "exact_memorization": [exact_memorization(row) for row in flags],
        "extraction_strength": [extraction_strength(row) for row in flags],
    }
    return {name: _finite_mean(column) for name, column in columns.items()}


def _finite_mean(column: Sequence[float | None]) -> float | None:
    values = [value for value in column if value is not None]
    mean = math.fsum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None
