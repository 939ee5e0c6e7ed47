"""The environment every test runs in, set before torch or Ray are imported, and the fixtures that several folders share.

Hermetic on purpose: no network, no telemetry, no cluster of the user's, a Ray token of this session's own.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from soul.device import COMPUTE
from tests.s3 import Store, free_port, store_on_loopback

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
WITH_CLUSTER = ("tests/orchestration/", "tests/test_harness.py")  # tests/cluster has a head of its own
SHARED_DATA = ROOT.parent / "shared" / "data"
# Short: Ray puts sockets below it, and their paths have room for 107 bytes.
SESSION_DIR = Path(tempfile.mkdtemp(prefix="soul-"))

# Two cores: one thread a process, and no spinning while a collective waits.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "RAY_USAGE_STATS_ENABLED": "0"}
# A worker report waits for the controller's next poll (2 s by default); a cluster that lacks room should say so in seconds.
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": str(SESSION_DIR / "token"),
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
}

# Every object store of the tests is on loopback, and what is fetched from it stays in the session's folder.
STORE = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
    "AWS_ACCESS_KEY_ID": "loopback",
    "AWS_SECRET_ACCESS_KEY": "loopback-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "SOUL_STORE_COPIES": str(SESSION_DIR / "copies"),
}

LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def _test_folders() -> list[str]:
    """The root, for soul and tests.*, and every folder with tests: Ray workers import a test's functions by its module name."""
    return [str(ROOT), *sorted({str(path.parent) for path in TESTS.rglob("test_*.py")})]


def _set_environment() -> None:
    (SESSION_DIR / "token").touch(mode=0o600)
    (SESSION_DIR / "token").write_text(secrets.token_hex(32))
    os.environ.update(THREADS | OFFLINE | RAY | STORE)
    os.environ.pop("RAY_ADDRESS", None)
    for name, first in {"PYTHONPATH": _test_folders(), "PATH": [str(Path(sys.executable).parent)]}.items():
        os.environ[name] = os.pathsep.join([*first, *filter(None, [os.environ.get(name)])])


_set_environment()

import torch  # noqa: E402 - reads the environment set above

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`-n 2`: one process has everything that shares the local cluster; the other the rest, file by file."""
    from xdist.scheduler import LoadScopeScheduling

    class OneCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "cluster" if file.startswith(WITH_CLUSTER) else file

    return OneCluster(config, log)


def pytest_unconfigure() -> None:
    shutil.rmtree(SESSION_DIR, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_rank_left_behind() -> Iterator[None]:
    """A process with torchrun's variables is a rank to transformers and accelerate: the test that leaves them fails, not a later one."""
    yield
    left = LAUNCHER & os.environ.keys()
    for name in left:
        del os.environ[name]
    assert not left, f"the test left {sorted(left)} in the environment"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The published benchmark files, read where they lie: they are not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no benchmark data: ../shared/data does not exist beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def s3_store() -> Iterator[Store]:
    """S3 on loopback, with a proxy before it that can fail."""
    with store_on_loopback() as store:
        yield store


@pytest.fixture
def bucket(s3_store: Store, request: pytest.FixtureRequest) -> str:
    """The URI of a bucket of the test's own."""
    return s3_store.make_bucket(f"b{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session, with eight logical GPUs, so that every run is placed as on a machine that has them.

    Four logical CPUs on any machine: two workers of one CPU each leave room for Ray Data.
    """
    import ray  # the other tests run where ray is not installed

    os.environ[COMPUTE] = "cpu"  # tensors stay on the CPU; what is asked of Ray does not
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=8,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        _temp_dir=str(SESSION_DIR / "ray"),
    )
    yield
    ray.shutdown()
    del os.environ[COMPUTE]
