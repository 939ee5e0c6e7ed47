"""Answers in OpenAI's shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soul.serving.work import Piece, Token, Usage


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every part of one answer repeats. `model` is the id that answers, also where an alias was asked for."""

    id: str
    model: str
    created: int
    is_chat: bool

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(piece) for piece in pieces],
            "usage": usage_body(usage),
        }

    def chunk(self, piece: Piece, *, begins: bool, offset: int = 0) -> dict[str, Any]:
        """One event of a stream; `begins` a choice, whose text so far has `offset` characters."""
        if self.is_chat:
            delta = {"role": "assistant"} if begins else {}
            choice = {
                "index": piece.index,
                "delta": {**delta, "content": piece.text},
                "finish_reason": piece.finish,
                "logprobs": _chat_logprobs(piece),
            }
        else:
            choice = {
                "index": piece.index,
                "text": piece.text,
                "finish_reason": piece.finish,
                "logprobs": _text_logprobs(piece.tokens, offset),
            }
        return self._event([choice])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._event([]), "usage": usage_body(usage)}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        if not self.is_chat:
            return {"index": piece.index, "text": piece.text, "finish_reason": piece.finish, "logprobs": _text_logprobs(piece.tokens, 0)}
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.index, "message": message, "finish_reason": piece.finish, "logprobs": _chat_logprobs(piece)}


def envelope(request_id: str, model: str, *, is_chat: bool) -> Envelope:
    return Envelope(f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}", model, int(time.time()), is_chat)


def usage_body(usage: Usage) -> dict[str, int]:
    total = usage.prompt_tokens + usage.completion_tokens
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}


def _text_logprobs(tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
    """The older API's parallel lists. `text_offset` counts characters of the tokens' own texts."""
    if not tokens:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logp for token in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets,
        "token_ids": [token.id for token in tokens],
    }


def _top(token: Token) -> dict[str, float] | None:
    """By text; where two tokens have the same text, the less probable one is called by its id."""
    if token.logp is None or not token.top:
        return None
    found: dict[str, float] = {}
    for number, text, logp in token.top:
        found[f"token_id:{number}" if text in found else text] = logp
    return found


def _chat_logprobs(piece: Piece) -> dict[str, Any] | None:
    if not piece.tokens:
        return None
    return {"content": [_chat_token(token) for token in piece.tokens], "refusal": None}


def _chat_token(token: Token) -> dict[str, Any]:
    top = [{"token": text, "logprob": logp, "bytes": list(text.encode())} for _, text, logp in token.top]
    return {"token": token.text, "logprob": token.logp, "bytes": list(token.text.encode()), "top_logprobs": top}
