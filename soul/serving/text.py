"""From token ids to text as it comes: no half characters, nothing that could still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

HALF: Final = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
_CONTEXT: Final = 5  # prompt tokens before the first new one: SentencePiece drops the space of a text's first token


class Decoding(Protocol):
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str | list[str]: ...


def decode(tokenizer: Decoding, ids: Sequence[int], *, special: bool = False) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def token_text(tokenizer: Decoding, token: int) -> str:
    """A token's own text; `token_id:N` for one that is part of a character, many of which would otherwise look alike."""
    text = decode(tokenizer, [token], special=True)
    return f"token_id:{token}" if HALF in text else text


class Detokenizer:
    """Text of a growing row of ids. `context`: the tokens before it."""

    def __init__(self, tokenizer: Decoding, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-_CONTEXT:])
        self._start, self._read = 0, len(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """The text that is now certain."""
        self._ids += ids
        return self._take(final=False)

    def flush(self) -> str:
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        known = decode(self._tokenizer, self._ids[self._start : self._read])
        text = decode(self._tokenizer, self._ids[self._start :])
        if text.endswith(HALF) and not final:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]


class StopFinder:
    """Holds back the end of a text while it could be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string was found (then nothing comes after it)."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            return self._held[: min(places)], True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that begins `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
