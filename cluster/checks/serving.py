"""Serve config files (`serve deploy`, `serveConfigV2`). Ray takes misspelt keys and min_replicas above max_replicas; we do not."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from cluster.checks.common import ROOT, Count, Port, Strict, model_complaints, secret_complaints

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class _Autoscaling(Strict):
    min_replicas: Count = 1
    max_replicas: Annotated[int, Field(ge=1, strict=True)] = 1
    initial_replicas: Count | None = None
    target_ongoing_requests: Positive = 2.0
    upscale_delay_s: NotNegative = 30.0
    downscale_delay_s: NotNegative = 600.0
    metrics_interval_s: Positive = 10.0
    look_back_period_s: Positive = 30.0

    @model_validator(mode="after")
    def _ordered(self) -> _Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError("initial_replicas is not between min_replicas and max_replicas")
        return self


class _ActorOptions(Strict):
    num_cpus: NotNegative | None = None
    num_gpus: NotNegative | None = None
    memory: NotNegative | None = None
    resources: dict[str, float] | None = None
    runtime_env: dict[str, Any] | None = None


class _Deployment(Strict):
    name: str
    num_replicas: Annotated[int, Field(ge=0, strict=True)] | Literal["auto"] | None = None
    autoscaling_config: _Autoscaling | None = None
    max_ongoing_requests: Annotated[int, Field(ge=1)] | None = None
    max_queued_requests: Annotated[int, Field(ge=-1)] | None = None
    user_config: dict[str, Any] | None = None
    graceful_shutdown_timeout_s: NotNegative | None = None
    graceful_shutdown_wait_loop_s: NotNegative | None = None
    health_check_period_s: Positive | None = None
    health_check_timeout_s: Positive | None = None
    ray_actor_options: _ActorOptions | None = None

    @model_validator(mode="after")
    def _one_size(self) -> _Deployment:
        if isinstance(self.num_replicas, int) and self.autoscaling_config is not None:
            raise ValueError("num_replicas and autoscaling_config exclude each other")
        return self


class _Http(Strict):
    host: str = "127.0.0.1"
    port: Port = 8000
    root_path: str = ""
    request_timeout_s: Positive | None = None
    keep_alive_timeout_s: Count = 5


class _Logging(Strict):
    encoding: Literal["TEXT", "JSON"] = "TEXT"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    logs_dir: str | None = None
    enable_access_log: bool = True


class _Application(Strict):
    name: str
    route_prefix: Annotated[str, Field(pattern=r"^/")] | None = "/"
    import_path: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    args: dict[str, Any] = Field(default_factory=dict)
    deployments: list[_Deployment] = Field(default_factory=list)


class ServeFile(Strict):
    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"
    http_options: _Http = Field(default_factory=_Http)
    logging_config: _Logging | None = None
    applications: list[_Application] = Field(min_length=1)

    @model_validator(mode="after")
    def _apart(self) -> ServeFile:
        for what in ("name", "route_prefix"):
            values = [getattr(app, what) for app in self.applications]
            if len(set(values)) < len(values):
                raise ValueError(f"two applications with the same {what}")
        return self


def serve_complaints(
    document: Any, *, where: str = "", keys_on_nodes: bool = False, capacity: Mapping[str, float] | None = None
) -> Iterator[str]:
    """`keys_on_nodes`: SOUL_API_KEYS is in the cluster's environment. `capacity`: what the workers can grow to, by resource."""
    try:
        file = ServeFile.model_validate(document)
    except ValidationError as error:
        yield from model_complaints(error, where)
        return
    yield from secret_complaints(document, where)
    for index, app in enumerate(file.applications):
        path = f"{where}.applications[{index}]".lstrip(".")
        missing = import_complaint(app.import_path)
        if missing is not None:
            yield f"{path}.import_path: {missing}"
        elif app.import_path == "soul.orchestration.serve:build_app":
            yield from _own_complaints(path, app, file.http_options, keys_on_nodes=keys_on_nodes, capacity=capacity)


def _own_complaints(
    where: str, app: _Application, http: _Http, *, keys_on_nodes: bool, capacity: Mapping[str, float] | None
) -> Iterator[str]:
    """Settings of our own server. What is hosted may stand in `args`, or as the user_config of both deployments."""
    from soul.serving.settings import ServeConfig

    told = {deployment.name: deployment.user_config for deployment in app.deployments if deployment.user_config is not None}
    if told and (set(told) != {"Gateway", "Generator"} or told["Gateway"] != told["Generator"]):
        yield f"{where}.deployments: Gateway and Generator have to be told the same user_config"
        return
    stand_in = {"key_hashes": ["0" * 64]} if keys_on_nodes and not app.args.get("key_hashes") else {}
    try:
        config = ServeConfig.model_validate({**app.args, **({"hosting": told["Gateway"]} if told else {}), **stand_in})
    except ValidationError as error:
        yield from model_complaints(error, f"{where}.args")
        return
    if (config.host, config.port) != (http.host, http.port):
        yield f"{where}.args: host and port differ from http_options: the gateway would judge by the wrong address whether keys are needed"
    if not config.hosting.runs:
        yield f"{where}: no runs are hosted: nothing would be served"
    unknown = sorted(set(config.hosting.aliases.values()) - set(config.hosting.runs))
    if unknown and config.hosting.runs:
        yield f"{where}: alias of {', '.join(unknown)}, which is not among the runs"
    likely: Literal["cpu", "gpu"] = "gpu" if capacity is None or capacity.get("GPU") else "cpu"
    size = config.replicas.decided(likely if config.replicas.wants == "auto" else config.replicas.wants)
    for name, one in (("CPU", size.num_cpus), ("GPU", size.num_gpus or 0.0)):
        room = math.inf if capacity is None else capacity.get(name, 0.0)
        if one * size.maximum > room:
            yield f"{where}.args.replicas: {size.maximum} replicas need {one * size.maximum:g} {name}, the workers can grow to {room:g}"


def import_complaint(import_path: str) -> str | None:
    """Why a module of this project does not have the name; None where it has, or where it is another package's."""
    module, _, name = import_path.partition(":")
    if module.split(".")[0] not in ("soul", "pipelines"):
        return f"{module} is not of this project"
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        return f"there is no module {module}"
    names = {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return None if name in names else f"{module} has no {name}"
