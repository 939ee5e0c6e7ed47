"""Runs on GPUs that Ray counts and nobody has: where every stage is placed, and that nothing of a run slips to the CPUs.

The session's own Ray has eight of them, so all other tests of this folder run on them too; tensors stay on the CPU (SOUL_COMPUTE).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from soul.orchestration.cluster import cluster
from soul.records import InputError
from tests.orchestration.mini import ROOT, Finished

pytestmark = pytest.mark.ray


def test_every_stage_that_computes_holds_gpus_and_no_other_does(finished: Finished) -> None:
    held = finished.held
    print(held.table())
    assert held.most["tokenise"] == 0
    assert held.most["prepare"] == 2  # target and retrained model beside each other
    assert held.most["unlearn"] == 2  # NPO with both optimizers
    assert held.most["evaluate"] == 4  # target, retrained and two unlearned models
    assert held.samples[-1][2] == 0
    assert {job.engine.runs_on for job in finished.jobs.values()} == {"gpu"}


def test_more_gpus_than_the_cluster_has_are_an_error_and_cpus_are_taken_only_when_asked_for(ray_cluster: None) -> None:
    with cluster(None, num_workers=8, device="auto", verbose=False) as device:
        assert device == "gpu"
    with (
        pytest.raises(InputError, match=r"--num-workers 9 needs 9 GPUs, the cluster has 8"),
        cluster(None, num_workers=9, device="auto", verbose=False),
    ):
        pass
    with cluster(None, num_workers=2, device="cpu", verbose=False) as device:
        assert device == "cpu"


def told_by(module: str, tofu: Path, folder: Path) -> dict[str, Any]:
    """What a module with a cluster of its own prints: the line of JSON; the rest is shown."""
    command = [sys.executable, "-m", f"tests.orchestration.{module}", str(tofu), str(folder)]
    ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=1400, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    print(ended.stdout)
    found: dict[str, Any] = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_nodes_of_four(tofu: Path, tmp_path: Path) -> None:
    """Eight fsdp workers over two nodes, eight examiners, a grid and a server; placement from Ray's state API."""
    found = told_by("two_nodes_of_four", tofu, tmp_path)
    assert found["most"]["unlearn"] == 8 and found["most_on_a_node"]["unlearn"] == 4
    assert found["most"]["evaluate"] == 8 and found["most"]["tokenise"] == 0
    assert found["grid"] == {"held": 4, "states": ["done", "done"]}  # two trials of two workers
    assert found["serving"] == {"held": 2, "status": 200}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_node_that_is_announced_to_go_leaves_a_checkpoint_and_costs_no_failure(tofu: Path, tmp_path: Path) -> None:
    """With a budget of no failure at all, and no checkpoint due by the clock."""
    found = told_by("drained_node", tofu, tmp_path)
    assert found["saved"] >= found["announced"] and found["whole"] and found["steps"] > found["saved"]
