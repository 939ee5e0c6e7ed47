"""CPU or GPU: decided once, by the driver of a run, and carried from there in every job and model spec.

A *device* here is what a process was given ("cpu" or "gpu"); `torch_device` makes of it what tensors are put on. No process looks at what
it happens to see and chooses: one that was given a GPU and finds none says so and ends.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Literal

from soul.records import InputError

if TYPE_CHECKING:
    import torch


class NoDevice(InputError):
    """A process was given a GPU that it does not see; on another machine it may."""


Device = Literal["cpu", "gpu"]
Wanted = Literal["auto", "gpu", "cpu"]

# For tests of everything around the arithmetic: "cpu" keeps tensors and gloo on the CPU while every request to Ray says GPU.
COMPUTE = "SOUL_COMPUTE"
TF32 = "high"


def on_cpu_for_tests() -> bool:
    """Whether logical GPUs stand in for real ones: SOUL_COMPUTE is cpu.

    Raises:
        InputError: it is anything else.
    """
    given = os.environ.get(COMPUTE)
    if given not in (None, "", "cpu"):
        raise InputError(f"{COMPUTE} must be cpu or unset, got {given!r}. It is for tests; --device chooses what a run computes on.")
    return given == "cpu"


def seen() -> Device:
    """What a process has that is its own driver: a script, a unit test, a rank under torchrun."""
    import torch

    return "gpu" if torch.cuda.is_available() and not on_cpu_for_tests() else "cpu"


def torch_device(device: Device, index: int = 0) -> torch.device:
    """Where the tensors of a process with this device live; on a GPU, fp32 products use TF32 (NVIDIA_TF32_OVERRIDE=0 forbids it).

    Raises:
        NoDevice: the process was given a GPU and sees none, or fewer than `index` says.
    """
    import torch

    if device == "cpu" or on_cpu_for_tests():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if index >= count:
        built = "" if torch.version.cuda else f" (this torch, {torch.__version__}, was built without CUDA)"
        raise NoDevice(
            f"{socket.gethostname()} was to compute on GPU {index} and sees {count}{built}. Check nvidia-smi, the driver and "
            "CUDA_VISIBLE_DEVICES there, or choose --device cpu."
        )
    torch.set_float32_matmul_precision(TF32)
    return torch.device("cuda", index)


def num_gpus_here() -> int:
    """Cards of this machine that torch can use; for a run that starts a Ray of its own."""
    import torch

    return torch.cuda.device_count()
