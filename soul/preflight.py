"""Checks before anything expensive starts: enough workers, a folder to write to, room for the checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from soul.config import Config
from soul.device import Device, Wanted, num_gpus_here
from soul.plan import Plan
from soul.records import InputError
from soul.report.numbers import memory
from soul.store import is_uri, path_of


def check_workers(num_workers: int, device: Device, most: Mapping[str, float], *, where: str = "this machine", waits: bool = False) -> None:
    """`most`: CPUs and GPUs that there are or can be; with `waits` an autoscaler that does not say may add GPUs.

    Raises:
        InputError: more workers than that.
    """
    kind = device.upper()
    available = int(most.get(kind, 0))
    if num_workers > available and not (waits and device == "gpu"):
        raise InputError(
            f"--num-workers {num_workers} needs {num_workers} {kind}s, {where} has {available}. "
            f"Use at most {available}, or join a larger cluster with --address."
        )


def here(wanted: Wanted) -> tuple[Device, dict[str, float]]:
    """What a Ray of the run's own on this machine computes on, and the CPUs and GPUs that it has.

    Raises:
        InputError: GPUs are wanted, and torch sees none here.
    """
    most = {"CPU": float(os.cpu_count() or 1), "GPU": float(num_gpus_here())}
    if wanted == "gpu" and not most["GPU"]:
        raise InputError("--device gpu: torch sees no GPU on this machine. Join a cluster with --address, or choose --device cpu.")
    device: Device = "gpu" if most["GPU"] and wanted != "cpu" else "cpu"
    return device, most


def check_output(output: str) -> None:
    """URIs pass: their store answers when it is written to.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    if is_uri(output):
        return
    folder = path_of(output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {output} is a file. Expected a folder, or a name that is free.")
    nearest = _nearest_existing(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--output {output} cannot be written: no permission in {nearest}. Choose another --output.")


def check_disk(output: str, needed_bytes: int) -> None:
    """Raises:
    InputError: the disk of the folder has less room than `needed_bytes`.
    """
    if is_uri(output):
        return
    free = shutil.disk_usage(_nearest_existing(path_of(output))).free
    if free < needed_bytes:
        raise InputError(
            f"--output {output} needs about {memory(needed_bytes)} for checkpoints and model, the disk has {memory(free)} free. "
            "Lower --keep-checkpoints, free some space or choose another disk."
        )


def preflight(config: Config, plan: Plan, *, is_local: bool) -> None:
    """All checks of a run and its twin; a cluster that is still to be joined is asked when it is.

    Raises:
        InputError: the first one that fails.
    """
    if is_local:
        device, most = here(config.engine.device)
        check_workers(config.engine.num_workers, device, most)
    check_output(config.output)
    check_disk(config.output, plan.disk_bytes(config) * (1 if config.twin is None else 2))


def _nearest_existing(path: Path) -> Path:
    """The folder itself, or the closest one above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
