"""The training feed through Ray Data: one pass of step rows for the whole run, instead of one dataset execution per epoch.

Each block holds K steps of one rank, gathered from the memory-mapped token stores. Blocks have equal sizes and keep their order, so
`streaming_split` hands block j to rank j modulo the world size; every row carries its rank and step, and the worker checks them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.collective

from soul.batch import Batch, TokenRow, collate
from soul.data.feed import LocalFeed
from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore
from soul.train.job import TrainJob, plan_of

STEPS_PER_BLOCK = 20
_ROWS = pa.list_(
    pa.struct(
        [
            ("micro_batch", pa.int32()),
            ("split", pa.string()),
            ("index", pa.int64()),
            ("ids", pa.list_(pa.int32())),
            ("num_prompt", pa.int32()),
            ("reference_logp", pa.float64()),
        ]
    )
)
_OPENED: dict[str, tuple[PairedPlan, dict[str, TokenStore]]] = {}
STEP_SCHEMA = pa.schema([("step", pa.int64()), ("rank", pa.int32()), ("num_micro_batches", pa.int32()), ("rows", _ROWS)])


def _opened(key: str, job: TrainJob) -> tuple[PairedPlan, dict[str, TokenStore]]:
    """Plan and stores of a job, kept by the process between its tasks: a long retain set's order is not drawn for every block."""
    if key not in _OPENED:
        stores = job.open_stores()
        _OPENED.clear()
        _OPENED[key] = plan_of(job, stores), stores
    return _OPENED[key]


@dataclass(frozen=True)
class GatherSteps:
    """A Ray Data task body: block number -> the step rows of one rank. Pure in (job, world, start)."""

    job: TrainJob
    world: int
    start: int

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> pa.Table:
        plan, stores = _opened(json.dumps([dict(self.job.stores), self.job.reference, self.job.train.model_dump()]), self.job)
        steps = [row for block in batch["id"].tolist() for row in self._block(int(block), plan, stores)]
        return pa.Table.from_pylist(steps, schema=STEP_SCHEMA)

    def _block(self, block: int, plan: PairedPlan, stores: Mapping[str, TokenStore]) -> Iterator[dict[str, Any]]:
        chunk, rank = divmod(block, self.world)
        first = self.start + chunk * STEPS_PER_BLOCK
        for step in range(first, first + STEPS_PER_BLOCK):  # past the end too: blocks must be equal, the worker stops in time
            shares = plan.share(step, rank=rank, world=self.world, micro_batch_size=self.job.train.micro_batch_size)
            rows = [_encode(i, split, stores[split].row(index)) for i, share in enumerate(shares) for split, index in share]
            yield {"step": step, "rank": rank, "num_micro_batches": len(shares), "rows": rows}


def _encode(micro_batch: int, split: str, row: TokenRow) -> dict[str, Any]:
    return {
        "micro_batch": micro_batch,
        "split": split,
        "index": row.index,
        "ids": row.ids,
        "num_prompt": row.num_prompt,
        "reference_logp": row.reference_logp,
    }


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
    return blocks.map_batches(GatherSteps(job, world, start), batch_size=None, num_cpus=0, concurrency=2)


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
