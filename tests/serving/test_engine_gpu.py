"""The transformers engine on a GPU says what `generate` says on the CPU, and loads models in bf16 there."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from soul.device import Device, torch_device
from soul.models.load import load_model, load_tokenizer
from soul.serving.decoder import Row, Sampling
from soul.serving.engine import Engine
from soul.serving.likelihood import likelihoods
from soul.serving.settings import EngineSettings
from soul.serving.torch_engine import TorchEngine, load_torch_engine
from tests.devices import DEVICES, exact_products
from tests.serving_runs import write_model

PROMPTS = [(5, 6, 7), (9, 8, 7, 6, 5), (11,), (20, 21, 22, 23)]
NEW = 12


def answers(engine: Engine, *, num_top: int | None = None) -> list[Row]:
    rows = [Row(prompt, Sampling(NEW, num_top=num_top), eos_ids=()) for prompt in PROMPTS]
    ends: queue.Queue[Row] = queue.Queue()
    assert engine.submit(rows, lambda row, count, end: ends.put(row) if end is not None else None, every_step=False)
    for _ in rows:
        ends.get(timeout=60)
    assert {row.end for row in rows} == {"length"}
    return rows


def close(engine: Engine) -> None:
    engine.close()
    engine.join(10)


@torch.inference_mode()
def generated(model: Any, prompt: tuple[int, ...]) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
    ids = torch.tensor([prompt])
    found: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_and_their_likelihoods_are_the_cpus(device: Device, tmp_path: Path) -> None:
    folder = str(write_model(tmp_path / "m", 0))
    with exact_products():
        here, there = (load_model(folder, dtype=torch.float32).eval().to(torch_device(place)) for place in ("cpu", device))
        engine = TorchEngine(there, load_tokenizer(folder), max_rows=4, max_batch_tokens=1000)  # type: ignore[arg-type]
        rows = answers(engine, num_top=3)
        close(engine)
        assert [row.tokens for row in rows] == [generated(here, prompt) for prompt in PROMPTS]
        told, wanted = (likelihoods(model, [[*row.prompt, *row.tokens] for row in rows], 2) for model in (there, here))  # type: ignore[arg-type]
    for row, one, other in zip(rows, told, wanted, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-3)
        assert row.logps == pytest.approx(other.logps[-NEW:], abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_is_loaded_where_and_as_the_device_wants_it(device: Device, tmp_path: Path) -> None:
    engine = load_torch_engine(write_model(tmp_path / "m", 0), EngineSettings("transformers", 4, 1000, device=device))
    try:
        assert all(len(row.tokens) == NEW for row in answers(engine))
        weights = next(engine._model.parameters())
        where = torch_device(device)
        assert (weights.device.type, weights.dtype) == (where.type, torch.bfloat16 if where.type == "cuda" else torch.float32)
    finally:
        close(engine)
