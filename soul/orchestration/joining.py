"""Before a run joins a cluster: is it there, does it take our token, does it run the same Ray, Python and soul.

Ray itself waits 20 s for a wrong token and then says "Failed to connect", a minute for a wrong port, and ends the process without a token.
Everything here answers within seconds, in one line that says what to do.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray._raylet
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.services import canonicalize_bootstrap_address, parse_address
from ray.exceptions import AuthenticationError, GetTimeoutError, RpcError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from soul.records import InputError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0
PROBE_SECONDS = 60.0  # a worker has to start on each node, and a node may be booting
# What opens an HTTP/2 connection, which gRPC is; a server's first frame is its settings, whose type stands in the fourth byte.
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS_FRAME = 4

TOKEN_HELP = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token (on its head: ray get-auth-token)."
_raylet: Any = ray._raylet  # compiled: type checkers see nothing in it
_log = logging.getLogger(__name__)


def is_job_server(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def resolved(address: str) -> str:
    """`auto` or host:port as host:port.

    Raises:
        InputError: no cluster is found, or `address` is of another kind.
    """
    if is_job_server(address):
        raise InputError(f"{address} is a job server, which runs are submitted to: ray job submit --address {address} ... -- python ...")
    if "://" in address:
        raise InputError(
            f"--address {address}: a run's driver has to be on the cluster, beside its files. Expected auto or HOST:PORT there; "
            "from elsewhere use ray job submit --address http://HOST:8265."
        )
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if named not in ("", "auto"):
        if named != address:
            return resolved(named)
        if parse_address(named) is None:
            raise InputError(f"--address {named} has no port. Expected auto or HOST:PORT; ray start prints it (6379 unless chosen).")
    try:
        found = canonicalize_bootstrap_address(address)
    except ConnectionError:
        found = None
    if found is None:
        raise InputError("--address auto: no Ray runs on this machine. Start one (ray start --head), or name it: --address HOST:PORT.")
    return str(found)


def check_cluster(address: str) -> str:
    """The resolved address of a cluster that can be joined.

    Raises:
        InputError: it cannot be reached, refuses our token, or runs another Ray or Python.
    """
    place = resolved(address)
    check_reachable(place)
    check_token()
    check_versions(_versions_at(place), this_environment(), where=f"the Ray cluster at {place}")
    return place


def check_reachable(place: str) -> None:
    """Raises:
    InputError: nothing answers there, or not what a cluster's own port answers.
    """
    host, port = place.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(HTTP2_HELLO)
            answer = connection.recv(4)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or type(error).__name__
        raise InputError(
            f"the Ray cluster at {place} cannot be reached ({reason}). Check host and port (ray start prints them, 6379 unless chosen), "
            "that the head is up, and that no firewall is between."
        ) from error
    if len(answer) < 4 or answer[3] != SETTINGS_FRAME:
        raise InputError(
            f"what answers at {place} is no Ray cluster's own port. Expected the one that ray start prints (6379 unless chosen), "
            "not the dashboard's."
        )


def check_token() -> None:
    """Raises:
    InputError: tokens are switched on here and there is none.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and not _raylet.AuthenticationTokenLoader.instance().has_token(
        ignore_auth_mode=True
    ):
        raise InputError(f"authentication: this environment has no token. {TOKEN_HELP}")


def this_environment() -> dict[str, str]:
    return {"Ray": ray.__version__, "Python": platform.python_version()}


def _versions_at(place: str) -> dict[str, str]:
    """What the cluster was started with: the first question that needs the token."""
    try:
        told = _raylet.GcsClient(address=place).internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster", timeout=ANSWER_SECONDS)
    except AuthenticationError as error:
        raise InputError(f"authentication: the Ray cluster at {place} refuses this environment's token. {TOKEN_HELP}") from error
    except RpcError as error:
        raise InputError(f"the Ray cluster at {place} does not answer ({error.rpc_code}). Check the port, and the head's logs.") from error
    if told is None:  # a head that is just starting
        return {}
    versions = json.loads(told)
    return {"Ray": versions["ray_version"], "Python": versions["python_version"]}


def check_versions(theirs: Mapping[str, str], ours: Mapping[str, str], *, where: str) -> None:
    """What `theirs` does not say is not compared.

    Raises:
        InputError: a version differs.
    """
    other = [name for name, version in theirs.items() if _comparable(name, version) != _comparable(name, ours[name])]
    if other:
        have = " and ".join(f"{name} {theirs[name]}" for name in other)
        raise InputError(
            f"version mismatch: {where} has {have}, this environment {' and '.join(f'{name} {ours[name]}' for name in other)}. "
            "Use an environment or an image with the same versions on both sides."
        )


def _comparable(name: str, version: str) -> str:
    """Ray compares Python down to the patch, unless it is told not to."""
    minor = name == "Python" and os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL") == "minor"
    return ".".join(version.split(".")[:2]) if minor else version


def make_probe() -> Callable[[], str]:
    """A function that says which soul its process would import. Local to this one, so that it travels whole to nodes that have none."""

    def probe() -> str:
        import hashlib
        import importlib.util
        from importlib import metadata
        from pathlib import Path

        spec = importlib.util.find_spec("soul")
        if spec is None or not spec.submodule_search_locations:
            return "none"
        folder = Path(next(iter(spec.submodule_search_locations)))
        sources = hashlib.sha256()
        for path in sorted(folder.rglob("*.py")):
            sources.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
        try:
            version = metadata.version("soul-unlearning")
        except metadata.PackageNotFoundError:  # a working directory, not an installation
            version = "from its sources"
        return f"{version}, sources {sources.hexdigest()[:12]}"

    return probe


def check_package(builds: Mapping[str, str], ours: str) -> None:
    """`builds`: what each node's probe has answered. Only sources are compared: a working directory has no version.

    Raises:
        InputError: a node would import another soul than this one, or none.
    """
    other = {node: build for node, build in builds.items() if _sources(build) != _sources(ours)}
    if other:
        node, build = next(iter(other.items()))
        more = f" (and {len(other) - 1} more nodes)" if len(other) > 1 else ""
        raise InputError(
            f"version mismatch: soul on {node}{more} is {build}; here it is {ours}. Submit the run with ray job submit --working-dir ., "
            "which brings this one to every node, or install the same on all."
        )


def _sources(build: str) -> str:
    return build.rpartition(" ")[2]


def builds(nodes: Iterable[Mapping[str, Any]], *, timeout_s: float = PROBE_SECONDS) -> dict[str, str]:
    """What `make_probe` says on every living node, all asked at once. A node that does not answer is left out, with a warning."""
    probe = ray.remote(num_cpus=0, max_retries=0)(make_probe())
    living = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in nodes if node["Alive"]}
    places = {node_id: NodeAffinitySchedulingStrategy(node_id, soft=False) for node_id in living}
    asked = {probe.options(scheduling_strategy=places[node_id]).remote(): name for node_id, name in living.items()}
    deadline, answers = time.monotonic() + timeout_s, {}
    for reference, name in asked.items():
        try:
            answers[name] = str(ray.get(reference, timeout=max(0.1, deadline - time.monotonic())))
        except (GetTimeoutError, ray.exceptions.RayError) as error:  # it may have been lost since
            _log.warning("node %s did not say which soul it has (%s)", name, type(error).__name__)
    return answers


@dataclass(frozen=True)
class JobServer:
    """What a job server says of itself and of its living nodes."""

    versions: Mapping[str, str]
    nodes: int
    resources: Mapping[str, float]


def check_job_server(url: str) -> JobServer:
    """What `ray job submit --address URL` would speak with.

    Raises:
        InputError: it cannot be reached, refuses our token, is something else, or runs another Ray.
    """
    check_token()
    versions = {"Ray": str(_asked(url, "/api/version").get("ray_version", "unknown"))}
    check_versions(versions, this_environment(), where=f"the job server at {url}")
    nodes = [node["raylet"] for node in _asked(url, "/nodes?view=summary")["data"]["summary"]]
    totals = [node.get("resourcesTotal", {}) for node in nodes if node.get("state") == "ALIVE"]
    return JobServer(versions, len(totals), {kind: sum(total.get(kind, 0.0) for total in totals) for kind in ("CPU", "GPU")})


def _asked(url: str, path: str) -> dict[str, Any]:
    request = urllib.request.Request(url.rstrip("/") + path, headers=get_auth_headers_if_auth_enabled({}))
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            told: dict[str, Any] = json.load(answer)
            return told
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            fault = "wants a token" if error.code == 401 else "refuses this environment's token"
            raise InputError(f"authentication: the job server at {url} {fault}. {TOKEN_HELP}") from error
        raise InputError(
            f"{url} is no job server of Ray (HTTP {error.code}). Expected the dashboard's address, port 8265 unless chosen."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise InputError(
            f"the job server at {url} cannot be reached ({reason}). It listens on the head's loopback: open a tunnel with ray dashboard or "
            "kubectl port-forward, and use http://127.0.0.1:8265."
        ) from error
