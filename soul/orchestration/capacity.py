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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from soul.device import Device, Wanted
from soul.records import InputError

# CPU=64,GPU=8: for a cluster whose autoscaler does not say how far it goes (KubeRay's)
LIMITS = "SOUL_CLUSTER_LIMITS"
LAUNCHERS_FILE = Path("~/ray_bootstrap_config.yaml")  # `ray up` leaves it on the head
UNKNOWN = 1e6
KIND = "accelerator_type:"  # a resource of nodes with GPUs, named after them
HEAD = "node:__internal_head__"  # a resource of the head alone
HEAD_SECONDS = 60.0  # a worker has to start there
AT_ONCE = 64


def capacity() -> dict[str, float]:
    """The most of each resource that the connected cluster can have at once, as far as it says; CPUs without end if it does not."""
    has: Mapping[str, float] = ray.cluster_resources()
    could = _told() or ({"CPU": UNKNOWN} if is_autoscaler_v2(fetch_from_server=True) else {})
    return {name: max(has.get(name, 0), could.get(name, 0)) for name in {*has, *could}}


def _told() -> Mapping[str, float]:
    """What the autoscaler could make of the cluster; empty if nobody says. A driver on another node than the head asks the head."""
    told: Mapping[str, float] | None = told_here() or ray._private.state.state.get_max_resources_from_cluster_config()
    return told or _told_by_head()


def told_here() -> dict[str, float]:
    """What this machine has of the autoscaler's limits: the variable, or the launcher's file."""
    if given := os.environ.get(LIMITS):
        return limits(given)
    file = LAUNCHERS_FILE.expanduser()
    return launched(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _told_by_head() -> dict[str, float]:
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node.get("Resources", {})]
    if not heads or heads[0] == ray.get_runtime_context().get_node_id():
        return {}
    there = NodeAffinitySchedulingStrategy(heads[0], soft=False)
    ask: Any = ray.remote(told_here)
    found: dict[str, float] = ray.get(ask.options(num_cpus=0, scheduling_strategy=there).remote(), timeout=HEAD_SECONDS)
    return found


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


class UndecidedDevice(InputError):
    """Nobody knows whether the cluster can have GPUs, so a run has to be told."""


def decide(wanted: Wanted) -> Device:
    """What a run on the connected cluster computes on. Asked once, by the driver; everything else is told.

    Raises:
        InputError: GPUs are wanted and there can be none, or nobody can know whether there can.
    """
    if wanted == "cpu":
        return "cpu"
    if capacity().get("GPU", 0):
        return "gpu"
    if wanted == "gpu":
        if may_add_gpus():
            return "gpu"
        raise InputError("--device gpu: the cluster has no GPU, and nothing that could add one. Join another one, or choose --device cpu.")
    if may_add_gpus():
        raise UndecidedDevice(
            "the cluster has no GPU now, and its autoscaler does not say here whether it can add some: --device auto cannot decide. Say "
            f"--device gpu (waits for them) or --device cpu, or set {LIMITS}, e.g. to CPU=64,GPU=8."
        )
    return "cpu"


def may_add_gpus() -> bool:
    """Whether an autoscaler is at work that says nowhere how far it goes."""
    return not _told() and is_autoscaler_v2(fetch_from_server=True)


def card_kinds() -> list[str]:
    """The kinds of GPU that are up, in Ray's words; empty where it does not know them."""
    resources = [name for node in ray.nodes() if node["Alive"] for name in node.get("Resources", {})]
    return sorted({name.removeprefix(KIND) for name in resources if name.startswith(KIND)})


def room_for(num_workers: int, device: Device) -> int:
    """How many jobs of so many workers the cluster can hold at once. CPUs of a lone machine are logical: the real ones count."""
    most = capacity()
    if device == "gpu":
        return max(1, int(most.get("GPU", 0)) // num_workers)
    cpus = int(most.get("CPU", 1))
    grows = cpus > int(ray.cluster_resources().get("CPU", 0))
    alone = not grows and len([node for node in ray.nodes() if node["Alive"]]) == 1
    return max(1, min(AT_ONCE, (min(cpus, os.cpu_count() or 1) if alone else cpus) // num_workers))
