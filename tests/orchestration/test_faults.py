"""Killed workers, killed drivers, losses that are not finite: the run goes on from its last checkpoint and ends with the same bits."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from soul.cli import DONE, FAILURE, INTERRUPTED, main
from soul.orchestration.train import TrainingStopped, fit
from soul.train.state import EXTRA
from tests.orchestration.mini import STEPS, TRAIN, Finished, fingerprint, long_job, mini, num_lines, start, steps, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def same(run: Path, other: Path) -> None:
    assert steps(run) == steps(other)
    assert fingerprint(run / "model") == fingerprint(other / "model")


def children(name: str) -> list[psutil.Process]:
    """Ray's processes of that title below this one: other clusters on the machine are nobody's business."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@pytest.mark.slow  # test_kills.py has one on a node of its own
def test_a_killed_worker_is_replaced_and_changes_nothing(finished: Finished, uninterrupted: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(step: int, total: int) -> None:
        if not killed and 100 <= step < total - 30:
            for process in children("RayTrainWorker"):
                killed.append(process.pid)
                process.kill()

    result = fit(long_job(finished, tmp_path), name="killed", on_progress=kill)
    assert len(killed) == 1, "the worker ended before it could be killed"
    assert result.steps == STEPS
    same(tmp_path, uninterrupted)


def run_words(finished: Finished, run: Path, **sections: Any) -> list[str]:
    config = mini(finished.data, run, **{"cache": finished.config.cache_folder, **sections})
    file = run.parent / "config.yaml"
    file.write_text(config.model_dump_json())
    return ["tofu", "--config", str(file)]


def interrupted(finished: Finished, run: Path, number: int) -> tuple[int, str, str, float]:
    """Start the run in a process of its own, send it a signal in the middle of training: exit code, stdout, stderr, seconds to the end."""
    process = start(*run_words(finished, run, train=TRAIN))
    try:
        wait_for(lambda: num_lines(run / "metrics.jsonl") >= 100 or process.poll() is not None, timeout_s=400)
        assert num_lines(run / "metrics.jsonl") < STEPS, "the run was over before it could be interrupted"
        began = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err, time.monotonic() - began
    finally:
        process.kill()


SIGNALS = [
    signal.SIGTERM,
    pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_driver_leaves_a_run_that_resumes(
    number: signal.Signals, finished: Finished, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    code, out, err, seconds = interrupted(finished, run, number)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == INTERRUPTED == 130, err
        assert err.splitlines()[-1] == f"interrupted. Continue with: soul resume {run}"
        assert "Traceback" not in err
    assert out == "" and seconds < 60
    done = num_lines(run / "metrics.jsonl")
    assert 100 <= done < STEPS and not (run / "model").exists() and not (run / "results.json").exists()
    assert main(["resume", str(run)]) == DONE
    assert capsys.readouterr().out.rstrip().endswith(str(run))
    same(run, uninterrupted)
    assert (run / "results.json").is_file() and (run / "report.html").is_file()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    exploding = {
        "method": {"name": "ga"},
        "optimizer": {"name": "adamw", "learning_rate": 1e10},
        "train": {"epochs": 30, "batch_size": 20, "warmup_fraction": 0, "schedule": "constant", "save_steps": 1},
        "engine": {"max_grad_norm": None},
    }
    assert main(run_words(finished, run, **exploding)) == FAILURE
    captured = capsys.readouterr()
    failed = [line for line in captured.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and "Traceback" not in captured.err
    done = num_lines(run / "metrics.jsonl")
    assert re.search(rf"the (forget loss|gradient) is not finite at step {done}[;,]", failed[0]) and "--learning-rate" in failed[0]
    kept = sorted(run.glob("checkpoints/*/step_*"))
    assert done >= 1 and kept[-1].name == f"step_{done:08d}" and (kept[-1] / EXTRA).is_file()
    assert json.loads((kept[-1] / EXTRA).read_text())["step"] == done
    assert not (run / "model").exists() and not (run / "results.json").exists()


def test_a_model_whose_weights_are_not_numbers_is_told_before_training(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.target, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    model = {"path": str(tmp_path / "model")}
    assert main(run_words(finished, tmp_path / "run", model=model)) == FAILURE
    err = capsys.readouterr().err
    assert "failed: TrainingStopped" in err and "check the model's weights" in err and "Traceback" not in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Three megabytes, for those who may mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no permission to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(finished: Finished, uninterrupted: Path, small_disk: Path) -> None:
    """Known to be too small it stops before the first step; filled by somebody else, in the middle."""
    made = long_job(finished, small_disk)
    job = replace(made, engine=made.engine.model_copy(update={"max_failures": 0}))
    greedy = replace(job, train=job.train.model_copy(update={"keep_checkpoints": 50}))
    with pytest.raises(TrainingStopped, match=r"^node \S+ \S+ needs about .* for checkpoints and model, its disk has .* free\."):
        fit(greedy, name="full")
    assert num_lines(small_disk / "metrics.jsonl") == 0
    with pytest.raises(TrainingStopped, match=r"No space left on device.*The last checkpoint is kept"):
        fit(job, name="full", on_progress=lambda step, total: fill(small_disk) if step >= 40 else None)
    (small_disk / "ballast").unlink()
    fit(job, name="full")
    same(small_disk, uninterrupted)


NOISE = (
    *("WARNING", "Warning", "warn", "INFO", "Traceback", "raylet", "pid="),
    *("Writing model shards", "Loading weights", "it/s]", "accelerator"),
)


def test_a_run_says_nothing_but_its_progress(finished: Finished, tmp_path: Path) -> None:
    """The target is made before, but what it started from is made again: in this process, where transformers used to draw its bars."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(finished.config.cache_folder, cache)
    shutil.rmtree(cache / "init")
    process = start(*run_words(finished, run, cache=str(cache), train={"epochs": 1}, progress=True))
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == DONE, err
    assert [word for word in NOISE if word in out + err] == [], out + err
    stages = (
        "1 worker(s) on CPUs, in fp32",
        "target model: made before",
        "retrained model: made before",
        "unlearn: NPO with sophia",
        "evaluat",
    )
    assert err.splitlines()[0] == stages[0] and all(line.startswith(stages) for line in err.splitlines()), err
    assert out.splitlines()[0].strip() == "Unlearning on tofu/forget05" and out.rstrip().endswith(str(run))
    assert (cache / "init").is_dir()
