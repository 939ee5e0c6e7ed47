"""Evaluation on one card, bf16 against fp32: rows a second of the likelihood pass and of the generation pass, as a run makes them.

Llamas of 0.9 M to 7 G parameters with random weights, over invented authors; the plan of a real evaluation, its batches run one after
the other. A random model hardly ever ends an answer, so every answer costs the whole cap, as that of a model that unlearning has
broken. Both types are in memory at once and take turns round by round; a ratio is the median of the rounds' paired ratios.

    python -m perf.gpu.evaluation --json evaluation.json
    python -m perf.gpu.evaluation --device cpu --models tiny --rounds 1 --authors 2 --limit 2 --new-tokens 4
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from perf._measure import Comparison, Moment, compare, interleaved, peak_bytes
from perf.gpu._card import MODELS, POSITIONS, Report, begin, loaded_llama, memory_bytes, parser_of, refuse, shape
from soul.data.chat import ChatFormat
from soul.data.fictitious import fictitious_splits
from soul.evaluate.evaluator import finish
from soul.evaluate.plan import EvalPlan, GenerateItem, ItemResult, ScoreItem, WorkItem, plan_evaluation, run_item
from soul.evaluate.settings import EvalSettings
from soul.models.tiny import tiny_tokenizer
from soul.report.numbers import memory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PASSES: dict[str, type[WorkItem]] = {"likelihood": ScoreItem, "generation": GenerateItem}


@dataclass(frozen=True)
class Judged:
    """What is asked of every model: a plan, and the tokenizer it was made with."""

    plan: EvalPlan
    tokenizer: Any

    @classmethod
    def of(cls, options: argparse.Namespace) -> Judged:
        splits = fictitious_splits(options.authors, seed=options.seed)
        asked = {"forget": splits["forget10"], "retain": splits["retain90"]}
        texts = [f"{record.prompt} {record.response}" for record in splits["retain90"]]
        tokenizer: Any = tiny_tokenizer(texts, min(sizes["vocab_size"] for sizes in MODELS.values()))
        settings = EvalSettings(max_new_tokens=options.new_tokens, limit=options.limit)
        eos_ids = (tokenizer.eos_token_id,)
        return cls(plan_evaluation(asked, tokenizer, settings, chat=ChatFormat(), eos_ids=eos_ids, max_length=POSITIONS), tokenizer)

    def items(self, name: str) -> list[WorkItem]:
        return [item for item in self.plan.items if isinstance(item, PASSES[name])]

    def rows(self, name: str) -> int:
        return sum(len(item.asks) for item in self.items(name))


def measure(name: str, judged: Judged, options: argparse.Namespace, device: torch.device) -> tuple[list[Comparison], list[dict[str, Any]]]:
    models = {kind: loaded_llama(name, seed=options.seed, device=device, dtype=dtype) for kind, dtype in DTYPES.items()}

    def run(kind: str, part: str) -> list[ItemResult]:
        return [run_item(models[kind], item, device=device) for item in judged.items(part)]

    def clocked(kind: str, part: str) -> Moment:
        start = Moment.now(device)
        run(kind, part)
        return Moment.now(device).since(start)

    metrics = {}
    for kind in DTYPES:  # warms up, too
        results = [result for part in PASSES for result in run(kind, part)]
        scores = finish(judged.plan, results, judged.tokenizer, device=device).model_entry()
        metrics[kind] = scores["forget"]["probability"]
    found, rows = [], []
    for part in PASSES:
        sides: dict[str, Callable[[], Moment]] = {kind: partial(clocked, kind, part) for kind in DTYPES}
        moments = interleaved(sides, rounds=options.rounds)
        walls = {kind: [moment.wall for moment in side] for kind, side in moments.items()}
        found.append(compare("evaluation", f"{name} {part}", ("bf16", walls["bf16"]), ("fp32", walls["fp32"]), unit="s"))
        for kind, side in walls.items():
            peak = peak_bytes(partial(run, kind, part), device)
            speed, facts = judged.rows(part) / sorted(side)[len(side) // 2], {"model": name, "pass": part, "side": kind}
            rows.append({**facts, "rows": judged.rows(part), "rows_per_s": speed, "peak_bytes": peak, "forget_probability": metrics[kind]})
    return found, rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--authors", type=int, default=40, help="invented authors, of whom a tenth is forgotten [default: 40]")
    parser.add_argument("--limit", type=int, help="rows of a split [default: all]")
    parser.add_argument("--new-tokens", type=int, default=EvalSettings().max_new_tokens, help="cap of an answer [default: %(default)s]")
    options, device = begin(parser, argv)
    if options.authors < 2 or options.new_tokens < 1 or (options.limit is not None and options.limit < 1):
        refuse("--authors must be at least 2, --new-tokens and --limit at least 1")
    report, room, judged = Report(options, device), memory_bytes(device), Judged.of(options)
    for name in options.models:
        need = sum(dtype.itemsize for dtype in DTYPES.values()) * shape(name).num_params
        if need > room:
            report.skip(name, f"its weights in both types need {memory(need)}, there are {memory(room)}")
            continue
        report.add(*measure(name, judged, options, device))
        gc.collect()


if __name__ == "__main__":
    main()
