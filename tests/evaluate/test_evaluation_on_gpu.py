"""An evaluation on a GPU gives the CPU's numbers: likelihoods, generated answers, metrics. The same code runs on the CPU, slowly marked.

In fp32, TF32 off, metrics are equal to 1e-4 and greedy answers are the same. In bf16 the model's own weights are rounded, so that a mean
loss is near and an answer may part from the CPU's at a token where two are alike: how far bf16 goes wrong is told by the losses alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from eval_records import CPU
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from soul import device as devices
from soul.evaluate.evaluator import Evaluation, evaluate_model
from soul.evaluate.settings import EvalSettings
from soul.records import Record

SETTINGS = EvalSettings(max_new_tokens=12, batch_tokens=400, generation_batch_tokens=300)
EXACT, NEAR = 1e-4, 0.1  # NEAR: nats per token
DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.delenv(devices.COMPUTE, raising=False)
    monkeypatch.setattr(devices, "TF32", "highest")
    on = devices.torch_device(request.param)
    assert on.type == {"gpu": "cuda", "cpu": "cpu"}[request.param]
    yield on
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def expected(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: dict[str, list[Record]]) -> Evaluation:
    return evaluate_model(model, tokenizer, splits, SETTINGS, device=CPU)


def on(device: torch.device, model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    moved: Any = copy.deepcopy(model)
    result: LlamaForCausalLM = moved.to(device=device, dtype=dtype).eval()
    return result


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON document, by its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from numbers(inner, f"{path}/{place}")
    elif isinstance(value, int | float):
        yield path, float(value)


def losses(evaluation: Evaluation) -> list[float]:
    return [nll for log in evaluation.log.splits.values() for nll in log.answer_nll or () if nll is not None]


def test_metrics_and_answers_are_those_of_the_cpu(
    device: torch.device,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    splits: dict[str, list[Record]],
    expected: Evaluation,
) -> None:
    found = evaluate_model(on(device, model, torch.float32), tokenizer, splits, SETTINGS, device=device)
    assert found.generations == expected.generations
    ours, theirs = dict(numbers(found.model_entry())), dict(numbers(expected.model_entry()))
    assert ours == pytest.approx(theirs, abs=EXACT, nan_ok=True) and len(ours) > 20
    assert losses(found) == pytest.approx(losses(expected), abs=EXACT)


def test_bf16_is_near(
    device: torch.device,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    splits: dict[str, list[Record]],
    expected: Evaluation,
) -> None:
    found = evaluate_model(on(device, model, torch.bfloat16), tokenizer, splits, SETTINGS, device=device)
    differences = [abs(one - other) for one, other in zip(losses(found), losses(expected), strict=True)]
    assert EXACT / 10 < max(differences) < NEAR, "the first bound: it did compute in bf16"
    assert all(math.isfinite(value) for _, value in numbers(found.model_entry()))
