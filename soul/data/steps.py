"""Blocks of training steps as Arrow rows: what a Ray Data task makes of a block's number, without torch, ray or transformers.

A block holds STEPS_PER_BLOCK steps of one rank. Blocks have equal sizes, also past the end of the run: the reader stops in time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore
from soul.store import local

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
STEP_SCHEMA = pa.schema([("step", pa.int64()), ("rank", pa.int32()), ("num_micro_batches", pa.int32()), ("rows", _ROWS)])


@dataclass(frozen=True)
class StepSource:
    """Where a run's rows lie and how they are ordered. `stores` maps each streamed split, the leading one first, to its folders."""

    stores: Mapping[str, tuple[str, ...]]
    reference: str | None
    batch_size: int
    seed: int
    bucket_window: int

    def open(self) -> tuple[PairedPlan, dict[str, TokenStore]]:
        """The plan, and the stores, the leading one with its reference log-probabilities if there are any; from a store, fetched first."""
        reference = None if self.reference is None else np.load(local(self.reference), allow_pickle=False)
        stores = {
            split: TokenStore.open(*(Path(local(folder)) for folder in folders), reference_logps_R=reference if i == 0 else None)
            for i, (split, folders) in enumerate(self.stores.items())
        }
        lengths = {split: store.lengths_R for split, store in stores.items()}
        return PairedPlan(lengths, batch_size=self.batch_size, seed=self.seed, window=self.bucket_window), stores


_OPENED: dict[str, tuple[PairedPlan, dict[str, TokenStore]]] = {}


def _opened(source: StepSource) -> tuple[PairedPlan, dict[str, TokenStore]]:
    """Kept by the process between its tasks: a long retain set's order is not drawn for every block."""
    key = repr(source)
    if key not in _OPENED:
        opened = source.open()
        _OPENED.clear()
        _OPENED[key] = opened
    return _OPENED[key]


@dataclass(frozen=True)
class GatherSteps:
    """A Ray Data task body: block number -> the step rows of one rank. Pure in its fields."""

    source: StepSource
    micro_batch_size: int
    world: int
    start: int

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> pa.Table:
        plan, stores = _opened(self.source)
        steps = [row for block in batch["id"].tolist() for row in self._block(int(block), plan, stores)]
        return pa.Table.from_pylist(steps, schema=STEP_SCHEMA)

    def _block(self, block: int, plan: PairedPlan, stores: Mapping[str, TokenStore]) -> Iterator[dict[str, Any]]:
        chunk, rank = divmod(block, self.world)
        first = self.start + chunk * STEPS_PER_BLOCK
        for step in range(first, first + STEPS_PER_BLOCK):
            shares = plan.share(step, rank=rank, world=self.world, micro_batch_size=self.micro_batch_size)
            rows = [self._row(i, split, stores[split], index) for i, share in enumerate(shares) for split, index in share]
            yield {"step": step, "rank": rank, "num_micro_batches": len(shares), "rows": rows}

    def _row(self, micro_batch: int, split: str, store: TokenStore, index: int) -> dict[str, Any]:
        ids, num_prompt, reference = store.values(index)
        return {
            "micro_batch": micro_batch,
            "split": split,
            "index": index,
            "ids": ids,
            "num_prompt": num_prompt,
            "reference_logp": reference,
        }
