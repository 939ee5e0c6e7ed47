"""A grid on a bucket, on nodes that share no disk: it outlives a node and its driver, and ends at the table of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("ray")

from soul.cli import DONE
from soul.object_store import find, read_bytes
from soul.store import COPIES_VARIABLE, path_of
from tests.orchestration.mini import start, wait_for
from tests.orchestration.test_tune_killed import FLAGS, finished_trials, table_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]

MORE = "--save-every 1 --eval-max-new-tokens 16 --no-progress"
NODES = """
import sys
import psutil
from ray.cluster_utils import Cluster

folder, cluster, nodes = sys.argv[1], Cluster(), {}
for line in sys.stdin:
    what, copies = line.split()
    if what == "add":
        first = {"temp_dir": folder, "include_dashboard": False} if cluster.head_node is None else {}
        nodes[copies] = cluster.add_node(num_cpus=1, env_vars={"SOUL_STORE_COPIES": copies}, **first)
    else:
        raylet = psutil.Process(nodes[copies].all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()
    print(cluster.address, flush=True)
"""


class Nodes:
    """A cluster whose nodes of one CPU are added and killed by the folder of their copies."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def _tell(self, what: str, copies: Path) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{what} {copies}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer, f"the cluster did not {what} a node"
        return answer

    def add(self, copies: Path) -> str:
        """The cluster's address."""
        return self._tell("add", copies)

    def kill(self, copies: Path) -> None:
        """Its raylet and its workers, with SIGKILL; its disk is lost with it."""
        self._tell("kill", copies)
        shutil.rmtree(copies, ignore_errors=True)


@contextmanager
def nodes() -> Iterator[Nodes]:
    folder = tempfile.mkdtemp(prefix="soul-nodes-")  # short: Ray puts sockets below it
    command = [sys.executable, "-c", NODES, folder]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        yield Nodes(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def words(data: Path, output: str) -> list[str]:
    return ["grid", *FLAGS.split(), *MORE.split(), "--data", str(data), "--output", output]


def done_on(uri: str) -> dict[str, list[int]]:
    """Finished trials, with size and time of their results."""
    found = find(f"{uri}/trials") or {}
    names = [name.partition("/")[0] for name in found if name.endswith("/.stages/outcome.json")]
    return {name: found[f"{name}/results.json"] for name in names}


def test_a_grid_on_a_bucket_outlives_a_node_and_its_driver(
    tofu: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, uri = tmp_path / "whole", f"{bucket}/runs/grid"
    began = time.monotonic()
    process = start(*words(tofu, str(whole)), start_new_session=True)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == DONE, errors
    seconds = [time.monotonic() - began]

    rows, homes = tmp_path / "rows", [tmp_path / f"node-{i}" for i in range(3)]
    shutil.copytree(tofu, rows)
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "driver-1"))
    with nodes() as cluster:
        cluster.add(homes[0])
        address = cluster.add(homes[1])
        began = time.monotonic()
        process = start(*words(rows, uri), "--address", address, start_new_session=True)
        try:
            wait_for(lambda: len(done_on(uri)) >= 3 or process.poll() is not None, timeout_s=900)
            cluster.kill(homes[1])
            cluster.add(homes[2])
            wait_for(lambda: len(done_on(uri)) >= 7 or process.poll() is not None, timeout_s=900)
        finally:
            ended = process.poll()
            os.killpg(process.pid, signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
        assert ended is None, errors
        shutil.rmtree(tmp_path / "driver-1")
        before = done_on(uri)
        assert 7 <= len(before) < 12
        monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "driver-2"))
        process = start(*words(rows, uri), "--address", address, start_new_session=True)
        try:
            output, errors = process.communicate(timeout=900)
        finally:
            process.kill()
        assert process.returncode == DONE, errors
        seconds.append(time.monotonic() - began)
    after = done_on(uri)
    assert set(after) == finished_trials(whole) and {name: after[name] for name in before} == before  # nothing is repeated
    assert output.rstrip().endswith(f"{uri}/report.html") and read_bytes(f"{uri}/report.html")
    for folder in (homes[0], homes[2]):  # each has fetched what it worked on, and nobody looked into another's
        assert list(folder.rglob("results.json")) and list(folder.rglob("store.json")), folder
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "anywhere"))
    assert table_of(path_of(uri)) == table_of(whole)
    left = {name.split("/")[1] for name in find(f"{uri}/trials") or {}}
    assert "checkpoints" not in left and "results.json" in left
    print(f"twelve trials in {seconds[0]:.0f} s; on a bucket, with a node and the driver killed, in {seconds[1]:.0f} s", file=sys.stderr)
