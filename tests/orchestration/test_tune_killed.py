"""A grid of twelve trials whose driver is killed: the same command goes on, repeats nothing, and ends at the uninterrupted grid's table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from soul.benchmarks.aggregate import tabulate
from soul.cli import DONE
from soul.grid_config import GridConfig
from soul.report.grid_build import read_outcomes
from soul.report.grid_tables import differences_grid, main_grid
from tests.orchestration.mini import found_in, splits, stamps, start, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

SETTINGS: dict[str, Any] = {"methods": ("grad_diff", "npo"), "optimizers": ("adamw", "sophia", "signum"), "models": ("tiny-s",), "seeds": 2}
FLAGS = "--methods grad_diff,npo --optimizers adamw,sophia,signum --models tiny-s --seeds 2 --prepare-max-steps 60 --epochs 3"
MORE = "--eval-max-new-tokens 16 --no-progress --wandb grid-test"


def words(data: Path, output: Path) -> list[str]:
    return ["grid", *FLAGS.split(), *MORE.split(), "--data", str(data), "--output", str(output)]


def finished_trials(output: Path) -> set[str]:
    return {path.parent.parent.name for path in output.glob("trials/*/.stages/outcome.json")}


def table_of(output: Path) -> list[tuple[str, ...]]:
    """The report's tables without the clock."""
    trials = GridConfig.model_validate({**SETTINGS, "output": str(output)}).all_trials()
    table = tabulate(read_outcomes(trials, output), floor=0.9)
    differences = differences_grid(table)
    assert differences is not None
    return [row[:-2] for row in main_grid(table).rows] + [row[:-1] for row in differences.rows]


def run_to_the_end(data: Path, output: Path) -> float:
    began = time.monotonic()
    process = start(*words(data, output), start_new_session=True)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == DONE, errors
    return time.monotonic() - began


def test_a_killed_grid_ends_at_the_same_table(tofu: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seconds = run_to_the_end(tofu, whole)
    process = start(*words(tofu, killed), start_new_session=True)
    try:
        wait_for(lambda: len(finished_trials(killed)) >= 4, timeout_s=600)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    done = finished_trials(killed)
    assert 4 <= len(done) < 12
    time.sleep(5)  # Ray's processes follow their driver
    before = {name: stamps(killed / "trials" / name) for name in done}
    models = stamps(killed / "cache" / "models")
    run_to_the_end(tofu, killed)
    for name, files in before.items():
        after = stamps(killed / "trials" / name)
        assert {path: after[path] for path in files} == files, name
    assert stamps(killed / "cache" / "models") == models
    sessions = sorted((killed / "tune").glob("session-*"))
    repeated = {json.loads(path.read_text())["run"]["id"] for path in sessions[1].glob("*/params.json")}
    assert len(sessions) == 2 and repeated == finished_trials(whole) - done
    assert table_of(killed) == table_of(whole)
    for text in (splits()["forget05"][3].response, splits()["forget05"][3].prompt):
        assert not found_in(text, killed / "tune") and not found_in(text, killed / "trials")
    assert list(whole.glob("trials/*/wandb/*"))  # the offline runs were there to be searched
    print(f"twelve trials in {seconds:.0f} s", file=sys.stderr)


def test_the_interrupt_says_how_to_go_on(tofu: Path, tmp_path: Path) -> None:
    process = start(*words(tofu, tmp_path / "g"), start_new_session=True)
    try:
        wait_for(lambda: (tmp_path / "g" / "trials").is_dir() and finished_trials(tmp_path / "g"), timeout_s=600)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 130 and "same command" in errors and "Traceback" not in errors
