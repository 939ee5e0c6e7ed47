"""The training feed through Ray Data: one pass of step rows for the whole run, instead of one dataset execution per epoch.

Each block holds a few steps of one rank, gathered from the memory-mapped token stores. Blocks have equal sizes and keep their order, so
`streaming_split` hands block j to rank j modulo the world size; every row carries its rank and step, and the worker checks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.data
import ray.train
import ray.train.collective

from soul.batch import Batch, TokenRow, collate
from soul.data.feed import LocalFeed
from soul.data.steps import STEPS_PER_BLOCK, GatherSteps
from soul.train.job import TrainJob


def _decode(step: Mapping[str, Any], pad_id: int) -> list[Batch]:
    shares: list[list[tuple[str, TokenRow]]] = [[] for _ in range(step["num_micro_batches"])]
    for row in step["rows"]:
        tokens = TokenRow(row["index"], row["ids"], row["num_prompt"], row["reference_logp"])
        shares[row["micro_batch"]].append((row["split"], tokens))
    return [collate(share, pad_id=pad_id) for share in shares]


def step_dataset(job: TrainJob, *, world: int, start: int, stop: int) -> ray.data.Dataset:
    """The blocks of steps `start` to `stop` for `world` ranks. Takes no CPU of the cluster's: training workers hold them all."""
    num_blocks = -(-(stop - start) // STEPS_PER_BLOCK) * world
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    blocks = ray.data.from_items([{"id": j} for j in range(num_blocks)], override_num_blocks=num_blocks)
    gather = GatherSteps(job.source, job.train.micro_batch_size, world, start)
    return blocks.map_batches(gather, batch_size=None, num_cpus=0, concurrency=min(world, 2))


def ray_steps(job: TrainJob, feed: LocalFeed, start: int, stop: int) -> Iterator[Sequence[Batch]]:
    """One rank's micro-batches of steps `start` to `stop`, streamed by Ray Data. Call on every rank of a Ray Train group."""
    if stop <= start:
        return
    shared = None
    if feed.rank == 0:
        splits = step_dataset(job, world=feed.world, start=start, stop=stop).streaming_split(feed.world, equal=True)
        shared = [ray.put(splits)]
    [reference] = ray.train.collective.broadcast_from_rank_zero(shared)
    shard = ray.get(reference)[feed.rank]
    expected = start
    for table in shard.iter_batches(batch_size=STEPS_PER_BLOCK, batch_format="pyarrow", prefetch_batches=1):
        for row in table.to_pylist():
            if expected == stop:
                break
            if (row["step"], row["rank"]) != (expected, feed.rank):
                raise RuntimeError(
                    f"rank {feed.rank} expected step {expected}, Ray Data delivered step {row['step']} of rank {row['rank']}"
                )
            yield _decode(row, feed.pad_id)
            expected += 1
    if expected != stop:
        raise RuntimeError(f"Ray Data delivered steps {start} to {expected}, expected up to {stop}")
