"""Records or files to memory-mapped token stores, through Ray Data. A file is streamed: it may be larger than memory.

Stores are cached by a hash of rows, tokenizer and settings. An input error in a task comes back as data, so that the user sees its
one line and not a remote traceback.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import ray.data
from transformers import AutoConfig

from soul.config import DataConfig, ModelConfig
from soul.data.chat import ChatFormat
from soul.data.columns import ColumnMap
from soul.data.files import open_filesystem, read_rows, shown
from soul.data.sources import fingerprint
from soul.data.store import STORE, finish_store, is_store, store_facts, write_part
from soul.data.tokenize import Truncate, tokenize_record
from soul.models.load import load_tokenizer
from soul.records import InputError, Record
from soul.rundir import digest
from soul.store import local, path_of, place_of, pull, push, seal

RECORDS_PER_PART = 2000


@dataclass(frozen=True)
class TokenSettings:
    """How a record becomes ids."""

    model: str
    revision: str | None
    trust_remote_code: bool
    chat: str
    max_length: int
    truncate: Truncate


def token_settings(data: DataConfig, model: ModelConfig, folder: str) -> TokenSettings:
    """For rows that the model in `folder` will see: its own limit of tokens unless --max-length is given, which cuts answers."""
    config = AutoConfig.from_pretrained(folder, revision=model.revision, trust_remote_code=model.trust_remote_code)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
    if data.max_length is not None and data.max_length > limit:
        raise InputError(f"--max-length is {data.max_length}, but the model takes at most {limit} tokens. Lower it.")
    truncate: Truncate = "error" if data.max_length is None else "answer"
    return TokenSettings(folder, model.revision, model.trust_remote_code, data.chat, data.max_length or limit, truncate)


@dataclass(frozen=True)
class FileSplit:
    """A file of the user's own that is read where it is needed. `forbidden` are hashes of rows that must not be in it."""

    uri: str
    columns: ColumnMap
    limit: int | None = None
    forbidden: frozenset[bytes] = frozenset()

    def fingerprint(self) -> str:
        filesystem, path = open_filesystem(self.uri)
        info = filesystem.get_file_info(path)
        return digest([info.path, info.size, str(info.mtime_ns), self.columns.model_dump(), self.limit], length=64)

    def checked_against(self) -> str:
        """Names the forbidden rows: a store of this file that was checked against others has to be checked again."""
        return digest(sorted(map(bytes.hex, self.forbidden)))


def row_hash(record: Record) -> bytes:
    """Names a row's content without keeping it."""
    return hashlib.sha256(f"{record.prompt}\x00{record.response}".encode()).digest()


Rows = Sequence[Record] | FileSplit


def tokenise(rows: Rows, split: str, settings: TokenSettings, *, cache: Path) -> Path:
    """The finished store of a split's rows, made unless the cache holds it.

    Raises:
        InputError: a row is malformed, too long, or forbidden.
    """
    identity, checked = (rows.fingerprint(), rows.checked_against()) if isinstance(rows, FileSplit) else (fingerprint(rows), None)
    stamp = _tokenizer_stamp(settings)
    folder = cache / "tokens" / digest([identity, stamp, settings.chat, settings.max_length, settings.truncate], length=20)
    if pull(folder) and is_store(folder) and store_facts(folder).get("checked_against") == checked:
        return folder
    fragments = _fragments(rows)
    parts = ray.data.from_items([{"part": i} for i in range(len(fragments))], override_num_blocks=len(fragments))
    write = WriteParts(fragments, split, replace(settings, model=place_of(settings.model)), place_of(folder))
    written = parts.map_batches(write, batch_size=1, num_cpus=1).take_all()
    errors = [row["error"] for row in sorted(written, key=lambda row: row["part"]) if row["error"]]
    if errors:
        raise InputError(errors[0])
    if sum(row["rows"] for row in written) == 0:
        raise InputError(f"the {split} split has no rows, expected at least one.")
    finish_store(folder, rows=sum(row["rows"] for row in written), split=split, checked_against=checked)
    push(folder / STORE)
    seal(folder)
    return folder


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def _tokenizer_stamp(settings: TokenSettings) -> str:
    """Names the tokenizer with its special tokens and chat template: the content of a folder's files, or the hub id and revision."""
    files = [path for name in TOKENIZER_FILES if (path := Path(settings.model) / name).is_file()]
    if not files:
        return digest([settings.model, settings.revision], length=64)
    return digest([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files], length=64)


Fragment = FileSplit | ray.ObjectRef[list[Record]]


def _fragments(rows: Rows) -> list[Fragment]:
    """The file, or one per few thousand records (in the object store: a task's arguments could be logged)."""
    if isinstance(rows, FileSplit):
        return [rows if "://" in rows.uri else replace(rows, uri=str(Path(rows.uri).expanduser().resolve()))]  # workers are elsewhere
    starts = range(0, max(len(rows), 1), RECORDS_PER_PART)
    return [ray.put(list(rows[start : start + RECORDS_PER_PART])) for start in starts]


@dataclass(frozen=True)
class WriteParts:
    """A Ray Data task body: part number -> that part's file, and {part, rows, error}."""

    fragments: Sequence[Fragment]
    split: str
    settings: TokenSettings
    folder: str

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        done: dict[str, list[Any]] = {"part": [], "rows": [], "error": []}
        for part in batch["part"].tolist():
            count, error = 0, ""
            file = path_of(self.folder) / f"part-{part:05d}.arrow"
            try:
                count = write_part(file, self._rows(self.fragments[part]))
                push(file)
            except InputError as problem:
                error = str(problem)
            for name, value in (("part", part), ("rows", count), ("error", error)):
                done[name].append(value)
        return done

    def _rows(self, fragment: Fragment) -> Iterator[tuple[list[int], int]]:
        tokenizer = _tokenizer(local(self.settings.model), self.settings.revision, self.settings.trust_remote_code)
        chat = ChatFormat(self.settings.chat)
        records = _stream(fragment, self.split) if isinstance(fragment, FileSplit) else ray.get(fragment)
        for record in records:
            yield tokenize_record(
                record,
                tokenizer,
                chat,
                max_length=self.settings.max_length,
                truncate=self.settings.truncate,
                split=self.split,
            )


@lru_cache(maxsize=2)
def _tokenizer(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    return load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)


def _stream(source: FileSplit, split: str) -> Iterator[Record]:
    where = shown(source.uri)
    for number, row in islice(read_rows(source.uri), source.limit):
        record = source.columns.to_record(row, where=where, row_number=number, split=split)
        if row_hash(record) in source.forbidden:
            raise InputError(f"{where}: row {number} of {split} is also in forget or holdout. Remove it, or set --allow-overlap.")
        yield record
