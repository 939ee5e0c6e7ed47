"""What the Kubernetes manifests say a cluster can grow to is what their groups add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from soul.orchestration.capacity import LIMITS, limits

KUBERAY = Path(__file__).resolve().parents[2] / "cluster" / "kuberay"


def cluster_spec(name: str) -> dict[str, Any]:
    for document in yaml.safe_load_all((KUBERAY / name).read_text()):
        if document["kind"] in ("RayCluster", "RayJob"):
            spec: dict[str, Any] = document["spec"]
            return spec.get("rayClusterSpec", spec)
    raise AssertionError(f"{name} has no cluster")


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob-tofu.yaml", "rayjob-grid.yaml"])
def test_the_limits_are_the_sum_of_the_groups(name: str) -> None:
    spec = cluster_spec(name)
    head = spec["headGroupSpec"]
    total = {"CPU": float(head["rayStartParams"]["num-cpus"]), "GPU": 0.0}
    for group in spec["workerGroupSpecs"]:
        wanted = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        total["CPU"] += group["maxReplicas"] * float(wanted["cpu"])
        total["GPU"] += group["maxReplicas"] * float(wanted.get("nvidia.com/gpu", 0))
    [told] = [entry["value"] for entry in head["template"]["spec"]["containers"][0]["env"] if entry["name"] == LIMITS]
    assert limits(told) == total
