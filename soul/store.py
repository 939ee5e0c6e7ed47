"""Folders on an object store: every node works in a copy of its own, and publishes from there what others are to see.

A *place* is how processes name a file or folder to each other: a path where all of them see the same disk, else a URI. What a node
keeps of `s3://bucket/run/model` lies in `copies()/s3/bucket/run/model`, so a path below `copies()` says which URI it is a copy of, and
relative paths between two copies hold in the store too. Plain paths are their own copies: for them every function here does nothing.

A published folder has a marker, written first as "begun" and last as "whole": a folder whose upload broke off is never used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from soul.object_store import delete_file, find, has_credentials, make_filesystem, put_bytes, read_bytes, receive, send
from soul.records import InputError

MARKER = ".published.json"
COPIES_VARIABLE = "SOUL_STORE_COPIES"
# Of a run directory these are not small: each is fetched by itself, and only where it is needed.
LARGE = ("model", "checkpoints")
STAGES = ".stages"
BEGUN = json.dumps({"files": None})

_KEPT: dict[Path, int] = {}


def is_uri(place: str | Path) -> bool:
    """Whether `place` is on a store and not on a disk."""
    text = str(place)
    return "://" in text and not text.startswith("file://")


def copies() -> Path:
    """Where this node keeps its copies. It may be deleted whenever no run is at work."""
    given = os.environ.get(COPIES_VARIABLE)
    root = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "soul" / "stores"
    return root.expanduser().resolve()


def path_of(place: str) -> Path:
    """Where this node keeps `place`, there or not; the path itself for a path.

    Raises:
        InputError: a URI without a folder, or with credentials or options in it.
    """
    if not is_uri(place):
        return Path(place.removeprefix("file://")).expanduser().resolve()
    scheme, _, rest = place.partition("://")
    bucket, *parts = rest.rstrip("/").split("/")
    if "?" in rest or "@" in rest:
        raise InputError(f"{scheme}://...: expected scheme://bucket/folder, got options or credentials in it. Put them in the environment.")
    if not bucket or not parts or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{place}: expected scheme://bucket/folder, a bucket and at least one name in it.")
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "") if scheme == "s3" else ""
    store = f"{scheme}+{hashlib.sha256(endpoint.encode()).hexdigest()[:8]}" if endpoint else scheme
    return copies().joinpath(store, bucket, *parts)


def place_of(path: str | Path) -> str:
    """What to call `path` before other processes: the URI that it is a copy of, else the path (or hub id) as it is."""
    text = str(path)
    if not os.path.isabs(text):
        return text
    normal, root = PurePosixPath(os.path.normpath(text)), copies()
    if not normal.is_relative_to(root):
        return text
    store, *parts = normal.relative_to(root).parts
    return f"{store.partition('+')[0]}://{'/'.join(parts)}"


def local(place: str) -> str:
    """The path on this node of something whole and finished, fetched once; a path or a hub id is returned as it is.

    Raises:
        InputError: the store has no such thing, or its upload broke off.
    """
    if not is_uri(place):
        return place.removeprefix("file://")
    path = path_of(place)
    if not (pull(path) or pull_file(path)):
        raise InputError(f"{place} does not exist, or its upload broke off. Check the spelling and, for a bucket, its name and region.")
    return str(path)


def checkout(place: str) -> Path:
    """The folder `place` (a run directory, a model or a log) without what is large in a run directory, as the store has it now.

    Raises:
        InputError: the store has no such thing.
    """
    path = path_of(place)
    if is_uri(place):
        attach(path)
        if not path.exists() and not pull_file(path):
            raise InputError(f"{place} does not exist. Check the spelling and, for a bucket, its name and region.")
    return path if is_uri(place) else Path(place.removeprefix("file://")).expanduser()


def push(path: Path) -> None:
    """Let the store have the file, or the folder's files, as they are.

    Raises:
        FileNotFoundError: there is no such file, which may have been deleted under a run that is at work.
    """
    if not is_uri(place := place_of(path)):
        return
    if not path.exists():
        raise FileNotFoundError(f"{path} is gone. Leave {copies()} alone while a run is at work; the same command continues it.")
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            send(file, place if file == path else f"{place}/{file.relative_to(path).as_posix()}")


def publish(folder: Path) -> None:
    """Let the store have exactly the folder's files, whole or not at all."""
    if not is_uri(place := place_of(folder)):
        return
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    files = {name: [(status := (folder / name).stat()).st_size, status.st_mtime_ns] for name in names}
    put_bytes(f"{place}/{MARKER}", BEGUN.encode())
    for name in find(place) or {}:
        if name not in files and name != MARKER:
            delete_file(f"{place}/{name}")
    for name in names:
        send(folder / name, f"{place}/{name}")
    _mark(folder, place, files)


def seal(folder: Path) -> None:
    """Declare the files that several nodes have pushed into `folder` complete, and have all of them here."""
    if not is_uri(place := place_of(folder)):
        return
    files = {name: facts for name, facts in (find(place) or {}).items() if name != MARKER}
    put_bytes(f"{place}/{MARKER}", _marker(files).encode())
    pull(folder)


def _marker(files: dict[str, list[int]]) -> str:
    return json.dumps({"files": files}, sort_keys=True)


def _mark(folder: Path, place: str, files: dict[str, list[int]]) -> None:
    text = _marker(files)
    put_bytes(f"{place}/{MARKER}", text.encode())
    (folder / MARKER).write_text(text)


def holds(folder: Path) -> bool:
    """Whether `folder` is there, for a copy: whole in the store. Fetches nothing."""
    place = place_of(folder)
    return bool(_files_of(place)) if is_uri(place) else folder.is_dir()


def pull(folder: Path) -> bool:
    """Make `folder` what the store has under its name, or nothing. Returns whether it is there; a plain path is looked at only.

    Modification times come along: they name a model's weights.
    """
    place = place_of(folder)
    if not is_uri(place):
        return folder.exists()
    with _lock(folder):
        files = _files_of(place)
        if not files:
            shutil.rmtree(folder, ignore_errors=True)
            return False
        text, known = _marker(files), folder / MARKER
        if known.is_file() and known.read_text() == text:
            return True
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as parent:
            staging, old = Path(parent) / "new", Path(parent) / "old"
            for name, facts in files.items():
                _fetch(f"{place}/{name}", staging / name, facts)
            (staging / MARKER).write_text(text)
            if folder.exists():
                os.replace(folder, old)
            os.replace(staging, folder)
    return True


def facts_of(folder: Path) -> dict[str, list[int]] | None:
    """Name -> size and time of the folder's files, as the store has them for a copy; None if it is not there. Fetches nothing."""
    if is_uri(place := place_of(folder)):
        return _files_of(place) or None
    files = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): [status.st_size, status.st_mtime_ns] for path, status in files} or None


def skim(folder: Path, *, without: str) -> bool:
    """As `pull`, but for the files whose names end like this: what is to be known of a model without its weights.

    A copy that is whole stays so; one that is not is no `pull`ed folder and will be fetched by the next who needs it.
    """
    if not is_uri(place := place_of(folder)):
        return folder.exists()
    with _lock(folder):
        files = _files_of(place)
        if not files:
            shutil.rmtree(folder, ignore_errors=True)
            return False
        known = folder / MARKER
        if known.is_file() and known.read_text() == _marker(files):
            return True
        if known.is_file():
            shutil.rmtree(folder)
        for name, facts in files.items():
            file = folder / name
            if not name.endswith(without) and not _is_as(file, facts):
                _fetch(f"{place}/{name}", file, facts)
    return True


def discard(folder: Path) -> None:
    """Remove a folder, here and in the store; one whose removal broke off is not taken for whole."""
    shutil.rmtree(folder, ignore_errors=True)
    if not is_uri(place := place_of(folder)) or not (names := find(place)):
        return
    put_bytes(f"{place}/{MARKER}", BEGUN.encode())
    for name in (*(name for name in names if name != MARKER), MARKER):
        delete_file(f"{place}/{name}")


def pull_file(file: Path) -> bool:
    """As `pull`, for one small file."""
    if not is_uri(place := place_of(file)):
        return file.is_file()
    data = read_bytes(place)
    if data is None:
        file.unlink(missing_ok=True)
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
    os.replace(staging, file)
    return True


def attach(folder: Path, *, keep: bool = False) -> None:
    """Make the copy of a run directory what the store has, all but what is large. `keep` it from other processes until this one ends.

    While a process of this machine works in it, the copy is ahead of the store and is left as it is.

    Raises:
        InputError: it is to be kept, and another process of this machine is at work in it.
    """
    if not is_uri(place := place_of(folder)):
        return
    if keep:
        keep_folder(folder)
    with _lock(folder):
        if not keep and _is_kept(folder):
            return
        files = {name: facts for name, facts in (find(place) or {}).items() if _is_small(name)}
        for path in folder.rglob("*"):
            known = path.relative_to(folder).as_posix()
            if path.is_file() and _is_small(known) and known not in files:
                path.unlink()
        for name, facts in files.items():
            file = folder / name
            if not _is_as(file, facts):
                _fetch(f"{place}/{name}", file, facts)


def _is_as(file: Path, facts: list[int]) -> bool:
    return file.is_file() and [file.stat().st_size, file.stat().st_mtime_ns] == facts


def _is_small(name: str) -> bool:
    """Whether a file of a run directory comes with it: not what is fetched by itself, no marker, nothing half written."""
    first = PurePosixPath(name).parts[0]
    return first not in LARGE and (first == STAGES or not first.startswith("."))


def check_local(output: str) -> None:
    """For what needs one disk that all its processes see.

    Raises:
        InputError: `output` is on a store.
    """
    if is_uri(output):
        raise InputError(f"--output {output} is a URI, expected a local folder. Mount the storage, or copy the results there in the end.")


def check_writable(place: str) -> None:
    """Raises:
    InputError: nothing can be written to this URI: no credentials, no such bucket, no permission, no room, no answer.
    """
    if not is_uri(place):
        return
    path_of(place)
    if place.startswith("s3://") and not has_credentials():
        raise InputError(
            f"{place} cannot be written: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role."
        )
    try:
        put_bytes(f"{place}/.probe", b"", patient=False)
        delete_file(f"{place}/.probe", patient=False)
    except OSError as error:
        raise InputError(str(error).replace("/.probe", "")) from None


def ray_storage(place: str) -> dict[str, Any]:
    """Where Ray Train is to keep checkpoints, as its `RunConfig` wants it."""
    if not is_uri(place):
        return {"storage_path": str(path_of(place))}
    return {"storage_path": place.partition("://")[2], "storage_filesystem": make_filesystem(place)}


def _files_of(place: str) -> dict[str, list[int]] | None:
    """Name -> size and time of a whole folder's files; None if it is not there or its upload broke off.

    A folder that nobody marked was not published by this program (a model somebody uploaded): its listing is taken for whole.
    """
    found = read_bytes(f"{place}/{MARKER}")
    if found is None:
        return find(place)
    files: dict[str, list[int]] | None = json.loads(found)["files"]
    return files


def _fetch(uri: str, file: Path, facts: list[int]) -> None:
    size, mtime_ns = facts
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as folder:
        staging = Path(folder) / file.name
        receive(uri, staging)
        if (found := staging.stat().st_size) != size:
            raise OSError(f"{uri} has {found} bytes, expected {size}: it was changed while it was read. Run the same again.")
        os.utime(staging, ns=(mtime_ns, mtime_ns))
        os.replace(staging, file)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process of this node at a time; the others wait and find what it has fetched."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def keep_folder(folder: Path) -> None:
    """Lock the other processes of this machine out of a store's copy; the lock goes with this process, however it ends.

    Raises:
        InputError: another process has it.
    """
    if folder in _KEPT or not is_uri(place_of(folder)):
        return
    for _ in range(20):  # somebody may just be looking whether it is locked
        if (handle := _lock_at_once(folder)) is not None:
            _KEPT[folder] = handle
            return
        time.sleep(0.05)
    raise InputError(f"another process of this machine is at work in {place_of(folder)}. Wait for it or stop it.")


def _is_kept(folder: Path) -> bool:
    """By this process or another one."""
    if folder in _KEPT:
        return True
    if (handle := _lock_at_once(folder)) is None:
        return True
    os.close(handle)
    return False


def _lock_at_once(folder: Path) -> int | None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder.parent / f".{folder.name}.run", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
