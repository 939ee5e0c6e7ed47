"""The same API behind Ray Serve: tokens as they come, clients that leave, models and aliases that change while requests go on, drain."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import yaml
from openai import OpenAI

from soul.serving.settings import ServeConfig, located
from soul.settings import load_settings
from tests.serving_runs import write_run

pytestmark = pytest.mark.ray
LENGTH = 9000  # positions: an answer of so many tokens takes much longer than anything is waited for


@dataclass
class Server:
    url: str
    file: Path
    folder: Path

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def write(self, *, runs: list[str], production: str) -> None:
        write_config(self.file, runs=runs, production=production)

    def wait_for(self, what: Any, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.1)


def write_config(file: Path, *, runs: list[str], production: str) -> None:
    hosting = {"runs": {name: f"runs/{name}" for name in runs}, "aliases": {"production": production}}
    staging = file.with_suffix(".new")
    staging.write_text(
        yaml.safe_dump({"hosting": hosting, "replicas": {"num_cpus": 0.2, "max_models": 2}, "limits": {"max_new_tokens": LENGTH}})
    )
    os.replace(staging, file)


@pytest.fixture(scope="module")
def server(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from soul.orchestration import serve
    from soul.serving.gate import Hashes, read_catalogue

    folder = tmp_path_factory.mktemp("serve")
    for seed, name in enumerate(("a", "b")):
        write_run(folder / "runs" / name, seed=seed, max_length=LENGTH)
    file = folder / "serving.yaml"
    write_config(file, runs=["a"], production="a")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = located(load_settings(ServeConfig, file, {"port": port, "watch": str(file)}), str(file))
    serve.start(config, read_catalogue(config.hosting, on_loopback=True, hashes=Hashes()))
    yield Server(f"http://127.0.0.1:{port}", file, folder)
    serve.stop()


def test_the_client_gets_completions_chat_and_refusals(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list().data] == ["a", "a.target", "a.retrained", "production"]
    done = client.completions.create(model="production", prompt=["The", "Who is"], max_tokens=5, temperature=0, logprobs=1, echo=True)
    assert done.model == "a" and len(done.choices) == 2 and done.choices[0].text.startswith("The")
    messages: Any = [{"role": "user", "content": "Who?"}]
    assert client.chat.completions.create(model="a", messages=messages, max_tokens=5, temperature=0).usage.completion_tokens <= 5  # type: ignore[union-attr]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="b", prompt="The")
    with pytest.raises(openai.BadRequestError, match="context has"):
        client.completions.create(model="a", prompt="The", max_tokens=LENGTH)
    assert requests.get(f"{server.url}/readyz", timeout=10).status_code == 200
    assert requests.get(f"{server.url}/docs", timeout=10).status_code == 404
    assert "a" not in requests.get(f"{server.url}/-/routes", timeout=10).json().values()


def test_a_replica_holds_the_models_used_last_and_no_more(server: Server) -> None:
    from ray import serve

    replicas = serve.get_deployment_handle("Generator", "soul")
    texts = []
    for _ in range(2):
        for name in ("a", "a.target", "a.retrained"):
            texts.append(server.client().completions.create(model=name, prompt="The", max_tokens=6, temperature=0).choices[0].text)
            assert replicas.num_models.remote().result(timeout_s=30) <= 2
    assert texts[:3] == texts[3:] and len(set(texts)) == 3


def test_tokens_come_one_by_one_and_a_client_that_leaves_frees_the_replica(server: Server) -> None:
    from ray import serve

    replicas = serve.get_deployment_handle("Generator", "soul")
    assert replicas.num_rows.remote().result(timeout_s=30) == 0
    body = {"model": "a", "prompt": "The", "max_tokens": LENGTH - 10, "temperature": 0, "stream": True}
    times = []
    with requests.post(f"{server.url}/v1/completions", json=body, stream=True, timeout=60) as reply:
        assert len(reply.headers["x-request-id"].split(",")) == 1
        lines = reply.iter_lines()  # kept: a dropped iterator closes the connection
        for line in lines:
            times += [time.monotonic()] if line else []
            if len(times) == 20:
                break
        assert replicas.num_rows.remote().result(timeout_s=10) == 1
    assert times[-1] - times[0] > 0.005  # not one piece cut up afterwards
    server.wait_for(lambda: replicas.num_rows.remote().result(timeout_s=10) == 0, timeout_s=5)


def test_models_and_aliases_change_under_load_without_a_failed_request(server: Server) -> None:
    stop, failures, models = threading.Event(), [], []

    def ask() -> None:
        client = server.client()
        while not stop.is_set():
            try:
                models.append(client.completions.create(model="production", prompt="The", max_tokens=4, temperature=0).model)
            except openai.OpenAIError as error:
                failures.append(repr(error))

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(ask)
        try:
            server.wait_for(lambda: len(models) > 5)
            server.write(runs=["a", "b"], production="b")
            server.wait_for(lambda: models[-1] == "b")
            server.write(runs=["a", "b"], production="a")
            server.wait_for(lambda: models[-1] == "a")
            server.write(runs=["a"], production="a")
            server.wait_for(lambda: "b" not in [model.id for model in server.client().models.list().data])
        finally:
            stop.set()
    assert not failures and set(models) == {"a", "b"}


def test_a_config_that_cannot_be_read_changes_nothing(server: Server) -> None:
    good = server.file.read_text()
    for bad in ("hosting: [", "hosting:\n  rnus: {}\n", "hosting:\n  aliases: {production: nobody}\n"):
        server.file.write_text(bad)
        time.sleep(1.5)
        assert server.client().completions.create(model="production", prompt="The", max_tokens=1).model == "a"
    server.file.write_text(good)


def test_weights_that_change_are_refused_while_the_server_runs(server: Server) -> None:
    weights = server.folder / "runs" / "a" / "model" / "model.safetensors"
    kept = weights.read_bytes()
    shutil.copy(server.folder / "runs" / "a-target" / "model.safetensors", weights)

    def is_refused() -> bool:
        try:
            server.client().completions.create(model="a", prompt="The", max_tokens=1)
        except openai.PermissionDeniedError as error:
            return "other weights" in str(error)
        return False

    try:
        server.wait_for(is_refused)
    finally:
        weights.write_bytes(kept)
    server.wait_for(lambda: not is_refused())


def test_a_deleted_application_answers_what_it_has_begun(server: Server) -> None:
    """Last: the server is gone afterwards."""
    from soul.orchestration import serve

    body = {"model": "a", "prompt": "The", "max_tokens": 240, "temperature": 1, "stream": True, "stream_options": {"include_usage": True}}
    with requests.post(f"{server.url}/v1/completions", json=body, stream=True, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        stopping = threading.Thread(target=serve.stop)
        stopping.start()
        text = [line for line in lines if line]
        stopping.join()
    assert text[-1] == b"data: [DONE]" and b'"completion_tokens":' in text[-2]
