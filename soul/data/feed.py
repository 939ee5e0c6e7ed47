"""From a plan and the token stores to a rank's micro-batches, step after step. The Ray feed yields the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from soul.batch import Batch, collate
from soul.data.pairing import PairedPlan
from soul.data.store import TokenStore


@dataclass(frozen=True)
class LocalFeed:
    """The steps of one rank, made where they are used. Iterating from `start` is how a run resumes."""

    plan: PairedPlan
    stores: Mapping[str, TokenStore]
    rank: int
    world: int
    micro_batch_size: int
    pad_id: int

    def step(self, step: int) -> list[Batch]:
        shares = self.plan.share(step, rank=self.rank, world=self.world, micro_batch_size=self.micro_batch_size)
        return [collate([(split, self.stores[split].row(i)) for split, i in share], pad_id=self.pad_id) for share in shares]

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        return (self.step(step) for step in range(start, stop))
