"""Reading evaluation logs without trusting them: every complaint names the file and the key, never a row's text."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soul.evaluate.eval_log import Column
from soul.records import InputError

Json = dict[str, Any]


def load_json(path: Path) -> Json:
    """A JSON object from a file, gzip or plain, whatever it is called.

    Raises:
        InputError: no such file, not JSON, or not an object.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        document = json.loads(text)
    except FileNotFoundError:
        raise InputError(f"evaluation log {path} does not exist. Pass a .json or .json.gz file, or a folder with one.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"evaluation log {path} is not JSON ({where}). Expected a TOFU or OpenUnlearning log.") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"evaluation log {path} cannot be read ({type(error).__name__}). Is the file complete?") from None
    if not isinstance(document, dict):
        raise InputError(f"evaluation log {path} holds a {type(document).__name__}, expected a JSON object with one entry per metric.")
    return document


def write_json(path: Path, document: Json) -> None:
    """`path` appears whole or not at all; a name that ends in .gz is compressed (same bytes every time)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(document, allow_nan=False).encode("utf-8")
    staging = path.with_name(f".{path.name}.part")
    staging.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    staging.replace(path)


def by_index(value: object, *, path: Path, key: str) -> dict[str, Any]:
    """A `{"0": ..., "1": ...}` object in the order of its indices."""
    if not isinstance(value, dict) or not value:
        raise InputError(f"{path}, key {key}: expected a non-empty object with one entry per row, got {_kind(value)}.")
    rows = {str(index): row for index, row in value.items()}
    if not all(index.isdecimal() for index in rows):
        raise InputError(f"{path}, key {key}: expected row numbers as keys, got other names. Is it a TOFU or OpenUnlearning log?")
    return dict(sorted(rows.items(), key=lambda item: int(item[0])))


def number(value: object, *, path: Path, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{path}, key {key}: expected a number, got {_kind(value)}.")
    if not math.isfinite(value):
        raise InputError(
            f"{path}, key {key}: expected a finite number, got {value}. The evaluation that wrote the log went wrong: repeat it."
        )
    return float(value)


def loss(value: object, *, path: Path, key: str) -> float:
    """Mean nats per token."""
    result = number(value, path=path, key=key)
    if result < -1e-6:
        raise InputError(f"{path}, key {key}: expected a loss of at least 0 nats, got {result:g}.")
    return result


def share(value: object, *, path: Path, key: str) -> float:
    result = number(value, path=path, key=key)
    if not -1e-6 <= result <= 1 + 1e-6:
        raise InputError(f"{path}, key {key}: expected a share between 0 and 1, got {result:g}.")
    return result


def losses(value: object, *, path: Path, key: str) -> tuple[float, ...]:
    """A list of at least one loss; a bare number counts as a list of one."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise InputError(f"{path}, key {key}: expected at least one number, got an empty list.")
    return tuple(loss(item, path=path, key=key) for item in items)


def count(value: object, *, path: Path, key: str) -> int:
    result = number(value, path=path, key=key)
    if result < 0 or result != int(result):
        raise InputError(f"{path}, key {key}: expected a number of tokens, got {result:g}.")
    return int(result)


def check_rows(columns: Mapping[str, Mapping[str, Any]], *, path: Path) -> tuple[str, ...]:
    """The row numbers that all columns share.

    Raises:
        InputError: two columns have different rows.
    """
    first_key, first = next(iter(columns.items()))
    for key, rows in columns.items():
        if rows.keys() != first.keys():
            raise InputError(
                f"{path}: key {key} has {len(rows)} rows, key {first_key} has {len(first)}, or other row numbers. "
                "Expected the same rows. Was the log put together from two evaluations?"
            )
    return tuple(first)


def indexed(column: Sequence[Any] | Column, keys: Sequence[str]) -> Json:
    return dict(zip(keys, column, strict=True))


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
