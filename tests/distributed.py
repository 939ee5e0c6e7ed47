"""Run a function on several ranks, each a process of its own with a gloo process group, and collect what they return."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def spawn(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `fn(rank, world, *args)` on `world` ranks and return their results in rank order.

    `fn` must be a module-level function (a spawned process imports it by name) and its results picklable. A rank that raises ends the
    others, and its traceback is the text of the `torch.multiprocessing.ProcessRaisedException` raised here. Ranks still running after
    `timeout_s` are killed: TimeoutError.
    """
    with tempfile.TemporaryDirectory(prefix="soul-ranks-") as folder:
        context = mp.start_processes(_rank, (world, folder, _free_port(), fn, args), nprocs=world, join=False, start_method="spawn")
        deadline = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=max(deadline - time.monotonic(), 0.0), grace_period=5.0):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{fn.__name__} on {world} ranks did not end within {timeout_s:g} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, port: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # what torchrun would set, for libraries that look there; gloo itself meets through a file and stays on loopback
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()} | {"GLOO_SOCKET_IFNAME": LOOPBACK})
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    result = fn(rank, world, *args)
    (Path(folder) / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
