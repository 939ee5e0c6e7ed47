"""Which rows make up which step: a pure function of (seed, epoch), of nothing else.

An epoch is one pass over the leading split; every partner split gives as many rows per step, drawn without replacement and
reshuffled when exhausted. No step holds a row twice: where a partner's pass ends inside a step, the rows that the step already has
move back in the new pass. Rows are bucketed by length inside a window of steps, so that short rows meet short rows and little is
padded; worker count, engine and restarts do not enter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from soul.draws import permutation
from soul.records import InputError

Indices = NDArray[np.int64]
MicroBatch = list[tuple[str, int]]


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
    _passes: dict[tuple[str, int], Indices] = field(default_factory=dict, repr=False, compare=False)
    _tails: dict[str, list[Indices]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for split, lengths_R in self.lengths.items():
            if len(lengths_R) == 0:
                raise InputError(f"the {split} split has no rows, expected at least one.")
        for split, lengths_R in self.lengths.items():
            if len(lengths_R) < self.rows_per_step:
                raise InputError(
                    f"the {split} split has {len(lengths_R)} rows, need >= {self.rows_per_step} (one batch). "
                    "Lower --batch-size or add rows."
                )

    @cached_property
    def num_lead(self) -> int:
        return len(next(iter(self.lengths.values())))

    @property
    def rows_per_step(self) -> int:
        """Rows of each split in every step but an epoch's last, which may have fewer."""
        return min(self.batch_size, self.num_lead)

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
        chosen = int(permutation(num_steps, "order of steps", self.seed, epoch, window)[slot])
        rows = {}
        for split, lengths_R in self.lengths.items():
            drawn = self._drawn(split, epoch * self.num_lead + first, size)
            if num_steps > 1:
                drawn = _bucketed(drawn, lengths_R, self.batch_size)[chosen * self.batch_size : (chosen + 1) * self.batch_size]
            rows[split] = drawn[np.argsort(lengths_R[drawn], kind="stable")]
        return rows

    def _drawn(self, split: str, start: int, size: int) -> Indices:
        """Samples `start` .. `start + size` of the endless sequence of passes over a split."""
        num_rows, parts = len(self.lengths[split]), []
        while size > 0:
            turn, offset = divmod(start, num_rows)
            taken = self._pass(split, turn)[offset : offset + size]
            parts.append(taken)
            start, size = start + len(taken), size - len(taken)
        return np.concatenate(parts)

    def _pass(self, split: str, turn: int) -> Indices:
        """The order of pass `turn` over a split. Of the passes before it only their ends are needed, which are kept."""
        found = self._passes.get((split, turn))
        if found is not None:
            return found
        tails = self._tails.setdefault(split, [np.empty(0, dtype=np.int64)])
        while len(tails) <= turn:
            tails.append(self._tail(split, len(tails) - 1, tails[-1]))
        for old in [key for key in self._passes if key[0] == split and key[1] < turn - 1]:
            del self._passes[old]
        return self._passes.setdefault((split, turn), self._new_pass(split, turn, tails[turn]))

    def _new_pass(self, split: str, turn: int, tail: Indices) -> Indices:
        """A fresh order in which the rows of `tail`, the part before it of the step that it begins in, come after that step."""
        order = permutation(len(self.lengths[split]), "order of rows", self.seed, split, turn)
        if len(tail) == 0:
            return order
        begun, end = self._step_around(turn * len(order))
        is_free = ~np.isin(order, tail)
        in_step = np.flatnonzero(is_free)[: end - begun - len(tail)]
        return np.concatenate([order[in_step], np.delete(order, in_step)])

    def _tail(self, split: str, turn: int, tail: Indices) -> Indices:
        """The rows of a pass, which begins behind `tail`, that lie in a step which the next pass completes."""
        end = (turn + 1) * len(self.lengths[split])
        num_open = end - self._step_around(end)[0]
        return self._new_pass(split, turn, tail)[len(self.lengths[split]) - num_open :] if num_open else np.empty(0, dtype=np.int64)

    def _step_around(self, position: int) -> tuple[int, int]:
        """First sample and end of the step that sample `position` belongs to, before steps of a window are bucketed."""
        epoch, within = divmod(position, self.num_lead)
        begun = within - within % self.batch_size
        return epoch * self.num_lead + begun, epoch * self.num_lead + min(begun + self.batch_size, self.num_lead)

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


def _bucketed(drawn: Indices, lengths_R: Indices, batch_size: int) -> Indices:
    """The samples of a window's steps dealt anew to as many steps, the shortest rows first, so that again no step holds a row twice.

    A row has at most one copy a step, and one with a copy for each step left goes into all of them; so there are always enough rows to
    fill a step. A short step is the last and has the longest rows; it is dealt first, because it has the least room for such rows.
    """
    rows, drawn_at, copies = np.unique(drawn, return_index=True, return_counts=True)
    by_length = np.lexsort((drawn_at, lengths_R[rows]))  # rows of one length as they were drawn, in another order each epoch
    rows, copies = rows[by_length], copies[by_length]

    def deal(size: int, steps_left: int, *, longest: bool = False) -> Indices:
        preferred = np.flatnonzero(copies)[:: -1 if longest else 1]
        can_wait = copies[preferred] < steps_left
        taken = preferred[np.argsort(can_wait, kind="stable")[:size]]
        copies[taken] -= 1
        return rows[taken]

    num_full, short = divmod(len(drawn), batch_size)
    last = [deal(short, num_full + 1, longest=True)] if short else []
    return np.concatenate([*(deal(batch_size, left) for left in range(num_full, 0, -1)), *last])
