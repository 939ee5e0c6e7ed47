"""A Ray head of a test's own: `ray start --head` with its own ports, token and folder, ended by its processes' ids and never by name."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import psutil
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS = 180.0
FAKE_NODES = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1200",  # a node has to start first
}


def free_ports(count: int) -> list[int]:
    """Above Ray's own worker ports, below those that the system lends to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20000, 32000)
        with socket.socket() as one:
            try:
                one.bind(("0.0.0.0", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def wait_until(condition: Any, *, timeout_s: float, every_s: float = 0.2) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {timeout_s:g} s")
        time.sleep(every_s)
    return value


class Head:
    """`environment` is what processes that speak with this head need, and what its own were started with.

    `workers`: a node type of Ray's cluster files. Its nodes are started and ended by Ray's own autoscaler, as more of Ray's node
    processes on this machine: FakeMultiNodeProvider, as a provider of our own, since type fake_multinode lacks a file in Ray's wheel.
    """

    def __init__(self, *, num_cpus: int, workers: dict[str, Any] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="soul-head-"))  # short: Ray puts sockets below it
        self.token = secrets.token_hex(32)
        (self.folder / "token").touch(mode=0o600)
        (self.folder / "token").write_text(self.token)
        self.port, client, dashboard, agent, agent_grpc = free_ports(5)
        self.http = f"http://127.0.0.1:{dashboard}"
        mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"), "RAY_API_SERVER_ADDRESS": self.http}
        taken = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH", "FORCE_COLOR")}
        self.environment = {**taken, **mine, "RAY_USAGE_STATS_ENABLED": "0", **(FAKE_NODES if workers else {})}
        command = [RAY, "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={self.folder / 'r'}", f"--port={self.port}"]
        command += [f"--ray-client-server-port={client}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
        command += [f"--num-cpus={num_cpus}", "--object-store-memory=200000000", *self._autoscaling(workers)]
        self._command, self.scales = command, workers is not None
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "head.log").open("w") as log:
            return subprocess.Popen(
                self._command, env=self.environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _autoscaling(self, workers: dict[str, Any] | None) -> list[str]:
        if workers is None:
            return []
        provider = {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{get_node_ip_address()}:{self.port}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        }
        config: dict[str, Any] = {
            "cluster_name": "fake",
            "provider": provider,
            "auth": {"ssh_user": "nobody"},
            "docker": {},
            "max_workers": workers["max_workers"],
            "idle_timeout_minutes": 0.1,
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {"node_config": {}, "min_workers": 0, **workers},
            },
            "head_node_type": "ray.head.default",
            **{f"{when}_commands": [] for when in ("setup", "head_setup", "worker_setup", "initialization")},
            **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
            **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            "upscaling_speed": 1.0,
        }
        file = self.folder / "autoscaling.json"
        file.write_text(json.dumps(config))
        return [f"--autoscaling-config={file}"]

    def __enter__(self) -> Self:
        """Ray gives a node 30 s to start, which a busy machine may need: three attempts."""
        log = self.folder / "head.log"
        try:
            for _ in range(3):
                wait_until(lambda: "Ray runtime started" in log.read_text() or self.process.poll() is not None, timeout_s=START_SECONDS)
                if self.process.poll() is None:
                    wait_until(self.answers, timeout_s=START_SECONDS)
                    return self
                self._end()
                self.process = self._start()
            raise RuntimeError(log.read_text()[-2000:])
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.http + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def worker_nodes(self) -> int:
        """How many nodes beside the head are alive."""
        nodes = [node["raylet"] for node in self.get("/nodes?view=summary")["data"]["summary"]]
        return len([node for node in nodes if node.get("state") == "ALIVE" and not node.get("isHeadNode")])

    def answers(self) -> bool:
        try:
            self.get("/api/version")
            return isinstance(self.get("/api/jobs/"), list)
        except (OSError, ValueError):
            return False

    def ray(self, *words: str, timeout_s: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """`ray ...` as its user types it, in the project's folder."""
        return subprocess.run([RAY, *words], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s, **options)

    def submit(self, name: str, *words: str, wait: bool = True, timeout_s: float = 1500) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a script of pipelines/, as docs/clusters.md has it.

        Nodes that share a machine share the folder into which a working directory is unpacked, and the first to go deletes it: there the
        script runs where it lies.
        """
        brought = ["--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml"]
        command = ["job", "submit", *([] if self.scales else brought), "--submission-id", name]
        words = (str(ROOT / words[0]), *words[1:]) if self.scales else words
        for _ in range(20):
            done = self.ray(*command, *(() if wait else ("--no-wait",)), "--", "python", *words, timeout_s=timeout_s)
            if "No available agent" not in done.stderr:  # the head's own agent may come up after its dashboard
                return done
            time.sleep(3)
        return done

    def job(self, name: str) -> dict[str, Any]:
        told: dict[str, Any] = self.get(f"/api/jobs/{name}")
        return told

    def log(self, name: str) -> str:
        return str(self.get(f"/api/jobs/{name}/logs")["logs"])

    def ended(self, name: str, *, timeout_s: float = 300) -> dict[str, Any]:
        """The job once it is over."""
        wait_until(lambda: self.job(name)["status"] in ("SUCCEEDED", "FAILED", "STOPPED"), timeout_s=timeout_s, every_s=1)
        return self.job(name)

    def processes(self, text: str = "") -> list[psutil.Process]:
        """Those of this head, known by its folder, whose command line holds `text`."""
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
            if str(self.folder) in line and text in line and process.pid != os.getpid():
                found.append(process)
        return found

    def stop(self) -> None:
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for process in {*below, *self.processes()}:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
