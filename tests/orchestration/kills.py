"""SIGKILL at random moments: a run on two nodes of this machine loses a worker, its driver or a node, and has to end as if nothing were.

`python -m tests.orchestration.kills --kills 20 --seed 0` prints the table; test_kills.py has three in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.heads import RAY, Head, wait_until
from tests.orchestration.mini import ROOT, STEPS, TRAIN, fingerprint, num_lines, settings, steps, write_tofu

VICTIMS = ("worker", "driver", "node")
TWO_WORKERS = {"name": "ddp", "num_workers": 2, "max_failures": 3}
ONE_WORKER = {"name": "single", "max_failures": 3}
RUN_SECONDS = 900.0
PATIENT = {"RAY_raylet_start_wait_time_s": "150"}  # a busy machine takes longer than Ray's 30 s


@dataclass(frozen=True)
class Kill:
    """One trial. `hit`: there was something to kill; `step`: lines of metrics.jsonl then; `drivers`: how often the command was given."""

    victim: str
    hit: bool
    step: int
    drivers: int
    seconds: float
    same: bool


@dataclass
class Nodes:
    """A head without a CPU and a node with three, on which all of a run's workers and tasks are."""

    head: Head
    folder: Path
    node: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {**self.head.environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **PATIENT}

    def add(self) -> None:
        """The node that comes for one that is gone."""
        self.remove()
        command = [RAY, "start", f"--address={self.head.address}", "--block", "--num-cpus=3", "--object-store-memory=100000000"]
        log = (self.folder / "node.log").open("ab")
        self.node = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        wait_until(self._arrived, timeout_s=180, every_s=1)

    def _arrived(self) -> bool:
        assert self.head.process.poll() is None, (self.folder / "head.log").read_text()[-2000:]
        try:
            return self.head.worker_nodes() == 1
        except OSError:  # the dashboard is busy
            return False

    def kill(self) -> None:
        """The raylet, as a machine that vanishes: what it had started goes with it."""
        for process in self._below("raylet/raylet"):
            process.kill()
        self.remove()

    def remove(self) -> None:
        if self.node is not None:
            for process in [*psutil.Process(self.node.pid).children(recursive=True)] if self.node.poll() is None else []:
                _kill(process)
            self.node.kill()
            self.node.wait(timeout=60)
            self.node = None

    def workers(self) -> list[psutil.Process]:
        return self._below("RayTrainWorker")

    def _below(self, name: str) -> list[psutil.Process]:
        assert self.node is not None
        return [process for process in psutil.Process(self.node.pid).children(recursive=True) if name in _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


@contextmanager
def nodes() -> Iterator[Nodes]:
    with Head(num_cpus=0) as head:
        made = Nodes(head, head.folder)
        try:
            made.add()
            yield made
        finally:
            made.remove()


@dataclass(frozen=True)
class Campaign:
    """`cache` has what all runs share: target, retrained model, tokens."""

    folder: Path
    data: Path
    cache: Path
    engine: Mapping[str, Any]

    def written(self, name: str) -> tuple[Path, Path]:
        """A run's folder and configuration file."""
        run, file = self.folder / name, self.folder / f"{name}.json"
        file.write_text(
            json.dumps(settings(self.data, run, train={**TRAIN, "keep_checkpoints": 2}, engine=dict(self.engine), cache=str(self.cache)))
        )
        return run, file


def start(file: Path, where: Nodes) -> subprocess.Popen[bytes]:
    words = [sys.executable, "pipelines/tofu.py", "--config", str(file), "--address", where.head.address]
    log = file.with_suffix(".log").open("ab")
    return subprocess.Popen(words, cwd=ROOT, env=where.environment, stdout=log, stderr=log, start_new_session=True)


def lines(run: Path) -> int:
    return num_lines(run / "metrics.jsonl")


def uninterrupted(campaign: Campaign, where: Nodes) -> Path:
    run, file = campaign.written("reference")
    code = start(file, where).wait(timeout=RUN_SECONDS)
    assert code == 0, file.with_suffix(".log").read_text()[-3000:]
    assert lines(run) == STEPS
    return run


def killed(number: int, victim: str, *, at: int, delay_s: float, reference: Path, campaign: Campaign, where: Nodes) -> Kill:
    """Kill `victim` `delay_s` after step `at`; give the command again for as long as it fails."""
    began, drivers = time.monotonic(), 1
    run, file = campaign.written(f"run-{number}")
    driver = start(file, where)
    try:
        wait_until(lambda: lines(run) >= at or driver.poll() is not None, timeout_s=RUN_SECONDS, every_s=0.02)
        assert driver.poll() is None, file.with_suffix(".log").read_text()[-3000:]
        time.sleep(delay_s)
        step = lines(run)
        hit = strike(victim, driver, where)
        while (code := driver.wait(timeout=RUN_SECONDS)) != 0 and drivers < 4:
            driver, drivers = start(file, where), drivers + 1
        assert code == 0, file.with_suffix(".log").read_text()[-3000:]
    finally:
        driver.kill()
    found = Kill(victim, hit, step, drivers, time.monotonic() - began, same(run, reference))
    shutil.rmtree(run)
    return found


def strike(victim: str, driver: subprocess.Popen[bytes], where: Nodes) -> bool:
    """Kill it; whether it was there."""
    if victim == "driver":
        alive = driver.poll() is None
        driver.kill()
        return alive
    if victim == "node":
        where.kill()
        where.add()
        return True
    found = where.workers()
    if found:
        _kill(random.choice(found))
    return bool(found)


def same(run: Path, reference: Path) -> bool:
    """Every step, the exported weights bit for bit, and every metric."""
    return (
        steps(run) == steps(reference)
        and fingerprint(run / "model") == fingerprint(reference / "model")
        and _figures(run) == _figures(reference)
    )


def _figures(run: Path) -> Mapping[str, Any]:
    models: Mapping[str, Any] = json.loads((run / "results.json").read_text())["models"]
    return models


def plan(kills: int, seed: int) -> list[tuple[str, int, float]]:
    """(victim, step, delay): every victim in turn, moments at random."""
    rng = random.Random(seed)
    return [(VICTIMS[number % len(VICTIMS)], rng.randrange(1, STEPS - 30), rng.uniform(0, 0.3)) for number in range(kills)]


def table(found: Sequence[Kill]) -> str:
    rows = [
        f"| {k.victim if k.hit else 'nothing'} | {k.step} | {k.drivers} | {k.seconds:.0f} | {'yes' if k.same else 'NO'} |" for k in found
    ]
    good = sum(k.same and k.hit for k in found)
    head = ["| killed | at step | commands given | seconds | same result |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"{good} of {len(found)} runs were struck and ended in the uninterrupted result."])


def carry_out(campaign: Campaign, kills: int, seed: int, where: Nodes) -> list[Kill]:
    reference = uninterrupted(campaign, where)
    found: list[Kill] = []
    for number, (victim, at, delay) in enumerate(plan(kills, seed)):
        found.append(killed(number, victim, at=at, delay_s=delay, reference=reference, campaign=campaign, where=where))
        print(json.dumps(asdict(found[-1])), file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soul-kills-") as folder, nodes() as where:
        campaign = Campaign(Path(folder), write_tofu(Path(folder) / "tofu"), Path(folder) / "cache", TWO_WORKERS)
        found = carry_out(campaign, options.kills, options.seed, where)
    print(table(found))
    return os.EX_OK if all(kill.same and kill.hit for kill in found) else os.EX_SOFTWARE


if __name__ == "__main__":
    sys.exit(main())
