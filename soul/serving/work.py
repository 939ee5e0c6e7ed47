"""What travels between the gateway, which knows HTTP and the gate, and the replicas, which know models: plain values both ways."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model by its content: whatever it is called, weights with this hash are loaded once."""

    sha256: str
    folder: str
    chat: str = "auto"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Exactly one of text, ids and messages (role, content)."""

    text: str | None = None
    ids: tuple[int, ...] | None = None
    messages: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """`num_top`: None is no log-probabilities, 0 those of the chosen tokens only. `max_tokens`: None is what limits and room allow."""

    prompts: tuple[Prompt, ...]
    max_tokens: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    num_top: int | None = None
    echo: bool = False


@dataclass(frozen=True, slots=True)
class Scoring:
    """How probable is `answer` behind `prompt`, token by token?"""

    prompt: Prompt
    answer: str


@dataclass(frozen=True, slots=True)
class Token:
    """`logp` in nats; None for the first token of a prompt, which nothing predicts. `top`: the most probable tokens and the chosen one."""

    id: int
    text: str
    logp: float | None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of choice number `index`; `finish` is set on its last one."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything at once: one piece per choice."""

    pieces: tuple[Piece, ...]
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
