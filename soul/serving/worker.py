"""One request on one model: prompts to rows, rows to pieces of text. What a replica does, without the replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from soul.serving.decoder import End, Row, Sampling
from soul.serving.engine import Engine
from soul.serving.errors import refuse
from soul.serving.likelihood import Likelihood
from soul.serving.prompts import answer_ids, prompt_ids
from soul.serving.settings import Limits
from soul.serving.text import Decoding, Detokenizer, StopFinder, decode, token_text
from soul.serving.work import Answer, Finish, ModelSpec, Piece, Prompt, Scoring, Token, Usage, Work

_LONG_TEXT = 20_000  # characters from which tokenising would hold up the event loop


class _Choice:
    """Turns the tokens of one row into pieces."""

    def __init__(self, index: int, row: Row, work: Work, engine: Engine) -> None:
        self.index, self.row = index, row
        self.is_done = False
        self._num_top = work.num_top
        self._tokenizer = engine.tokenizer
        self._text = Detokenizer(engine.tokenizer, row.prompt)
        self._stops = StopFinder(work.stop)
        self._num_told = 0
        self._is_chat = work.prompts[0].messages is not None
        self._has_begun = False

    def advance(self, num_tokens: int, end: End | None) -> Piece | None:
        """What is new now that the row has so many tokens and, perhaps, an end; None while there is nothing to say."""
        row, new = self.row, range(self._num_told, num_tokens)
        text, stopped = self._stops.push(self._text.push(row.tokens[self._num_told : num_tokens]))
        finish: Finish | None = "stop" if stopped else None
        if end is not None and not stopped:
            tail, stopped = self._stops.push(self._text.flush())
            text += tail if stopped else tail + self._stops.flush()
            finish = "length" if end == "length" and not stopped else "stop"
        tokens = tuple(self._token(place) for place in new) if self._num_top is not None else ()
        if finish == "stop" and not stopped and self._num_top is not None and row.closing is not None and not self._is_chat:
            # lm-eval asks for one token behind what it scores, and drops it: it must be there even where the model ends
            tokens += (_told(self._tokenizer, row.closing, row.logps[-1], row.tops[-1]),)
        self._num_told = num_tokens
        self.is_done = finish is not None
        if self._is_chat and not self._has_begun:  # the space between "Answer:" and the answer is the format's, not the answer's
            text = text.lstrip()
        self._has_begun = self._has_begun or bool(text)
        if not (text or tokens or finish):
            return None
        return Piece(self.index, text, tokens, finish)

    def _token(self, place: int) -> Token:
        return _told(self._tokenizer, self.row.tokens[place], self.row.logps[place], self.row.tops[place])

    @property
    def num_tokens(self) -> int:
        return self._num_told


def _told(tokenizer: Decoding, token: int, logp: float | None, top: Sequence[tuple[int, float]]) -> Token:
    """The chosen token stands among the top ones even where it is not one of them."""
    shown = list(top)
    if top and logp is not None and token not in dict(top):
        shown.append((token, logp))
    named = tuple((other, token_text(tokenizer, other), value) for other, value in shown)
    return Token(token, token_text(tokenizer, token), logp, named)


@dataclass(frozen=True, slots=True)
class Worker:
    """`engine_of` loads a model or finds it loaded; it raises InputError where it cannot."""

    engine_of: Callable[[ModelSpec], Awaitable[Engine]]
    limits: Limits

    async def answer(self, spec: ModelSpec, work: Work) -> Answer:
        """Everything at once.

        Raises:
            Refused: the request does not fit the model, or the model fails.
        """
        merged: dict[int, list[Piece]] = {}
        usage = Usage(0, 0)
        async with aclosing(self._run(spec, work, every_step=bool(work.stop))) as parts:
            async for part in parts:
                if isinstance(part, Usage):
                    usage = part
                else:
                    merged.setdefault(part.index, []).append(part)
        return Answer(tuple(_joined(pieces) for _, pieces in sorted(merged.items())), usage)

    def stream(self, spec: ModelSpec, work: Work) -> AsyncGenerator[Piece | Usage, None]:
        """Pieces as they come, the usage last. Closing the iterator stops the work.

        Raises:
            Refused: as `answer`; before the first piece unless the model fails.
        """
        return self._run(spec, work, every_step=True)

    async def score(self, spec: ModelSpec, scoring: Scoring) -> list[Token]:
        """The tokens of an answer with their log-probabilities.

        Raises:
            Refused: the answer is empty, or does not fit.
        """
        engine = await self.engine_of(spec)
        before = await self._ids(scoring.prompt, engine, spec)
        ids = answer_ids(scoring.answer, engine.tokenizer, spec.chat, scoring.prompt)
        if not ids:
            raise refuse(400, "the answer has no tokens: expected at least one.", "empty_answer", param="answer")
        _check_room(before + ids, 0, engine)
        found = (await self._likelihoods(engine, spec, [before + ids], 1))[0]
        first = len(before) - 1
        return [_told(engine.tokenizer, token, found.logps[first + i], found.tops[first + i]) for i, token in enumerate(ids)]

    async def _run(self, spec: ModelSpec, work: Work, *, every_step: bool) -> AsyncGenerator[Piece | Usage, None]:
        engine = await self.engine_of(spec)
        prompts = [await self._ids(prompt, engine, spec) for prompt in work.prompts]
        for ids in prompts:
            _check_room(ids, 1 if work.max_tokens is None else work.max_tokens, engine)
        if work.echo:
            for piece in await self._echo(engine, spec, work, prompts):
                yield piece
        choices = (
            [_Choice(index, row, work, engine) for index, row in enumerate(self._rows(work, prompts, engine))]
            if work.max_tokens != 0
            else []
        )
        async with aclosing(self._decode(engine, spec, choices, every_step=every_step)) as pieces:
            async for piece in pieces:
                yield piece
        yield Usage(sum(map(len, prompts)), sum(choice.num_tokens for choice in choices))

    def _rows(self, work: Work, prompts: Sequence[list[int]], engine: Engine) -> list[Row]:
        rows: list[Row] = []
        for ids in prompts:
            room = engine.positions - len(ids)
            most = min(self.limits.default_new_tokens, room) if work.max_tokens is None else work.max_tokens
            for _ in range(work.num_choices):
                seed = work.seed + len(rows)
                rows.append(Row(tuple(ids), Sampling(most, work.temperature, work.top_p, seed, work.num_top), engine.eos_ids))
        return rows

    async def _decode(
        self, engine: Engine, spec: ModelSpec, choices: Sequence[_Choice], *, every_step: bool
    ) -> AsyncGenerator[Piece, None]:
        loop, news = asyncio.get_running_loop(), asyncio.Queue[tuple[Row, int, End | None]]()
        by_row = {choice.row: choice for choice in choices}

        def watch(row: Row, num_tokens: int, end: End | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(news.put_nowait, (row, num_tokens, end))

        while not engine.submit(list(by_row), watch, every_step=every_step):
            engine = await self.engine_of(spec)  # evicted in between
        try:
            while any(not choice.is_done for choice in choices):
                row, num_tokens, end = await news.get()
                choice = by_row[row]
                if choice.is_done:
                    continue
                if end == "broken":
                    raise refuse(500, "the model failed on this request: its outputs are not finite, or memory ran out.", "model_failed")
                piece = choice.advance(num_tokens, end)
                if piece is None:
                    continue
                if piece.finish is not None:
                    engine.cancel([row])
                yield piece
        finally:
            engine.cancel(list(by_row))

    async def _echo(self, engine: Engine, spec: ModelSpec, work: Work, prompts: Sequence[list[int]]) -> list[Piece]:
        """The prompts themselves, as the first piece of each of their choices."""
        finish: Finish | None = "length" if work.max_tokens == 0 else None
        found = await self._likelihoods(engine, spec, prompts, work.num_top) if work.num_top is not None else [None] * len(prompts)
        pieces = []
        for number, (prompt, ids, scored) in enumerate(zip(work.prompts, prompts, found, strict=True)):
            text = prompt.text if prompt.text is not None else decode(engine.tokenizer, ids, special=True)
            tokens: tuple[Token, ...] = ()
            if scored is not None:
                rest = [_told(engine.tokenizer, *row) for row in zip(ids[1:], scored.logps, scored.tops, strict=True)]
                tokens = (_told(engine.tokenizer, ids[0], None, ()), *rest)
            first = number * work.num_choices
            pieces += [Piece(first + k, text, tokens, finish) for k in range(work.num_choices)]
        return pieces

    async def _likelihoods(self, engine: Engine, spec: ModelSpec, rows: Sequence[list[int]], num_top: int) -> list[Likelihood]:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Likelihood] | None] = loop.create_future()

        def settle(answer: list[Likelihood] | None) -> None:
            if not found.done():
                found.set_result(answer)

        def told(answer: list[Likelihood] | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, answer)

        while not engine.ask(rows, num_top, told):
            engine = await self.engine_of(spec)
        scored = await found
        if scored is None:
            raise refuse(500, "the model failed on this request; memory may have run out.", "model_failed")
        return scored

    async def _ids(self, prompt: Prompt, engine: Engine, spec: ModelSpec) -> list[int]:
        size = len(prompt.text or "") + sum(len(content) for _, content in prompt.messages or ())
        if size > _LONG_TEXT:
            ids = await asyncio.to_thread(prompt_ids, prompt, engine.tokenizer, spec.chat)
        else:
            ids = prompt_ids(prompt, engine.tokenizer, spec.chat)
        if prompt.ids is not None and max(ids) >= engine.vocab_size:
            raise refuse(400, f"a token id is above this model's largest, {engine.vocab_size - 1}.", "unknown_token", param="prompt")
        return ids


def _check_room(ids: Sequence[int], max_tokens: int, engine: Engine) -> None:
    if len(ids) + max_tokens <= engine.positions:
        return
    raise refuse(
        400,
        f"the prompt has {len(ids)} tokens and max_tokens is {max_tokens}, but the model's context has {engine.positions}. Shorten either.",
        "context_length_exceeded",
        param="max_tokens" if len(ids) < engine.positions else "prompt",
    )


def _joined(pieces: Sequence[Piece]) -> Piece:
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Piece(pieces[0].index, "".join(piece.text for piece in pieces), tokens, pieces[-1].finish)
