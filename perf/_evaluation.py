"""Part (c): our evaluation against item-by-item generation and likelihoods from padded full logits, at equal values and equal texts.

Theirs, as OpenUnlearning does it: answers in dataset order, 32 at a time, padded to the longest, logits at every position; a `generate`
of its own for each prompt. `metric by metric` adds the six further passes over the true answers that it makes because probability, exact
memorisation, extraction strength, loss, zlib, Min-K and Min-K++ each run the model. Ours is `evaluate_model` as it is: planning,
tokenising and all metrics included, which theirs is spared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaForCausalLM

from perf._measure import Comparison, Moment, compare, interleaved
from perf._workload import Workload
from soul.batch import TokenRow, collate
from soul.data.chat import ChatFormat
from soul.data.tokenize import tokenize_pair
from soul.evaluate.evaluator import Evaluation, evaluate_model, positions
from soul.evaluate.generate import decode, stop_ids
from soul.evaluate.plan import GenerateItem, plan_evaluation, run_item
from soul.evaluate.settings import EvalSettings
from soul.models.scoring import answer_logps
from soul.records import Record

PEER_BATCH = 32
REPEATED_PASSES = 6
CAP = 64
TRAINING_STEPS = 150
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
OURS, SCORED, GENERATED = "ours", "likelihood", "generate"


@dataclass(frozen=True)
class Questions:
    """What both sides are asked: every answer of the records to score, every prompt to continue."""

    records: tuple[Record, ...]
    rows: list[TokenRow]
    truths: list[TokenRow]
    prompts: list[list[int]]


def half_trained(workload: Workload, records: Sequence[Record], rows: Sequence[TokenRow]) -> LlamaForCausalLM:
    """The tiny model once it half knows the rows, so that its answers end as a useful model's do; larger shapes stay random."""
    model = workload.build_model()
    if workload.model_name != "tiny":
        model.eval()
        return model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(TRAINING_STEPS):
        chosen = [rows[(step * 12 + i) % len(rows)] for i in range(12)]
        batch = collate([("forget", row) for row in chosen], pad_id=workload.pad_id).to(workload.device)
        optimizer.zero_grad()
        (-answer_logps(model, batch).logps_N.mean()).backward()
        optimizer.step()
    model.eval()
    return model


def questions(workload: Workload) -> Questions:
    records = tuple(workload.records["forget"])
    tokenizer, chat = workload.tokenizer, ChatFormat()
    rows: list[TokenRow] = []
    truths: list[TokenRow] = []
    for record in records:
        answers = [record.response, *([] if record.paraphrase is None else [record.paraphrase]), *record.perturbed]
        for number, answer in enumerate(answers):
            ids, num_prompt = tokenize_pair(record.prompt, answer, tokenizer, chat, max_length=512, where=f"row {record.id}")
            rows.append(TokenRow(len(rows), ids, num_prompt))
            truths += rows[-1:] if number == 0 else []
    return Questions(records, rows, truths, [chat.prompt_ids(record.prompt, tokenizer) for record in records])


@torch.no_grad()
def padded_mean_nlls(workload: Workload, model: LlamaForCausalLM, rows: Sequence[TokenRow]) -> list[float]:
    nlls: list[float] = []
    for start in range(0, len(rows), PEER_BATCH):
        chunk = rows[start : start + PEER_BATCH]
        batch = collate([("forget", row) for row in chunk], pad_id=workload.pad_id, multiple=1).to(workload.device)
        logits_BTV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits.float()
        losses_BT = F.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), batch.labels_BT[:, 1:], reduction="none")
        nlls += (losses_BT.sum(1).double().cpu() / torch.tensor([row.num_supervised for row in chunk])).tolist()
    return nlls


def generate_each(workload: Workload, model: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    tokenizer = workload.tokenizer
    ids = {"pad_token_id": workload.pad_id, "eos_token_id": tokenizer.eos_token_id}
    config = GenerationConfig(do_sample=False, max_new_tokens=CAP, use_cache=True, **ids)
    texts = []
    for prompt in prompts:
        ids_1T = torch.tensor([list(prompt)], device=workload.device)
        output = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=config)
        texts.append(decode(tokenizer, output[0, len(prompt) :].tolist()))
    return texts


def compare_evaluations(workload: Workload, *, rounds: int, steps: int) -> list[Comparison]:
    """`steps` has no meaning here: an evaluation is one pass over all forget rows."""
    asked = questions(workload)
    model = half_trained(workload, asked.records, asked.truths)
    settings = EvalSettings(max_new_tokens=CAP)
    splits = {"forget": asked.records}
    context = torch.autocast(workload.device.type, dtype=torch.bfloat16, enabled=workload.precision == "bf16")

    def ours(chosen: EvalSettings = settings) -> Evaluation:
        with context:
            return evaluate_model(model, workload.tokenizer, splits, chosen, device=workload.device)

    def likelihood() -> list[float]:
        with context:
            return padded_mean_nlls(workload, model, asked.rows)

    def repeated() -> None:
        with context:
            for _ in range(REPEATED_PASSES):
                padded_mean_nlls(workload, model, asked.truths)

    def generation() -> list[str]:
        with context:
            return generate_each(workload, model, asked.prompts)

    plan = plan_evaluation(
        splits,
        workload.tokenizer,
        settings,
        chat=ChatFormat(),
        eos_ids=stop_ids(model.generation_config, workload.tokenizer),
        max_length=positions(model.config),
    )
    batches = [item for item in plan.items if isinstance(item, GenerateItem)]

    def our_generation() -> None:
        with context:
            for item in batches:
                run_item(model, item, device=workload.device)

    work: dict[str, Callable[[], object]] = {
        OURS: ours,
        f"{OURS}, generation": our_generation,
        f"{OURS}, no generation": lambda: ours(settings.model_copy(update={"generate": False})),
        SCORED: likelihood,
        "repeated passes": repeated,
        GENERATED: generation,
    }

    def clocked(name: str) -> Moment:
        start = Moment.now(workload.device)
        work[name]()
        return Moment.now(workload.device).since(start)

    notes = {"largest difference of a mean NLL": check_equal(workload, ours(), likelihood(), generation())}
    notes |= {"answers scored": len(asked.rows), "texts generated": len(asked.prompts), "cap": CAP}
    moments = interleaved({name: lambda name=name: clocked(name) for name in work}, rounds=rounds)  # type: ignore[misc]
    return _ratios(moments, notes)


def check_equal(workload: Workload, ours: Evaluation, nlls: Sequence[float], texts: Sequence[str]) -> float:
    """The largest difference of a row's mean NLL, in nats per token. In bf16 padding moves the last bits, and with them a text."""
    log = ours.log.splits["forget"]
    mine: list[float | None] = []
    for row, nll in enumerate(log.answer_nll or ()):
        right = log.right_nll[row] if log.right_nll is not None else None
        wrongs = log.wrong_nlls[row] if log.wrong_nlls is not None else None
        mine += [nll, *([] if right is None else [right]), *(wrongs or ())]
    difference = max(abs(one - other) for one, other in zip(mine, nlls, strict=True) if one is not None)
    if difference > TOLERANCE[workload.precision]:
        raise AssertionError(f"mean losses differ by {difference} nats: not the same work, so not a comparison")
    if workload.precision == "fp32" and list(ours.generations["forget"]) != list(texts):
        different = sum(one != other for one, other in zip(ours.generations["forget"], texts, strict=True))
        raise AssertionError(f"{different} of {len(texts)} generated texts differ: not the same work, so not a comparison")
    return difference


def _ratios(moments: Mapping[str, Sequence[Moment]], notes: dict[str, Any]) -> list[Comparison]:
    def total(clock: str, *names: str) -> list[float]:
        return [sum(getattr(moment, clock) for moment in side) for side in zip(*(moments[name] for name in names), strict=True)]

    found = []
    for clock in ("wall", "cpu"):
        first = clock == "wall"
        below = (OURS, total(clock, OURS))
        above = ("padded, item by item", total(clock, SCORED, GENERATED))
        found.append(
            compare(
                "c",
                f"evaluation, {clock} time",
                above,
                below,
                unit="s",
                aim=5.0 if first else None,
                at_least=True,
                notes=notes if first else {},
            )
        )
        above = ("metric by metric, item by item", total(clock, SCORED, "repeated passes", GENERATED))
        found.append(compare("c", f"evaluation, {clock} time", above, below, unit="s"))
    scored = (f"{OURS}, all metrics", total("wall", f"{OURS}, no generation"))
    found.append(compare("c", "likelihoods alone, wall time", ("padded", total("wall", SCORED)), scored, unit="s"))
    found.append(
        compare("c", "likelihoods alone, wall time", ("metric by metric", total("wall", SCORED, "repeated passes")), scored, unit="s")
    )
    generated = (f"{OURS}, batches", total("wall", f"{OURS}, generation"))
    found.append(compare("c", "generation alone, wall time", ("item by item", total("wall", GENERATED)), generated, unit="s"))
    return found
