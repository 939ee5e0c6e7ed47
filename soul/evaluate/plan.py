"""An evaluation as data: fixed batches of work, which any process with the model can do, in any order.

`plan_evaluation` is a pure function of the records, the tokenizer and the settings. Whoever runs the items, one process or many, gets
bit for bit the same values, because the batches are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soul.batch import TokenRow
from soul.data.chat import ChatFormat
from soul.data.tokenize import Truncate, check_tokenizer, tokenize_pair
from soul.evaluate.eval_log import EVAL_SPLITS, EvalLog, SplitLog
from soul.evaluate.generate import check_room, generate_batch
from soul.evaluate.likelihood import AnswerScore, evaluation_mode, plan_batches, score_batch
from soul.evaluate.same_rows import made_with, rows_digest
from soul.evaluate.settings import EvalSettings
from soul.records import InputError, Record

STEP_TOKENS = 256  # a step of generation waits for the weights to be read; so many tokens cost as much in one pass
GENERATED_SPLITS = ("forget", "retain", "real_authors", "world_facts")
PARAPHRASED_SPLITS = ("forget", "retain")  # the others have no paraphrases: their right answer is the answer itself


@dataclass(frozen=True, slots=True)
class Ask:
    """Which value of which row: the likelihood of an `answer`, `right` or `wrong` one, or a generated answer to the `prompt`.

    `choice` counts wrong answers. `paraphrased_prompt` is SOUL's accuracy question.
    """

    split: str
    row: int
    what: Literal["answer", "right", "wrong", "prompt", "paraphrased_prompt"]
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """A batch of the likelihood pass."""

    asks: tuple[Ask, ...]
    rows: tuple[TokenRow, ...]
    pad_id: int
    setting: ClassVar[str] = "evaluate.batch_tokens (--eval-batch-tokens)"

    @property
    def pairs(self) -> list[tuple[Ask, TokenRow]]:
        return list(zip(self.asks, self.rows, strict=True))

    @property
    def words(self) -> str:
        """The batch in an error, without what is in it."""
        return f"likelihood batch of {len(self.rows)} answer(s), up to {max(len(row.ids) for row in self.rows)} tokens each"


@dataclass(frozen=True, slots=True)
class GenerateItem:
    """A batch of the generation pass."""

    asks: tuple[Ask, ...]
    prompts: tuple[tuple[int, ...], ...]
    pad_id: int
    eos_ids: tuple[int, ...]
    max_new_tokens: int
    setting: ClassVar[str] = "evaluate.generation_batch_tokens (--eval-generation-batch-tokens)"

    @property
    def words(self) -> str:
        """The batch in an error, without what is in it."""
        longest = max(map(len, self.prompts)) + self.max_new_tokens
        return f"generation batch of {len(self.prompts)} prompt(s), up to {longest} tokens each with the answer"


WorkItem = ScoreItem | GenerateItem
ItemResult = dict[Ask, AnswerScore] | dict[Ask, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """`splits` are the records behind the asks, cut to the limit. Items and results pickle; the order of the results is free."""

    settings: EvalSettings
    splits: dict[str, tuple[Record, ...]]
    items: tuple[WorkItem, ...]
    made_with: Mapping[str, str] = field(default_factory=dict)


def plan_evaluation(
    splits: Mapping[str, Sequence[Record]],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvalSettings,
    *,
    chat: ChatFormat,
    eos_ids: Sequence[int],
    max_length: int,
    cut: int | None = None,
) -> EvalPlan:
    """`max_length` is the model's number of positions, `eos_ids` what `generate.stop_ids` says; with `cut` a longer row loses the end
    of its answer, as in training.

    Raises:
        InputError: an unknown or empty split, or a row that does not fit into the model.
    """
    unknown = sorted(set(splits) - set(EVAL_SPLITS))
    if unknown:
        raise InputError(f"unknown evaluation split {unknown[0]!r}. Expected some of {', '.join(EVAL_SPLITS)}.")
    kept = {split: tuple(splits[split][: settings.limit]) for split in EVAL_SPLITS if split in splits}
    empty = [split for split, records in kept.items() if not records]
    if empty:
        raise InputError(f"the evaluation split {empty[0]} has no rows. Give it rows or leave it out; its metrics are then null.")
    pad_id = check_tokenizer(tokenizer).pad
    truncate: Truncate = "error" if cut is None else "answer"
    tokenize = partial(tokenize_pair, tokenizer=tokenizer, chat=chat, max_length=min(max_length, cut or max_length), truncate=truncate)
    asks: list[Ask] = []
    rows: list[TokenRow] = []
    for split, records in kept.items():
        for position, record in enumerate(records):
            for what, choice, answer in _answers(split, record):
                ids, num_prompt = tokenize(record.prompt, answer, where=f"The {what} answer of the {split} row {record.id}")
                asks.append(Ask(split, position, what, choice))
                rows.append(TokenRow(len(rows), ids, num_prompt))
    batches = plan_batches([len(row.ids) for row in rows], settings.batch_tokens)
    items: list[WorkItem] = [ScoreItem(tuple(asks[i] for i in batch), tuple(rows[i] for i in batch), pad_id) for batch in batches]
    if settings.generate:
        items += _generation_items(kept, tokenizer, settings, chat=chat, pad_id=pad_id, eos_ids=tuple(eos_ids), max_length=max_length)
    return EvalPlan(settings, kept, tuple(items), made_with(tokenizer, chat))


def foreseen(plan: EvalPlan, source: str) -> EvalLog:
    """What the evaluation's log will say of its rows, before any item is run."""
    counts = {ask: len(row.ids) - row.num_prompt for item in plan.items if isinstance(item, ScoreItem) for ask, row in item.pairs}
    splits = {
        split: SplitLog(
            tuple(map(str, range(len(records)))),
            answer_tokens=tuple(counts[Ask(split, row, "answer")] for row in range(len(records))),
            right_tokens=_right_tokens(split, records, counts),
            wrong_tokens=_wrong_tokens(split, records, counts),
            rows=rows_digest(records),
        )
        for split, records in plan.splits.items()
    }
    return EvalLog(source, splits, made_with=plan.made_with)


def _right_tokens(split: str, records: Sequence[Record], counts: Mapping[Ask, int]) -> tuple[int, ...] | None:
    """As the log has them: of the paraphrase where rows have one, elsewhere of the answer itself; none of held-out rows."""
    if split == "holdout":
        return None
    what: Literal["answer", "right"] = "right" if split in PARAPHRASED_SPLITS else "answer"
    found = tuple(counts.get(Ask(split, row, what), 0) for row in range(len(records)))
    return found if any(found) else None


def _wrong_tokens(split: str, records: Sequence[Record], counts: Mapping[Ask, int]) -> tuple[tuple[int, ...], ...] | None:
    if split == "holdout" or not any(record.perturbed for record in records):
        return None
    return tuple(
        tuple(counts[Ask(split, row, "wrong", choice)] for choice in range(len(record.perturbed))) for row, record in enumerate(records)
    )


def _answers(split: str, record: Record) -> list[tuple[Literal["answer", "right", "wrong"], int, str]]:
    """All answers of a record to score, under its own question. Held-out rows are only attacked: their answer is enough."""
    answers: list[tuple[Literal["answer", "right", "wrong"], int, str]] = [("answer", 0, record.response)]
    if split == "holdout":
        return answers
    if split in PARAPHRASED_SPLITS and record.paraphrase is not None:
        answers.append(("right", 0, record.paraphrase))
    return answers + [("wrong", choice, answer) for choice, answer in enumerate(record.perturbed)]


def _generation_items(
    splits: Mapping[str, Sequence[Record]],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvalSettings,
    *,
    chat: ChatFormat,
    pad_id: int,
    eos_ids: tuple[int, ...],
    max_length: int,
) -> list[GenerateItem]:
    asks: list[Ask] = []
    prompts: list[tuple[int, ...]] = []
    for split in GENERATED_SPLITS:
        for position, record in enumerate(splits.get(split, ())):
            asks.append(Ask(split, position, "prompt"))
            prompts.append(tuple(chat.prompt_ids(record.prompt, tokenizer)))
            if settings.sentence_model is not None and record.paraphrased_prompt is not None:
                asks.append(Ask(split, position, "paraphrased_prompt"))
                prompts.append(tuple(chat.prompt_ids(record.paraphrased_prompt, tokenizer)))
    cap = settings.max_new_tokens
    check_room(prompts, max_new_tokens=cap, positions=max_length)
    batches = plan_batches([len(prompt) + cap for prompt in prompts], settings.generation_batch_tokens)
    return [GenerateItem(tuple(asks[i] for i in batch), tuple(prompts[i] for i in batch), pad_id, eos_ids, cap) for batch in batches]


def cost(item: WorkItem) -> int:
    """About how much work an item is, in tokens of a likelihood pass: the longest should be begun first."""
    if isinstance(item, ScoreItem):
        return len(item.rows) * max(len(row.ids) for row in item.rows)
    return len(item.prompts) * max(map(len, item.prompts)) + item.max_new_tokens * (STEP_TOKENS + len(item.prompts))


def run_item(model: PreTrainedModel, item: WorkItem, *, device: torch.device) -> ItemResult:
    """Do one batch with a model that lies on `device`.

    Raises:
        InputError: the device's memory does not hold model and batch.
    """
    try:
        return _run(model, item, device)
    except torch.OutOfMemoryError as error:
        raise InputError(f"a GPU's memory does not hold the model and a {item.words}. Lower {item.setting}.") from error


def _run(model: PreTrainedModel, item: WorkItem, device: torch.device) -> ItemResult:
    if isinstance(item, ScoreItem):
        with evaluation_mode(model):
            scores = score_batch(model, item.rows, pad_id=item.pad_id, device=device)
        return dict(zip(item.asks, scores, strict=True))
    answers = generate_batch(
        model, item.prompts, pad_id=item.pad_id, eos_ids=item.eos_ids, max_new_tokens=item.max_new_tokens, device=device
    )
    return dict(zip(item.asks, answers, strict=True))
