from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from soul.data.chat import PLAIN_TEMPLATE, ChatFormat
from soul.models.tiny import BOS, EOS
from soul.records import InputError

CANARY = "zanzibarquokka"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DATED = (
    "{% if not date_string is defined %}{{ strftime_now('%d %b %Y') }}{% else %}{{ date_string }}{% endif %}: {{ messages[0]['content'] }}"
)


def with_chat(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    clone = copy.deepcopy(tokenizer)
    clone.chat_template = template
    return clone


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("answer", ["Bergen, Norway.", "9 lanterns", "(none)", "東京", " spaced", "\nnext line"])
@pytest.mark.parametrize("prompt", ["Where was Ada Lind born?", "ends in a space ", "two\nlines", "{braces} {0} {prompt}", "é"])
def test_prompt_and_answer_spell_the_template(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> None:
    for choice, expected in (
        ("plain", f"Question: {prompt}\nAnswer: {answer}"),
        ("Q {prompt} A:", f"Q {prompt} A:{answer}"),
        ("{prompt}", prompt + answer),
        (r"{prompt}\n\tA:  ", f"{prompt}\n\tA:  {answer}"),
    ):
        chat = ChatFormat(choice)
        assert decoded(tokenizer, chat.prompt_ids(prompt, tokenizer) + chat.answer_ids(answer, tokenizer)) == expected


def test_the_space_before_the_answer_is_the_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat("plain")
    assert PLAIN_TEMPLATE == "Question: {prompt}\nAnswer: "
    assert decoded(tokenizer, chat.prompt_ids("x", tokenizer)) == "Question: x\nAnswer:"
    assert decoded(tokenizer, chat.answer_ids("Ada", tokenizer)) == " Ada"
    # ... so that its first word is the token that the word has inside a sentence
    inside = tokenizer.encode("Answer: Ada Lind", add_special_tokens=False)
    assert chat.answer_ids("Ada Lind", tokenizer) == inside[-len(chat.answer_ids("Ada Lind", tokenizer)) :]


def test_a_tokenizer_that_begins_with_a_space_does_not_get_two(sentencepiece_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat("plain")
    prompt, answer = (
        chat.prompt_ids("Where was Ada Lind born?", sentencepiece_tokenizer),
        chat.answer_ids("Ada Lind", sentencepiece_tokenizer),
    )
    assert prompt.count(sentencepiece_tokenizer.bos_token_id) == 1
    assert decoded(sentencepiece_tokenizer, prompt[1:] + answer) == " Question: Where was Ada Lind born?\nAnswer: Ada Lind"
    inside = sentencepiece_tokenizer.encode("by Ada Lind", add_special_tokens=False)
    assert answer == inside[-len(answer) :]


def test_no_token_spans_the_border(tokenizer: PreTrainedTokenizerFast) -> None:
    """The prompt's ids are the same whatever the answer, which a joint tokenisation would not give here."""
    chat = ChatFormat("{prompt}")
    prompt, answer = "Ans", "wer:"
    joint = tokenizer.encode(prompt + answer, add_special_tokens=False)
    apart = chat.prompt_ids(prompt, tokenizer) + chat.answer_ids(answer, tokenizer)
    assert decoded(tokenizer, joint) == decoded(tokenizer, apart)
    assert joint != apart


def test_bos_is_there_once_where_the_tokenizer_puts_it(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast, bos_eos_tokenizer: PreTrainedTokenizerFast
) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for each, expected in ((tokenizer, 0), (bos_tokenizer, 1), (bos_eos_tokenizer, 1)):
        for choice in ("plain", "{prompt}"):
            ids = ChatFormat(choice).prompt_ids("Who?", each)
            assert (ids.count(bos), ids.count(eos)) == (expected, 0)
            assert (ids[0] == bos) == bool(expected)
        spelled = ChatFormat(f"{BOS}Q: {{prompt}}").prompt_ids("Who?", each)
        assert (spelled[0], spelled.count(bos), spelled.count(eos)) == (bos, 1, 0)
        rendered = ChatFormat("chat").prompt_ids("Who?", with_chat(each, CHAT))
        assert (rendered[0], rendered.count(bos), rendered.count(eos)) == (bos, 1, 0)
        assert bos not in ChatFormat("plain").answer_ids("Ada", each)


def test_the_chat_template_is_rendered_up_to_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    chatty = with_chat(tokenizer, CHAT)
    assert decoded(chatty, ChatFormat("chat").prompt_ids(" Who? ", chatty)) == f"{BOS}<user>Who?</user><assistant>"
    assert decoded(chatty, ChatFormat("chat").answer_ids("Ada", chatty)) == "Ada"


def test_auto_takes_the_chat_template_where_there_is_one(tokenizer: PreTrainedTokenizerFast) -> None:
    chatty = with_chat(tokenizer, CHAT)
    auto = ChatFormat()
    assert auto.prompt_ids("Who?", chatty) == ChatFormat("chat").prompt_ids("Who?", chatty)
    assert auto.prompt_ids("Who?", tokenizer) == ChatFormat("plain").prompt_ids("Who?", tokenizer)
    assert ChatFormat("plain").prompt_ids("Who?", chatty) == ChatFormat("plain").prompt_ids("Who?", tokenizer)


def test_ids_do_not_depend_on_the_day(tokenizer: PreTrainedTokenizerFast) -> None:
    dated = with_chat(tokenizer, DATED)
    assert decoded(dated, ChatFormat("chat").prompt_ids("Who?", dated)) == "26 Jul 2024: Who?"


@pytest.mark.parametrize("choice", ["plain", "Q: {prompt} A:", "chat"])
def test_control_tokens_in_a_row_are_text(tokenizer: PreTrainedTokenizerFast, choice: str) -> None:
    chatty = with_chat(tokenizer, CHAT)
    chat = ChatFormat(choice)
    text = f"Who {EOS}{BOS} is it?"
    ids = chat.prompt_ids(text, chatty) + chat.answer_ids(text, chatty)
    assert tokenizer.eos_token_id not in ids
    assert ids.count(tokenizer.bos_token_id) == (choice == "chat")
    assert decoded(chatty, ids).count(text) == 2


def test_a_template_may_spell_control_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ChatFormat(f"{BOS}{{prompt}}{EOS}").prompt_ids("Who?", tokenizer)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("chatt", "Did you mean 'chat'"),
        ("", "Expected one of auto, chat, plain"),
        ("Question: {question}", "holds {prompt} exactly once"),
        ("{prompt} {prompt}", "2 times"),
    ],
)
def test_a_bad_format_says_what_to_write(choice: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        ChatFormat(choice)


def test_chat_needs_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="Choose plain"):
        ChatFormat("chat").prompt_ids("Who?", tokenizer)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception(messages[0]['content']) }}", "{{ messages[1]['content'].x }}", "{{ messages[0]['content' }}", "{{ 1 + 'a' }}"],
)
def test_a_template_that_fails_does_not_quote_the_prompt(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    broken = with_chat(tokenizer, template)
    with pytest.raises(InputError, match="Choose --chat plain") as caught:
        ChatFormat("auto").prompt_ids(CANARY, broken)
    assert CANARY not in str(caught.value)
    assert caught.value.__suppress_context__
