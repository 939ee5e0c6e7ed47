"""A run continued from any step boundary is the uninterrupted run, bit for bit, for every method with every optimizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from soul.batch import TokenRow
from soul.objectives.methods import METHODS
from soul.optim.configs import OPTIMIZERS
from soul.train.loop import Progress
from tests.train.loop_runs import METHODS_BY_NAME, NUM_STEPS, OPTIMIZERS_BY_NAME, ROWS, TRAIN, assert_bit_equal, go, new_run


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("method_name", METHODS)
def test_resuming_at_any_step_changes_nothing(method_name: str, optimizer_name: str, tmp_path: Path) -> None:
    method, optimizer = METHODS_BY_NAME[method_name], OPTIMIZERS_BY_NAME[optimizer_name]
    straight = go(new_run(optimizer), method, optimizer, save_to=tmp_path)
    assert [row["step"] for row in straight.rows] == [1, 2, 3, 4, 5]
    for boundary in range(1, NUM_STEPS + 1):
        run = new_run(optimizer)
        with torch.no_grad():
            for parameter in run.engine.model.parameters():
                parameter.add_(1.0)  # what is not restored shows
        run.progress = Progress(**run.engine.load(tmp_path / str(boundary)))
        assert run.progress.step == boundary
        go(run, method, optimizer)
        assert run.rows == straight.rows[boundary:]
        assert_bit_equal(run.state(), straight.state())
        assert run.progress.to_json() | {"seconds": 0.0} == straight.progress.to_json() | {"seconds": 0.0}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("method_name", METHODS)
def test_one_seed_gives_one_result(method_name: str, optimizer_name: str) -> None:
    method, optimizer = METHODS_BY_NAME[method_name], OPTIMIZERS_BY_NAME[optimizer_name]
    first, second = (go(new_run(optimizer), method, optimizer) for _ in range(2))
    assert first.rows == second.rows
    assert_bit_equal(first.state(), second.state())
    other = go(new_run(optimizer), method, optimizer, TRAIN.model_copy(update={"seed": 4}))
    assert [row["loss"] for row in other.rows] != [row["loss"] for row in first.rows]


def test_seeds_sample_other_labels_for_the_same_batches() -> None:
    """With one row per split the order is always the same, so only the sampled labels can tell two seeds apart."""
    method, optimizer = METHODS_BY_NAME["grad_diff"], OPTIMIZERS_BY_NAME["sophia"]
    rows = {split: [replace(rows[0], index=0)] for split, rows in ROWS.items()}
    assert all(isinstance(row, TokenRow) for [row] in rows.values())
    runs = [go(new_run(optimizer), method, optimizer, TRAIN.model_copy(update={"seed": seed}), rows=rows, stop=1) for seed in (3, 4)]
    assert runs[0].rows[0]["loss"] == runs[1].rows[0]["loss"]
    hessians = [torch.cat([v.flatten() for name, v in run.state().items() if name.startswith("exp_avg_sq/")]) for run in runs]
    assert not torch.equal(*hessians)
