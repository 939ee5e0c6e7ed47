"""Tokenised rows on disk: memory-mapped Arrow files, so that a split may be larger than memory and any row is one look-up.

A store is a folder of `part-*.arrow` files, read in name order, and a `store.json` written last: without it there is no store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from soul.records import TokenRow

SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("num_prompt", pa.int32())])
ROWS_PER_BATCH = 1024
STORE = "store.json"


def write_part(path: Path, rows: Iterable[tuple[Sequence[int], int]]) -> int:
    """Write (ids, num_prompt) rows as one Arrow file that appears whole or not at all; returns the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".tmp{os.getpid()}")
    count = 0
    try:
        with pa.OSFile(str(staging), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for chunk in _chunks(rows, ROWS_PER_BATCH):
                ids, num_prompt = zip(*chunk, strict=True)
                writer.write_batch(pa.record_batch([pa.array(ids, SCHEMA[0].type), pa.array(num_prompt, SCHEMA[1].type)], schema=SCHEMA))
                count += len(chunk)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    return count


def finish_store(folder: Path, **facts: object) -> None:
    """Declare the parts in `folder` complete, with whatever `facts` the caller wants to check on reuse."""
    folder.mkdir(parents=True, exist_ok=True)  # on an object store the parts may all have been written by other nodes
    staging = folder / f".store.{os.getpid()}"
    staging.write_text(json.dumps(facts, sort_keys=True))
    os.replace(staging, folder / STORE)


def is_store(folder: Path) -> bool:
    return (folder / STORE).is_file()


def store_facts(folder: Path) -> dict[str, Any]:
    """What `finish_store` was told of a finished store."""
    facts: dict[str, Any] = json.loads((folder / STORE).read_text())
    return facts


def _chunks(rows: Iterable[tuple[Sequence[int], int]], size: int) -> Iterator[list[tuple[Sequence[int], int]]]:
    chunk: list[tuple[Sequence[int], int]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass(frozen=True)
class TokenStore:
    """One split's rows. `lengths_R` are token counts; `reference_logps_R` the answers' log-probabilities under the frozen target."""

    batches: tuple[pa.RecordBatch, ...]
    starts: NDArray[np.int64]
    lengths_R: NDArray[np.int64]
    reference_logps_R: NDArray[np.float64] | None = None

    @classmethod
    def open(cls, *folders: Path, reference_logps_R: NDArray[np.float64] | None = None) -> TokenStore:
        """Map the parts of finished stores, one behind the other; nothing is read but the row lengths."""
        batches: list[pa.RecordBatch] = []
        for folder in folders:
            if not is_store(folder):
                raise FileNotFoundError(f"{folder} is not a finished token store (no {STORE})")
            for part in sorted(folder.glob("part-*.arrow")):
                reader = pa.ipc.open_file(pa.memory_map(str(part)))
                batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
        return cls._of(batches, reference_logps_R)

    @classmethod
    def of_rows(cls, rows: Sequence[TokenRow]) -> TokenStore:
        """An in-memory store, for small splits and tests."""
        table = [
            pa.record_batch(
                [pa.array([list(row.ids) for row in rows], SCHEMA[0].type), pa.array([row.num_prompt for row in rows], SCHEMA[1].type)],
                schema=SCHEMA,
            )
        ]
        reference = None
        if rows and rows[0].reference_logp is not None:
            reference = np.array([row.reference_logp for row in rows], dtype=np.float64)
        return cls._of(table, reference)

    @cached_property
    def num_supervised_R(self) -> NDArray[np.int64]:
        """Answer tokens of every row, its end included."""
        num_prompt = [batch.column(1).to_numpy() for batch in self.batches]
        num_supervised_R: NDArray[np.int64] = self.lengths_R - np.concatenate([*num_prompt, np.empty(0, dtype=np.int64)])
        return num_supervised_R

    @classmethod
    def _of(cls, batches: Sequence[pa.RecordBatch], reference_logps_R: NDArray[np.float64] | None) -> TokenStore:
        sizes = [batch.num_rows for batch in batches]
        lengths = [np.diff(batch.column(0).offsets.to_numpy()) for batch in batches]
        num_references = sum(sizes) if reference_logps_R is None else len(reference_logps_R)
        assert num_references == sum(sizes), f"{num_references} reference log-probabilities for {sum(sizes)} rows"
        return cls(
            tuple(batches),
            np.cumsum([0, *sizes]),
            np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64),
            reference_logps_R,
        )

    def __len__(self) -> int:
        return len(self.lengths_R)

    def values(self, index: int) -> tuple[list[int], int, float | None]:
        """(ids, num_prompt, reference log-probability) of a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a store of {len(self)} rows")
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        batch, offset = self.batches[part], index - int(self.starts[part])
        reference = None if self.reference_logps_R is None else float(self.reference_logps_R[index])
        return batch.column(0)[offset].as_py(), batch.column(1)[offset].as_py(), reference

    def row(self, index: int) -> TokenRow:
        return TokenRow(index, *self.values(index))

    def rows(self) -> Iterator[TokenRow]:
        return (self.row(index) for index in range(len(self)))
