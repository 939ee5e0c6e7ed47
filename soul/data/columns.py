"""Which column of a row is which field of a `Record`, and the checks a row passes to become one.

Messages name the file, the row, the field and column names. A "name" that looks like a sentence is a row in disguise (a CSV without
its header line, an object keyed by question), so it is counted and not shown.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from soul.records import InputError, Record

KNOWN_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "prompt", "instruction", "query", "input"),
    "response": ("answer", "response", "output", "completion"),
    "paraphrase": ("paraphrased_answer", "paraphrased_response", "paraphrase"),
    "perturbed": ("perturbed_answer", "perturbed_answers", "perturbed"),
    "paraphrased_prompt": ("paraphrased_question", "paraphrased_prompt"),
    "id": ("id",),
}
REQUIRED = ("prompt", "response")
NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,39}")
ID_PATTERN = re.compile(r"[\w./:#@+\-]{1,100}")
EXAMPLE = "prompt=question,response=answer"


class ColumnMap(BaseModel):
    """The column of each field. None: the one well-known name that a row has (`KNOWN_NAMES`), or no value for an optional field."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    prompt: str | None = Field(default=None, min_length=1, description="column of the question")
    response: str | None = Field(default=None, min_length=1, description="column of the answer")
    paraphrase: str | None = Field(default=None, min_length=1, description="column of the answer in other words")
    perturbed: str | None = Field(default=None, min_length=1, description="column of the list of plausible wrong answers")
    paraphrased_prompt: str | None = Field(default=None, min_length=1, description="column of the question in other words")
    id: str | None = Field(default=None, min_length=1, description="column of the row's short name")

    @model_validator(mode="after")
    def _one_field_per_column(self) -> Self:
        named = [column for column in self.model_dump().values() if column is not None]
        if len(set(named)) < len(named):
            raise ValueError("two fields use one column: give each field its own column")
        return self

    def to_record(self, row: Mapping[str, Any], *, where: str, row_number: int, split: str) -> Record:
        """Check one row. Its id is `<split>/<row number>` unless a column gives one."""
        place = f"{where}, row {row_number}"
        columns = {field: self._column(field, row, place) for field in KNOWN_NAMES}

        def text(field: str) -> str | None:
            column = columns[field]
            return None if column is None else _text(row[column], f"{place}: {_named(field, column)}", required=field in REQUIRED)

        prompt, response = text("prompt"), text("response")
        assert prompt is not None and response is not None  # required: `_column` or `_text` has raised
        return Record(
            id=_identifier(row, columns["id"], place) or f"{split}/{row_number}",
            prompt=prompt,
            response=response,
            paraphrase=text("paraphrase"),
            perturbed=_texts(row, columns["perturbed"], place),
            paraphrased_prompt=text("paraphrased_prompt"),
        )

    def _column(self, field: str, row: Mapping[str, Any], place: str) -> str | None:
        """The row's column for a field, None where an optional field has none."""
        chosen: str | None = getattr(self, field)
        if chosen is not None:
            if chosen not in row:
                raise InputError(f"{place}: no column {chosen!r} for the {field}. {_advice(field, row)}")
            return chosen
        taken = {column for column in self.model_dump().values() if column is not None}
        found = [name for name in KNOWN_NAMES[field] if name in row and name not in taken]
        if len(found) > 1:
            both = " and ".join(found)
            raise InputError(f"{place}: {both} could each be the {field}. Choose one, for example --columns {field}={found[0]}")
        if not found and field in REQUIRED:
            raise InputError(f"{place}: no column for the {field}. {_advice(field, row)}")
        return found[0] if found else None


def parse_columns(text: str) -> ColumnMap:
    """`prompt=question,response=answer`, as the --columns flag takes it. An empty text is the automatic map."""
    chosen: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise InputError(f"--columns: {part!r} is not field=column. Expected for example {EXAMPLE}")
        if field not in KNOWN_NAMES:
            near = difflib.get_close_matches(field, KNOWN_NAMES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"--columns: unknown field {field!r}. Expected one of {', '.join(KNOWN_NAMES)}.{hint}")
        if field in chosen:
            raise InputError(f"--columns: {field} is given twice. Give it once.")
        chosen[field] = column
    try:
        return ColumnMap(**chosen)
    except ValidationError as error:
        raise InputError(f"--columns: {error.errors()[0]['msg']}") from None


def shown_columns(names: Iterable[str]) -> str:
    """Column names for a message; only their number when one of them cannot be a name."""
    listed = list(names)
    if not listed:
        return "The row has no columns."
    if not all(NAME_PATTERN.fullmatch(str(name)) for name in listed):
        return f"The row has {len(listed)} column(s) with names that look like text (is the header line missing?), so they are not shown."
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return f"Its columns are {', '.join(listed[:20])}{more}."


def _advice(field: str, row: Mapping[str, Any]) -> str:
    """Which columns there are, and the flag to set, with the nearest name filled in."""
    shown = shown_columns(row)
    names = [name for name in row if NAME_PATTERN.fullmatch(str(name))]
    near = next((match for known in KNOWN_NAMES[field] for match in difflib.get_close_matches(known, names, n=1)), None)
    if near is None or len(names) < len(row):
        return f"{shown} Name it, for example --columns {EXAMPLE}"
    return f"{shown} Did you mean {near!r}? Then set --columns {field}={near}"


def _named(field: str, column: str) -> str:
    return field if field == column or not NAME_PATTERN.fullmatch(column) else f"{field} (column {column})"


def _text(value: Any, place: str, *, required: bool) -> str | None:
    if value is None and not required:
        return None
    if not isinstance(value, str):
        raise InputError(f"{place} is {'missing (null)' if value is None else type(value).__name__}. Expected text.")
    if not value.strip():
        raise InputError(f"{place} is blank. Expected text. Fill it in or remove the {'row' if required else 'value'}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{place} holds half of a surrogate pair. Expected valid Unicode. Write the file again as UTF-8.") from None
    return value


def _texts(row: Mapping[str, Any], column: str | None, place: str) -> tuple[str, ...]:
    """The wrong answers: a list of texts, or (in CSV) one cell that spells a JSON list of texts."""
    if column is None or row[column] is None:
        return ()
    value, place = row[column], f"{place}: {_named('perturbed', column)}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError(f'{place} is one text. Expected a list of texts (in CSV, a cell with a JSON list: ["...", "..."]).') from None
    if not isinstance(value, list | tuple):
        raise InputError(f"{place} is {type(value).__name__}. Expected a list of texts.")
    texts = [_text(item, f"{place}, item {number}", required=True) for number, item in enumerate(value, start=1)]
    return tuple(item for item in texts if item is not None)


def _identifier(row: Mapping[str, Any], column: str | None, place: str) -> str | None:
    """Ids appear in messages and reports, so they must not be able to hold a row's text."""
    if column is None or row[column] is None:
        return None
    value = row[column]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not ID_PATTERN.fullmatch(value):
        raise InputError(
            f"{place}: {_named('id', column)} is not a short name. Expected a whole number, or up to 100 letters, digits and ./:#@+-_ "
            "without spaces. Rename the column if it is no id: rows are then numbered."
        )
    return value
