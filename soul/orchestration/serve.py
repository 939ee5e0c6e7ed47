"""A server on Ray Serve: started from the command line, or written down as a config file for a cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from soul.orchestration.capacity import capacity, decide, may_add_gpus
from soul.orchestration.cluster import cluster
from soul.orchestration.replica import Gateway, Generator
from soul.records import InputError
from soul.rundir import write_atomically
from soul.serving.gate import Catalogue, Hashes, check_folders, read_catalogue
from soul.serving.keys import read_key_hashes
from soul.serving.settings import Replicas, ServeConfig

APP: Final = "soul"
LOG: Final = logging.getLogger(__name__)
MAX_GATEWAY_REQUESTS: Final = 1000
QUIET: Final = LoggingConfig(log_level="WARNING", enable_access_log=False)  # the gateway writes a line about each request itself


def build_app(args: dict[str, Any]) -> serve.Application:
    """What a Serve config file names as `import_path`; `args` is a `ServeConfig`. API keys may be in SOUL_API_KEYS of the cluster's nodes.

    What is hosted stands in `args` or, if it is to change without a restart, in the user_config of both deployments.
    """
    hashes = read_key_hashes(os.environ, None)
    config = ServeConfig.model_validate({**args, "key_hashes": [*args.get("key_hashes", ()), *hashes]})
    config = config.decided(decide(config.replicas.wants))
    return application(config, read_catalogue(config.hosting, on_loopback=config.on_loopback, hashes=Hashes()))


def application(config: ServeConfig, catalogue: Catalogue) -> serve.Application:
    """Gateway and generators. Replicas load what the catalogue hosts, as much of it as they may hold, before they count as ready."""
    size, limits = config.replicas, config.limits
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": size.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "logging_config": QUIET,
    }
    scaling: dict[str, Any] = {"num_replicas": size.minimum}
    if size.maximum > size.minimum:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=size.minimum, max_replicas=size.maximum, target_ongoing_requests=size.target_requests
            )
        }
    generators: Any = serve.deployment(
        Generator,
        name="Generator",
        ray_actor_options={"num_cpus": size.num_cpus, "num_gpus": size.num_gpus},
        max_ongoing_requests=limits.max_requests,
        max_queued_requests=limits.max_requests,
        **common,
        **scaling,
    )
    gateway: Any = serve.deployment(
        serve.ingress()(Gateway),
        name="Gateway",
        num_replicas=size.gateways,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=MAX_GATEWAY_REQUESTS,
        **common,
    )
    told = config.model_dump(mode="json")
    app: serve.Application = gateway.bind(told, generators.bind(told, catalogue.specs()))
    return app


def start(config: ServeConfig, catalogue: Catalogue) -> None:
    """Serve on a connected Ray; returns once every replica is ready.

    Raises:
        InputError: the port is taken.
    """
    _check_port(config)
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=config.host, port=config.port),
        logging_config=QUIET,
    )
    serve.run(application(config, catalogue), name=APP, route_prefix="/")


def _check_port(config: ServeConfig) -> None:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise InputError(f"{config.host}:{config.port} cannot be listened on ({error.strerror}). Choose another --port.") from None


def run_server(config: ServeConfig, *, address: str | None, verbose: bool) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that have begun are answered first.

    Raises:
        InputError: a run is missing, nothing passes the gate, or the port is taken.
    """
    check_folders(config.hosting)
    catalogue = read_catalogue(config.hosting, on_loopback=config.on_loopback, hashes=Hashes())
    for line in describe(catalogue):
        print(line, flush=True)
    size = config.replicas
    with cluster(address, num_workers=1, device=size.wants, verbose=verbose) as device:
        config = config.decided(device)
        check_room(config.replicas, capacity())
        start(config, catalogue)
        print(f"serving on http://{config.host}:{config.port}/ (API under /v1); Ctrl-C stops it", flush=True)
        _wait_for_signal()
        print("draining: requests that have begun are answered", flush=True)
        stop()


def check_room(size: Replicas, most: Mapping[str, float]) -> None:
    """Raises:
    InputError: the cluster cannot have the GPUs of all replicas, which would wait for them for ever.
    """
    needed, has = size.minimum * (size.num_gpus or 0.0), most.get("GPU", 0.0)
    if needed > has and not may_add_gpus():
        raise InputError(
            f"--replicas {size.minimum} with {size.num_gpus:g} GPU(s) each need {needed:g} GPUs, the cluster has {has:g}. Start fewer, let "
            "them share (--gpus-per-replica 0.5), or choose --device cpu."
        )


def _wait_for_signal() -> None:
    """Until the first SIGTERM or SIGINT; a second one ends the process as it would any other."""
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    while not told.wait(timeout=0.5):  # without a timeout the main thread would not see the signal
        pass
    for number, handler in before.items():
        signal.signal(number, handler)


def describe(catalogue: Catalogue) -> list[str]:
    """One line per model: hosted, hosted without approval, or refused and why."""
    lines = []
    for model in catalogue.models.values():
        if model.spec is None:
            lines.append(f"  refused  {model.id}: {model.reason}")
        elif model.reason is not None:
            lines.append(f"  WARNING  {model.id} is served without approval: {model.reason}")
        else:
            lines.append(f"  hosted   {model.id} ({model.role})")
    return [*lines, *(f"  alias    {alias} -> {name}" for alias, name in catalogue.aliases.items())]


def write_serve_config(config: ServeConfig, path: Path) -> None:
    """A file for `serve deploy`. What is hosted stands in it once, as the deployments' user_config: changing it there restarts nothing."""
    hosting = config.hosting.model_dump(mode="json")
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "logging_config": {"log_level": QUIET.log_level, "enable_access_log": QUIET.enable_access_log},
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "soul.orchestration.serve:build_app",
                "args": config.model_dump(mode="json", exclude={"hosting", "watch"}),
                "deployments": [{"name": name, "user_config": hosting} for name in ("Gateway", "Generator")],
            }
        ],
    }
    write_atomically(path, yaml.safe_dump(document, sort_keys=False, width=140))


def stop() -> None:
    """Take the application down and Serve with it; Ray stays."""
    if APP in serve.status().applications:
        serve.delete(APP)
    serve.shutdown()
