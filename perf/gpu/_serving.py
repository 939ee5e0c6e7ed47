"""The work of serving.py: the serving engine beside `generate`, and the passes of an evaluation in two precisions."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import queue
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from perf._measure import Moment, compare, interleaved, table
from perf._workload import Workload, make_workload
from perf.gpu._command import header, say
from perf.gpu._models import random_model, room
from soul.data.chat import ChatFormat
from soul.device import torch_device
from soul.evaluate.evaluator import positions
from soul.evaluate.generate import generate_batch
from soul.evaluate.plan import GenerateItem, ScoreItem, plan_evaluation, run_item
from soul.evaluate.settings import EvalSettings
from soul.models.load import save_model
from soul.models.stored import in_memory
from soul.report.numbers import memory
from soul.serving.decoder import End, Row, Sampling
from soul.serving.engine import Engine
from soul.serving.settings import EngineSettings
from soul.serving.torch_engine import TorchEngine

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PASSES = {"likelihoods": ScoreItem, "generation": GenerateItem}
WAIT_S = 3600.0
BATCH_TOKENS = 2**20


def measure(options: argparse.Namespace) -> None:
    """Everything that the flags ask for, printed and written as it is found."""
    device = torch_device(options.device)
    found: dict[str, Any] = {"header": header(options), "comparisons": [], "sides": [], "skipped": []}
    print(json.dumps(found["header"], indent=1), flush=True)
    for name in options.models:
        workload = make_workload(
            model=name, device=device.type, precision="", rows=options.rows, batch_size=1, micro_batch_size=1, data=options.data
        )
        stored = random_model(name, workload.tokenizer, device=device, seed=options.seed)
        numel = sum(parameter.numel() for parameter in stored.skeleton.parameters())
        needs, limit = sum(numel * DTYPES[precision].itemsize for precision in options.precisions), room(device)
        if needs > limit:
            say(f"SKIPPED {name}: weights in {' and '.join(options.precisions)} need {memory(needs)}, there are {memory(limit)}")
            found["skipped"].append({"model": name, "why": "the weights do not fit", "weights_bytes": needs, "room_bytes": limit})
            continue
        for part in (_serve, _evaluate, _serve_with_vllm):
            part(options, workload, device, found)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if options.json is not None:
                options.json.write_text(json.dumps(found, indent=1))


def _serve(options: argparse.Namespace, workload: Workload, device: torch.device, found: dict[str, Any]) -> None:
    """The precision is that of `load_torch_engine`: bf16 on a GPU, fp32 elsewhere."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    model = _model(options, workload, device, precision)
    engine = TorchEngine(model, workload.tokenizer, max_rows=max(options.batches), max_batch_tokens=BATCH_TOKENS)
    for size in options.batches:
        prompts = _prompts(workload, size)
        texts: dict[str, list[tuple[int, ...]]] = {}

        def ours(prompts: Sequence[Sequence[int]] = prompts, texts: dict[str, list[tuple[int, ...]]] = texts) -> None:
            texts["ours"] = answers(engine, prompts, options.new_tokens)

        def theirs(prompts: Sequence[Sequence[int]] = prompts, texts: dict[str, list[tuple[int, ...]]] = texts) -> None:
            settings: dict[str, Any] = {"pad_id": workload.pad_id, "eos_ids": (), "max_new_tokens": options.new_tokens, "device": device}
            texts["theirs"] = generate_batch(model, prompts, **settings)

        sides = _timed({"torch_engine": ours, "generate": theirs}, device, rounds=options.rounds)
        alike = sum(one == other for one, other in zip(texts["ours"], texts["theirs"], strict=True))
        facts = {"model": workload.model_name, "precision": precision, "batch": size}
        amount = size * options.new_tokens
        for name, (moments, peak) in sides.items():
            found["sides"].append({**facts, "engine": name, **_rate("tokens", amount, moments), "peak_bytes": peak})
        _note(found, f"{workload.model_name} {precision}", f"batch {size}", "tokens", amount, sides, {"answers_alike": alike / size})
    engine.close()
    engine.join(60)


def _evaluate(options: argparse.Namespace, workload: Workload, device: torch.device, found: dict[str, Any]) -> None:
    """As an examiner runs it: the model in the precision's own type, one item of the plan after the other. No answer ends by itself."""
    models = {precision: _model(options, workload, device, precision) for precision in options.precisions}
    tokenizer, model = workload.tokenizer, next(iter(models.values()))
    settings = EvalSettings(max_new_tokens=options.new_tokens)
    splits = {"forget": tuple(workload.records["forget"])}
    plan = plan_evaluation(splits, tokenizer, settings, chat=ChatFormat(), eos_ids=(), max_length=positions(model.config))
    for name, kind in PASSES.items():
        items = [item for item in plan.items if isinstance(item, kind)]
        amount = sum(len(item.asks) for item in items)

        def run(model: PreTrainedModel, items: Sequence[ScoreItem | GenerateItem] = items) -> None:
            for item in items:
                run_item(model, item, device=device)

        work = {precision: lambda model=model, run=run: run(model) for precision, model in models.items()}  # type: ignore[misc]
        sides = _timed(work, device, rounds=options.rounds)
        for precision, (moments, peak) in sides.items():
            facts = {"model": workload.model_name, "precision": precision, "pass": name}
            found["sides"].append({**facts, **_rate("rows", amount, moments), "peak_bytes": peak})
        _note(found, workload.model_name, name, "rows", amount, sides, {})


def _serve_with_vllm(options: argparse.Namespace, workload: Workload, device: torch.device, found: dict[str, Any]) -> None:
    """Behind the others, because it takes the card's memory for itself."""
    if importlib.util.find_spec("vllm") is None:
        say("vllm is not installed: it is left out")
        return
    from soul.serving.vllm_engine import load_vllm_engine

    settings = EngineSettings("vllm", max_rows=max(options.batches), num_gpus=float(device.type == "cuda"), device=options.device)
    with tempfile.TemporaryDirectory(prefix="soul-perf-") as folder:
        model = _model(options, workload, torch.device("cpu"), "bf16" if device.type == "cuda" else "fp32")
        save_model(Path(folder) / "model", model, workload.tokenizer)
        del model
        engine = load_vllm_engine(Path(folder) / "model", settings)
        for size in options.batches:
            prompts = _prompts(workload, size)
            sides = _timed({"vllm": lambda prompts=prompts: answers(engine, prompts, options.new_tokens)}, device, rounds=options.rounds)  # type: ignore[misc]
            facts = {"model": workload.model_name, "batch": size, "engine": "vllm", "paired": False}
            found["sides"].append({**facts, **_rate("tokens", size * options.new_tokens, sides["vllm"][0])})
            print(f"    {facts['model']}, batch {size}, vllm: {found['sides'][-1]['tokens_a_second']:.0f} tokens/s", flush=True)
        engine.close()
        engine.join(120)


def answers(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[int, ...]]:
    """Greedy answers of so many tokens each, all asked for at once.

    Raises:
        AssertionError: one ended early.
    """
    rows = [Row(tuple(prompt), Sampling(new_tokens), eos_ids=()) for prompt in prompts]
    ends: queue.Queue[End | None] = queue.Queue()
    assert engine.submit(rows, lambda _, __, end: ends.put(end), every_step=False)
    told = {ends.get(timeout=WAIT_S) for _ in rows}
    assert told == {"length"}, f"answers ended with {sorted(map(str, told))}: not the same work, so not a comparison"
    return [tuple(row.tokens) for row in rows]


def _model(options: argparse.Namespace, workload: Workload, device: torch.device, precision: str) -> PreTrainedModel:
    stored = random_model(workload.model_name, workload.tokenizer, device=device, seed=options.seed)
    model = in_memory(stored, device=device, dtype=DTYPES[precision])
    assert isinstance(model, PreTrainedModel)
    model.config.use_cache = True
    return model.eval()


def _prompts(workload: Workload, size: int) -> list[list[int]]:
    """Of the forget rows, again from the first where there are too few."""
    records = workload.records["forget"]
    tokenizer: PreTrainedTokenizerFast = workload.tokenizer
    return [ChatFormat().prompt_ids(records[i % len(records)].prompt, tokenizer) for i in range(size)]


Timed = dict[str, tuple[list[Moment], int | None]]


def _timed(work: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int) -> Timed:
    """Each side once as a warm-up, in which the peak of the card's memory is taken, then in turns."""
    peaks = {name: _peak(once, device) for name, once in work.items()}

    def clocked(name: str) -> Moment:
        start = Moment.now(device)
        work[name]()
        return Moment.now(device).since(start)

    moments = interleaved({name: lambda name=name: clocked(name) for name in work}, rounds=rounds)  # type: ignore[misc]
    return {name: (moments[name], peaks[name]) for name in work}


def _peak(work: Callable[[], object], device: torch.device) -> int | None:
    """The models of all sides are in it. None on a CPU, whose allocator is only asked from the thread that profiles."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    work()
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def _rate(what: str, amount: int, moments: Sequence[Moment]) -> dict[str, Any]:
    seconds = statistics.median(moment.wall for moment in moments)
    return {what: amount, "seconds": seconds, f"{what}_a_second": amount / seconds}


def _note(found: dict[str, Any], part: str, name: str, what: str, amount: int, sides: Timed, notes: dict[str, Any]) -> None:
    """Print the rates of all sides, and the ratio of the second's seconds to the first's."""
    for side, (moments, _) in sides.items():
        print(f"    {part}, {name}, {side}: {_rate(what, amount, moments)[f'{what}_a_second']:.1f} {what}/s", flush=True)
    if len(sides) < 2:
        return
    (one, (ours, _)), (other, (theirs, _)) = sides.items()
    walls = [[moment.wall for moment in side] for side in (theirs, ours)]
    comparison = compare(part, name, (other, walls[0]), (one, walls[1]), unit="s", notes=notes)
    found["comparisons"].append(comparison.to_json())
    print(f"{table([comparison])}\n    {notes}" if notes else table([comparison]), flush=True)
