"""Whether every node of a cluster sees what a grid works with, where that lies on a disk: asked before the first trial goes there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from soul.records import InputError
from soul.store import is_uri, path_of

SECONDS = 120.0  # a worker has to start on every node


def unseen(paths: list[str]) -> list[int]:
    """Which of these paths this node does not have."""
    return [index for index, path in enumerate(paths) if not Path(path).exists()]


def check_disks(*, written: Mapping[str, str | None], read: Mapping[str, str | None]) -> None:
    """`written` and `read`: flag -> folder. URIs, hub ids and what is not given pass; so does a cluster of one node.

    Raises:
        InputError: a node does not see one of the folders.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    folders = {flag: path_of(given) for flag, given in written.items() if given is not None and not is_uri(given)}
    models = {flag: path for flag, given in read.items() if given is not None and not is_uri(given) and (path := path_of(given)).exists()}
    if len(nodes) < 2 or not (folders or models):
        return
    with ExitStack() as stack:
        probes = {}
        for flag, folder in folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            probes[flag] = Path(stack.enter_context(tempfile.NamedTemporaryFile(prefix=".seen-", dir=folder)).name)
        wanted = {**probes, **models}
        look: Any = ray.remote(unseen)
        there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        asked = [look.options(num_cpus=0, scheduling_strategy=node).remote(list(map(str, wanted.values()))) for node in there]
        found: list[list[int]] = ray.get(asked, timeout=SECONDS)
    for index, flag in enumerate(wanted):
        if blind := sum(index in missing for missing in found):
            raise InputError(
                f"{flag} {(folders | models)[flag]} is on a disk that {blind} of the cluster's {len(nodes)} nodes do not see, and trials "
                "run on all of them. Name a bucket (s3://bucket/folder), or a disk that every node mounts."
            )
