"""Two nodes that share no disk: a run that tokenises, trains and evaluates on both of them over an object store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from soul.cli import DONE
from soul.object_store import read_bytes
from soul.orchestration import pipeline
from soul.store import COPIES_VARIABLE, local
from tests.orchestration.mini import Finished, fingerprint, mini, start

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
for copies in sys.argv[2:]:
    first = {"temp_dir": sys.argv[1], "include_dashboard": False} if cluster.head_node is None else {}
    cluster.add_node(num_cpus=1, env_vars={"SOUL_STORE_COPIES": copies}, **first)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def nodes_of_one_cpu(*copies: Path) -> Iterator[str]:
    """The address of a cluster with one node for each of these folders."""
    folder = tempfile.mkdtemp(prefix="soul-nodes-")  # short: Ray puts sockets below it
    command = [sys.executable, "-c", CLUSTER, folder, *map(str, copies)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        yield address
    finally:
        process.communicate(timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_run_spreads_over_nodes_without_a_common_disk(
    finished: Finished, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {"engine": {"name": "fsdp", "num_workers": 2}, "train": {"epochs": 2}}
    beside = pipeline.run(mini(finished.data, tmp_path / "run", cache=finished.config.cache_folder, **two))
    file = tmp_path / "config.yaml"
    uri = f"{bucket}/runs/x"
    file.write_text(json.dumps({**mini(finished.data, tmp_path, **two).model_dump(mode="json"), "output": uri}))
    copies = [tmp_path / "node-0", tmp_path / "node-1"]
    monkeypatch.setenv(COPIES_VARIABLE, str(tmp_path / "driver"))
    with nodes_of_one_cpu(*copies) as address:
        process = start("tofu", "--config", str(file), "--address", address)
        try:
            _, err = process.communicate(timeout=1500)
        finally:
            process.kill()
    assert process.returncode == DONE, err
    here, there = (json.loads(text) for text in ((beside / "results.json").read_text(), read_bytes(f"{uri}/results.json") or b""))
    assert {**here, "cost": None} == {**there, "cost": None}
    weights = {path.relative_to(tmp_path).parts[-3:] for path in (tmp_path / "driver").rglob("*.safetensors")}
    assert {parts[0] for parts in weights} <= {"init"}  # what it made itself to start from: no model that others trained
    assert fingerprint(Path(local(f"{uri}/model"))) == fingerprint(beside / "model")
    for folder in copies:  # each has fetched what it worked on, and nobody looked into another's
        assert list(folder.rglob("store.json")) and list(folder.rglob("*.safetensors")), folder
