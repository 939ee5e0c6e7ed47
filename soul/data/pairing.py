"""Which rows make up which step: a pure function of (seed, epoch), of nothing else.

An epoch is one pass over the leading split; every partner split gives as many rows per step, drawn without replacement and
reshuffled when exhausted. Rows are bucketed by length inside a window of steps, so that short rows meet short rows and little is
padded; worker count, engine and restarts do not enter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from soul.records import InputError

Indices = NDArray[np.int64]
MicroBatch = list[tuple[str, int]]


def _permutation(seed: int, tag: int, epoch: int, size: int) -> Indices:
    bits = np.random.Philox(key=np.array([seed, tag], dtype=np.uint64), counter=[epoch, 0, 0, 0])
    return np.random.Generator(bits).permutation(size)


@dataclass(frozen=True)
class PairedPlan:
    """`lengths` maps each streamed split, the leading one first, to its rows' token counts. `batch_size` counts rows of the leading
    split per step over all workers; `window` is the number of steps bucketed together (1: no bucketing).

    Raises:
        InputError: a split is empty or has fewer rows than one step takes.
    """

    lengths: Mapping[str, Indices]
    batch_size: int
    seed: int
    window: int = 8
    _cache: dict[tuple[int, int], Indices] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for split, lengths_R in self.lengths.items():
            if len(lengths_R) == 0:
                raise InputError(f"the {split} split has no rows, expected at least one.")
        needed = min(self.batch_size, self.num_lead)
        for split, lengths_R in self.lengths.items():
            if len(lengths_R) < needed:
                raise InputError(
                    f"the {split} split has {len(lengths_R)} rows, need >= {needed} (one batch). Lower --batch-size or add rows."
                )

    @cached_property
    def num_lead(self) -> int:
        return len(next(iter(self.lengths.values())))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_lead // self.batch_size)

    def step(self, step: int) -> dict[str, Indices]:
        """Row indices of every split for global step `step`, sorted by length. All splits give the same number of rows."""
        epoch, within = divmod(step, self.steps_per_epoch)
        window, slot = divmod(within, self.window)
        first = window * self.window * self.batch_size
        size = min(self.window * self.batch_size, self.num_lead - first)
        num_steps = -(-size // self.batch_size)
        order = np.random.Generator(
            np.random.Philox(key=np.array([self.seed, 2**32], dtype=np.uint64), counter=[epoch, window, 0, 0])
        ).permutation(num_steps)
        start = int(order[slot]) * self.batch_size
        chosen = slice(start, min(start + self.batch_size, size))
        rows = {}
        for tag, (split, lengths_R) in enumerate(self.lengths.items()):
            drawn = self._draw(tag, len(lengths_R), epoch * self.num_lead + first, size)
            by_length = drawn[np.argsort(lengths_R[drawn], kind="stable")] if self.window > 1 else drawn
            rows[split] = by_length[chosen]
        return rows

    def _draw(self, tag: int, num_rows: int, start: int, size: int) -> Indices:
        """Samples `start` .. `start + size` of the endless reshuffled sequence over `num_rows` rows."""
        parts = []
        while size > 0:
            turn, offset = divmod(start, num_rows)
            if (tag, turn) not in self._cache:
                self._cache[tag, turn] = _permutation(self.seed, tag, turn, num_rows)
                for old in [key for key in self._cache if key[0] == tag and key[1] < turn - 1]:
                    del self._cache[old]
            taken = self._cache[tag, turn][offset : offset + size]
            parts.append(taken)
            start, size = start + len(taken), size - len(taken)
        return np.concatenate(parts)

    def share(self, step: int, *, rank: int, world: int, micro_batch_size: int) -> list[MicroBatch]:
        """The micro-batches of one rank: (split, row index) pairs, `micro_batch_size` rows of each split at most.

        Every rank gets the same number of micro-batches, some of them empty when a step has fewer rows than ranks.
        """
        rows = self.step(step)
        per_rank = -(-len(next(iter(rows.values()))) // world)
        shares: list[MicroBatch] = []
        for start in range(0, per_rank, micro_batch_size):
            chosen = slice(start, start + micro_batch_size)
            shares.append([(split, int(index)) for split, indices in rows.items() for index in indices[rank::world][chosen]])
        return shares
