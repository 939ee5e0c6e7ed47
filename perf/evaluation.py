"""How much faster an evaluation is as one likelihood pass and batched generation than row by row, at equal values and equal text.

Both sides do the same work on the same model in one process, alternating, so that whatever else the machine does falls on both:

- row by row: every answer in a forward of its own with all its logits, every prompt in a `generate` of its own (SOUL's evaluation);
- metric by metric: answers in dataset order, 32 at a time, padded, with all logits; one pass over everything, and six more over the true
  answers, because probability, exact memorisation, extraction strength, loss, zlib, Min-K and Min-K++ run the model for themselves
  (OpenUnlearning's evaluation).

Run: python perf/evaluation.py [--records 60] [--steps 150] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul.batch import TokenRow, collate
from soul.data.chat import ChatFormat
from soul.data.fictitious import fictitious_splits
from soul.data.tokenize import token_rows
from soul.evaluate.generate import decode, generate_batch
from soul.evaluate.likelihood import score_answers
from soul.evaluate.plan import GenerateItem, ScoreItem, plan_evaluation
from soul.evaluate.settings import EvalSettings
from soul.models.scoring import answer_logps
from soul.models.tiny import TinyConfig, tiny_model, tiny_tokenizer
from soul.records import Record

CPU = torch.device("cpu")
OURS, ROW_BY_ROW, METRIC_BY_METRIC = "ours", "row by row", "metric by metric"
T = TypeVar("T")
REPEATED_PASSES = 6
PEER_BATCH = 32
CAP = 64


def trained_model(records: Sequence[Record], *, steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A tiny model that half knows the records: its answers end, as a useful model's do."""
    tokenizer = tiny_tokenizer([f"{record.prompt} {record.response}" for record in records], 1500)
    model = tiny_model(TinyConfig(vocab_size=1500), tokenizer, seed=0)
    rows = token_rows(records, "forget", tokenizer, ChatFormat(), max_length=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        chosen = [rows[(step * 12 + i) % len(rows)] for i in range(12)]
        batch = collate([("forget", row) for row in chosen], pad_id=tokenizer.pad_token_id)
        optimizer.zero_grad()
        (-answer_logps(model, batch).logps_N.mean()).backward()
        optimizer.step()
    return model.eval(), tokenizer


def padded_mean_nlls(model: LlamaForCausalLM, rows: Sequence[TokenRow], *, pad_id: int, batch_size: int) -> list[float]:
    """Full logits of padded batches in dataset order, then the mean loss of each row's answer."""
    nlls: list[float] = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        batch = collate([("forget", row) for row in chunk], pad_id=pad_id, multiple=1)
        with torch.no_grad():
            logits_BTV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits.float()
        losses_BT = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), batch.labels_BT[:, 1:], reduction="none")
        nlls += [float(losses_T.sum() / row.num_supervised) for losses_T, row in zip(losses_BT, chunk, strict=True)]
    return nlls


def generate_row_by_row(model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]]) -> list[str]:
    texts: list[str] = []
    for prompt in prompts:
        ids_1T = torch.tensor([list(prompt)])
        output = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, max_new_tokens=CAP, use_cache=True)
        texts.append(decode(tokenizer, output[0, len(prompt) :].tolist()))
    return texts


def run_all(sides: Mapping[str, Callable[[], T]]) -> dict[str, tuple[float, T]]:
    """Every side once, in turn: seconds and values."""
    runs: dict[str, tuple[float, T]] = {}
    for name, work in sides.items():
        started = time.perf_counter()
        values = work()
        runs[name] = (time.perf_counter() - started, values)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=60, help="rows of the forget set [default: 60]")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the tiny model [default: 150]")
    parser.add_argument("--repeats", type=int, default=3, help="paired repetitions, of which the median counts [default: 3]")
    options = parser.parse_args()
    torch.set_num_threads(1)

    splits = {"forget": fictitious_splits(num_authors=40)["full"][: options.records]}
    model, tokenizer = trained_model(splits["forget"], steps=options.steps)
    settings = EvalSettings(max_new_tokens=CAP)
    plan = plan_evaluation(splits, tokenizer, settings, chat=ChatFormat(), eos_ids=(tokenizer.eos_token_id,), max_length=512)
    items = [item for item in plan.items if isinstance(item, ScoreItem)]
    asked = sorted(
        ((row.index, ask.what, row) for item in items for ask, row in zip(item.asks, item.rows, strict=True)), key=lambda ask: ask[0]
    )
    rows = [row for _, _, row in asked]
    answers = [row for _, what, row in asked if what == "answer"]
    prompts = [ChatFormat().prompt_ids(record.prompt, tokenizer) for record in splits["forget"]]
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)

    def ours_generated() -> list[str]:
        texts: dict[int, str] = {}
        for item in plan.items:
            if isinstance(item, GenerateItem):
                tokens = generate_batch(
                    model, item.prompts, pad_id=pad_id, eos_ids=item.eos_ids, max_new_tokens=item.max_new_tokens, device=CPU
                )
                texts.update({ask.row: decode(tokenizer, answer) for ask, answer in zip(item.asks, tokens, strict=True)})
        return [texts[row] for row in sorted(texts)]

    def metric_by_metric() -> list[float]:
        nlls = padded_mean_nlls(model, rows, pad_id=pad_id, batch_size=PEER_BATCH)
        for _ in range(REPEATED_PASSES):
            padded_mean_nlls(model, answers, pad_id=pad_id, batch_size=PEER_BATCH)
        return nlls

    scoring: dict[str, Callable[[], list[float]]] = {
        OURS: lambda: [score.mean_nll for score in score_answers(model, rows, pad_id=pad_id, device=CPU)],
        ROW_BY_ROW: lambda: padded_mean_nlls(model, rows, pad_id=pad_id, batch_size=1),
        METRIC_BY_METRIC: metric_by_metric,
    }
    generating: dict[str, Callable[[], list[str]]] = {
        OURS: ours_generated,
        ROW_BY_ROW: lambda: generate_row_by_row(model, tokenizer, prompts),
    }
    nll_runs = [run_all(scoring) for _ in range(options.repeats)]
    text_runs = [run_all(generating) for _ in range(options.repeats)]
    check_equal({name: values for name, (_, values) in nll_runs[-1].items()}, {name: texts for name, (_, texts) in text_runs[-1].items()})
    print(f"{len(rows)} answers scored, {len(prompts)} generated, one CPU thread; medians of {options.repeats}; values and text equal\n")
    report(medians(nll_runs), medians(text_runs))


def medians(runs: Sequence[Mapping[str, tuple[float, object]]]) -> dict[str, float]:
    return {name: statistics.median(run[name][0] for run in runs) for name in runs[0]}


def check_equal(nlls: Mapping[str, list[float]], texts: Mapping[str, list[str]]) -> None:
    for name, values in nlls.items():
        difference = max(abs(a - b) for a, b in zip(nlls[OURS], values, strict=True))
        assert difference < 1e-5, f"{name}: losses differ by {difference} nats"
    assert texts[OURS] == texts[ROW_BY_ROW], "batched and single generation differ"


def report(scoring: Mapping[str, float], generating: Mapping[str, float]) -> None:
    for stage, seconds in (("likelihood", scoring), ("generation", generating)):
        for name, spent in seconds.items():
            print(f"{stage:<12}{name:<18}{spent:8.3f} s{spent / seconds[OURS]:8.1f} x")
    ours = scoring[OURS] + generating[OURS]
    print(
        f"\nwhole evaluation {ours:.3f} s; everything row by row takes {(scoring[ROW_BY_ROW] + generating[ROW_BY_ROW]) / ours:.1f} x that,"
    )
    print(f"likelihoods metric by metric with generation row by row {(scoring[METRIC_BY_METRIC] + generating[ROW_BY_ROW]) / ours:.1f} x")


if __name__ == "__main__":
    main()
