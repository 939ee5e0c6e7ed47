"""What every request passes before a route sees it: a request id, the Host check, the key, the place in the queue; and what it leaves."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soul.serving.errors import Refusal
from soul.serving.keys import is_admitted
from soul.serving.metrics import Metrics
from soul.serving.settings import LOOPBACK

LOG: Final = logging.getLogger(__name__)
OPEN: Final = ("/", "/page.js", "/page.css", "/healthz", "/readyz")  # nothing of the models is in these
WORK: Final = ("/v1/completions", "/v1/chat/completions", "/v1/score")
HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
NO_KEY: Final = Refusal(401, "no valid API key: send one as Authorization: Bearer KEY.", "invalid_api_key")
WRONG_HOST: Final = Refusal(403, "this server answers under its loopback address only; the Host header names another.", "wrong_host")


class Front:
    """ASGI middleware. `key_hashes` empty: anybody who reaches the port, which then is this machine's loopback."""

    def __init__(
        self, app: ASGIApp, *, key_hashes: Sequence[str], on_loopback: bool, max_in_flight: int, metrics: Metrics, names_requests: bool
    ) -> None:
        self._app = app
        self._key_hashes = key_hashes
        self._checks_host = on_loopback and not key_hashes  # a web page elsewhere could point its own name at this address
        self._max_in_flight = max_in_flight
        self._metrics = metrics
        self._names_requests = names_requests
        self.num_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.perf_counter()
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(scope=message)
                if self._names_requests:
                    added["x-request-id"] = request_id
                for name, value in HEADERS.items():
                    added[name] = value
            await send(message)

        try:
            await self._admit(scope, headers, receive, send_on)
        finally:
            seconds = time.perf_counter() - started
            route = _route(scope)
            self._metrics.answered(route, status, seconds)
            LOG.info("%s %s %d %.3fs", request_id, route, status, seconds)

    async def _admit(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refused(refusal)(scope, receive, send)
            return
        if scope["path"] not in WORK:
            await self._app(scope, receive, send)
            return
        self.num_in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.num_in_flight -= 1

    def _refusal(self, path: str, headers: Headers) -> Refusal | None:
        if self._checks_host and _name(headers.get("host", "")) not in LOOPBACK:
            return WRONG_HOST
        if path not in OPEN and not is_admitted(headers.get("authorization"), self._key_hashes):
            return NO_KEY
        if path in WORK and self.num_in_flight >= self._max_in_flight:
            return busy()
        return None


def busy() -> Refusal:
    return Refusal(429, "all replicas are busy. Try again in a moment.", "overloaded", retry_after_s=1)


def refused(refusal: Refusal) -> Response:
    headers = {} if refusal.retry_after_s is None else {"retry-after": str(refusal.retry_after_s)}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(refusal.body(), refusal.status, headers)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


def _name(host: str) -> str:
    """The host of a Host header, without port and brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()


def _route(scope: Scope) -> str:
    """The route's pattern, not the path, in which a caller could write anything."""
    route = scope.get("route")
    return str(getattr(route, "path", "")) or (scope["path"] if scope["path"] in (*OPEN, *WORK) else "other")
