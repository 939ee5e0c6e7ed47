"""Joining a Ray cluster, or starting a local one that ends with the script; what it has is checked before anything waits for it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray._private.state
import ray.data
from ray.exceptions import ActorHandleNotFoundError, AuthenticationError, RayTaskError

from soul.device import COMPUTE, Device, Wanted, num_gpus_here
from soul.object_store import environment
from soul.orchestration import ENVIRONMENT
from soul.orchestration.capacity import capacity, decide, may_add_gpus
from soul.orchestration.joining import builds, check_cluster, check_package, make_probe
from soul.orchestration.parallel import waiting_threads
from soul.preflight import check_workers
from soul.records import InputError

OBJECT_STORE_BYTES = 300 * 2**20
RELEASE_SECONDS = 15.0


def _quiet(verbose: bool) -> None:
    if verbose:
        return
    for name in ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")


@contextmanager
def cluster(address: str | None, *, num_workers: int, device: Wanted, verbose: bool) -> Iterator[Device]:
    """A connected Ray for the length of the block, and what runs on it are to compute on. A Ray that is already connected is left running.

    `address`: a cluster to join; None joins RAY_ADDRESS if that is set, else starts a local Ray.

    Raises:
        InputError: the cluster cannot be joined, has too few CPUs or GPUs for `num_workers`, or no GPU where `device` asks for one.
    """
    _quiet(verbose)
    owned = not ray.is_initialized()
    if owned:
        with _own_sigterm():
            if is_local(address):
                _start_local(num_workers, verbose)
            else:
                _join(address or os.environ["RAY_ADDRESS"], verbose)
    try:
        decided = decide(device)
        check_workers(num_workers, decided, capacity(), where="the cluster", waits=may_add_gpus())
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True  # the paired stream relies on it
        yield decided
    except RayTaskError as error:  # bad input that only a task could notice is still one line for the user
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    finally:
        if owned:
            _release_threads()
            ray.shutdown()


def _release_threads() -> None:
    """End what threads of a failed or interrupted run wait for: one still inside Ray when Ray goes ends the process without a word."""
    threads = waiting_threads()
    if not threads:
        return
    core: Any = ray._private.worker.global_worker.core_worker  # type: ignore[attr-defined]
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    for actor_id, actor in ray._private.state.actors(job_id=job).items():
        if actor["State"] != "DEAD":
            with suppress(ActorHandleNotFoundError):  # another actor's: it goes with that one
                core.kill_actor(ray.ActorID.from_hex(actor_id), True)
    deadline = time.monotonic() + RELEASE_SECONDS
    for thread in threads:
        thread.join(timeout=max(0.0, deadline - time.monotonic()))


def is_local(address: str | None) -> bool:
    """Whether a Ray of the run's own would be started."""
    return not ray.is_initialized() and not (address or os.environ.get("RAY_ADDRESS"))


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray puts a handler of its own in the place of ours, one that exits with code 15 and says nothing."""
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(ours) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def _start_local(num_workers: int, verbose: bool) -> None:
    # Logical CPUs are bookkeeping: workers hold theirs for the whole run, and data tasks must still find one (else Ray waits for ever).
    logical = max(4, (os.cpu_count() or 1), num_workers + 2)
    ray.init(
        address="local",  # not a cluster that somebody else started on this machine
        num_cpus=logical,
        num_gpus=num_gpus_here(),  # those that torch can use, which is what was checked before; Ray counts others too
        include_dashboard=False,
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
        runtime_env={"env_vars": worker_environment()},
    )


def worker_environment() -> dict[str, str]:
    """What workers must see: where the package is, one thread per worker (two on one core wait for each other), and the object store."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    told = {name: os.environ[name] for name in (*ENVIRONMENT, COMPUTE) if name in os.environ}
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": threads, **told, **environment()}


def _join(address: str, verbose: bool) -> None:
    place = check_cluster(address)
    # a submitted job's workers have its environment already, and Ray refuses to be told twice
    told = {} if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else environment()
    try:
        ray.init(
            address=place,
            runtime_env={"env_vars": told} if told else None,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except (ConnectionError, AuthenticationError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the Ray cluster at {place} answers, but cannot be joined ({type(error).__name__}). A driver needs a Ray node on its own "
            "machine: run this on one of the cluster's nodes, or submit it with ray job submit."
        ) from error
    try:
        check_package(builds(ray.nodes()), make_probe()())
    except InputError:
        ray.shutdown()
        raise
