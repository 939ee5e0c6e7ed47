"""What a cluster can hold: what it has, and what its autoscaler could add. A group of spot machines that is asleep has no CPU yet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray._private.state
import yaml
from ray.autoscaler.v2.utils import is_autoscaler_v2

from soul.records import InputError

# CPU=64,GPU=8: for a cluster whose autoscaler does not say how far it goes (KubeRay's)
LIMITS = "SOUL_CLUSTER_LIMITS"
LAUNCHERS_FILE = Path("~/ray_bootstrap_config.yaml")  # `ray up` leaves it on the head
UNKNOWN = 1e6
AT_ONCE = 64


def capacity() -> dict[str, float]:
    """The most of each resource that the connected cluster can have at once, as far as it says; CPUs without end if it does not."""
    has: Mapping[str, float] = ray.cluster_resources()
    could = _told() or ({"CPU": UNKNOWN} if is_autoscaler_v2(fetch_from_server=True) else {})
    return {name: max(has.get(name, 0), could.get(name, 0)) for name in {*has, *could}}


def _told() -> Mapping[str, float]:
    """What the autoscaler could make of the cluster; empty if nobody says."""
    if given := os.environ.get(LIMITS):
        return limits(given)
    told: Mapping[str, float] | None = ray._private.state.state.get_max_resources_from_cluster_config()
    if told is None and (file := LAUNCHERS_FILE.expanduser()).is_file():
        return launched(yaml.safe_load(file.read_text(encoding="utf-8")))
    return told or {}


def limits(text: str) -> dict[str, float]:
    """CPU=64,GPU=8 as numbers.

    Raises:
        InputError: it is written otherwise.
    """
    try:
        return {name.strip(): float(amount) for name, amount in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise InputError(f"{LIMITS} must look like CPU=64,GPU=8, got {text!r}.") from error


def launched(config: Mapping[str, Any]) -> dict[str, float]:
    """All that the worker types of a cluster launcher's file come to; the limit on their sum is the autoscaler's to keep."""
    most: dict[str, float] = {}
    for name, node_type in config["available_node_types"].items():
        count = 1 if name == config.get("head_node_type") else min(node_type.get("max_workers", 0), config.get("max_workers", 0))
        for kind, amount in node_type.get("resources", {}).items():
            most[kind] = most.get(kind, 0) + count * amount
    return most


def gpus_per_task() -> int:
    """One where there are GPUs, or can be."""
    return 1 if capacity().get("GPU", 0) else 0


def room_for(num_workers: int) -> int:
    """How many jobs of so many workers the cluster can hold at once. CPUs of a lone machine are logical: the real ones count."""
    most = capacity()
    if gpus := int(most.get("GPU", 0)):
        return max(1, gpus // num_workers)
    cpus = int(most.get("CPU", 1))
    grows = cpus > int(ray.cluster_resources().get("CPU", 0))
    alone = not grows and len([node for node in ray.nodes() if node["Alive"]]) == 1
    return max(1, min(AT_ONCE, (min(cpus, os.cpu_count() or 1) if alone else cpus) // num_workers))
