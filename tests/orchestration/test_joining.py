"""A cluster that cannot be joined is named in one line, within seconds; what a node imports is compared with what the driver does."""

from __future__ import annotations

import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
import ray.cloudpickle

import soul
from soul.cli import BAD_INPUT, main
from soul.orchestration import joining
from soul.orchestration.joining import (
    builds,
    check_job_server,
    check_package,
    check_reachable,
    check_versions,
    make_probe,
    resolved,
    this_environment,
)
from soul.records import InputError


@contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """A port that says `answer`, or nothing, to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    connection.recv(64)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        for connection in held:
            connection.close()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def test_nothing_listens() -> None:
    with pytest.raises(InputError, match=r"cannot be reached \(Connection refused\)"):
        check_reachable(f"127.0.0.1:{closed_port()}")


def test_something_else_listens() -> None:
    with server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port, pytest.raises(InputError, match="no Ray cluster's own port"):
        check_reachable(f"127.0.0.1:{port}")


def test_what_listens_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "CONNECT_SECONDS", 0.3)
    began = time.monotonic()
    with server(None) as port, pytest.raises(InputError, match=r"cannot be reached \(no answer\)"):
        check_reachable(f"127.0.0.1:{port}")
    assert time.monotonic() - began < 30


def test_a_server_of_http2_is_let_through() -> None:
    with server(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])) as port:
        check_reachable(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ray://head:10001", "driver has to be on the cluster"),
        ("http://head:8265", "is a job server"),
        ("head", "has no port"),
    ],
)
def test_addresses_of_another_kind(address: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=says):
        resolved(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=says):
        resolved("auto")


def test_the_command_says_so_and_exits_with_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert main(["check", "--address", f"127.0.0.1:{closed_port()}"]) == BAD_INPUT
    assert main(["check", "--address", f"http://127.0.0.1:{closed_port()}"]) == BAD_INPUT
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("cannot be reached" in line for line in told)


class _Answers(http.server.BaseHTTPRequestHandler):
    status, body = 200, b"{}"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b"", "authentication: .* wants a token"),
        (403, b"", "authentication: .* refuses this environment's token"),
        (404, b"", "no job server of Ray"),
        (200, b"<html>", "cannot be reached"),
        (200, b'{"ray_version": "2.44.1"}', r"version mismatch: the job server at .* has Ray 2\.44\.1, this environment Ray"),
    ],
)
def test_job_servers_that_will_not_do(status: int, body: bytes, says: str) -> None:
    handler = type("_Told", (_Answers,), {"status": status, "body": body})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            with pytest.raises(InputError, match=says):
                check_job_server(f"http://127.0.0.1:{listening.server_port}")
        finally:
            listening.shutdown()


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"Ray": "2.59.0"}, "the cluster has Ray 2.59.0, this environment Ray"),
        ({"Python": "3.9.18"}, "the cluster has Python 3.9.18, this environment Python"),
        ({"Ray": "2.59.0", "Python": "3.9.18"}, "Ray 2.59.0 and Python 3.9.18, this environment Ray"),
    ],
)
def test_another_version_is_named(theirs: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_versions({**this_environment(), **theirs}, this_environment(), where="the cluster")


def test_the_same_versions_pass_and_a_patch_of_python_as_far_as_ray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = this_environment()
    check_versions(ours, ours, where="the cluster")
    check_versions({}, ours, where="a head that is just starting")
    patch = {**ours, "Python": ours["Python"].rpartition(".")[0] + ".99"}
    with pytest.raises(InputError, match="version mismatch"):
        check_versions(patch, ours, where="the cluster")
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    check_versions(patch, ours, where="the cluster")


def probed(folder: Path) -> str:
    """The probe's answer in a process that would import what lies in `folder`, as a node's worker: by value, without ours."""
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1]))())"
    probe = ray.cloudpickle.dumps(make_probe()).hex()
    done = subprocess.run([sys.executable, "-c", code, probe], cwd=folder, env={}, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_every_change_of_the_sources_is_another_build(tmp_path: Path) -> None:
    ours, copy = make_probe()(), tmp_path / "soul"
    shutil.copytree(Path(soul.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    same = probed(tmp_path)
    check_package({"10.0.0.2": same}, ours)
    with (copy / "records.py").open("a") as file:
        file.write("\n")
    other = probed(tmp_path)
    with pytest.raises(InputError, match=r"version mismatch: soul on 10\.0\.0\.3 is .*; here it is .*ray job submit --working-dir"):
        check_package({"10.0.0.2": same, "10.0.0.3": other}, ours)
    with pytest.raises(InputError, match=r"soul on 10\.0\.0\.3 \(and 1 more nodes\) is none"):
        check_package({"10.0.0.3": "none", "10.0.0.4": other}, ours)


@pytest.mark.ray
def test_nodes_are_asked_and_one_that_is_gone_is_left_out(ray_cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gone = {"NodeID": "ab" * 28, "Alive": True, "NodeManagerAddress": "10.0.0.9"}
    dead = {"NodeID": "ee" * 28, "Alive": False, "NodeManagerAddress": "10.0.0.8"}
    answers = builds([*nodes, gone, dead], timeout_s=60)
    assert set(answers) == {nodes[0]["NodeManagerAddress"]}
    check_package(answers, make_probe()())
    assert "10.0.0.9" in caplog.text and "10.0.0.8" not in caplog.text
