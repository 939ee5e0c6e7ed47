"""The server as a process: SIGTERM answers the request that has begun, and ends with 0."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from tests.serving_runs import write_run

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).resolve().parents[2]


def test_sigterm_drains(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", max_length=2000)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "pipelines/serve.py", str(run), "--port", str(port)],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        seen = []
        for line in server.stdout:
            seen.append(line)
            if line.startswith("serving on"):
                break
        assert server.poll() is None, seen
        body = {
            "model": "x",
            "prompt": "The",
            "max_tokens": 900,
            "temperature": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with requests.post(f"http://127.0.0.1:{port}/v1/completions", json=body, stream=True, timeout=120) as reply:
            lines = reply.iter_lines()
            first = next(lines)
            server.send_signal(signal.SIGTERM)
            events = [line for line in [first, *lines] if line]
        assert events[-1] == b"data: [DONE]"
        assert json.loads(events[-2].removeprefix(b"data: "))["usage"]["completion_tokens"] == 900
        deadline = time.monotonic() + 120
        while server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.returncode == 0
        assert "draining" in server.stdout.read()
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5)
    finally:
        if server.poll() is None:
            server.kill()
        server.wait()
