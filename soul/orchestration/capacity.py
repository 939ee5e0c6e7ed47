"""What a cluster can hold: what it has, and what its autoscaler could add. A group of spot machines that is asleep has no CPU yet."""

from __future__ import annotations

import os
from collections.abc import Mapping

import ray
import ray._private.state


def capacity() -> dict[str, float]:
    """The most of each resource that the connected cluster can have at once, as far as it says."""
    has: Mapping[str, float] = ray.cluster_resources()
    could: Mapping[str, float] = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {name: max(has.get(name, 0), could.get(name, 0)) for name in {*has, *could}}


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
    return max(1, (min(cpus, os.cpu_count() or 1) if alone else cpus) // num_workers)
