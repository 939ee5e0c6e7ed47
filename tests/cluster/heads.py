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

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS = 180.0


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
    """`environment` is what processes that speak with this head need, and what its own were started with."""

    def __init__(self, *, num_cpus: int, more: dict[str, str] | None = None, words: tuple[str, ...] = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="soul-head-"))  # short: Ray puts sockets below it
        self.token = secrets.token_hex(32)
        (self.folder / "token").touch(mode=0o600)
        (self.folder / "token").write_text(self.token)
        self.port, client, dashboard, agent, agent_grpc = free_ports(5)
        self.http = f"http://127.0.0.1:{dashboard}"
        mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"), "RAY_API_SERVER_ADDRESS": self.http}
        taken = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH", "FORCE_COLOR")}
        self.environment = {**taken, **mine, "RAY_USAGE_STATS_ENABLED": "0", **(more or {})}
        command = [RAY, "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={self.folder / 'r'}", f"--port={self.port}"]
        command += [f"--ray-client-server-port={client}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
        command += [f"--num-cpus={num_cpus}", "--object-store-memory=200000000", *(word.format(head=self) for word in words)]
        self._log = (self.folder / "head.log").open("w")
        self.process = subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def __enter__(self) -> Self:
        try:
            wait_until(lambda: self.answers() or self.process.poll() is not None, timeout_s=START_SECONDS)
            assert self.process.poll() is None, (self.folder / "head.log").read_text()[-2000:]
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ip(self) -> str:
        return socket.gethostbyname(socket.gethostname())

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.http + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def answers(self) -> bool:
        try:
            self.get("/api/version")
            return isinstance(self.get("/api/jobs/"), list)
        except (OSError, ValueError):
            return False

    def ray(self, *words: str, timeout_s: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """`ray ...` as its user types it, in the project's folder."""
        return subprocess.run([RAY, *words], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s, **options)

    def submit(self, name: str, *words: str, wait: bool = True, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a script of pipelines/, as docs/clusters.md has it."""
        command = ["job", "submit", "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml", "--submission-id", name]
        return self.ray(*command, *(() if wait else ("--no-wait",)), "--", "python", *words, timeout_s=timeout_s)

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
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
