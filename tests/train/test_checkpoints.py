"""A checkpoint is whole or refused, and the one before it stays usable, wherever a run dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

import soul.train.state
from soul.train.loop import Progress
from soul.train.state import EXTRA
from tests.train.engine_runs import NUM_STEPS, SAVED_AT, full_state, largest_difference, new_engine, resumed_run, run_steps, straight_run


def save_and_die(folder: Path, *, before: str) -> None:
    """Save step SAVED_AT whole, then die while saving the next one: at the call of `before` in the checkpoint module."""
    torch.set_num_threads(1)
    engine, progress = new_engine("single", "sophia"), Progress()
    run_steps(engine, "sophia", progress, SAVED_AT)
    engine.save(folder / "whole", progress.to_json())
    run_steps(engine, "sophia", progress, SAVED_AT + 1)
    owner = soul.train.state.os if before == "replace" else soul.train.state.dcp.filesystem.FileSystemWriter
    setattr(owner, before, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    engine.save(folder / "half", progress.to_json())


@pytest.mark.parametrize("before", ["replace", "finish"])
def test_a_kill_while_saving_leaves_the_checkpoint_before_usable(before: str, tmp_path: Path) -> None:
    """`replace` brings extra.json in place, after all tensors; `finish` writes the tensors' metadata, after their data."""
    process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(tmp_path,), kwargs={"before": before})
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "half").glob("*.distcp"))  # it did get as far as the tensors
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        new_engine("single", "sophia").load(tmp_path / "half")
    resumed = resumed_run(new_engine("single", "sophia"), "sophia", tmp_path / "whole")
    assert largest_difference(resumed["state"], straight_run(new_engine("single", "sophia"), "sophia")["state"]) == 0


@pytest.mark.parametrize("lost", [EXTRA, ".metadata"])
def test_a_checkpoint_without_its_last_file_is_refused(lost: str, tmp_path: Path) -> None:
    engine = new_engine("single", "adamw")
    straight_run(engine, "adamw", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / lost).unlink()
    before = full_state(engine)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        engine.load(tmp_path / "checkpoint")
    assert largest_difference(full_state(engine), before) == 0


def test_a_checkpoint_of_before_the_first_step_round_trips(tmp_path: Path) -> None:
    engine = new_engine("single", "sophia")
    engine.save(tmp_path / "start", Progress().to_json())
    used = new_engine("single", "sophia")
    run_steps(used, "sophia", Progress(), 1)
    assert Progress(**used.load(tmp_path / "start")) == Progress()
    again = run_steps(used, "sophia", Progress(), NUM_STEPS)
    straight = straight_run(engine, "sophia")
    assert [row["loss"] for row in again] == straight["losses"]
    assert largest_difference(full_state(used), straight["state"]) == 0
