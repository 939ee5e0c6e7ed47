"""`python -m tests.orchestration.two_nodes_of_four TOFU FOLDER`: whole runs on two nodes of four logical GPUs each.

Prints the table of stages and GPUs, then one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

os.environ["SOUL_COMPUTE"] = "cpu"

import ray
from ray.cluster_utils import Cluster

from soul.benchmarks.grid import TINY_MODELS
from soul.grid_config import GridConfig
from soul.orchestration import pipeline, serve
from soul.orchestration.cluster import worker_environment
from soul.orchestration.tune import run_grid
from soul.report.grid_build import read_outcomes
from soul.serving.gate import Hashes, read_catalogue
from soul.serving.settings import ServeConfig
from tests.orchestration.held import Held, held_by_nodes, watched
from tests.orchestration.mini import TINY, mini
from tests.s3 import free_port

GPUS = 4
PERIOD_S = 0.4


def grid(tofu: Path, folder: Path, cache: str) -> dict[str, Any]:
    """Two trials of two workers each."""
    settings = {
        "data": {"source": str(tofu)},
        "methods": ("npo",),
        "optimizers": ("adamw", "sophia"),
        "models": ("mini",),
        "prepare": {"max_steps": 20},
        "train": {"epochs": 2},
        "engine": {"name": "fsdp", "num_workers": 2},
        "evaluate": {"max_new_tokens": 8},
        "max_concurrent": 2,
        "progress": False,
        "output": str(folder / "grid"),
        "cache": cache,
    }
    TINY_MODELS["mini"] = TINY
    config = GridConfig.model_validate(settings)
    with watched(held_by_nodes, period_s=PERIOD_S) as held:
        run_grid(config)
    outcomes = read_outcomes(config.all_trials(), Path(config.output))
    return {"held": max(total for _, _, total in held.samples), "states": [outcome.state for outcome in outcomes]}


def serving(run: Path) -> dict[str, Any]:
    """Two replicas, each with the GPU that it has by default."""
    port = free_port()
    given = {"hosting": {"runs": {"mini": str(run)}, "allow_unevaluated": True}, "port": port, "replicas": {"minimum": 2, "maximum": 2}}
    config = ServeConfig.model_validate(given).decided("gpu")
    serve.start(config, read_catalogue(config.hosting, on_loopback=True, hashes=Hashes()))
    body = json.dumps({"model": "mini", "prompt": "Who", "max_tokens": 2}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        status = answer.status
    held = sum(held_by_nodes().values())
    serve.stop()
    return {"held": held, "status": status}


def whole_run(tofu: Path, folder: Path) -> tuple[Path, Held]:
    """Eight workers; precision is left to the driver."""
    made = {"engine": {"name": "fsdp", "num_workers": 2 * GPUS, "precision": "auto"}, "train": {"epochs": 2}}
    with watched(held_by_nodes, period_s=PERIOD_S) as held:
        run = pipeline.run(mini(tofu, folder / "run", **made))
    return run, held


def main() -> None:
    tofu, folder = map(Path, sys.argv[1:])
    cluster = Cluster()
    first: dict[str, Any] = {"temp_dir": tempfile.mkdtemp(prefix="soul-nodes-"), "include_dashboard": True, "dashboard_port": free_port()}
    cluster.add_node(num_cpus=4, num_gpus=GPUS, **first)
    cluster.add_node(num_cpus=4, num_gpus=GPUS)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": worker_environment()})
    os.environ["RAY_ADDRESS"] = cluster.address  # other Rays may be at work on this machine
    run, held = whole_run(tofu, folder)
    found: dict[str, Any] = {"most": held.most, "most_on_a_node": held.most_on_a_node}
    found["grid"] = grid(tofu, folder, str(folder / ".cache"))
    found["serving"] = serving(run)
    print(held.table())
    print(json.dumps(found), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
