"""Greedy tokens a second on one card: the transformers engine of the server, without Ray, beside `model.generate`, and vLLM if installed.

Llamas of 0.9 M to 7 G parameters with random weights, in bf16 (fp32 on the CPU); every prompt as long as the others, every answer
`--new-tokens` long. Sides take turns round by round; a ratio is the median of the rounds' paired ratios. How many rows have
the tokens of `generate` is told: in fp32 all of them should, in bf16 a random model's near-ties fall either way.

    python -m perf.gpu.serving --json serving.json
    python -m perf.gpu.serving --device cpu --models tiny --rounds 1 --batches 1,2 --prompt-tokens 8 --new-tokens 4
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import queue
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from perf._measure import Comparison, Moment, compare, interleaved
from perf.gpu._card import MODELS, POSITIONS, Report, begin, loaded_llama, memory_bytes, parser_of, refuse, shape
from soul.models.hashes import model_sha256
from soul.models.load import save_model
from soul.models.tiny import tiny_tokenizer
from soul.report.numbers import memory
from soul.serving.decoder import Row, Sampling
from soul.serving.engine import Engine, load_engine
from soul.serving.settings import EngineSettings
from soul.serving.torch_engine import TorchEngine
from soul.serving.work import ModelSpec

RAW, OURS, VLLM = "model.generate", "our transformers engine", "vLLM"
ANSWER_S = 600.0
Prompts = list[list[int]]
Answers = list[list[int]]


def prompts_of(name: str, number: int, options: argparse.Namespace) -> Prompts:
    rng = np.random.default_rng(options.seed)
    found: Prompts = rng.integers(3, MODELS[name]["vocab_size"], (number, options.prompt_tokens)).tolist()
    return found


@torch.inference_mode()
def generated(model: Any, prompts: Prompts, num_tokens: int) -> Answers:
    """What the server is measured against: one call for the whole batch."""
    config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, use_cache=True, pad_token_id=0)
    ids_BT = torch.tensor(prompts, device=model.device)
    output_BT = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config)
    answers: Answers = output_BT[:, ids_BT.shape[1] :].tolist()
    return answers


def answered(engine: Engine, prompts: Prompts, num_tokens: int) -> Answers:
    """The same rows through an engine of the server, all submitted at once."""
    rows = [Row(tuple(prompt), Sampling(num_tokens), eos_ids=()) for prompt in prompts]
    ends: queue.Queue[Row] = queue.Queue()
    assert engine.submit(rows, lambda row, count, end: ends.put(row) if end is not None else None, every_step=False)
    for _ in rows:
        ends.get(timeout=ANSWER_S)
    broken = sum(row.end != "length" for row in rows)
    assert not broken, f"{broken} of {len(rows)} rows did not end at their length"
    return [list(row.tokens) for row in rows]


@contextmanager
def engines(name: str, options: argparse.Namespace, device: torch.device, tokenizer: Any) -> Iterator[tuple[Any, dict[str, Engine]]]:
    """The model in memory and the engines over it; vLLM reads it from a folder, and has a copy of its own in its half of the card."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = loaded_llama(name, seed=options.seed, device=device, dtype=dtype)
    rows, positions = max(options.batches), options.prompt_tokens + options.new_tokens
    found: dict[str, Engine] = {OURS: TorchEngine(model, tokenizer, max_rows=rows, max_batch_tokens=rows * positions)}
    with tempfile.TemporaryDirectory() as folder:
        if options.vllm:
            save_model(Path(folder), model, tokenizer, dtype=dtype)
            spec = ModelSpec(model_sha256(Path(folder)), folder)
            found[VLLM] = load_engine(spec, EngineSettings("vllm", rows, rows * positions, max_models=2, num_gpus=1, device=options.device))
        try:
            yield model, found
        finally:
            for engine in found.values():
                engine.close()
                engine.join(60)


def measure(
    name: str, model: Any, found: dict[str, Engine], batch: int, options: argparse.Namespace, device: torch.device
) -> tuple[list[Comparison], list[dict[str, Any]]]:
    prompts, count = prompts_of(name, batch, options), options.new_tokens
    ways: dict[str, Callable[[], Answers]] = {RAW: lambda: generated(model, prompts, count)}
    ways |= {label: partial(answered, engine, prompts, count) for label, engine in found.items()}

    def clocked(label: str) -> Moment:
        start = Moment.now(device)
        ways[label]()
        return Moment.now(device).since(start)

    wanted = ways[RAW]()
    equal = {label: sum(one == other for one, other in zip(way(), wanted, strict=True)) for label, way in ways.items()}  # warms up, too
    moments = interleaved({label: partial(clocked, label) for label in ways}, rounds=options.rounds)
    speeds = {label: [batch * count / moment.wall for moment in side] for label, side in moments.items()}
    walls = {label: [moment.wall for moment in side] for label, side in moments.items()}
    rows = []
    for label in ways:
        peak = None
        if device.type == "cuda" and label != VLLM:  # whose memory is another process's
            torch.cuda.reset_peak_memory_stats(device)
            ways[label]()
            peak = torch.cuda.max_memory_allocated(device)
        middle = sorted(speeds[label])[len(speeds[label]) // 2]
        rows.append({"model": name, "batch": batch, "side": label, "tokens_per_s": middle, "rows_equal": equal[label], "peak_bytes": peak})
    what = f"{name}, batch {batch}, {count} tokens"
    return [compare("serving", what, (label, walls[label]), (RAW, walls[RAW]), unit="s") for label in found], rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batches", default="1,8,32", metavar="ROWS,...", help="rows at once [default: 1,8,32]")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="[default: 64]")
    parser.add_argument("--new-tokens", type=int, default=128, help="[default: 128]")
    options, device = begin(parser, argv)
    sizes = [int(part) if part.isdecimal() else 0 for part in options.batches.split(",")]
    if min(sizes) < 1 or min(options.prompt_tokens, options.new_tokens) < 1 or options.prompt_tokens + options.new_tokens > POSITIONS:
        refuse(f"--batches must be row counts; --prompt-tokens and --new-tokens at least 1 and together at most {POSITIONS}")
    options.batches, options.vllm = sizes, importlib.util.find_spec("vllm") is not None and device.type == "cuda"
    report, room = Report(options, device), memory_bytes(device)
    if not options.vllm:
        report.skip(VLLM, "not installed, or no card")
    tokenizer: Any = tiny_tokenizer(["a b c"], 300)
    for name in options.models:
        need = serving_bytes(name, options, width=2 if device.type == "cuda" else 4)
        if need > room:
            report.skip(name, f"weights and cache need {memory(need)}, there are {memory(room)}")
            continue
        with engines(name, options, device, tokenizer) as (model, found):
            for batch in sizes:
                report.add(*measure(name, model, found, batch, options, device))
        del model, found
        gc.collect()


def serving_bytes(name: str, options: argparse.Namespace, *, width: int) -> int:
    """Weights, and the keys and values of the largest batch, held twice for a moment when a row joins; vLLM takes its share beside."""
    sizes, found = MODELS[name], shape(name)
    heads = sizes["num_attention_heads"]
    per_token = 2 * sizes["num_hidden_layers"] * sizes["hidden_size"] // heads * sizes.get("num_key_value_heads", heads)
    positions = max(options.batches) * (options.prompt_tokens + options.new_tokens)
    needed: int = width * (found.num_params * (2 if options.vllm else 1) + 2 * positions * per_token)
    return needed


if __name__ == "__main__":
    main()
