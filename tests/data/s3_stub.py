"""Just enough of S3 on loopback to read objects and list a prefix: a process that honours AWS_ENDPOINT_URL talks to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

LISTING = "<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>{}</ListBucketResult>"


@dataclass
class Bucket:
    """`objects` are keys of the one bucket `data`; reading a key in `denied` is forbidden. `requests` are "METHOD path" lines."""

    endpoint: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)


def _handler(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            bucket.requests.append(f"{self.command} {self.path}")
            url = urlsplit(self.path)
            name, _, key = unquote(url.path).lstrip("/").partition("/")
            query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
            if name != "data":
                self._send(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            elif "list-type" in query:
                self._send(200, LISTING.format("".join(self._entries(query.get("prefix", ""), query.get("delimiter")))).encode())
            elif key in bucket.denied:
                self._send(403, b"<Error><Code>AccessDenied</Code></Error>")
            elif key in bucket.objects:
                self._send_range(bucket.objects[key])
            else:
                self._send(200 if not key else 404, b"" if not key else b"<Error><Code>NoSuchKey</Code></Error>")

        def _entries(self, prefix: str, delimiter: str | None) -> Iterator[str]:
            for key, body in sorted(bucket.objects.items()):
                if key.startswith(prefix) and not (delimiter and delimiter in key[len(prefix) :]):
                    date = "2024-01-01T00:00:00.000Z"
                    yield f"<Contents><Key>{escape(key)}</Key><Size>{len(body)}</Size><LastModified>{date}</LastModified></Contents>"

        def _send_range(self, body: bytes) -> None:
            span = self.headers.get("Range")
            if span is None:
                return self._send(200, body)
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(body), len(body))
            self._send(206, body[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "ETag": '"x"', **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def s3_on_loopback() -> Iterator[Bucket]:
    bucket = Bucket()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(bucket)) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        bucket.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        yield bucket
        server.shutdown()
