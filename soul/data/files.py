"""Rows of one data file, streamed: JSON lines, a JSON array, CSV or Parquet, from a local path or any URI that pyarrow opens.

A row's number is the 1-based line it starts on in JSON lines and CSV, and its 1-based position in a JSON array and Parquet.
Parsers quote what they could not parse, so their messages are never passed on: an error here names the file and the line only.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from soul.records import InputError

Row = dict[str, Any]
Line = tuple[int, str]

FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
MAX_LINE_BYTES = 64 * 1024 * 1024
PARQUET_BATCH_ROWS = 1024


def read_rows(uri: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield (row number, row). Only a JSON array is held in memory as a whole. The file is opened at the first row."""
    where = shown(uri)
    filesystem, path = open_filesystem(uri)
    kind, is_gzip = file_format(path, where)
    _check_readable(filesystem, path, where)
    num_rows = 0
    for number, row in _parquet_rows(filesystem, path, where) if kind == "parquet" else _text_rows(filesystem, path, where, kind, is_gzip):
        num_rows += 1
        yield number, row
    if num_rows == 0:
        raise InputError(f"{where} holds no rows. Expected at least one. Give a file with data.")


def shown(uri: str | Path) -> str:
    """The path or URI as messages may print it: without the credentials and the query that a URI can carry."""
    text = str(uri)
    if "://" not in text:
        return text
    return re.sub(r"(?<=://)[^@]*:.*@", "", text.split("?")[0])


def open_filesystem(uri: str | Path) -> tuple[Any, str]:
    """A pyarrow filesystem and the path inside it. `from_uri` (and nothing else) honours AWS_ENDPOINT_URL."""
    text = str(uri)
    if "://" not in text:
        return pafs.LocalFileSystem(), str(Path(text).expanduser())
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ImportError):
        raise InputError(
            f"{shown(uri)} is not a URI that pyarrow can open. Expected a local path or one of s3://, gs://, hf://, file:///. "
            "Check the scheme, and write special characters percent-encoded."
        ) from None
    return filesystem, path


def list_files(uri: str | Path) -> list[str]:
    """Names of the files directly in a folder or under a prefix, sorted."""
    filesystem, path = open_filesystem(uri)
    try:
        entries = filesystem.get_file_info(pafs.FileSelector(path))
    except FileNotFoundError:
        raise InputError(f"The folder {shown(uri)} does not exist. Check its spelling and, for a bucket, its name and region.") from None
    except OSError as error:
        raise InputError(f"The folder {shown(uri)} cannot be listed: {_reason(error)}.") from None
    return sorted(entry.base_name for entry in entries if entry.type == pafs.FileType.File)


def file_format(path: str, where: str) -> tuple[str, bool]:
    """(json, csv or parquet; whether it is gzipped), from the extensions."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    is_gzip = suffixes[-1:] == [".gz"]
    extension = (suffixes[:-1] if is_gzip else suffixes)[-1:]
    kind = FORMATS.get(extension[0]) if extension else None
    if kind is None or (is_gzip and kind == "parquet"):
        raise InputError(
            f"{where} has no extension that says how to read it. Expected one of {', '.join(FORMATS)}; "
            "all but .parquet also with .gz behind it. Rename or convert the file."
        )
    return kind, is_gzip


def _check_readable(filesystem: Any, path: str, where: str) -> None:
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {_reason(error)}.") from None
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"{where} does not exist. Check its spelling and, for a bucket, its name and region.")
    if info.type == pafs.FileType.Directory:
        raise InputError(f"{where} is a folder. Expected one file.")
    if info.size == 0:
        raise InputError(f"{where} is empty. Expected at least one row.")


def _reason(error: OSError) -> str:
    """What a filesystem said before any content was read, in our words where they are clearer."""
    text = str(error)
    if isinstance(error, PermissionError) or "ACCESS_DENIED" in text or "Permission denied" in text:
        return "permission denied. Check the file's rights or the credentials in the environment (AWS_ACCESS_KEY_ID, ...)"
    if "NETWORK_CONNECTION" in text:
        return "the storage service does not answer. Check the network and AWS_ENDPOINT_URL"
    return f"the storage says {type(error).__name__}. Check the path, the rights and the credentials"


def _text_rows(filesystem: Any, path: str, where: str, kind: str, is_gzip: bool) -> Iterator[tuple[int, Row]]:
    try:
        raw = filesystem.open_input_stream(path, compression="gzip" if is_gzip else None)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {_reason(error)}.") from None
    with io.BufferedReader(raw, buffer_size=1 << 20) as stream:
        lines = _lines(stream, where)
        yield from _csv_rows(lines, where) if kind == "csv" else _json_rows(lines, where)


def _lines(stream: io.BufferedReader, where: str) -> Iterator[Line]:
    """Decoded lines with their numbers. A byte-order mark is dropped."""
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(MAX_LINE_BYTES)
        except OSError:
            raise InputError(f"{where} breaks off or is damaged near line {number}. Copy or compress it again.") from None
        if not line:
            return
        if len(line) == MAX_LINE_BYTES:
            raise InputError(f"{where}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB. Expected one row per line.")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{where}, line {number} is not UTF-8 text. Save the file as UTF-8.") from None
        yield number, text


def _json_rows(lines: Iterator[Line], where: str) -> Iterator[tuple[int, Row]]:
    """JSON lines, or one array when the first character that is not blank opens one."""
    is_first = True
    for number, text in lines:
        if not text.strip():
            continue
        if is_first and text.lstrip().startswith("["):
            yield from _array_rows("\n" * (number - 1) + text + "".join(rest for _, rest in lines), where)
            return
        is_first = False
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(f"{where}, line {number} is not JSON. Expected one object per line, or one array of objects.") from None
        yield number, _object(row, f"{where}, line {number}")


def _array_rows(text: str, where: str) -> Iterator[tuple[int, Row]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno
        raise InputError(f"{where}, line {line} breaks the JSON array. Expected [object, object, ...] and nothing behind it.") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not a JSON array that can be read. Expected [object, object, ...].") from None
    for number, row in enumerate(rows, start=1):
        yield number, _object(row, f"{where}, row {number}")


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{place} is a JSON {type(row).__name__}. Expected an object with one key per column.")
    return row


def _csv_rows(lines: Iterator[Line], where: str) -> Iterator[tuple[int, Row]]:
    """The first line names the columns. An empty cell is a missing value."""
    reader = csv.reader((text for _, text in lines), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            raise InputError(
                f"{where}, the row at line {start} is not CSV. Check its quotes: a cell with a comma, a quote or a line break "
                f'stands in "...", a quote inside is written twice, and a cell has at most {csv.field_size_limit()} characters.'
            ) from None
        if not cells:
            continue
        if header is None:
            header = _csv_header(cells, where)
            continue
        if len(cells) != len(header):
            raise InputError(f"{where}, the row at line {start} has {len(cells)} cells. Expected {len(header)}, as in the header line.")
        yield start, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _csv_header(cells: list[str], where: str) -> list[str]:
    if len(cells) == 1 and re.search(r"[;\t|]", cells[0]):
        raise InputError(
            f"{where} has one column whose name holds a ; or | or a tab. Expected commas between the cells. Save it with commas."
        )
    names = [cell.strip() for cell in cells]
    if "" in names or len(set(names)) < len(names):
        raise InputError(f"{where} has a header with an empty or repeated name. Expected one different name per column in the first line.")
    return names


def _parquet_rows(filesystem: Any, path: str, where: str) -> Iterator[tuple[int, Row]]:
    try:
        source = filesystem.open_input_file(path)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {_reason(error)}.") from None
    number = 0
    with source:
        batches = _parquet_batches(source)
        while True:
            try:
                rows = next(batches, None)
            except (pa.ArrowException, OSError, ValueError):
                raise InputError(f"{where} is not a Parquet file that can be read (after row {number}). Write it again.") from None
            if rows is None:
                return
            for row in rows:
                number += 1
                yield number, row


def _parquet_batches(source: Any) -> Iterator[list[Row]]:
    for batch in pq.ParquetFile(source).iter_batches(batch_size=PARQUET_BATCH_ROWS):
        yield batch.to_pylist()
