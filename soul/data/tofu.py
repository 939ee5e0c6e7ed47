"""The layout of TOFU: which subsets make a benchmark, and how its evaluation rows find the rows that are trained on.

A subset is one file of a folder or one config of a hub dataset: `forget05`, `retain95` (its complement), `forget05_perturbed` (the same
questions with paraphrases and wrong answers), `retain_perturbed` (the first 400 rows of everything), `real_authors_perturbed`, ...
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from soul.data.columns import ColumnMap
from soul.data.files import FORMATS, list_files, read_rows, shown
from soul.records import InputError, Record


class Subsets(Mapping[str, list[Record]]):
    """Subset name -> records. A subset is read each time it is asked for; which ones there are is known without reading."""

    def __init__(self, where: str, loaders: Mapping[str, Callable[[], list[Record]]]) -> None:
        self.where = where
        self._loaders = dict(loaders)

    def __getitem__(self, subset: str) -> list[Record]:
        return self._loaders[subset]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def __contains__(self, subset: object) -> bool:
        return subset in self._loaders


def tofu_folder(uri: str | Path) -> Subsets:
    """The subsets of a folder or prefix: its files named `<subset>.json`, `.jsonl`, `.parquet`, ..."""
    where = shown(uri)
    uris: dict[str, str] = {}
    for name in list_files(uri):
        subset = _subset_name(name)
        if subset is None:
            continue
        if subset in uris:
            raise InputError(f"{where} holds the subset {subset} in two files. Expected one. Remove the other.")
        uris[subset] = _join(str(uri), name)
    return Subsets(where, {subset: partial(_read_subset, file, subset) for subset, file in uris.items()})


def _read_subset(uri: str, subset: str) -> list[Record]:
    columns, where = ColumnMap(), shown(uri)
    return [columns.to_record(row, where=where, row_number=number, split=subset) for number, row in read_rows(uri)]


def tofu_splits(subsets: Subsets, *, forget: str, retain: str | None = None) -> dict[str, list[Record]]:
    """forget, retain, retain_eval and the optional splits. Evaluation subsets that are not there are left out."""
    _require(subsets, forget, [name for name in subsets if name.startswith("forget") and not name.endswith("_perturbed")])
    retain = retain or complement(forget)
    _require(subsets, retain, list(subsets))
    splits = {"forget": subsets[forget], "retain": subsets[retain]}
    perturbed = f"{forget}_perturbed"
    if perturbed in subsets:
        splits["forget"] = with_evaluation_fields(splits["forget"], subsets[perturbed], where=f"{subsets.where}: {perturbed}")
    evaluated = restricted(subsets["retain_perturbed"], splits["retain"]) if "retain_perturbed" in subsets else []
    if evaluated:
        splits["retain_eval"] = evaluated
    holdout = forget.replace("forget", "holdout", 1)
    optional = {"holdout": holdout, "real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed"}
    splits.update({split: subsets[name] for split, name in optional.items() if name in subsets})
    return splits


def _require(subsets: Subsets, subset: str, choices: Sequence[str]) -> None:
    if subset in choices:
        return
    near = difflib.get_close_matches(subset, choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{subsets.where} has no subset {subset!r}. Found: {', '.join(sorted(subsets)) or 'none'}.{hint}")


def complement(forget: str) -> str:
    """The retain subset that goes with a forget subset, by percentages that add to 100: forget05 -> retain95."""
    match = re.fullmatch(r"forget(\d\d)", forget)
    if match is None or match[1] == "00":
        raise InputError(
            f"Which retain subset goes with {forget!r} is not in its name. Expected forget01, forget05, ... or --retain beside it."
        )
    return f"retain{100 - int(match[1]):02d}"


def with_evaluation_fields(records: Sequence[Record], evaluation: Sequence[Record], *, where: str) -> list[Record]:
    """Add paraphrases and wrong answers to the records with the same question. Both lists are in the same order."""
    merged: list[Record] = []
    position = 0
    for record in records:
        extra = evaluation[position] if position < len(evaluation) else None
        if extra is None or extra.prompt != record.prompt:
            merged.append(record)
            continue
        position += 1
        if extra.response != record.response:
            raise InputError(f"{where}, row {position} has the question of {record.id} with another answer. Expected the same answer.")
        merged.append(replace(record, paraphrase=extra.paraphrase, perturbed=extra.perturbed, paraphrased_prompt=extra.paraphrased_prompt))
    if position < len(evaluation):
        raise InputError(
            f"{where}, row {position + 1} has a question that is not in the forget subset from there on. "
            "Expected the questions of the forget subset in the same order."
        )
    return merged


def restricted(evaluation: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """The evaluation rows that are also in `records` (same question and answer), under the ids they have there."""
    ids = {(record.prompt, record.response): record.id for record in records}
    return [replace(row, id=ids[row.prompt, row.response]) for row in evaluation if (row.prompt, row.response) in ids]


def _subset_name(file_name: str) -> str | None:
    """forget05.json -> forget05, None for files that hold no rows."""
    for extension in FORMATS:
        for ending in (extension, f"{extension}.gz"):
            if file_name.lower().endswith(ending):
                return file_name[: -len(ending)]
    return None


def _join(folder: str, name: str) -> str:
    """A file in a folder, before the query that a URI can end with."""
    path, question_mark, query = folder.partition("?") if "://" in folder else (folder, "", "")
    return f"{path.rstrip('/')}/{name}{question_mark}{query}"
