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
from soul.store import COPIES_VARIABLE, copies, is_uri, path_of


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
            f"Use at most {available}, or join a larger cluster with --address{', or choose --device cpu' if device == 'gpu' else ''}."
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
    """The disk of the run directory; for one on a store, of this machine's copy, where checkpoints and model are on their way.

    Raises:
        InputError: the disk of the folder has less room than `needed_bytes`.
    """
    if is_uri(output):
        check_room(path_of(output), needed_bytes, where="this machine")
        return
    folder = path_of(output)
    there = sum(file.stat().st_size for file in folder.glob("checkpoints/**/*") if file.is_file())  # a resumed run has some of it
    free = shutil.disk_usage(_nearest_existing(folder)).free
    if free + there < needed_bytes:
        raise InputError(
            f"--output {output} needs about {memory(needed_bytes)} for checkpoints and model, the disk has {memory(free)} free. "
            "Lower --keep-checkpoints, free some space or choose another disk."
        )


def check_room(folder: Path, needed_bytes: int, *, where: str) -> None:
    """Raises:
    InputError: the disk of `folder` on the machine `where`, this one, has less room than `needed_bytes`.
    """
    free = shutil.disk_usage(_nearest_existing(folder)).free
    if free < needed_bytes:
        place = f" (or set {COPIES_VARIABLE} to a folder on a larger disk)" if folder.is_relative_to(copies()) else ""
        raise InputError(
            f"{where}: {folder} needs about {memory(needed_bytes)} for checkpoints and model, its disk has {memory(free)} free. "
            f"Lower --keep-checkpoints or free some space{place}."
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
    arms = 1 if config.twin is None else 2
    if not is_uri(config.output):
        check_disk(config.output, arms * plan.disk_bytes(config))
    elif is_local:  # on a cluster that is joined other machines write, and look at their own disks
        check_disk(config.output, arms * plan.staging_bytes(config))


def _nearest_existing(path: Path) -> Path:
    """The folder itself, or the closest one above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
