"""The requests of OpenAI's API as far as it is spoken here: what has no meaning for these models is refused by name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import from_json

from soul.serving.errors import refuse
from soul.serving.settings import Limits
from soul.serving.work import Prompt, Scoring, Work

Text = Annotated[str, Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Stops = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]
# Fields of OpenAI's that change nothing when they have these values; any other value asks for what is not there.
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None,),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "service_tier": (None, "auto", "default"),
    "reasoning_effort": (None,),
}
IGNORED: Final = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=())

    model: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, values in NEUTRAL.items():
            if name in given and name not in cls.model_fields and given[name] not in values:
                raise refuse(400, f"{name} is not supported here. Leave it out.", "unsupported_parameter", param=name)
        return {name: value for name, value in given.items() if name in cls.model_fields or name not in (*NEUTRAL, *IGNORED)}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    include_usage: Flag = False
    include_obfuscation: Flag = False


class _Sampled(_Request):
    """What both kinds of generation share. OpenAI's default temperature is 1."""

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    stop: Stops | list[Stops] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _work(
        self, prompts: tuple[Prompt, ...], limits: Limits, *, max_tokens: int | None, num_top: int | None, seed: int, echo: bool
    ) -> Work:
        choices = self.n or 1
        _at_most("n", choices, limits.max_choices)
        _at_most("stop", len(self.stops()), limits.max_stops, "stop strings")
        _at_most("max_tokens", max_tokens or 0, limits.max_new_tokens)
        _at_most("logprobs", num_top or 0, limits.max_top)
        return Work(
            prompts=prompts,
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed if self.seed is None else self.seed,
            num_choices=choices,
            stop=self.stops(),
            num_top=num_top,
            echo=echo,
        )


class CompletionRequest(_Sampled):
    """`/v1/completions`: text, token ids, or a list of either."""

    prompt: Text | list[TokenId] | list[Text] | list[list[TokenId]]
    max_tokens: Annotated[Whole, Field(ge=0)] | None = 16
    echo: Flag | None = None
    logprobs: Annotated[Whole, Field(ge=0)] | None = None

    def work(self, limits: Limits, seed: int) -> Work:
        """The request in our words.

        Raises:
            Refused: it is beyond a limit.
        """
        prompts = self._prompts()
        _at_most("prompt", len(prompts), limits.max_prompts, "prompts in one request")
        if not prompts:
            raise refuse(400, "prompt is an empty list: expected at least one prompt.", "empty_prompt", param="prompt")
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        if max_tokens == 0 and not self.echo:
            raise refuse(400, "max_tokens is 0 without echo: there would be nothing to answer.", "invalid_value", param="max_tokens")
        return self._work(prompts, limits, max_tokens=max_tokens, num_top=self.logprobs, seed=seed, echo=bool(self.echo))

    def _prompts(self) -> tuple[Prompt, ...]:
        if isinstance(self.prompt, str):
            return (Prompt(text=self.prompt),)
        if self.prompt and isinstance(self.prompt[0], int):
            return (Prompt(ids=tuple(token for token in self.prompt if isinstance(token, int))),)
        return tuple(
            Prompt(text=item) if isinstance(item, str) else Prompt(ids=tuple(item)) for item in self.prompt if not isinstance(item, int)
        )


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Sampled):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Whole, Field(ge=0)] | None = None

    def work(self, limits: Limits, seed: int) -> Work:
        """The request in our words.

        Raises:
            Refused: it is beyond a limit, or contradicts itself.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse(400, "top_logprobs needs logprobs: true.", "invalid_value", param="top_logprobs")
        max_tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        num_top = (self.top_logprobs or 0) if self.logprobs else None
        return self._work((conversation(self.messages),), limits, max_tokens=max_tokens, num_top=num_top, seed=seed, echo=False)


class ScoreRequest(_Request):
    """`/v1/score`, an addition to OpenAI's routes: how probable is this answer to this question?"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    answer: Text

    def scoring(self) -> Scoring:
        return Scoring(conversation(self.messages), self.answer)


def conversation(messages: list[Message]) -> Prompt:
    return Prompt(messages=tuple((message.role, message.text) for message in messages))


Request = TypeVar("Request", bound=_Request)


def parse(kind: type[Request], body: bytes) -> Request:
    """A request from its bytes.

    Raises:
        Refused: not JSON, or not this kind of request; the message names fields and never repeats their values.
    """
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        where = str(error).rpartition(" at ")[2] if " at line " in str(error) else "an unknown place"
        raise refuse(400, f"the body cannot be read, it is not JSON in UTF-8 (at {where}).", "invalid_json") from None
    if not isinstance(given, dict):
        raise refuse(400, "the body is not a JSON object.", "invalid_json")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, kind) from None


def _refusal(error: ValidationError, kind: type[BaseModel]) -> Exception:
    told: dict[str, str] = {}
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        name = str(item["loc"][0]) if item["loc"] else "body"
        known = name in kind.model_fields
        told.setdefault(name if known else "", item["msg"] if known else "")
    name, message = next(iter(told.items()))
    if not name:
        return refuse(
            400, f"the request has a field that {kind.__name__} does not know. Fields: {', '.join(kind.model_fields)}.", "unknown_parameter"
        )
    if message == "Field required":
        return refuse(400, f"{name} is missing: it is required.", "missing_parameter", param=name)
    return refuse(400, f"{name}: {message[:1].lower()}{message[1:]}.", "invalid_value", param=name)


def _at_most(param: str, value: int, limit: int, what: str | None = None) -> None:
    if value > limit:
        raise refuse(400, f"{what or param} is limited to {limit} on this server, got {value}.", "limit_exceeded", param=param)
