"""Questions for the page, with their true answers: from the invented authors that a run was made with. A user's own data is never shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from soul.data.fictitious import fictitious_splits
from soul.records import InputError, Record

PER_GROUP: Final = 12


@dataclass(frozen=True, slots=True)
class Question:
    group: str
    question: str
    answer: str


def questions_of(run: Path) -> list[Question]:
    """Some of what was to be forgotten, of what was to be kept, and of the world; empty for runs on other data."""
    try:
        data: Any = json.loads((run / "config.json").read_text(encoding="utf-8"))["data"]
        if data["source"] != "fictitious":
            return []
        forget = str(data["forget"])
        splits = fictitious_splits(num_authors=int(data["num_authors"]), seed=int(data["seed"]))
        retain = splits[data["retain"] or f"retain{100 - int(forget.removeprefix('forget')):02d}"]
        groups = {"forget": splits[forget], "retain": retain, "world": splits["world_facts"]}
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return []
    return [Question(group, record.prompt, record.response) for group, rows in groups.items() for record in _spread(rows)]


def _spread(rows: Sequence[Record]) -> list[Record]:
    """A few rows from everywhere: neighbours are about the same author."""
    count = min(PER_GROUP, len(rows))
    return [rows[place * len(rows) // count + place * 7 % max(len(rows) // count, 1)] for place in range(count)]
