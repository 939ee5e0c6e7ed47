"""Metrics from a GPU are the CPU's: to 1e-4 in float32, to a few percent in bf16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from soul.data.chat import ChatFormat
from soul.device import Device, torch_device
from soul.evaluate.evaluator import Evaluation, evaluate_model
from soul.evaluate.settings import EvalSettings
from tests.devices import DEVICES, exact_products


def numbers(value: Any, path: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {name: number for key, inner in value.items() for name, number in numbers(inner, f"{path}/{key}").items()}
    return {path: value} if isinstance(value, float) else {}


def judge(model: Any, tokenizer: Any, splits: Any, device: Device, dtype: torch.dtype) -> Evaluation:
    where = torch_device(device)
    settings = EvalSettings(max_new_tokens=12)
    return evaluate_model(copy.deepcopy(model).to(where, dtype), tokenizer, splits, settings, device=where, chat=ChatFormat("plain"))


@pytest.mark.parametrize("device", DEVICES)
def test_every_metric_of_a_gpu_is_the_cpus(device: Device, model: Any, tokenizer: Any, splits: Any) -> None:
    with exact_products():
        wanted, found = (judge(model, tokenizer, splits, place, torch.float32) for place in ("cpu", device))
    assert found.generations == wanted.generations
    pairs = [numbers(evaluation.model_entry()) for evaluation in (found, wanted)]
    assert pairs[1] and pairs[0] == pytest.approx(pairs[1], abs=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_likelihoods_in_bf16_are_near(device: Device, model: Any, tokenizer: Any, splits: Any) -> None:
    wanted, found = judge(model, tokenizer, splits, "cpu", torch.float32), judge(model, tokenizer, splits, device, torch.bfloat16)
    for split, log in wanted.log.splits.items():
        assert found.log.splits[split].answer_nll == pytest.approx(log.answer_nll, abs=0.1), split
