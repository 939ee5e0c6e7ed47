"""The whole API on loopback in this process, over two runs: one that passes the gate, one that does not. No Ray."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from openai import OpenAI

from soul.serving.api import build_api
from soul.serving.engine import Engine, load_engine
from soul.serving.gate import Catalogue, Hashes, read_catalogue
from soul.serving.keys import hash_key
from soul.serving.settings import EngineSettings, Hosting, Limits, ServeConfig
from soul.serving.work import Answer, ModelSpec, Piece, Scoring, Token, Usage, Work
from soul.serving.worker import Worker
from tests.serving_runs import PASSING, write_run

KIND: Any = os.environ.get("SOUL_TEST_ENGINE", "transformers")  # vllm, where it is installed: the same answers are expected of it
SECONDS = 20 if KIND == "transformers" else 120  # vLLM takes a while to start
KEY = "a-key-of-sixteen-or-more"
LIMITS = Limits(
    max_body_bytes=200_000,
    max_new_tokens=200,
    default_new_tokens=50,
    max_prompts=8,
    max_choices=4,
    max_top=5,
    timeout_s=SECONDS,
    max_requests=6,
)


@dataclass
class InProcess:
    """The backend of these tests: what replicas do, without replicas."""

    limits: Limits
    engines: dict[str, Engine] = field(default_factory=dict)

    async def engine(self, spec: ModelSpec) -> Engine:
        if spec.sha256 not in self.engines:
            self.engines[spec.sha256] = load_engine(
                spec, EngineSettings(KIND, self.limits.max_rows, self.limits.max_batch_tokens, self.limits.max_top)
            )
        return self.engines[spec.sha256]

    @property
    def worker(self) -> Worker:
        return Worker(self.engine, self.limits)

    async def answer(self, spec: ModelSpec, work: Work) -> Answer:
        return await self.worker.answer(spec, work)

    def stream(self, spec: ModelSpec, work: Work) -> AsyncGenerator[Piece | Usage, None]:
        return self.worker.stream(spec, work)

    async def score(self, spec: ModelSpec, scoring: Scoring) -> list[Token]:
        return await self.worker.score(spec, scoring)

    async def is_ready(self) -> bool:
        return True

    @property
    def num_rows(self) -> int:
        return sum(engine.num_rows for engine in self.engines.values())


@dataclass
class Served:
    url: str
    backend: InProcess
    catalogue: Catalogue

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def folder(self, name: str) -> str:
        spec = self.catalogue.models[name].spec
        assert spec is not None
        return spec.folder


def serve(config: ServeConfig, backend: Any, catalogue: Catalogue) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = build_api(config, backend, lambda: catalogue)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("served")
    good = write_run(folder / "good")
    bad = write_run(folder / "bad", seed=1, numbers={**PASSING, "unlearned": (0.9, 0.9, 0.58)})
    return {"good": str(good), "bad": str(bad)}


@pytest.fixture(scope="session")
def served(runs: dict[str, str]) -> Iterator[Served]:
    hosting = Hosting(runs=runs, aliases={"production": "good"})
    config = ServeConfig(hosting=hosting, limits=LIMITS, key_hashes=(hash_key("another-key-entirely"), hash_key(KEY)))
    backend = InProcess(LIMITS)
    catalogue = read_catalogue(hosting, on_loopback=True, hashes=Hashes())
    for url in serve(config, backend, catalogue):
        yield Served(url, backend, catalogue)
    for engine in backend.engines.values():
        engine.close()
