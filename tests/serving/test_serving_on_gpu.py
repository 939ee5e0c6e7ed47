"""The serving engine on a GPU gives the CPU's numbers. The same code runs on the CPU, slowly marked.

What a server loads on a GPU is in bf16, where a greedy answer may part from the CPU's at a token where two are alike, and all that
follows differs. So the engine as it is loaded is held to likelihoods of given rows, within bf16's rounding, and to having chosen at each
place a token that the CPU finds (nearly) the best; the same weights in fp32, TF32 off, are held to the very tokens of `generate`.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from soul import device as devices
from soul.evaluate.generate import generate_batch
from soul.models.load import load_model, load_tokenizer
from soul.serving.decoder import End, Row, Sampling
from soul.serving.engine import Engine
from soul.serving.likelihood import Likelihood, likelihoods
from soul.serving.settings import EngineSettings
from soul.serving.torch_engine import TorchEngine, load_torch_engine
from tests.serving_runs import write_model

DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]
CPU = torch.device("cpu")
PROMPTS = [tuple(3 + (7 * i + 11 * j) % 240 for j in range(length)) for i, length in enumerate((1, 2, 5, 11, 23, 40))]
TOKENS, TOP = 12, 3
EXACT, NEAR = 1e-4, 0.25  # nats: per token in fp32, on average in bf16 (the model's logits are large)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[devices.Device]:
    monkeypatch.delenv(devices.COMPUTE, raising=False)
    monkeypatch.setattr(devices, "TF32", "highest")
    assert devices.torch_device(request.param).type == {"gpu": "cuda", "cpu": "cpu"}[request.param]
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engine") / "m", 0)


def answered(engine: Engine) -> list[Row]:
    """All prompts, more than may run at a time, so that rows join and leave."""
    rows = [Row(prompt, Sampling(TOKENS, num_top=TOP), eos_ids=()) for prompt in PROMPTS]
    ends: queue.Queue[End | None] = queue.Queue()
    assert engine.submit(rows, lambda _, __, end: ends.put(end), every_step=False)
    assert {ends.get(timeout=120) for _ in rows} == {"length"}
    return rows


def asked(engine: Engine) -> list[Likelihood]:
    told: queue.Queue[list[Likelihood] | None] = queue.Queue()
    assert engine.ask(PROMPTS, TOP, told.put)
    found = told.get(timeout=120)
    assert found is not None
    return found


def test_fp32_gives_the_tokens_and_likelihoods_of_the_cpu(device: devices.Device, folder: Path) -> None:
    model = load_model(str(folder)).eval()
    wanted = [generate_batch(model, [prompt], pad_id=0, eos_ids=(), max_new_tokens=TOKENS, device=CPU)[0] for prompt in PROMPTS]
    expected = likelihoods(model, PROMPTS, TOP)
    on = devices.torch_device(device)
    engine = TorchEngine(load_model(str(folder)).eval().to(on), load_tokenizer(str(folder)), max_rows=3, max_batch_tokens=1000)
    try:
        assert [tuple(row.tokens) for row in answered(engine)] == wanted
        for found, likelihood in zip(asked(engine), expected, strict=True):
            assert found.logps == pytest.approx(likelihood.logps, abs=EXACT)
    finally:
        engine.close()
        engine.join(30)


def test_a_loaded_engine_is_near(device: devices.Device, folder: Path) -> None:
    model = load_model(str(folder)).eval()
    expected = likelihoods(model, PROMPTS, TOP)
    engine = load_torch_engine(folder, EngineSettings(max_rows=3, max_batch_tokens=1000, device=device))
    try:
        assert engine._model.dtype == (torch.bfloat16 if device == "gpu" else torch.float32)
        rows, found = answered(engine), asked(engine)
    finally:
        engine.close()
        engine.join(30)
    near = NEAR if device == "gpu" else EXACT
    differences = [abs(a - b) for one, other in zip(found, expected, strict=True) for a, b in zip(one.logps, other.logps, strict=True)]
    assert sum(differences) / len(differences) <= near
    for row, told in zip(rows, likelihoods(model, [(*row.prompt, *row.tokens) for row in rows], TOP), strict=True):
        short = [top[0][1] - logp for top, logp in zip(told.tops, told.logps, strict=True)][len(row.prompt) - 1 :]
        assert len(short) == TOKENS and sum(short) / TOKENS <= near, "a token that the CPU finds far from the best"
