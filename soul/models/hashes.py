"""Hashes of a model folder's files. Who writes the files writes their hashes down beside them, while they are still in memory.

The record saves reading tens of gigabytes for a name; it proves nothing. Whoever must know that a folder is what it was takes
`model_sha256`, which reads every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Final

from soul.object_store import read_bytes
from soul.records import InputError
from soul.store import facts_of, is_uri, place_of, pull

RECORD: Final = ".sha256.json"
IGNORED: Final = ("README.md",)  # the model card says nothing to the model
_CHUNK: Final = 1 << 20
_AT_ONCE: Final = 8


def file_sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def model_files(folder: Path) -> Iterator[Path]:
    """The files of a model folder that have a say in what it answers, in a fixed order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and _counts(path.relative_to(folder).as_posix()):
            yield path


def _counts(name: str) -> bool:
    return name not in IGNORED and not any(part.startswith(".") for part in PurePosixPath(name).parts)


def model_sha256(folder: Path) -> str:
    """One hash for weights, configuration and tokenizer, from their bytes.

    Raises:
        InputError: the folder is not there or is empty.
    """
    return _combined(folder, _hashes(folder, [path.relative_to(folder).as_posix() for path in model_files(folder)]))


def recorded_sha256(folder: Path) -> str:
    """The same from the record, where it is of the files that are there by size and time; others are read. Of a store's copy nothing is
    fetched for that unless something has to be read.

    Raises:
        InputError: the folder is not there or is empty.
    """
    files = {name: facts for name, facts in (facts_of(folder) or {}).items() if _counts(name)}
    record = _read_record(folder)
    known = {name: record[name][1] for name, facts in files.items() if name in record and record[name][0] == facts}
    rest = [name for name in files if name not in known]
    if rest and not pull(folder):
        raise InputError(f"expected a model folder at {place_of(folder)}, found no files. Was it moved or deleted?")
    return _combined(folder, {**known, **_hashes(folder, rest)})


def record_hashes(folder: Path) -> None:
    """Write the record of a folder that is complete."""
    names = {path.relative_to(folder).as_posix(): path.stat() for path in model_files(folder)}
    hashes = _hashes(folder, names)
    found = {name: [[status.st_size, status.st_mtime_ns], hashes[name]] for name, status in names.items()}
    (folder / RECORD).write_text(json.dumps(found, sort_keys=True))


def _read_record(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Name -> size and time of the file that was hashed, and its hash; empty where there is none, or none that can be read."""
    place, file = place_of(folder), folder / RECORD
    try:
        data = read_bytes(f"{place}/{RECORD}") if is_uri(place) else file.read_bytes() if file.is_file() else None
        found = json.loads(data or b"{}")
        return {str(name): ([int(fact) for fact in facts], str(sha256)) for name, (facts, sha256) in found.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Several files at a time: hashing leaves Python's lock alone."""
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        wanted = list(names)
        return dict(zip(wanted, pool.map(lambda name: file_sha256(folder / name), wanted), strict=True))


def _combined(folder: Path, hashes: Mapping[str, str]) -> str:
    if not hashes:
        raise InputError(f"expected a model folder at {folder}, found no files. Was it moved or deleted?")
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
