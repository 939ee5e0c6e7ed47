"""What a cluster can grow to is what decides whether a run fits, and whether it trains on GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

import ray

from soul.orchestration import capacity as module
from soul.orchestration.capacity import LIMITS, capacity, decide, launched, limits, room_for
from soul.preflight import check_workers
from soul.records import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A head without CPUs, whose autoscaler says nothing."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr(ray._private.state.state, "get_max_resources_from_cluster_config", lambda: None)
    monkeypatch.setattr(module, "is_autoscaler_v2", lambda fetch_from_server: False)
    monkeypatch.setattr(module, "LAUNCHERS_FILE", tmp_path / "ray_bootstrap_config.yaml")
    monkeypatch.delenv(LIMITS, raising=False)


def fits(num_workers: int) -> bool:
    most = capacity()
    try:
        check_workers(num_workers, decide("auto") if most.get("GPU") else "cpu", most)
    except InputError:
        return False
    return True


def test_without_an_autoscaler_what_is_there_counts(asleep: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fits(1)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    assert fits(4) and not fits(5) and decide("auto") == "cpu"


def test_an_autoscaler_that_does_not_say_is_not_second_guessed(asleep: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_autoscaler_v2", lambda fetch_from_server: True)
    assert fits(1000) and room_for(1, "cpu") == 64
    assert decide("gpu") == "gpu" and decide("cpu") == "cpu"  # waits for what may come
    with pytest.raises(InputError, match=r"--device auto cannot decide. Say --device gpu .* or set SOUL_CLUSTER_LIMITS"):
        decide("auto")


def test_a_gpu_that_cannot_come_is_an_error(asleep: None) -> None:
    with pytest.raises(InputError, match=r"--device gpu: the cluster has no GPU, and nothing that could add one"):
        decide("gpu")


def test_it_can_be_told(asleep: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMITS, "CPU=64, GPU=8")
    assert capacity()["GPU"] == 8 and fits(8) and not fits(9) and decide("auto") == "gpu" and room_for(2, "gpu") == 4
    assert decide("cpu") == "cpu" and room_for(2, "cpu") == 32  # told so, whatever there is
    for wrong in ("64", "CPU=many", "CPU=1;GPU=2"):
        with pytest.raises(InputError, match=r"must look like CPU=64,GPU=8"):
            limits(wrong)


def test_ray_may_say_it(asleep: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray._private.state.state, "get_max_resources_from_cluster_config", lambda: {"CPU": 12})
    assert fits(12) and not fits(13)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_our_launcher_files_say_it_on_their_head(name: str, asleep: None, tmp_path: Path) -> None:
    text = (ROOT / "cluster" / name).read_text()
    config: dict[str, Any] = yaml.safe_load(text)
    (tmp_path / "ray_bootstrap_config.yaml").write_text(text)
    workers = [node for kind, node in config["available_node_types"].items() if kind != config["head_node_type"]]
    assert sum(node["resources"].get("GPU", 0) for node in workers) > 0
    assert capacity()["GPU"] == sum(min(node["max_workers"], config["max_workers"]) * node["resources"].get("GPU", 0) for node in workers)
    assert launched(config) == {kind: amount for kind, amount in capacity().items() if kind != "memory"}
