"""From a request's prompt to token ids: text as it is, ids as they are, a conversation in the format the model was trained with."""

from __future__ import annotations

from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from soul.data.chat import PROMPT_SLOT, TEMPLATE_DATE, ChatFormat, Tokenizer
from soul.serving.errors import refuse
from soul.serving.work import Prompt

_AS_IS = ChatFormat(PROMPT_SLOT)


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat: str) -> list[int]:
    """The ids that the model continues. Control tokens that a text spells are text, so that nobody closes a turn from inside it.

    Raises:
        Refused: an empty prompt, or a conversation that the chat template cannot render.
    """
    own = cast("Tokenizer", tokenizer)
    if prompt.ids is not None:
        ids = list(prompt.ids)
    elif prompt.text is not None:
        ids = _AS_IS.prompt_ids(prompt.text, own)
    else:
        ids = _conversation(prompt.messages or (), tokenizer, ChatFormat(chat))
    if not ids:
        raise refuse(400, "the prompt has no tokens: expected at least one.", "empty_prompt", param="prompt")
    return ids


def answer_ids(answer: str, tokenizer: PreTrainedTokenizerBase, chat: str, prompt: Prompt) -> list[int]:
    """The ids of an answer behind the prompt."""
    form = _AS_IS if prompt.messages is None else ChatFormat(chat)
    return form.answer_ids(answer, cast("Tokenizer", tokenizer))


def _conversation(messages: tuple[tuple[str, str], ...], tokenizer: PreTrainedTokenizerBase, form: ChatFormat) -> list[int]:
    template = form.template(cast("Tokenizer", tokenizer))
    if template is not None:
        return _plain_turns(messages, tokenizer, form, template)
    talk: Any = [{"role": role, "content": content} for role, content in messages]
    try:
        ids: Any = tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=False, sanitize_control_tokens=True, date_string=TEMPLATE_DATE
        )
    except (jinja2.TemplateError, TypeError) as error:  # the message can quote the conversation
        raise refuse(
            400,
            f"the model's chat template cannot render this conversation ({type(error).__name__}). Most want user and assistant in turn, "
            "a user message last, and some no system message.",
            "bad_conversation",
            param="messages",
        ) from None
    return list(ids)


def _plain_turns(messages: tuple[tuple[str, str], ...], tokenizer: PreTrainedTokenizerBase, form: ChatFormat, template: str) -> list[int]:
    """A text template knows one question: earlier turns stand before it in the same form, a system message before them all."""
    *earlier, (role, question) = messages
    if role != "user":
        raise refuse(
            400, f"the last message is the {role}'s: expected the user's, which the model answers.", "bad_conversation", param="messages"
        )
    if not earlier:
        return form.prompt_ids(question, cast("Tokenizer", tokenizer))
    told = {"user": template, "assistant": "{prompt}\n\n", "system": "{prompt}\n\n", "developer": "{prompt}\n\n"}
    before = "".join(told[speaker].replace(PROMPT_SLOT, content) for speaker, content in earlier)
    return _AS_IS.prompt_ids(before + template.rstrip(" ").replace(PROMPT_SLOT, question), cast("Tokenizer", tokenizer))
