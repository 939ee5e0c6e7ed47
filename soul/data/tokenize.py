"""Records to labelled token ids: the prompt, then the supervised part, which is the answer and the EOS behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from soul.batch import TokenRow
from soul.data.chat import ChatFormat, Tokenizer
from soul.records import InputError, Record

Truncate = Literal["error", "answer"]


class SpecialIds(NamedTuple):
    eos: int
    pad: int


def check_tokenizer(tokenizer: Tokenizer) -> SpecialIds:
    """EOS and the id to pad with, which is EOS where there is no pad token: masks come from lengths, so a real EOS stays visible."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise InputError(
            "The tokenizer has no EOS token, so a model could not learn where an answer ends. "
            'Set "eos_token" in its tokenizer_config.json to the token that ends an answer of this model.'
        )
    pad = tokenizer.pad_token_id
    return SpecialIds(eos, pad if isinstance(pad, int) else eos)


def tokenize_pair(
    prompt: str, answer: str, tokenizer: Tokenizer, chat: ChatFormat, *, max_length: int, truncate: Truncate = "error", where: str
) -> tuple[list[int], int]:
    """(ids, how many of them are the prompt). `where` names the row in an error.

    A row over `max_length` tokens is an error, or with `truncate="answer"` loses the end of its answer and the EOS. A prompt is
    never cut.
    """
    eos = check_tokenizer(tokenizer).eos
    prompt_ids = chat.prompt_ids(prompt, tokenizer)
    answer_ids = chat.answer_ids(answer, tokenizer)
    if not prompt_ids or not answer_ids:
        part = "answer" if prompt_ids else "prompt"
        raise InputError(f"{where}: the tokenizer makes no token of the {part}. Use a tokenizer that covers its characters.")
    ids = [*prompt_ids, *answer_ids, eos]
    if len(ids) <= max_length:
        return ids, len(prompt_ids)
    if truncate == "error":
        raise InputError(
            f"{where} has {len(ids)} tokens ({len(prompt_ids)} of them prompt). Expected at most {max_length}, the model's "
            f"limit. Give --max-length {max_length} (or less) to cut the ends of long answers, or remove the row."
        )
    if len(prompt_ids) >= max_length:
        raise InputError(
            f"{where} has a prompt of {len(prompt_ids)} tokens, which leaves no room for an answer in {max_length}. "
            "Raise --max-length if the model allows it, or remove the row."
        )
    return ids[:max_length], len(prompt_ids)


def tokenize_record(
    record: Record, tokenizer: Tokenizer, chat: ChatFormat, *, max_length: int, truncate: Truncate = "error", split: str = "data"
) -> tuple[list[int], int]:
    """`tokenize_pair` of a record's prompt and response."""
    where = f"The {split} row {record.id}"
    return tokenize_pair(record.prompt, record.response, tokenizer, chat, max_length=max_length, truncate=truncate, where=where)


def token_rows(
    records: Sequence[Record], split: str, tokenizer: Tokenizer, chat: ChatFormat, *, max_length: int, truncate: Truncate = "error"
) -> list[TokenRow]:
    """A whole split, each row's `index` its position."""
    rows = []
    for index, record in enumerate(records):
        ids, num_prompt = tokenize_record(record, tokenizer, chat, max_length=max_length, truncate=truncate, split=split)
        rows.append(TokenRow(index, ids, num_prompt))
    return rows


@dataclass(frozen=True)
class TokenizeBatch:
    """A Ray Data task body: a numpy batch with columns `id`, `prompt`, `response` -> a table of `ids` and `num_prompt`.

    It carries a folder or hub id and not the tokenizer, so it pickles small; a process loads each tokenizer once.
    """

    tokenizer_folder: str
    max_length: int
    split: str
    chat: ChatFormat = field(default_factory=ChatFormat)
    truncate: Truncate = "error"

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> pa.Table:
        tokenizer = _loaded(self.tokenizer_folder)
        columns = (batch[name].tolist() for name in ("id", "prompt", "response"))
        pairs = [
            tokenize_record(Record(*row), tokenizer, self.chat, max_length=self.max_length, truncate=self.truncate, split=self.split)
            for row in zip(*columns, strict=True)
        ]
        table = pa.table(
            {
                "ids": pa.array([ids for ids, _ in pairs], type=pa.list_(pa.int32())),
                "num_prompt": pa.array([num_prompt for _, num_prompt in pairs], type=pa.int32()),
            }
        )
        return table.append_column("index", pa.array(np.asarray(batch["index"], dtype=np.int64))) if "index" in batch else table


@lru_cache(maxsize=4)
def _loaded(folder: str) -> Tokenizer:
    from transformers import AutoTokenizer  # two seconds, and only the worker processes that tokenise need it

    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise InputError(
            f"No tokenizer can be loaded from {folder} ({type(error).__name__}). Expected a Hugging Face folder or id."
        ) from None
