"""What the gateway makes of replicas that die, are full or refuse: a handle that does these things on cue, no cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from soul.orchestration import replica, serve
from soul.orchestration.replica import ATTEMPTS, Replicas
from soul.orchestration.serve import application, build_app
from soul.records import InputError
from soul.serving.errors import Refusal, Refused
from soul.serving.gate import Catalogue
from soul.serving.keys import hash_key
from soul.serving.settings import ServeConfig
from soul.serving.work import Answer, ModelSpec, Piece, Prompt, Usage, Work

SPEC = ModelSpec("0" * 64, "nowhere")
WORK = Work((Prompt(text="The"),), 3)
FULL = BackPressureError(num_queued_requests=4, max_queued_requests=4)
NO = Refusal(400, "too long", "context_length_exceeded")
PIECES = (Piece(0, "a"), Piece(0, "b"), Usage(1, 2))


class Parts:
    """A streamed answer: pieces, and an exception where one stands among them."""

    def __init__(self, script: Sequence[object]) -> None:
        self._script, self.cancelled = script, False

    async def __aiter__(self) -> AsyncIterator[object]:
        for item in self._script:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Every call takes the next line of the script."""

    def __init__(self, *script: Any) -> None:
        self.script, self.calls, self.models = list(script), 0, set[str]()

    def options(self, *, multiplexed_model_id: str, stream: bool = False) -> Handle:
        self.models.add(multiplexed_model_id)
        return self

    def __getattr__(self, _: str) -> Handle:
        return self

    def remote(self, *_: object) -> Any:
        self.calls += 1
        line = self.script.pop(0)
        return line if isinstance(line, Parts) else self._later(line)

    async def _later(self, line: object) -> object:
        if isinstance(line, Exception):
            raise line
        return line


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(_: float) -> None: ...

    monkeypatch.setattr(replica.asyncio, "sleep", at_once)


def ask(*script: object) -> tuple[Answer | Refusal, Handle]:
    handle = Handle(*script)
    try:
        return asyncio.run(Replicas(handle).answer(SPEC, WORK)), handle  # type: ignore[arg-type]
    except Refused as error:
        return error.refusal, handle


def stream(*script: object) -> tuple[list[object], Refusal | None, Handle]:
    handle, told = Handle(*script), []

    async def read() -> None:
        async for part in Replicas(handle).stream(SPEC, WORK):  # type: ignore[arg-type]
            told.append(part)

    try:
        asyncio.run(read())
    except Refused as error:
        return told, error.refusal, handle
    return told, None, handle


def test_a_request_on_a_dead_replica_is_asked_of_another() -> None:
    answer = Answer((Piece(0, "x"),), Usage(1, 1))
    told, handle = ask(RayActorError(), RayActorError(), answer)
    assert told == answer and handle.calls == 3 and handle.models == {SPEC.sha256}


def test_it_is_not_asked_for_ever() -> None:
    told, handle = ask(*[RayActorError()] * (ATTEMPTS + 1))
    assert isinstance(told, Refusal) and told.status == 503 and told.retry_after_s
    assert handle.calls == ATTEMPTS


def test_full_replicas_are_429_and_nothing_is_repeated() -> None:
    told, handle = ask(FULL)
    assert isinstance(told, Refusal) and told.status == 429 and told.retry_after_s
    assert handle.calls == 1


def test_a_refusal_passes_through() -> None:
    assert ask(NO)[0] == NO
    assert stream(Parts([NO]))[1] == NO
    refusal = stream(Parts([FULL]))[1]
    assert refusal is not None and refusal.status == 429


def test_a_stream_begins_again_only_while_nothing_was_shown() -> None:
    first, second = Parts([RayActorError()]), Parts(PIECES)
    told, refusal, handle = stream(first, second)
    assert (told, refusal, handle.calls) == (list(PIECES), None, 2)
    assert first.cancelled and second.cancelled  # the replica hears that nobody listens any more
    told, refusal, handle = stream(Parts([PIECES[0], RayActorError()]), Parts(PIECES))
    assert told == [PIECES[0]] and handle.calls == 1
    assert refusal is not None and refusal.code == "replica_lost"


class Broadcast:
    def __init__(self, *told: object) -> None:
        self._told = told

    def broadcast(self, *_: object) -> Broadcast:
        return self

    async def results_async(self, **_: object) -> list[object]:
        if isinstance(self._told[0], DeploymentUnavailableError):
            raise self._told[0]
        return list(self._told)


def test_warming_reaches_every_replica_and_survives_lost_ones() -> None:
    asyncio.run(Replicas(Broadcast(None, RayActorError(), None)).warm(SPEC))  # type: ignore[arg-type]
    asyncio.run(Replicas(Broadcast(DeploymentUnavailableError("none"))).warm(SPEC))  # type: ignore[arg-type]
    with pytest.raises(Refused):
        asyncio.run(Replicas(Broadcast(None, NO)).warm(SPEC))  # type: ignore[arg-type]


def test_replicas_scale_between_their_bounds_and_drain() -> None:
    config = ServeConfig.model_validate(
        {"replicas": {"minimum": 2, "maximum": 5, "target_requests": 3, "drain_s": 12, "num_gpus": 0.5, "gateways": 2}}
    ).decided("gpu")
    app: Any = application(config, Catalogue())
    assert app._bound_deployment._deployment_config.num_replicas == 2
    generators = app._bound_deployment.init_args[1]._bound_deployment
    scaling = generators._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 3)
    assert generators._deployment_config.graceful_shutdown_timeout_s == 12
    assert generators.ray_actor_options["num_gpus"] == 0.5
    assert generators._deployment_config.max_ongoing_requests == config.limits.max_requests
    fixed: Any = application(ServeConfig().decided("gpu"), Catalogue())
    alone = fixed._bound_deployment.init_args[1]._bound_deployment
    assert alone._deployment_config.num_replicas == 1
    assert alone.ray_actor_options["num_gpus"] == 1  # nobody has said how many: a card of its own
    on_cpus: Any = application(ServeConfig().decided("cpu"), Catalogue())
    assert on_cpus._bound_deployment.init_args[1]._bound_deployment.ray_actor_options["num_gpus"] == 0
    for wrong in ({"device": "gpu", "num_gpus": 0}, {"device": "cpu", "num_gpus": 1}):
        with pytest.raises(ValueError, match=r"does not go with replicas\.device"):
            ServeConfig.model_validate({"replicas": wrong})


def test_replicas_without_a_gpu_to_come_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "may_add_gpus", lambda: False)
    two = ServeConfig.model_validate({"replicas": {"minimum": 2, "maximum": 2}})
    serve.check_room(two.decided("cpu").replicas, {"CPU": 2.0})
    serve.check_room(two.decided("gpu").replicas, {"GPU": 2.0})
    with pytest.raises(InputError, match=r"--replicas 2 with 1 GPU\(s\) each need 2 GPUs, the cluster has 1"):
        serve.check_room(two.decided("gpu").replicas, {"GPU": 1.0})
    monkeypatch.setattr(serve, "may_add_gpus", lambda: True)
    serve.check_room(two.decided("gpu").replicas, {"GPU": 1.0})  # waits for the autoscaler


def test_the_builder_takes_keys_from_the_nodes_environment_and_knows_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOUL_API_KEYS", raising=False)
    with pytest.raises(ValueError, match="no API key"):
        build_app({"host": "0.0.0.0"})
    with pytest.raises(ValueError, match="minimun"):
        build_app({"replicas": {"minimun": 2}})
    monkeypatch.setenv("SOUL_API_KEYS", "a-key-in-a-secret-0123")
    app: Any = build_app({"host": "0.0.0.0", "replicas": {"device": "cpu"}, "key_hashes": [hash_key("another-key-0123456789")]})
    told = app._bound_deployment.init_args[0]
    assert told["key_hashes"] == [hash_key("another-key-0123456789"), hash_key("a-key-in-a-secret-0123")]
    assert "a-key-in-a-secret" not in str(told)
