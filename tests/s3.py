"""S3 on loopback: moto in a process of its own, and in front of it a proxy that can fail in the ways in which networks and stores do.

The proxy sits where AWS_ENDPOINT_URL points in every process of the tests, so nothing can reach the real S3.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

# An HTTP status, a connection that is dropped while the request is sent or while the answer is, seconds to wait.
Fault = int | float | Literal["drop request", "drop answer"] | None
CODES = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown", 507: "InsufficientStorage"}
HOP_HEADERS = ("expect", "connection", "transfer-encoding", "content-length")


@dataclass
class Store:
    """`fault` decides about every request, a "METHOD /bucket/key"; `requests` are those that were made."""

    moto: int
    fault: Callable[[str], Fault] = lambda request: None
    requests: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def make_bucket(self, name: str) -> str:
        """A bucket's URI."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.moto}/{name}", method="PUT")
        urllib.request.urlopen(request).close()
        return f"s3://{name}"

    @contextmanager
    def failing(self, fault: Callable[[str], Fault]) -> Iterator[None]:
        before, self.fault, self.faults = self.fault, fault, []
        try:
            yield
        finally:
            self.fault = before


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            request = f"{self.command} {self.path}"
            store.requests.append(request)
            fault = store.fault(request)
            if fault is not None:
                store.faults.append(f"{fault}: {request}")
            if fault == "drop request":
                if self.command in ("PUT", "POST"):
                    self.rfile.read1(200)
                return self._hang_up()
            body = self._body()
            if isinstance(fault, float):
                time.sleep(fault)
            if isinstance(fault, int):
                code = CODES.get(fault)
                page = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>" if code else "<html>Bad Gateway</html>"
                return self._answer(fault, {"Content-Type": "application/xml"}, page.encode())
            status, headers, data = self._forward(body)
            if fault == "drop answer" and self.command == "GET":
                self._answer(status, headers, data, sent=len(data) // 2)
                return self._hang_up()
            self._answer(status, headers, data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", store.moto)
            kept = {name: value for name, value in self.headers.items() if name.lower() not in HOP_HEADERS}
            connection.request(self.command, self.path, body, kept)
            response = connection.getresponse()
            data = response.read()
            connection.close()
            return response.status, dict(response.getheaders()), data

        def _answer(self, status: int, headers: dict[str, str], data: bytes, *, sent: int | None = None) -> None:
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in HOP_HEADERS:
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:sent])
                self.wfile.flush()

        def _hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def handle(self) -> None:
            with suppress(ConnectionError, ValueError):  # the client was killed, or has given up
                super().handle()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def store_on_loopback() -> Iterator[Store]:
    """At AWS_ENDPOINT_URL, until the block ends."""
    port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert port is not None
    moto = free_port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(moto)], **quiet)
    try:
        deadline = time.monotonic() + 120
        while not _listens(moto):
            assert process.poll() is None and time.monotonic() < deadline, "moto did not start"
            time.sleep(0.05)
        store = Store(moto)
        with ThreadingHTTPServer(("127.0.0.1", port), _handler(store)) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield store
            server.shutdown()
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
