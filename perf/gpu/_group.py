"""A process group of one rank, for the engines that talk to others: nccl on a GPU, gloo on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

LOOPBACK = "127.0.0.1"


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """While open, this process is rank 0 of 1, also to libraries that look for torchrun's variables."""
    on_gpu = device.type == "cuda"
    store = dist.TCPStore(LOOPBACK, 0, 1, is_master=True)
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    names |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(store.port)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1, device_id=device if on_gpu else None)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
