"""How a question becomes the prompt that the model sees: the tokenizer's chat template, the plain form, or the user's own.

Whitespace: a text template such as the plain one means exactly `template + answer`, but the two are tokenised apart, so that no token
spans the border and a prompt has the same ids in training and in generation. Spaces at the template's end belong to the answer, where
byte-level BPE expects a word's leading space: the prompt ends with `Answer:`, the answer begins with ` `. A tokenizer that begins every
text with a space (SentencePiece) writes that one itself. A chat template is taken as it renders, and the answer follows as it is.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Protocol

import jinja2

from soul.records import InputError

PLAIN_TEMPLATE = "Question: {prompt}\nAnswer: "
PROMPT_SLOT = "{prompt}"
CHOICES = ("auto", "chat", "plain")
# Llama 3 templates write today's date unless they are given one; the ids of a row must not depend on the day
TEMPLATE_DATE = "26 Jul 2024"


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer, which satisfies it as it is."""

    @property
    def chat_template(self) -> Any: ...

    @property
    def eos_token_id(self) -> Any: ...

    @property
    def pad_token_id(self) -> Any: ...

    @property
    def all_special_tokens(self) -> Any: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
        sanitize_control_tokens: bool,
        date_string: str,
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class ChatFormat:
    r"""`auto`: the chat template if the tokenizer has one, else plain. A template holds {prompt} once; `\n` and `\t` in it are read as
    line break and tab, because a shell passes them on as two characters.
    """

    choice: str = "auto"

    def __post_init__(self) -> None:
        if self.choice in CHOICES:
            return
        num_places = self.choice.count(PROMPT_SLOT)
        if num_places == 1:
            return
        expected = f"Expected one of {', '.join(CHOICES)}, or a text that holds {PROMPT_SLOT} exactly once."
        if num_places > 1:
            raise InputError(f"--chat: the template holds {PROMPT_SLOT} {num_places} times. {expected}")
        near = difflib.get_close_matches(self.choice, CHOICES, n=1)
        raise InputError(f"--chat: {self.choice!r} is no format. {expected}{f' Did you mean {near[0]!r}?' if near else ''}")

    def template(self, tokenizer: Tokenizer) -> str | None:
        """The text template in use, None for the tokenizer's chat template."""
        if self.choice == "plain":
            return PLAIN_TEMPLATE
        if self.choice not in CHOICES:
            return self.choice.replace("\\n", "\n").replace("\\t", "\t")
        if tokenizer.chat_template:
            return None
        if self.choice == "chat":
            raise InputError("--chat chat: the tokenizer has no chat template. Choose plain, or give a template with {prompt} in it.")
        return PLAIN_TEMPLATE

    def prompt_ids(self, prompt: str, tokenizer: Tokenizer) -> list[int]:
        """The ids that a model continues with an answer. BOS is there once if the tokenizer or its chat template writes one."""
        template = self.template(tokenizer)
        if template is None:
            return _chat_ids(prompt, tokenizer)
        # a control token is a token where the template spells it, and text where a data row does
        spells_control = any(token in template for token in tokenizer.all_special_tokens)
        text = template.rstrip(" ").replace(PROMPT_SLOT, prompt)
        body = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not spells_control)
        prefix = _prefix_ids(tokenizer)
        return body if body[: len(prefix)] == prefix else prefix + body

    def answer_ids(self, answer: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of an answer behind `prompt_ids`, without EOS. Control tokens that the answer spells are text."""
        template = self.template(tokenizer)
        gap = "" if template is None else template[len(template.rstrip(" ")) :]
        if gap and _begins_with_space(tokenizer):
            gap = gap[1:]
        return list(tokenizer.encode(gap + answer, add_special_tokens=False, split_special_tokens=True))


def _chat_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=True,
            date_string=TEMPLATE_DATE,
        )
    except (jinja2.TemplateError, TypeError) as error:  # the message can quote the prompt
        raise InputError(
            f"The tokenizer's chat template fails on a single user message ({type(error).__name__}). "
            "Choose --chat plain, or give a template with {prompt} in it."
        ) from None
    return list(ids)


def _prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text (BOS, or nothing). What it puts behind one, such as EOS, has no place in a prompt."""
    bare = tokenizer.encode("a", add_special_tokens=False, split_special_tokens=True)
    full = tokenizer.encode("a", add_special_tokens=True, split_special_tokens=True)
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:start])


def _begins_with_space(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a space in front of every text, which SentencePiece spells \u2581."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False, split_special_tokens=True))
    return bool(tokens) and str(tokens[0]).startswith("\u2581")
