"""`python -m tests.orchestration.drained_node TOFU FOLDER`: the node with a run's GPUs is announced to go, goes, and another one comes.

No checkpoint is due by the clock. Prints one line of JSON: the step of the checkpoint that the notice made, and the steps of the whole run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["SOUL_COMPUTE"] = "cpu"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = os.environ["RAY_TRAIN_METRICS_ENABLED"] = "1"  # as on a user's cluster

import ray
from ray.cluster_utils import Cluster

from soul.orchestration import pipeline
from soul.orchestration.cluster import worker_environment
from tests.orchestration.mini import mini, num_lines, steps, wait_for

EPOCHS, BEFORE, DEADLINE_S = 600, 30, 25


def newest(run: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/*/step_*")), default=0)


def drain(address: str, node_id: str) -> None:
    """What a cloud's notice of reclaim is to call."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "reclaimed"]
    limit = ["--deadline-remaining-seconds", str(DEADLINE_S)]
    subprocess.run(["ray", "drain-node", "--address", address, "--node-id", node_id, *reason, *limit], check=True)


def main() -> None:
    tofu, folder = map(Path, sys.argv[1:])
    cluster = Cluster()
    cluster.add_node(num_cpus=3, temp_dir=tempfile.mkdtemp(prefix="soul-nodes-"), include_dashboard=False)
    spot = cluster.add_node(num_cpus=1, num_gpus=2)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": worker_environment()})
    [node_id] = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")]
    run, result = folder / "run", {}
    train = {"epochs": EPOCHS, "save_minutes": 600, "eval_every": 0}
    config = mini(tofu, run, train=train, engine={"name": "ddp", "num_workers": 2, "max_failures": 0})

    def work() -> None:
        result["run"] = pipeline.run(config)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: num_lines(run / "metrics.jsonl") > BEFORE, timeout_s=400)
    assert newest(run) == 0
    announced: Any = num_lines(run / "metrics.jsonl")
    drain(cluster.address, node_id)
    wait_for(lambda: newest(run) > 0, timeout_s=60)
    saved = newest(run)
    time.sleep(DEADLINE_S)
    cluster.remove_node(spot, allow_graceful=False)
    cluster.add_node(num_cpus=1, num_gpus=2)
    thread.join(timeout=600)
    assert result, "the run did not end"
    found = [row["step"] for row in steps(run)]
    print(
        json.dumps({"announced": announced, "saved": saved, "whole": found == list(range(1, found[-1] + 1)), "steps": found[-1]}),
        flush=True,
    )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
