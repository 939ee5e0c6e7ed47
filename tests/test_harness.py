"""The test suite's own tools: ranks in processes, the session's Ray, the environment."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from tests.distributed import spawn


def summed(rank: int, world: int, offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return rank, total


def failing_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise LookupError("rank one gave up")
    dist.barrier()


def waiting_forever(rank: int, world: int) -> None:
    if rank == 0:
        time.sleep(600)
    dist.barrier()


def threads(rank: int, world: int) -> tuple[int, str, str]:
    return torch.get_num_threads(), os.environ["RANK"], os.environ["WORLD_SIZE"]


def test_spawn_returns_every_ranks_result_in_order() -> None:
    results = spawn(summed, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert [total.item() for _, total in results] == [33, 33, 33]


def test_spawn_of_one_rank_sees_what_torchrun_sets() -> None:
    assert spawn(threads, 1) == [(1, "0", "1")]


def test_a_failing_rank_ends_the_others_and_its_traceback_arrives() -> None:
    with pytest.raises(ProcessRaisedException, match="LookupError: rank one gave up"):
        spawn(failing_on_one, 2)


def test_hanging_ranks_are_killed() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="waiting_forever on 2 ranks"):
        spawn(waiting_forever, 2, timeout_s=8)
    assert time.monotonic() - began < 30


def test_no_test_leaves_this_machine() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["WANDB_MODE"] == "offline"
    assert "RAY_ADDRESS" not in os.environ


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_workers_import_soul_and_this_file() -> None:
    import ray

    def seen() -> tuple[str, str, int]:
        import soul.records

        return soul.records.InputError.__name__, os.environ["RAY_AUTH_MODE"], summed.__code__.co_argcount

    assert ray.get(ray.remote(seen).remote(), timeout=60) == ("InputError", "token", 3)
    assert ray.cluster_resources()["CPU"] == 4
