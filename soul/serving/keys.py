"""API keys: from the environment or a file, kept and passed on as hashes only, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from soul.records import InputError

VARIABLE: Final = "SOUL_API_KEYS"
MIN_LENGTH: Final = 16
_USABLE: Final = re.compile(r"[\x21-\x7e]+")


def read_key_hashes(environment: Mapping[str, str], file: str | None) -> tuple[str, ...]:
    """The hashes of all keys, separated by commas or white space in the variable, one a line in the file (# begins a comment).

    Raises:
        InputError: the file cannot be read, or a key is too short or cannot stand in a header. Keys are never quoted.
    """
    keys = re.split(r"[,\s]+", environment.get(VARIABLE, ""))
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--api-key-file {file} cannot be read ({type(error).__name__}). Expected a text file, one key a line."
            ) from None
        keys += [line.partition("#")[0].strip() for line in lines]
    given = [key for key in keys if key]
    if file is not None and not given:
        raise InputError(f"--api-key-file {file} holds no key. Expected one a line.")
    for number, key in enumerate(given, 1):
        if len(key) < MIN_LENGTH or not _USABLE.fullmatch(key):
            raise InputError(f"API key {number} has {len(key)} characters: expected at least {MIN_LENGTH}, printable ASCII without spaces.")
    return tuple(hash_key(key) for key in given)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def is_admitted(authorization: str | None, hashes: Sequence[str]) -> bool:
    """Whether an Authorization header carries one of the keys. Without keys everybody is admitted."""
    if not hashes:
        return True
    scheme, _, key = (authorization or "").partition(" ")
    given = hash_key(key.strip())
    matches = [hmac.compare_digest(given, known) for known in hashes]  # all of them: the time says nothing
    return scheme.lower() == "bearer" and any(matches)
