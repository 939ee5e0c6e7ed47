"""Token stores: what is written is what is read, over parts and folders, and an unfinished store is none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from soul.batch import TokenRow
from soul.data.store import ROWS_PER_BATCH, TokenStore, finish_store, is_store, store_facts, write_part


def ragged(seed: int, num: int) -> list[tuple[list[int], int]]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num):
        length = int(rng.integers(2, 30))
        rows.append((rng.integers(0, 2**31 - 1, length).tolist(), int(rng.integers(1, length))))
    return rows


def as_rows(pairs: Sequence[tuple[list[int], int]]) -> list[TokenRow]:
    return [TokenRow(index, ids, num_prompt) for index, (ids, num_prompt) in enumerate(pairs)]


@pytest.mark.parametrize("sizes", [[1], [5, 3], [0, 4, 0, 2], [ROWS_PER_BATCH + 1, 7]])
def test_parts_are_read_one_behind_the_other(sizes: list[int], tmp_path: Path) -> None:
    pairs = [ragged(number, size) for number, size in enumerate(sizes)]
    for number, rows in enumerate(pairs):
        assert write_part(tmp_path / f"part-{number:05d}.arrow", iter(rows)) == len(rows)
    finish_store(tmp_path)
    store, expected = TokenStore.open(tmp_path), as_rows([row for rows in pairs for row in rows])
    assert len(store) == sum(sizes)
    assert list(store.rows()) == expected
    assert store.lengths_R.tolist() == [len(row.ids) for row in expected]


def test_folders_are_read_one_behind_the_other(tmp_path: Path) -> None:
    pairs = {name: ragged(seed, 4) for seed, name in enumerate(["b", "a"])}
    for name, rows in pairs.items():
        write_part(tmp_path / name / "part-00000.arrow", rows)
        finish_store(tmp_path / name)
    store = TokenStore.open(tmp_path / "b", tmp_path / "a")
    assert list(store.rows()) == as_rows([*pairs["b"], *pairs["a"]])


def test_a_store_in_memory_equals_one_on_disk(tmp_path: Path) -> None:
    reference = np.random.default_rng(0).normal(size=9)
    pairs = ragged(3, 9)
    write_part(tmp_path / "part-00000.arrow", pairs)
    finish_store(tmp_path)
    on_disk = TokenStore.open(tmp_path, reference_logps_R=reference)
    rows = [TokenRow(i, ids, num_prompt, float(reference[i])) for i, (ids, num_prompt) in enumerate(pairs)]
    in_memory = TokenStore.of_rows(rows)
    assert list(in_memory.rows()) == list(on_disk.rows()) == rows
    assert in_memory.lengths_R.tolist() == on_disk.lengths_R.tolist()
    assert len(TokenStore.of_rows([])) == 0


def test_reference_log_probabilities_of_other_rows_are_refused(tmp_path: Path) -> None:
    write_part(tmp_path / "part-00000.arrow", ragged(3, 9))
    finish_store(tmp_path)
    with pytest.raises(AssertionError, match="8 reference log-probabilities for 9 rows"):
        TokenStore.open(tmp_path, reference_logps_R=np.zeros(8))


@pytest.mark.parametrize("index", [-1, 9, 100])
def test_a_row_beyond_the_store_is_an_index_error(index: int) -> None:
    store = TokenStore.of_rows(as_rows(ragged(3, 9)))
    with pytest.raises(IndexError):
        store.row(index)


def test_an_unfinished_store_is_refused(tmp_path: Path) -> None:
    write_part(tmp_path / "part-00000.arrow", ragged(0, 2))
    assert not is_store(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a finished token store"):
        TokenStore.open(tmp_path)
    finish_store(tmp_path, rows=2, split="forget")
    assert is_store(tmp_path) and len(TokenStore.open(tmp_path)) == 2
    assert json.loads((tmp_path / "store.json").read_text()) == store_facts(tmp_path) == {"rows": 2, "split": "forget"}


def breaking_off(rows: Sequence[tuple[list[int], int]]) -> Iterator[tuple[list[int], int]]:
    yield from rows
    raise RuntimeError("the tokenizer gave up")


def test_a_part_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gave up"):
        write_part(tmp_path / "part-00000.arrow", breaking_off(ragged(0, ROWS_PER_BATCH + 5)))
    assert not list(tmp_path.iterdir())


def test_a_part_that_breaks_off_leaves_the_old_one(tmp_path: Path) -> None:
    part, rows = tmp_path / "part-00000.arrow", ragged(0, 5)
    write_part(part, rows)
    before = part.read_bytes()
    with pytest.raises(RuntimeError, match="gave up"):
        write_part(part, breaking_off(ragged(1, 2)))
    assert part.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [part.name]


def test_looking_up_rows_copies_nothing(tmp_path: Path) -> None:
    num_rows, ids = 20_000, list(range(60))
    write_part(tmp_path / "part-00000.arrow", ((ids, 3) for _ in range(num_rows)))
    finish_store(tmp_path)
    before = pa.total_allocated_bytes()
    store = TokenStore.open(tmp_path)
    assert [store.row(index).ids for index in range(0, num_rows, 4999)] == [ids] * 5
    assert pa.total_allocated_bytes() - before < 10_000  # the ids are 4.8 MB: they stay in the file's pages
