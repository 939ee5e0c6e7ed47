"""Ray's own autoscaler over processes of this machine: a grid wakes nodes and lets them go, a run survives the loss of one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray")

from tests.cluster.heads import Head, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

MOST = 3
DATA = "--device cpu --num-authors 3 --forget forget05 --eval-max-new-tokens 16"
GRID = f"pipelines/grid.py {DATA} --methods npo --optimizers adamw,sophia,signum --models tiny-s --prepare-max-steps 20 --epochs 2"
RUN = f"pipelines/tofu.py {DATA} --twin none --prepare-max-steps 20 --epochs 200 --save-every 10 --eval-every 0 --tiny-hidden-size 32"
RUN += " --tiny-intermediate-size 64 --tiny-num-layers 1 --tiny-num-heads 2 --tiny-vocab-size 400"
ELASTIC = "--engine ddp --num-workers 2 --min-workers 1 --max-failures 3"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head without CPUs, and up to three nodes of one CPU each, of which none is there yet."""
    with Head(num_cpus=0, workers={"resources": {"CPU": 1}, "max_workers": MOST}) as head:
        yield head


class Timeline:
    """(seconds, worker nodes), one entry per change."""

    def __init__(self, head: Head) -> None:
        self.head, self.began, self.entries = head, time.monotonic(), [(0.0, head.worker_nodes())]

    def look(self) -> int:
        try:
            now = self.head.worker_nodes()
        except OSError:  # a busy dashboard
            return self.entries[-1][1]
        if now != self.entries[-1][1]:
            self.entries.append((time.monotonic() - self.began, now))
        return now

    @property
    def most(self) -> int:
        return max(nodes for _, nodes in self.entries)

    def __str__(self) -> str:
        return "  ".join(f"{seconds:.0f}s:{nodes}" for seconds, nodes in self.entries)


@contextmanager
def watched(head: Head) -> Iterator[Timeline]:
    timeline, done = Timeline(head), threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            timeline.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield timeline
    finally:
        done.set()
        thread.join(timeout=30)
        print(f"\nnodes over time: {timeline}")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def test_a_grid_wakes_nodes_and_lets_them_go(head: Head, tmp_path: Path) -> None:
    with watched(head) as timeline:
        assert timeline.entries[0][1] == 0
        done = head.submit("grid", *GRID.split(), "--output", str(tmp_path / "grid"))
        ended = time.monotonic() - timeline.began
        assert done.returncode == 0, done.stdout[-4000:]
        wait_until(lambda: timeline.look() == 0, timeout_s=180, every_s=1)
    print(f"grid done after {ended:.0f} s\n{head.log('grid')}")
    assert timeline.most >= 2
    assert len(list((tmp_path / "grid").glob("trials/*/results.json"))) == 3
    assert "grid: 3/3" in head.log("grid")


def test_a_run_survives_the_loss_of_a_node(head: Head, tmp_path: Path) -> None:
    lost, whole, cache = tmp_path / "lost", tmp_path / "whole", tmp_path / "cache"
    with watched(head) as timeline:
        assert head.submit("lost", *RUN.split(), *ELASTIC.split(), "--output", str(lost), "--cache", str(cache), wait=False).returncode == 0
        wait_until(lambda: lines(lost / "metrics.jsonl") >= 120 or head.job("lost")["status"] == "FAILED", timeout_s=1500, every_s=0.2)
        assert head.job("lost")["status"] == "RUNNING", head.log("lost")
        kill_a_node(head)
        reached, killed = lines(lost / "metrics.jsonl"), time.monotonic() - timeline.began
        assert head.ended("lost", timeout_s=1500)["status"] == "SUCCEEDED", head.log("lost")
        ended = time.monotonic() - timeline.began
        wait_until(lambda: timeline.look() == 0, timeout_s=180, every_s=1)
    told = f"a node killed after {killed:.0f} s at step {reached}, the run done after {ended:.0f} s"
    print(f"{told}\n{head.log('lost')}")
    steps = rows(lost)
    assert [row["step"] for row in steps] == list(range(1, steps[-1]["total_steps"] + 1))
    assert 120 <= reached < len(steps), "the run was over before a node was killed"
    assert head.submit("whole", *RUN.split(), "--output", str(whole), "--cache", str(cache)).returncode == 0
    assert [row["loss"] for row in steps] == pytest.approx([row["loss"] for row in rows(whole)], rel=0.01)


def kill_a_node(head: Head) -> None:
    """The raylet below which a training worker runs, as if its machine had gone: what runs there goes with it."""
    for worker in head_workers(head):
        node = worker.parent()
        if node is not None and "raylet" in node.name():
            node.kill()
            return
    raise AssertionError("no training worker found")


def head_workers(head: Head) -> list[psutil.Process]:
    nodes = [process for process in head.processes("raylet/raylet") if "--head" not in process.cmdline()]
    return [child for node in nodes for child in node.children() if "RayTrainWorker" in " ".join(child.cmdline())]
