"""What Ray's own autoscaler (v2) makes of these files: GPU work starts spot machines, and on-demand ones once spot could not be had.

The scheduler is a pure function: nothing is started.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
LAUNCHER = ("aws.yaml", "gcp.yaml")
KUBERAY = {"kuberay/raycluster.yaml": (), "kuberay/rayjob-tofu.yaml": ("rayClusterSpec",), "kuberay/rayservice.yaml": ("rayClusterConfig",)}
SPOT = {**dict.fromkeys(LAUNCHER, "gpu_spot"), **dict.fromkeys(KUBERAY, "gpu-spot")}
ON_DEMAND = {**dict.fromkeys(LAUNCHER, "gpu_on_demand"), **dict.fromkeys(KUBERAY, "gpu-on-demand")}
FILES = [*LAUNCHER, "kuberay/raycluster.yaml", "kuberay/rayjob-tofu.yaml"]


@cache
def derived(file: str) -> dict[str, Any]:
    """What the autoscaler is configured with: a launcher file itself, or what Ray reads out of KubeRay's resource."""
    document = yaml.safe_load((CLUSTER / file).read_text(encoding="utf-8"))
    if file in LAUNCHER:
        return {**document, "file_mounts": {}}
    spec = document["spec"]
    for key in KUBERAY[file]:
        spec = spec[key]
    resource = {"metadata": {"name": "soul", "namespace": "default"}, "spec": spec}
    found: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)
    return found


def launched(file: str, bundle: dict[str, float], count: int, *, unavailable: tuple[str, ...] = ()) -> dict[str, int]:
    config = AutoscalingConfig(derived(file), skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={name: kind for name, kind in config.get_node_type_configs().items() if name != config.get_head_node_type()},
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(bundle) for _ in range(count)]),
        recoverable_resource_availabilities=dict.fromkeys(unavailable, 0.0),
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("file", FILES)
def test_training_starts_spot_machines(file: str) -> None:
    assert launched(file, {"GPU": 1}, 8) == {SPOT[file]: 2}


@pytest.mark.parametrize("file", FILES)
def test_training_starts_on_demand_machines_when_spot_could_not_be_had(file: str) -> None:
    assert launched(file, {"GPU": 1}, 8, unavailable=(SPOT[file],)) == {ON_DEMAND[file]: 2}


@pytest.mark.parametrize("file", FILES)
def test_more_work_than_spot_may_take_goes_on_demand_and_no_further(file: str) -> None:
    assert launched(file, {"GPU": 4}, 9) == {SPOT[file]: 4, ON_DEMAND[file]: 2}


@pytest.mark.parametrize("file", FILES)
def test_data_and_evaluation_start_cpu_machines_only(file: str) -> None:
    assert set(launched(file, {"CPU": 1}, 20)) == {"cpu"}


@pytest.mark.parametrize("file", FILES)
def test_nothing_to_do_starts_nothing(file: str) -> None:
    assert launched(file, {"CPU": 1}, 0) == {}


@pytest.mark.parametrize("file", KUBERAY)
def test_ray_reads_sizes_and_limits_out_of_the_manifest(file: str) -> None:
    types = derived(file)["available_node_types"]
    groups = {name: kind for name, kind in types.items() if name != derived(file)["head_node_type"]}
    assert {name: kind["resources"].get("GPU", 0) for name, kind in groups.items()} in (
        {"cpu": 0, "gpu-spot": 4, "gpu-on-demand": 4},
        {"gpu": 1},
    )
    assert all(kind["resources"]["CPU"] >= 8 and kind["resources"]["memory"] > 0 for kind in groups.values())
    assert all(kind["min_workers"] <= kind["max_workers"] for kind in groups.values())
