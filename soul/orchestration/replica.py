"""The Ray Serve deployments: `Generator` replicas that have models, and the `Gateway` with the routes and the gate in front of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from soul.records import InputError
from soul.serving.api import build_api
from soul.serving.engine import Engine, load_engine
from soul.serving.errors import Refusal, Refused, refuse
from soul.serving.front import busy
from soul.serving.gate import Catalogue, Hashes, read_catalogue, stamp
from soul.serving.settings import Hosting, ServeConfig, located
from soul.serving.work import Answer, ModelSpec, Piece, Scoring, Token, Usage, Work
from soul.serving.worker import Worker
from soul.settings import load_settings

LOG: Final = logging.getLogger(__name__)
ATTEMPTS: Final = 3
REFRESH_S: Final = 1.0
READY_S: Final = 2.0
WARM_S: Final = 900.0
Result = TypeVar("Result")
Handle: TypeAlias = "DeploymentHandle[Any]"


class _ServeLog(logging.Handler):
    """Hands our lines (request ids, routes, statuses; never content) to whatever Serve writes its own log of this replica with."""

    def emit(self, record: logging.LogRecord) -> None:
        for handler in logging.getLogger("ray.serve").handlers:
            handler.handle(record)


def _log_with_serve() -> None:
    ours = logging.getLogger("soul")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.handlers = [_ServeLog()]


class Generator:
    """Loads models and answers for them. `warm`: what is loaded before the replica counts as ready."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: dict[str, Any], warm: Sequence[ModelSpec]
    ) -> None:
        _log_with_serve()
        torch.set_num_threads(1)
        self._config = ServeConfig.model_validate(config)
        self._limits = self._config.limits
        self._max_models = self._config.replicas.max_models
        self._specs: dict[str, ModelSpec] = {}
        self._loaded: list[Engine] = []
        self._find = serve.multiplexed(self._load_by_key(), max_num_models_per_replica=self._max_models)
        self._worker = Worker(self._engine, self._limits)
        await self._warm_all(warm)

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """From a Serve config file: load what is hosted. Serve waits for this before the replica counts as ready."""
        if not user_config:
            return
        hosting = Hosting.model_validate(user_config)
        try:
            found = await asyncio.to_thread(read_catalogue, hosting, on_loopback=self._config.on_loopback, hashes=Hashes())
        except InputError as error:  # the gateway, which has the same settings, decides what becomes of it
            LOG.error("nothing is loaded beforehand: %s", error)
            return
        await self._warm_all(found.specs())

    async def _warm_all(self, specs: Sequence[ModelSpec]) -> None:
        for spec in list(specs)[: self._max_models]:
            refusal = await self.warm(spec)
            if refusal is not None:
                LOG.error("a model was not loaded: %s", refusal.message)

    def _load_by_key(self) -> Callable[[str], Coroutine[Any, Any, Engine]]:
        async def load(key: str) -> Engine:
            engine = await asyncio.to_thread(load_engine, self._specs[key], self._config.engine_settings)
            self._loaded = [*(other for other in self._loaded if other.is_open), engine]
            return engine

        return load

    async def _engine(self, spec: ModelSpec) -> Engine:
        self._specs[spec.sha256] = spec
        try:
            engine: Engine = await self._find(spec.sha256)
        except InputError as error:
            raise refuse(403, f"the model cannot be loaded: {error}", "model_refused", param="model") from None
        return engine

    async def warm(self, spec: ModelSpec) -> Refusal | None:
        """Load a model before anybody asks for it."""
        return await _told(self._load(spec))

    async def _load(self, spec: ModelSpec) -> None:
        await self._engine(spec)

    async def answer(self, spec: ModelSpec, work: Work) -> Answer | Refusal:
        return await _told(self._worker.answer(spec, work))

    async def score(self, spec: ModelSpec, scoring: Scoring) -> list[Token] | Refusal:
        return await _told(self._worker.score(spec, scoring))

    async def stream(self, spec: ModelSpec, work: Work) -> AsyncGenerator[Piece | Usage | Refusal, None]:
        parts = self._worker.stream(spec, work)
        try:
            async for part in parts:
                yield part
        except Refused as error:
            yield error.refusal
        finally:
            await parts.aclose()

    async def check_health(self) -> None:
        """Serve replaces a replica whose model fails again and again (a lost GPU, memory gone for good)."""
        if any(engine.is_open and not engine.is_well for engine in self._loaded):
            raise RuntimeError("an engine has stopped, or its steps fail one after the other")

    async def num_rows(self) -> int:
        """Rows in work: 0 once every client has its answer or has gone."""
        return sum(engine.num_rows for engine in self._loaded)

    async def num_models(self) -> int:
        """Models in memory."""
        return sum(engine.is_open for engine in self._loaded)


async def _told(work: Coroutine[Any, Any, Result]) -> Result | Refusal:
    """A refusal as a value: an exception would be logged, and wrapped on its way."""
    try:
        return await work
    except Refused as error:
        return error.refusal


class Replicas:
    """The gateway's backend: a handle to the generators. What a dead replica had begun is asked of another, if no part of it was shown."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def answer(self, spec: ModelSpec, work: Work) -> Answer:
        answer: Answer = await self._call("answer", spec, work)
        return answer

    async def score(self, spec: ModelSpec, scoring: Scoring) -> list[Token]:
        found: list[Token] = await self._call("score", spec, scoring)
        return found

    async def warm(self, spec: ModelSpec) -> None:
        """Load a model on every replica. One that starts at this moment loads it when it is first asked.

        Raises:
            Refused: it cannot be loaded.
        """
        try:
            told = await self._handle.broadcast("warm", spec).results_async(timeout_s=WARM_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError) as error:
            LOG.warning("no replica could be told to load a model (%s)", type(error).__name__)
            return
        for one in told:
            if isinstance(one, Refusal):
                raise Refused(one)
            if isinstance(one, Exception):
                LOG.warning("a replica did not load a model (%s)", type(one).__name__)

    async def is_ready(self) -> bool:
        """Whether a replica answers, which it does once its models are loaded."""
        try:
            async with asyncio.timeout(READY_S):
                await self._handle.num_rows.remote()
        except (TimeoutError, RayActorError, DeploymentUnavailableError, BackPressureError):
            return False
        return True

    async def _call(self, method: str, spec: ModelSpec, *given: object) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                told = await self._bound(method, spec).remote(spec, *given)
            except (RayActorError, DeploymentUnavailableError) as error:
                await _again(attempt, error)
            except BackPressureError:
                raise Refused(busy()) from None
            else:
                if isinstance(told, Refusal):
                    raise Refused(told)
                return told
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def stream(self, spec: ModelSpec, work: Work) -> AsyncGenerator[Piece | Usage, None]:
        for attempt in range(1, ATTEMPTS + 1):
            has_begun = False
            parts = self._bound("stream", spec, stream=True).remote(spec, work)
            try:
                async for part in parts:
                    if isinstance(part, Refusal):
                        raise Refused(part)
                    has_begun = True
                    yield part
                return
            except (RayActorError, DeploymentUnavailableError) as error:
                if has_begun:
                    raise _lost() from error
                await _again(attempt, error)
            except BackPressureError:
                raise Refused(busy()) from None
            finally:
                parts.cancel()

    def _bound(self, method: str, spec: ModelSpec, *, stream: bool = False) -> Any:
        return getattr(self._handle.options(multiplexed_model_id=spec.sha256, stream=stream), method)


def _lost() -> Refused:
    return refuse(503, "the replica that worked on this request is gone. Ask again.", "replica_lost", retry_after_s=1)


async def _again(attempt: int, error: Exception) -> None:
    LOG.warning("a replica was lost (%s), attempt %d of %d", type(error).__name__, attempt, ATTEMPTS)
    if attempt == ATTEMPTS:
        raise _lost() from error
    await asyncio.sleep(0.2 * attempt)


class Gateway:
    """HTTP in, the gate, and out to the replicas. Runs, aliases and policy follow `config.watch` and the runs' own files."""

    async def __init__(self, config: dict[str, Any], generators: Handle) -> None:  # type: ignore[misc]  # Serve awaits it
        _log_with_serve()
        self._config = ServeConfig.model_validate(config)
        self._hosting = self._config.hosting
        self._replicas = Replicas(generators)
        self._hashes = Hashes()
        self._seen: object = None
        first = await asyncio.to_thread(self._read)
        self._catalogue = first or Catalogue()
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_api(self._config, self._replicas, lambda: self._catalogue, names_requests=False)

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """From a Serve config file: what is hosted changes in place, nothing restarts."""
        if user_config:
            self._hosting = Hosting.model_validate(user_config)
            if not self._catalogue.models:  # at the start a mistake is an error; later it must not end what is served
                await self._take_in()
        await self._refresh()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await self._refresh()

    async def _refresh(self) -> None:
        """Take in what has changed; what cannot be read leaves everything as it was. New models are loaded before they are shown."""
        try:
            await self._take_in()
        except InputError as error:
            LOG.error("what is hosted stays as it was: %s", error)

    async def _take_in(self) -> None:
        found = await asyncio.to_thread(self._read)
        if found is None:
            return
        known = set(self._catalogue.specs())
        for spec in found.specs():
            if spec not in known:
                await self._warm(spec)
        self._catalogue = found

    async def _warm(self, spec: ModelSpec) -> None:
        try:
            await self._replicas.warm(spec)
        except Refused as error:
            LOG.error("a model was not loaded: %s", error.refusal.message)

    def _read(self) -> Catalogue | None:
        """The new catalogue, None if nothing has changed since the last look."""
        path = self._config.watch
        now = (self._hosting, None if path is None else _time_of(path), stamp(self._hosting))
        if now == self._seen:
            return None
        self._seen = now
        hosting = self._hosting if path is None else self._hosting_in(path)
        self._hosting = hosting
        self._seen = (hosting, now[1], stamp(hosting))
        return read_catalogue(hosting, on_loopback=self._config.on_loopback, hashes=self._hashes)

    def _hosting_in(self, path: str) -> Hosting:
        fixed = {"host": self._config.host, "key_hashes": list(self._config.key_hashes)}
        return located(load_settings(ServeConfig, path, fixed), path).hosting


def _time_of(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0
