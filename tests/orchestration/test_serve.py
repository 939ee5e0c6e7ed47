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
import ray
import requests
import yaml
from openai import OpenAI

from soul.serving.keys import hash_key
from soul.serving.settings import ServeConfig, located
from soul.settings import load_settings
from tests.serving_runs import write_run

pytestmark = pytest.mark.ray
KEY = "a-key-of-these-tests"  # sent from the start, asked for once the config file is deployed
HEADERS = {"Authorization": f"Bearer {KEY}"}
LENGTH = 9000  # positions: an answer of so many tokens takes much longer than anything is waited for


@dataclass
class Server:
    url: str
    file: Path
    folder: Path

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

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
    config = located(load_settings(ServeConfig, file, {"port": port, "watch": str(file)}), str(file)).decided("gpu")
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


def test_a_client_that_leaves_before_its_answer_frees_the_replica_too(server: Server) -> None:
    from ray import serve

    replicas = serve.get_deployment_handle("Generator", "soul")
    body = {"model": "a", "prompt": "The", "max_tokens": LENGTH - 10, "temperature": 0}
    with pytest.raises(requests.Timeout):
        requests.post(f"{server.url}/v1/completions", json=body, timeout=0.4)
    server.wait_for(lambda: replicas.num_rows.remote().result(timeout_s=10) == 0, timeout_s=5)


def test_logs_have_request_ids_and_never_what_was_asked(server: Server) -> None:
    """In every file that Ray and Serve write, for answers and for refusals; the request ids show that the files are the right ones."""
    canary = "canary-in-the-prompt"
    talk = [{"role": "user", "content": canary}]
    asked: list[tuple[str, Any, int]] = [
        ("completions", {"prompt": canary, "max_tokens": 2}, 200),
        ("completions", {"prompt": canary, "max_tokens": -2}, 400),
        ("completions", {"prompt": canary * 9000, "max_tokens": 2}, 400),
        ("chat/completions", {"messages": talk, "max_tokens": 2, "stream": True}, 200),
        ("chat/completions", {"messages": [*talk, {"role": "assistant", "content": canary}]}, 400),
        ("score", {"messages": talk, "answer": canary}, 200),
    ]
    for number, (route, body, status) in enumerate(asked):
        headers = {"x-request-id": f"request-{number}"}
        reply = requests.post(f"{server.url}/v1/{route}", json={"model": "a", **body}, headers=headers, timeout=30)
        assert reply.status_code == status, reply.text
        assert reply.headers["x-request-id"] == f"request-{number}"
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())  # session_latest may be that of another test's Ray

    def written() -> str:
        return "".join(path.read_text(errors="replace") for path in logs.rglob("*") if path.is_file())

    for number, (route, _, status) in enumerate(asked):
        server.wait_for(lambda: f"request-{number} /v1/{route} {status}" in written())  # noqa: B023 - called at once
    assert canary not in written()


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


def pids() -> dict[str, set[int]]:
    from ray.serve.context import _get_global_client

    deployments = _get_global_client().get_serve_details()["applications"]["soul"]["deployments"]
    return {name: {replica["pid"] for replica in told["replicas"]} for name, told in deployments.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)  # three processes that import torch, on a machine that may be busy
def test_a_cluster_takes_the_config_file_and_its_changes_in_place(server: Server) -> None:
    """What `serve deploy` does with the file that --build writes; a later change of what is hosted restarts no replica."""
    from ray import serve as ray_serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from soul.orchestration import serve

    hosting: dict[str, Any] = {"runs": {"a": str(server.folder / "runs" / "a")}, "aliases": {"production": "a"}}
    replicas = {"minimum": 2, "maximum": 2, "num_cpus": 0.2}
    port = int(server.url.rpartition(":")[2])
    config = ServeConfig.model_validate({"hosting": hosting, "port": port, "replicas": replicas, "key_hashes": [hash_key(KEY)]})
    serve.write_serve_config(config, server.folder / "built.yaml")
    document = yaml.safe_load((server.folder / "built.yaml").read_text())

    def deploy() -> None:
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(document))

    def models() -> list[str]:
        reply = requests.get(f"{server.url}/v1/models", headers=HEADERS, timeout=30)
        return [model["id"] for model in reply.json()["data"]]

    def num_models() -> list[int]:
        return ray_serve.get_deployment_handle("Generator", "soul").broadcast("num_models").results(timeout_s=30)

    def is_settled() -> bool:
        return ray_serve.status().applications["soul"].status == "RUNNING" and sorted(map(len, pids().values())) == [1, 2]

    deploy()
    # the only gateway is replaced: requests wait for the new one
    server.wait_for(lambda: requests.get(f"{server.url}/v1/models", timeout=120).status_code == 401, timeout_s=120)
    server.wait_for(is_settled, timeout_s=120)
    assert models() == ["a", "a.target", "a.retrained", "production"]
    assert num_models() == [3, 3]  # on both, before anybody has asked
    before = pids()
    hosting["runs"]["b"] = str(server.folder / "runs" / "b")
    for deployment in document["applications"][0]["deployments"]:
        deployment["user_config"] = {**hosting, "aliases": {"production": "b"}, "policy": {"references": "never"}}
    deploy()
    server.wait_for(lambda: models() == ["a", "b", "production"], timeout_s=60)
    assert server.client().completions.create(model="production", prompt="The", max_tokens=1).model == "b"
    assert num_models() == [4, 4]
    assert pids() == before


def test_a_deleted_application_answers_what_it_has_begun(server: Server) -> None:
    """Last of its kind: the server is gone afterwards."""
    from soul.orchestration import serve

    body = {"model": "a", "prompt": "The", "max_tokens": 240, "temperature": 1, "stream": True, "stream_options": {"include_usage": True}}
    with requests.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, stream=True, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        stopping = threading.Thread(target=serve.stop)
        stopping.start()
        text = [line for line in lines if line]
        stopping.join()
    assert text[-1] == b"data: [DONE]" and b'"completion_tokens":' in text[-2]
