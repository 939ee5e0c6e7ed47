"""What `soul check` says of a cluster: the checks with which every run joins one, and what it has."""

from __future__ import annotations

import os
from collections.abc import Mapping

import ray

from soul.orchestration.capacity import UNKNOWN, UndecidedDevice, capacity, decide
from soul.orchestration.cluster import cluster
from soul.orchestration.joining import check_job_server, is_job_server, make_probe, this_environment
from soul.preflight import check_workers
from soul.records import InputError


def survey(address: str | None, *, num_workers: int) -> str:
    """The lines of a cluster that a run of `num_workers` could use.

    Raises:
        InputError: what such a run would stop with.
    """
    if num_workers < 1:
        raise InputError(f"--num-workers must be at least 1, got {num_workers}.")
    place = address or os.environ.get("RAY_ADDRESS") or "auto"
    if is_job_server(place):
        server = check_job_server(place)
        sizes = {f"{kind}s": f"{amount:g}" for kind, amount in server.resources.items()}
        shown = _table({"job server": place, **server.versions, "token": "accepted", "nodes": str(server.nodes), **sizes})
        enough = num_workers <= (server.resources["GPU"] or server.resources["CPU"])
        return (
            shown
            if enough
            else f"{shown}\n{num_workers} workers do not fit into that: a run stops at its start, unless an autoscaler can add the rest"
        )
    with cluster(place, num_workers=1, device="cpu", verbose=False):
        try:
            device = decide("auto")
        except UndecidedDevice as error:
            computes = f"--device gpu or cpu, which a run has to name: {error}"
        else:
            check_workers(num_workers, device, capacity(), where="the cluster")
            computes = f"{device.upper()}s (--device auto)"
        has, most = ray.cluster_resources(), capacity()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        rows = {"cluster": ray.get_runtime_context().gcs_address, **this_environment(), "soul": make_probe()(), "nodes": str(len(nodes))}
        rows["computes on"] = computes
        return _table({**rows, **{f"{kind}s": _amount(has.get(kind, 0), most.get(kind, 0)) for kind in ("CPU", "GPU")}})


def _amount(has: float, most: float) -> str:
    if most == UNKNOWN:
        return f"{has:g}; an autoscaler may add some"
    return f"{has:g}, with the autoscaler up to {most:g}" if most > has else f"{has:g}"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())
