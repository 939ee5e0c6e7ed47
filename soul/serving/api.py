"""The HTTP routes, over any backend that can answer: OpenAI's own, the gate's reports, the page, health and metrics."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from soul.serving.errors import Refusal, Refused, refuse
from soul.serving.front import Front, refused
from soul.serving.gate import Catalogue, Hosted
from soul.serving.metrics import CONTENT_TYPE, Metrics
from soul.serving.reports import listed, report_body, report_page
from soul.serving.schemas import ChatRequest, CompletionRequest, ScoreRequest, parse
from soul.serving.settings import Limits, ServeConfig
from soul.serving.shapes import Envelope, envelope
from soul.serving.work import Answer, ModelSpec, Piece, Scoring, Token, Usage, Work

FILES: Final = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/page.css": ("page.css", "text/css")}
# scripts are ours alone; a report, shown in a sandboxed frame, brings its styles with it
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Result = TypeVar("Result")
Parts = AsyncGenerator[Piece | Usage, None]


class Backend(Protocol):
    """Whoever has the models: replicas of Ray Serve, or this process in a test. All raise `Refused`."""

    async def answer(self, spec: ModelSpec, work: Work) -> Answer: ...

    def stream(self, spec: ModelSpec, work: Work) -> Parts: ...

    async def score(self, spec: ModelSpec, scoring: Scoring) -> list[Token]: ...

    async def is_ready(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Api:
    """The handlers. `catalogue` gives what is hosted now; it may change between two requests, never within one."""

    backend: Backend
    catalogue: Callable[[], Catalogue]
    limits: Limits
    metrics: Metrics

    async def completions(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await self._body(request))
        model, spec = self._hosted(asked.model)
        work = asked.work(self.limits, _seed())
        return await self._generate(request, model, spec, work, bool(asked.stream), is_chat=False, wants_usage=asked.wants_usage)

    async def chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await self._body(request))
        model, spec = self._hosted(asked.model)
        work = asked.work(self.limits, _seed())
        return await self._generate(request, model, spec, work, bool(asked.stream), is_chat=True, wants_usage=asked.wants_usage)

    async def score(self, request: Request) -> Response:
        asked = parse(ScoreRequest, await self._body(request))
        model, spec = self._hosted(asked.model)
        tokens = await self._in_time(self.backend.score(spec, asked.scoring()))
        self.metrics.used(model.id, Usage(len(tokens), 0))
        told = [{"token": token.text, "logprob": token.logp, "best": token.top[0][1] if token.top else None} for token in tokens]
        return _answer({"object": "score", "model": model.id, "tokens": told}, model)

    async def models(self) -> Response:
        return JSONResponse(listed(self.catalogue()))

    async def model(self, name: str) -> Response:
        found, _ = self._hosted(name)
        return JSONResponse(next(entry for entry in listed(self.catalogue())["data"] if entry["id"] == found.id))

    async def report(self, name: str) -> Response:
        return JSONResponse(report_body(self._known(name)))

    async def report_html(self, name: str) -> Response:
        page = report_page(self._known(name))
        return Response(
            page, media_type="text/html", headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox"}
        )

    def _known(self, name: str) -> Hosted:
        found = self.catalogue().find(name)
        if found is None:
            raise refuse(404, "there is no model of this name here. GET /v1/models lists them.", "model_not_found", param="model")
        return found

    def _hosted(self, name: str) -> tuple[Hosted, ModelSpec]:
        found = self._known(name)
        if found.spec is None:
            text = f"model {found.id} is not hosted: {found.reason}. GET /v1/models/{found.id}/report has the details."
            raise refuse(403, text, "model_refused", param="model")
        return found, found.spec

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise refuse(415, "expected Content-Type: application/json.", "unsupported_media_type")
        most = self.limits.max_body_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise refuse(413, f"the body is larger than {most} bytes.", "body_too_large")
        return bytes(body)

    async def _in_time(self, work: Awaitable[Result]) -> Result:
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                return await work
        except TimeoutError:
            raise self._late() from None

    def _late(self) -> Refused:
        return refuse(504, f"no answer within {self.limits.timeout_s:g} s. Ask for fewer tokens.", "timeout")

    async def _generate(
        self, request: Request, model: Hosted, spec: ModelSpec, work: Work, is_stream: bool, *, is_chat: bool, wants_usage: bool
    ) -> Response:
        shape = envelope(request.state.request_id, model.id, is_chat=is_chat)
        if not is_stream:
            answer: Answer = await self._in_time(self.backend.answer(spec, work))
            self.metrics.used(model.id, answer.usage)
            return _answer(shape.whole(answer.pieces, answer.usage), model)
        parts = self.backend.stream(spec, work)
        first: Piece | Usage = await self._in_time(anext(aiter(parts)))  # a refusal is still an ordinary answer with its status
        events = self._events(first, parts, shape, model, wants_usage=wants_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store", **_mark(model)})

    async def _events(
        self, first: Piece | Usage, parts: Parts, shape: Envelope, model: Hosted, *, wants_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        written: dict[int, int] = {}
        try:
            async with asyncio.timeout(self.limits.timeout_s), aclosing(_chained(first, parts)) as chained:
                async for part in chained:
                    if isinstance(part, Usage):
                        self.metrics.used(model.id, part)
                        if wants_usage:
                            yield _event(shape.usage_chunk(part))
                        continue
                    begins = part.index not in written
                    yield _event(shape.chunk(part, begins=begins, offset=written.get(part.index, 0)))
                    written[part.index] = written.get(part.index, 0) + sum(len(token.text) for token in part.tokens)
        except Refused as error:
            yield _event(error.refusal.body())
        except TimeoutError:
            yield _event(self._late().refusal.body())
        yield b"data: [DONE]\n\n"


async def _chained(first: Piece | Usage, parts: Parts) -> Parts:
    async with aclosing(parts):
        yield first
        async for part in parts:
            yield part


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


def _mark(model: Hosted) -> dict[str, str]:
    return {} if model.evaluated else {"x-soul-warning": "this model was not approved by an evaluation report"}


def _answer(body: dict[str, Any], model: Hosted) -> Response:
    return JSONResponse(body, headers=_mark(model))


def _seed() -> int:
    """Drawn here, so that a request which a second replica repeats gives the answer that the first would have given."""
    return random.SystemRandom().randrange(2**31)


def build_api(config: ServeConfig, backend: Backend, catalogue: Callable[[], Catalogue], *, names_requests: bool = True) -> ASGIApp:
    """The application. No pages about its own schema. `names_requests`: whether answers need their x-request-id from here."""
    metrics = Metrics()
    api = Api(backend, catalogue, config.limits, metrics)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/completions", api.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"])
    app.add_api_route("/v1/score", api.score, methods=["POST"])
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/models/{name}", api.model)
    app.add_api_route("/v1/models/{name}/report", api.report)
    app.add_api_route("/v1/models/{name}/report.html", api.report_html)
    front = Front(
        app,
        key_hashes=config.key_hashes,
        on_loopback=config.on_loopback,
        max_in_flight=config.max_in_flight,
        metrics=metrics,
        names_requests=names_requests,
    )
    _add_upkeep(app, api, front)
    _add_refusals(app)
    return front


def _add_upkeep(app: FastAPI, api: Api, front: Front) -> None:
    async def alive() -> Response:
        return JSONResponse({"status": "alive"})

    async def ready() -> Response:
        if await api.backend.is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "loading"}, 503, {"retry-after": "1"})

    async def metrics() -> Response:
        catalogue = api.catalogue()
        hosted = len(catalogue.hosted())
        text = api.metrics.text(in_flight=front.num_in_flight, hosted=hosted, refused=len(catalogue.models) - hosted)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def file(request: Request) -> Response:
        name, kind = FILES[request.url.path]
        headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}
        return Response((Path(__file__).parent / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=headers)

    app.add_api_route("/healthz", alive)
    app.add_api_route("/readyz", ready)
    app.add_api_route("/metrics", metrics)
    for path in FILES:
        app.add_api_route(path, file)


def _add_refusals(app: FastAPI) -> None:
    async def told(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return refused(error.refusal)

    async def unrouted(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: "there is no such route.", 405: "this route does not take that method."}
        return refused(Refusal(error.status_code, what.get(error.status_code, "the request cannot be answered."), "bad_route"))

    async def defect(request: Request, _: Exception) -> Response:
        text = f"the server failed on this request; its log has more under {request.state.request_id}."
        return refused(Refusal(500, text, "internal_error"))

    app.add_exception_handler(Refused, told)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_exception_handler(Exception, defect)
