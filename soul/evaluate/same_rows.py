"""Are two logs comparable: what each says of its rows and of how it was made, without a text of any row, and where they differ."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from soul.evaluate.eval_log import EvalLog, SplitLog
from soul.evaluate.rouge import TOKENIZER
from soul.records import InputError, Record

if TYPE_CHECKING:  # `soul score` starts without torch
    from transformers import PreTrainedTokenizerBase

    from soul.data.chat import ChatFormat

COMPARED_SPLITS: Final = ("forget", "holdout")  # what forget quality and PrivLeak read of a gold standard
_HOW: Final = {"tokenizer": "tokenizer's vocabulary", "template": "chat template"}
_COLUMNS: Final = {
    "answer_tokens": "another number of answer tokens",
    "right_tokens": "another number of tokens in the right answer",
    "wrong_tokens": "other numbers of tokens in the wrong answers",
    "wrong_nlls": "another number of wrong answers",
}


def rows_digest(records: Sequence[Record]) -> str:
    """Two hex digits of the SHA-256 of all questions and answers, in order: other rows are seen in 255 of 256 cases.

    No more, and none of single rows: a log is handed on, and whoever has a row's digest can try what a date or a number in it may be.
    """
    return _hash([[record.prompt, record.response] for record in records])[:2]


def made_with(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> dict[str, str]:
    """What a log's numbers depend on beside rows, weights and settings."""
    kept: Any = getattr(tokenizer, "chat_template", None)
    choice = chat.choice if chat.choice != "auto" else "chat" if kept else "plain"
    template = [choice, kept if choice == "chat" else None]
    return {
        "rouge_tokenizer": TOKENIZER,
        "zlib": zlib_name(),
        "tokenizer": _hash(sorted(tokenizer.get_vocab().items())),
        "template": _hash(template),
    }


def zlib_name() -> str:
    """The library behind the zlib attack: others compress to other lengths."""
    ng = getattr(zlib, "ZLIBNG_VERSION", None)
    return f"zlib {zlib.ZLIB_RUNTIME_VERSION}" + (f" (zlib-ng {ng})" if ng else "")


def differences(own: EvalLog, gold: EvalLog) -> tuple[str, ...]:
    """Why the two must not be compared row against row; nothing where all that both hold agrees."""
    found = [line for split in COMPARED_SPLITS for line in _split_differences(split, own.splits.get(split), gold.splits.get(split))]
    for name, words in _HOW.items():
        if name in own.made_with and name in gold.made_with and own.made_with[name] != gold.made_with[name]:
            found.append(f"made with another {words}")
    return tuple(found)


def zlibs_apart(own: EvalLog, gold: EvalLog) -> str | None:
    """Why the zlib attacks of the two must not be compared."""
    names = [log.made_with.get("zlib") for log in (own, gold)]
    if None in names or names[0] == names[1]:
        return None
    return f"made with {names[0]}, the retrained model's log with {names[1]}: they compress to other lengths"


def not_compared(own: EvalLog, gold: EvalLog) -> tuple[str, ...]:
    """What the logs do not both say, so that it could not be looked at."""
    pairs = [(split, own.splits[split], gold.splits[split]) for split in COMPARED_SPLITS if split in own.splits and split in gold.splits]
    found = [f"{split}.{name}" for split, a, b in pairs for name in ("rows", "answer_tokens") if _missing(a, name) or _missing(b, name)]
    return tuple(found + [name for name in (*_HOW, "zlib") if name not in own.made_with or name not in gold.made_with])


def check_comparable(own: EvalLog, gold: EvalLog | None, *, insists: bool = False) -> None:
    """Refuse a gold standard that says it is of other rows, or was made in another way.

    Raises:
        InputError: it is.
    """
    found = () if gold is None or insists else differences(own, gold)
    if gold is not None and found:
        raise InputError(
            f"the gold standard {gold.source} does not fit {own.source}: {'; '.join(found)}. Expected an evaluation of the same rows, "
            "made the same way. Pass that one, or --allow-mismatch to compare them all the same."
        )


def _split_differences(split: str, own: SplitLog | None, gold: SplitLog | None) -> list[str]:
    if own is None or gold is None:
        return []
    if own.keys != gold.keys:
        theirs, ours = set(gold.keys), set(own.keys)
        other = sorted(theirs ^ ours, key=lambda key: (len(key), key))
        if not other:
            return [f"{split}: the same row numbers in another order"]
        return [f"{split}: {len(gold.keys)} rows against {len(own.keys)}, {len(other)} row number(s) in one only, first row {other[0]}"]
    if own.rows is not None and gold.rows is not None and own.rows != gold.rows:
        return [f"{split}: other questions or answers"]
    for name, words in _COLUMNS.items():
        if _missing(own, name) or _missing(gold, name):
            continue
        pairs = zip(own.keys, getattr(own, name), getattr(gold, name), strict=True)
        other = [key for key, a, b in pairs if (_length(a) != _length(b) if name == "wrong_nlls" else a != b)]
        if other:
            return [f"{split}: {len(other)} of {len(own.keys)} rows have {words}, first row {other[0]}"]
    return []


def _length(values: Sequence[float] | None) -> int:
    return len(values or ())


def _missing(log: SplitLog, name: str) -> bool:
    return getattr(log, name) is None


def _hash(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest()[:16]
