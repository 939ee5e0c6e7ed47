"""One object at a time: an object store through pyarrow, patient with transient faults and clear about the others.

The endpoint and the credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ..., or the machine's role): neither
stands in a path, travels in a task or shows in an error. A PUT is atomic: an object is there whole or not at all.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# What workers must be told by name; only those that are set here.
VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)
ATTEMPTS, FEW_ATTEMPTS = 8, 3  # about 45 s and 2 s of a store that does not answer
CONNECT_S, SILENCE_S = 5.0, 60.0
PAUSES_S = (0.3, 1.0, 3.0)
CHUNK_BYTES = 32 * 2**20

# (pattern, what it means). pyarrow has one type for all of them, and no attributes.
_REASONS = (
    (
        r"NO_SUCH_BUCKET|NoSuchBucket|[Bb]ucket .*(does not exist|not found)",
        "there is no such bucket. Check its name and region, or create it",
    ),
    (
        r"ACCESS_DENIED|AccessDenied|HTTP status 40[13]|INVALID_ACCESS_KEY|InvalidAccessKey|SIGNATURE_DOES_NOT_MATCH|TOKEN",
        "permission denied. Check the credentials in the environment (AWS_ACCESS_KEY_ID, ...) and what they may do",
    ),
    (
        r"HTTP status 507|HTTP status 413|StorageFull|InsufficientStorage|QuotaExceeded|EntityTooLarge|ENTITY_TOO_LARGE|No space left",
        "the store is full or over its quota. Make room, then run the same again",
    ),
    (r"NETWORK_CONNECTION|curlCode", "the store does not answer. Check the network and AWS_ENDPOINT_URL"),
)
# Statuses that the SDK gives up on where the body is not S3's own (a gateway's 502 page).
_TRANSIENT = re.compile(r"HTTP status (429|500|502|503|504)|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE")


def why(error: OSError) -> str:
    """What went wrong, in our words where they are clearer, else the store's own name for it."""
    text = str(error)
    for pattern, meaning in _REASONS:
        if re.search(pattern, text):
            return meaning
    named = re.search(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))?", text)
    what = f"error {named[2] or named[1]}" if named else type(error).__name__
    return f"the store says {what}. Try again later, or check the store's own log"


def environment() -> dict[str, str]:
    """The variables above that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def has_credentials() -> bool:
    """Whether S3's usual chain (environment, profile, role) finds any; without them pyarrow would ask as nobody."""
    import botocore.session

    return botocore.session.Session().get_credentials() is not None


def make_filesystem(uri: str, *, attempts: int = ATTEMPTS) -> Any:
    """The pyarrow filesystem of a URI. A process that is handed one makes its own, from its own environment."""
    scheme, _, path = uri.partition("://")
    return _filesystem(scheme, path.partition("/")[0], attempts, tuple(environment().items()))


@lru_cache(maxsize=8)
def _filesystem(scheme: str, bucket: str, attempts: int, variables: tuple[tuple[str, str], ...]) -> Any:
    from pyarrow import fs

    if scheme != "s3":
        return fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]

    class PatientS3(fs.S3FileSystem):  # type: ignore[misc]
        """Keeps its patience when it is pickled, and leaves the credentials behind."""

        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return make_filesystem, (f"s3://{bucket}",)

    told = dict(variables)
    protocol, _, host = told.get("AWS_ENDPOINT_URL", "").rpartition("://")
    region = told.get("AWS_REGION") or told.get("AWS_DEFAULT_REGION")
    return PatientS3(
        endpoint_override=host or None,
        scheme=protocol or "https",
        region=region or ("us-east-1" if host else fs.resolve_s3_region(bucket)),
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        allow_delayed_open=True,  # a small object is one request
    )


def _do(call: Callable[[Any, str], T], uri: str, doing: str, *, patient: bool = True) -> T:
    """`call(filesystem, path)`, again after a pause where the fault may pass.

    Raises:
        FileNotFoundError: there is no such object.
        OSError: everything else, with a message for the user.
    """
    path = uri.partition("://")[2]
    for pause in (*(PAUSES_S if patient else ()), None):
        try:
            return call(make_filesystem(uri, attempts=ATTEMPTS if patient else FEW_ATTEMPTS), path)
        except FileNotFoundError:
            raise
        except OSError as error:
            if pause is None or not _TRANSIENT.search(str(error)):
                raise OSError(f"{uri} cannot be {doing}: {why(error)}.") from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def put_bytes(uri: str, data: bytes, *, patient: bool = True) -> None:
    def put(filesystem: Any, path: str) -> None:
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)

    _do(put, uri, "written", patient=patient)


def read_bytes(uri: str) -> bytes | None:
    """A small object; None if there is none."""

    def read(filesystem: Any, path: str) -> bytes:
        with filesystem.open_input_stream(path) as stream:
            data: bytes = stream.read()
            return data

    try:
        return _do(read, uri, "read")
    except FileNotFoundError:
        return None


def send(file: Path, uri: str) -> None:
    """A file of any size to the store. By hand: what pyarrow's copy_files closes in the end may fail without a word."""

    def put(filesystem: Any, path: str) -> None:
        with file.open("rb") as source, filesystem.open_output_stream(path) as stream:
            while chunk := source.read(CHUNK_BYTES):
                stream.write(chunk)

    _do(put, uri, "written")


def receive(uri: str, file: Path) -> None:
    """An object of any size to a file."""

    def get(filesystem: Any, path: str) -> None:
        from pyarrow import fs

        given = {"source_filesystem": filesystem, "destination_filesystem": fs.LocalFileSystem()}
        fs.copy_files(path, str(file), chunk_size=CHUNK_BYTES, use_threads=False, **given)

    _do(get, uri, "read")


def delete_file(uri: str, *, patient: bool = True) -> None:
    _do(lambda filesystem, path: filesystem.delete_file(path), uri, "deleted", patient=patient)


def find(uri: str) -> dict[str, list[int]] | None:
    """Relative name -> [size, modification time in ns] of all files below a folder; None if there are none."""

    def look(filesystem: Any, path: str) -> dict[str, list[int]]:
        from pyarrow import fs

        entries = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        files = [entry for entry in entries if entry.type == fs.FileType.File]
        return {entry.path[len(path) + 1 :]: [entry.size, entry.mtime_ns] for entry in files}

    return _do(look, uri, "listed") or None
