"""A run's rows: the benchmark's records for preparation and evaluation, and what the training stages tokenise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from soul.batch import SPLITS
from soul.config import Config, DataConfig
from soul.data.refusals import refusal_records
from soul.data.sources import RETAIN_EVAL_ROWS, Benchmark, fingerprint, load_own, open_benchmark
from soul.objectives.methods import METHODS, streamed_splits
from soul.orchestration.tokens import FileSplit, Rows, row_hash
from soul.store import path_of


@dataclass(frozen=True)
class Sources:
    """`benchmark` holds what is evaluated; `rows` every split that can be trained on (own retain data stays a file, streamed)."""

    benchmark: Benchmark
    rows: Mapping[str, Rows]

    def fingerprints(self) -> dict[str, str]:
        return {split: rows.fingerprint() if isinstance(rows, FileSplit) else fingerprint(rows) for split, rows in self.rows.items()}

    @property
    def evaluated(self) -> dict[str, list]:  # type: ignore[type-arg]
        """The splits that are evaluated, under their names in results.json."""
        splits = dict(self.benchmark.splits)
        retain = splits.pop("retain_eval", None) or splits.get("retain", [])
        return {**{name: rows for name, rows in splits.items() if name != "retain"}, "retain": retain}


def open_sources(data: DataConfig, *, benchmark: str, seed: int) -> Sources:
    """Read, check and pair up the records; own retain data is checked while it is tokenised.

    Raises:
        InputError: something about the data is wrong; never quotes a row.
    """
    opened = _open_own(data) if benchmark == "own" else _open_named(data)
    refusals = refusal_records(opened.benchmark.splits["forget"], seed=seed)
    return replace(opened, rows={**opened.rows, "refusal": refusals})


def _open_named(data: DataConfig) -> Sources:
    assert data.forget is not None  # filled in by the config
    benchmark = open_benchmark(
        data.source,
        forget=data.forget,
        retain=data.retain,
        num_authors=data.num_authors,
        seed=data.seed,
        revision=data.revision,
        limit_forget=data.limit_forget,
        limit_retain=data.limit_retain,
        allow_overlap=data.allow_overlap,
    )
    trained = ("forget", "retain", "real_authors", "world_facts")
    return Sources(benchmark, {split: benchmark.splits[split] for split in trained if split in benchmark.splits})


def _open_own(data: DataConfig) -> Sources:
    assert data.forget is not None and data.retain is not None
    read = load_own(
        forget=data.forget,
        retain=data.retain,
        holdout=data.holdout,
        columns=data.columns,
        limit_forget=data.limit_forget,
        limit_retain=min(data.limit_retain or RETAIN_EVAL_ROWS, RETAIN_EVAL_ROWS),  # the rest is streamed
        allow_overlap=data.allow_overlap,
    )
    elsewhere = [] if data.allow_overlap else [*read.splits["forget"], *read.splits.get("holdout", [])]
    retain = FileSplit(data.retain, data.columns, data.limit_retain, frozenset(map(row_hash, elsewhere)))
    return Sources(Benchmark("own", {**read.splits, "retain": []}), {"forget": read.splits["forget"], "retain": retain})


def trained_splits(config: Config) -> tuple[str, ...]:
    """The splits the run's method streams, the leading one first."""
    names = streamed_splits(config.method)
    assert set(names) <= set(SPLITS) and config.method.name in METHODS
    return names


def cache_of(config: Config) -> Path:
    return path_of(config.cache_folder)
