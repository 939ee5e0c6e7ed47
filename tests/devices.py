"""For tests of what a GPU computes: the same functions run on the CPU in the slow lane, so that they are known to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

import soul.device
from soul.device import Device, torch_device

DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 without TF32 while open: `torch_device` would switch it on."""
    usual, before = soul.device.TF32, torch.get_float32_matmul_precision()
    soul.device.TF32 = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        soul.device.TF32 = usual
        torch.set_float32_matmul_precision(before)


@contextmanager
def rank_of_one(device: Device) -> Iterator[None]:
    """This process as the only rank: NCCL on a GPU, gloo on the CPU, and both where a GPU's weights are in CPU memory."""
    backend = "cpu:gloo,cuda:nccl" if torch_device(device).type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.TCPStore("127.0.0.1", 0, 1, is_master=True), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
