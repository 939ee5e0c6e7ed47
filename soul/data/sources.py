"""Where the records of an experiment come from: a benchmark's named splits, whatever their source.

`open_benchmark` tells the sources apart: "fictitious", a folder or prefix in TOFU's layout, or a hub dataset with TOFU's configs.
`load_own` takes the user's own files.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from soul.data.columns import ColumnMap
from soul.data.fictitious import fictitious_splits
from soul.data.files import read_rows, shown
from soul.data.tofu import Subsets, tofu_folder, tofu_splits
from soul.records import InputError, Record

FICTITIOUS = "fictitious"
RETAIN_EVAL_ROWS = 400  # as many as TOFU's retain_perturbed: a likelihood pass over all of retain would dwarf the rest
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")
SHOWN_ROWS = 5


@dataclass(frozen=True)
class Benchmark:
    """Named splits. `forget` and `retain` are always there; `retain_eval` (the retain rows that evaluation looks at), `holdout`,
    `real_authors` and `world_facts` where the source has them. The target was trained on the splits in `trained`.
    """

    name: str
    splits: Mapping[str, list[Record]]
    trained: tuple[str, ...] = ("forget", "retain")

    def fingerprints(self) -> dict[str, str]:
        return {split: fingerprint(records) for split, records in self.splits.items()}


def fingerprint(records: Sequence[Record]) -> str:
    """SHA-256 (hex) of the records, their order and nothing else: the key of caches, and what a manifest says instead of the data."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(astuple(record), ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()


def open_benchmark(
    data: str,
    *,
    forget: str = "forget05",
    retain: str | None = None,
    num_authors: int = 200,
    seed: int = 0,
    revision: str | None = None,
    limit_forget: int | None = None,
    limit_retain: int | None = None,
    allow_overlap: bool = False,
) -> Benchmark:
    """`num_authors` and `seed` mean something to "fictitious" only, `revision` to a hub dataset only."""
    if data == FICTITIOUS:
        benchmark = load_fictitious(num_authors=num_authors, seed=seed, forget=forget, retain=retain, allow_overlap=allow_overlap)
    elif "://" in data or (data and Path(data).expanduser().exists()):
        benchmark = load_tofu(data, forget=forget, retain=retain, allow_overlap=allow_overlap)
    elif HUB_ID.fullmatch(data) and not difflib.get_close_matches(data, [FICTITIOUS], cutoff=0.8):
        benchmark = load_hub(data, forget=forget, retain=retain, revision=revision, allow_overlap=allow_overlap)
    else:
        raise InputError(
            f"--data {shown(data)}: no such folder, and not the name of a hub dataset. Expected {FICTITIOUS!r}, a folder or URI with "
            "files named forget05.json, retain95.json, ..., or a hub dataset such as locuslab/TOFU."
        )
    return limited(benchmark, forget=limit_forget, retain=limit_retain)


def load_tofu(uri: str | Path, *, forget: str = "forget05", retain: str | None = None, allow_overlap: bool = False) -> Benchmark:
    """A folder or prefix in TOFU's layout. `retain`: the complement of `forget` unless named."""
    if "://" not in str(uri) and Path(uri).expanduser().is_file():
        raise InputError(f"{shown(uri)} is a file. Expected a folder in TOFU's layout. For own files give a forget and a retain file.")
    return _checked(Benchmark("tofu", tofu_splits(tofu_folder(uri), forget=forget, retain=retain)), allow_overlap=allow_overlap)


def load_hub(
    dataset_id: str,
    *,
    forget: str = "forget05",
    retain: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    allow_overlap: bool = False,
) -> Benchmark:
    """A hub dataset whose configs are TOFU's subsets. `token` None: the one of HF_TOKEN or `hf auth login`, if any."""
    import datasets  # a second and pandas, for this source only
    from huggingface_hub.errors import HfHubHTTPError

    failures = (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError)

    def load(subset: str) -> list[Record]:
        try:
            rows = datasets.load_dataset(dataset_id, name=subset, split="train", revision=revision, token=token)
            named = [dict(row) for row in rows]
        except failures as error:
            raise InputError(_hub_failure(dataset_id, error)) from None
        columns, where = ColumnMap(), f"{dataset_id} ({subset})"
        return [columns.to_record(row, where=where, row_number=number, split=subset) for number, row in enumerate(named, start=1)]

    try:
        names = datasets.get_dataset_config_names(dataset_id, revision=revision, token=token)
    except failures as error:
        raise InputError(_hub_failure(dataset_id, error)) from None
    subsets = Subsets(dataset_id, {name: partial(load, name) for name in names})
    return _checked(Benchmark("tofu", tofu_splits(subsets, forget=forget, retain=retain)), allow_overlap=allow_overlap)


def load_fictitious(
    *, num_authors: int = 200, seed: int = 0, forget: str = "forget05", retain: str | None = None, allow_overlap: bool = False
) -> Benchmark:
    """The built-in generator. Every record has its evaluation fields; `retain_eval` are the first rows of retain."""
    generated = fictitious_splits(num_authors=num_authors, seed=seed)
    subsets = Subsets(FICTITIOUS, {name: partial(list, records) for name, records in generated.items()})
    splits = tofu_splits(subsets, forget=forget, retain=retain)
    splits["retain_eval"] = splits["retain"][:RETAIN_EVAL_ROWS]
    splits |= {name: generated[name] for name in ("holdout", "real_authors", "world_facts")}
    return _checked(Benchmark(FICTITIOUS, splits), allow_overlap=allow_overlap)


def load_own(
    *,
    forget: str | Path,
    retain: str | Path,
    holdout: str | Path | None = None,
    columns: ColumnMap | None = None,
    limit_forget: int | None = None,
    limit_retain: int | None = None,
    allow_overlap: bool = False,
) -> Benchmark:
    """The user's own files, or their first rows. `retain_eval` are the first rows of retain."""
    columns = columns or ColumnMap()
    files = {"forget": forget, "retain": retain} | ({} if holdout is None else {"holdout": holdout})
    limits = {"forget": limit_forget, "retain": limit_retain}
    splits = {split: load_split(file, split=split, columns=columns, limit=limits.get(split)) for split, file in files.items()}
    splits["retain_eval"] = splits["retain"][:RETAIN_EVAL_ROWS]
    return _checked(Benchmark("own", splits), allow_overlap=allow_overlap)


def load_split(uri: str | Path, *, split: str, columns: ColumnMap | None = None, limit: int | None = None) -> list[Record]:
    """The records of one file, or its first `limit`; the rest is not read."""
    columns, where = columns or ColumnMap(), shown(uri)
    return [columns.to_record(row, where=where, row_number=number, split=split) for number, row in islice(read_rows(uri), limit)]


def limited(benchmark: Benchmark, *, forget: int | None = None, retain: int | None = None) -> Benchmark:
    """The first rows of forget and retain (None: all), and of retain_eval those that are still in retain."""
    splits = dict(benchmark.splits)
    for split, limit in (("forget", forget), ("retain", retain)):
        if limit is not None and limit < 1:
            raise InputError(f"--limit-{split} is {limit}. Expected at least 1 row.")
        splits[split] = splits[split][:limit]
    kept = {record.id for record in splits["retain"]}
    evaluated = [record for record in splits.pop("retain_eval", []) if record.id in kept]
    return replace(benchmark, splits=splits | ({"retain_eval": evaluated} if evaluated else {}))


def _checked(benchmark: Benchmark, *, allow_overlap: bool) -> Benchmark:
    for split, records in benchmark.splits.items():
        if split in benchmark.trained and not records:
            raise InputError(f"The {split} split has no rows. Expected at least one.")
        seen: dict[str, int] = {}
        for number, record in enumerate(records, start=1):
            first = seen.setdefault(record.id, number)
            if first != number:
                raise InputError(f"The {split} split gives rows {first} and {number} the same id. Expected each id once.")
    if not allow_overlap:
        _check_disjoint(benchmark.splits, "forget", "retain", "it would be forgotten and kept at once")
        for trained in benchmark.trained:
            _check_disjoint(benchmark.splits, "holdout", trained, "a holdout row must be new to the target")
    return benchmark


def _check_disjoint(splits: Mapping[str, list[Record]], left: str, right: str, reason: str) -> None:
    """No row (same question and same answer) of one split is in the other."""
    positions = {(record.prompt, record.response): number for number, record in enumerate(splits.get(right, []), start=1)}
    pairs = [
        (number, positions[record.prompt, record.response])
        for number, record in enumerate(splits.get(left, []), start=1)
        if (record.prompt, record.response) in positions
    ]
    if not pairs:
        return
    listed = ", ".join(f"{left} row {a} = {right} row {b}" for a, b in pairs[:SHOWN_ROWS])
    more = f" and {len(pairs) - SHOWN_ROWS} more" if len(pairs) > SHOWN_ROWS else ""
    raise InputError(f"{len(pairs)} row(s) of {left} are also in {right} ({reason}): {listed}{more}. Remove them, or set --allow-overlap.")


def _hub_failure(dataset_id: str, error: Exception) -> str:
    """What to do when the hub gives nothing. The error's own text is left out: a parser's message can quote a row."""
    return (
        f"The hub dataset {dataset_id!r} cannot be loaded ({type(error).__name__}), and there is no folder of that name. Check the name, "
        "the network and, for a gated dataset, `hf auth login`. Offline: pass a folder with its files instead (forget05.json, ...)."
    )
