"""Files of Ray's cluster launcher (`ray up`): Ray's own validator, then what it lets pass and costs money, time or safety."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import jsonschema
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.checks.common import ROOT, image_complaints, secret_complaints
from cluster.checks.machines import is_spot, machine_complaints, num_gpus

_STARTS_RAY: Final = re.compile(r"\bray start\b")
_PORT_FLAG: Final = re.compile(r"--([a-z-]*port)[= ](\S+)")
_LOOPBACK: Final = ("127.0.0.1", "localhost")


def launcher_complaints(document: Mapping[str, Any]) -> list[str]:
    found = list(_rays_own(document))
    if found:  # the rest relies on the shape that Ray checks
        return found
    types: dict[str, Any] = document["available_node_types"]
    provider = str(document["provider"]["type"])
    for name, kind in types.items():
        where = f"available_node_types.{name}"
        found += _size_complaints(where, kind, is_head=name == document["head_node_type"])
        found += machine_complaints(f"{where}.node_config", kind["node_config"], provider=provider)
        found += _gpu_complaints(where, kind, provider=provider)
    found += _worker_complaints(document, provider)
    found += _image_complaints(document)
    found += _command_complaints(document)
    found += _reach_complaints(document)
    found += [f"file_mounts.{remote}: {local} does not exist" for remote, local in _missing_mounts(document)]
    found += secret_complaints(document)
    return found


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """Ray's launcher talks while it validates."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _rays_own(document: Mapping[str, Any]) -> Iterator[str]:
    for key in ("provider", "available_node_types", "head_node_type"):  # Ray would fill in its defaults, nightly wheels among them
        if key not in document:
            yield f"{key}: missing"
            return
    mounts = document.get("file_mounts", {})
    if not isinstance(mounts, Mapping) or not all(isinstance(local, str) for local in mounts.values()):
        yield "file_mounts: expected remote path: local path"
        return
    try:
        with _quiet_ray():
            validate_config(prepare_config({**document, "file_mounts": {}}))  # it warns of every mount that is a file
    except jsonschema.ValidationError as error:
        yield f"{error.json_path.removeprefix('$.')}: {error.message}"
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        yield f"Ray's launcher: {error}"


def _size_complaints(where: str, kind: Mapping[str, Any], *, is_head: bool) -> Iterator[str]:
    least, most = kind.get("min_workers", 0), kind.get("max_workers")
    if is_head:
        if most:
            yield f"{where}.max_workers: {most} more machines of the head's type would start. Leave it out"
        return
    if most is None:
        yield f"{where}.max_workers: missing: without it the type may grow to the whole cluster's max_workers"
    elif least > most:
        yield f"{where}: min_workers {least} is more than max_workers {most}"
    if not kind["resources"]:
        yield f"{where}.resources: empty: the autoscaler would have to guess what a machine brings. Write CPU and, if any, GPU"


def _gpu_complaints(where: str, kind: Mapping[str, Any], *, provider: str) -> Iterator[str]:
    asked, has = kind["resources"].get("GPU", 0), num_gpus(kind["node_config"], provider=provider)
    if has is not None and bool(asked) != bool(has):
        machine = kind["node_config"].get("InstanceType") or kind["node_config"].get("machineType")
        yield f"{where}.resources: GPU is {asked}, but a {machine} has {'GPUs' if has else 'none'}"


def _worker_complaints(document: Mapping[str, Any], provider: str) -> Iterator[str]:
    workers = {name: kind for name, kind in document["available_node_types"].items() if name != document["head_node_type"]}
    if not any(kind["resources"].get("GPU") for kind in workers.values()):
        yield "available_node_types: no worker type with GPUs: training would have nowhere to run"
    if not any(kind["resources"].get("CPU") and not kind["resources"].get("GPU") for kind in workers.values()):
        yield "available_node_types: no worker type without GPUs: data and evaluation would hold GPU machines"
    for name, kind in workers.items():
        if not is_spot(kind["node_config"], provider=provider):
            continue
        same = [other for other in workers.values() if other["resources"] == kind["resources"]]
        fallback = [other for other in same if not is_spot(other["node_config"], provider=provider)]
        if not fallback:
            yield f"available_node_types.{name}: spot machines without a fallback. Add an on-demand type with the same resources"
        elif all(other.get("priority", 0) >= kind.get("priority", 0) for other in fallback):
            yield f"available_node_types.{name}: spot is not tried first. Give it a higher priority than the on-demand type"


def _image_complaints(document: Mapping[str, Any]) -> Iterator[str]:
    docker = document.get("docker") or {}
    images = {f"docker.{key}": docker[key] for key in ("image", "head_image", "worker_image") if docker.get(key)}
    if not images:
        yield "docker.image: missing: without a container the machine image's own Python would be used"
    for name, kind in document["available_node_types"].items():
        own = kind.get("docker") or {}
        images |= {f"available_node_types.{name}.docker.{key}": own[key] for key in ("worker_image", "head_image") if own.get(key)}
    for where, image in images.items():
        yield from image_complaints(where, image)


def _command_complaints(document: Mapping[str, Any]) -> Iterator[str]:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = document.get(key)
        if not commands:  # Ray's defaults open the dashboard to everybody
            yield f"{key}: missing: Ray's own would open the dashboard and leave authentication off"
            continue
        starts = [command for command in commands if _STARTS_RAY.search(command)]
        if not starts:
            yield f"{key}: no `ray start`"
        for command in starts:
            yield from _start_complaints(key, command)
    node_types = document["available_node_types"].values()
    lists = [document.get("setup_commands", []), document.get("head_setup_commands", []), document.get("worker_setup_commands", [])]
    for command in (line for lines in [*lists, *(kind.get("worker_setup_commands", []) for kind in node_types)] for line in lines):
        if "pip install" in command and "constraints.txt" not in command:
            yield "setup_commands: `pip install` without -c constraints.txt: nodes would get other versions than the tests ran with"


def _start_complaints(key: str, command: str) -> Iterator[str]:
    if "RAY_AUTH_MODE=token" not in command:
        yield f"{key}: RAY_AUTH_MODE=token is not set: whoever reaches a port of Ray could run code"
    for name, port in _PORT_FLAG.findall(command):
        if not port.isdecimal() or not 1 <= int(port) <= 65_535:
            yield f"{key}: --{name} {port} is no port"
    if "--head" not in shlex.split(command, posix=True):
        return
    host = re.search(r"--dashboard-host[= ](\S+)", command)
    if host is not None and host[1] not in _LOOPBACK:
        yield f"{key}: the dashboard listens on {host[1]}. Keep it on 127.0.0.1 and open a tunnel with `ray dashboard`"
    if "--autoscaling-config" not in command:
        yield f"{key}: --autoscaling-config is missing: no worker would ever start"


def _reach_complaints(document: Mapping[str, Any]) -> Iterator[str]:
    group = document["provider"].get("security_group") or {}
    for index, rule in enumerate(group.get("IpPermissions", [])):
        ranges = [entry.get("CidrIp") or entry.get("CidrIpv6") for entry in [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]]
        if {"0.0.0.0/0", "::/0"} & set(ranges):
            yield f"provider.security_group.IpPermissions[{index}]: open to the whole internet. Name the addresses that may come in"


def _missing_mounts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Paths are relative to where `ray up` is typed: the project's root. Those below ~ are the user's."""
    mounts = (document.get("file_mounts") or {}).items()
    return [(remote, local) for remote, local in mounts if not local.startswith("~") and not (ROOT / Path(local)).exists()]
