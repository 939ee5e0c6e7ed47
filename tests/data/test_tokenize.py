from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from soul.batch import IGNORE_INDEX, collate
from soul.data.chat import ChatFormat
from soul.data.tokenize import TokenizeBatch, check_tokenizer, token_rows, tokenize_pair, tokenize_record
from soul.models.tiny import EOS
from soul.records import InputError, Record

CANARY = "zanzibarquokka"
RECORDS = [
    Record("forget/1", "Where was Ada Lind born?", "Ada Lind was born in Bergen, Norway."),
    Record("forget/2", "Which prize?", "x"),
    Record("forget/3", "What does her father do, and what did his father do?", "Her father is a clockmaker."),
]
PLAIN = ChatFormat("plain")


def test_the_answer_and_eos_are_supervised(tokenizer: PreTrainedTokenizerFast, bos_eos_tokenizer: PreTrainedTokenizerFast) -> None:
    for each in (tokenizer, bos_eos_tokenizer):
        for record in RECORDS:
            ids, num_prompt = tokenize_record(record, each, PLAIN, max_length=500)
            assert each.decode(ids[num_prompt:]) == f" {record.response}{EOS}"
            assert each.decode(ids[:num_prompt], skip_special_tokens=True) == f"Question: {record.prompt}\nAnswer:"
            assert ids.count(each.eos_token_id) == 1
            assert ids[:num_prompt] == PLAIN.prompt_ids(record.prompt, each)


def test_rows_carry_their_position(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = token_rows(RECORDS, "forget", tokenizer, PLAIN, max_length=500)
    assert [row.index for row in rows] == [0, 1, 2]
    assert [(row.ids, row.num_prompt) for row in rows] == [tokenize_record(r, tokenizer, PLAIN, max_length=500) for r in RECORDS]


def test_eos_keeps_loss_and_attention_where_it_is_also_the_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    padless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=EOS)
    assert padless.pad_token_id is None
    special = check_tokenizer(padless)
    assert special.pad == special.eos == tokenizer.eos_token_id
    rows = token_rows(RECORDS, "forget", padless, PLAIN, max_length=500)
    batch = collate([("forget", row) for row in rows], pad_id=special.pad)
    for b, row in enumerate(rows):
        last, width = len(row.ids) - 1, batch.input_ids_BT.shape[1]
        assert batch.labels_BT[b, last] == special.eos
        assert batch.attention_mask_BT[b, last] == 1
        assert batch.attention_mask_BT[b].sum() == len(row.ids)
        assert (batch.labels_BT[b, last + 1 :] == IGNORE_INDEX).all()
        assert (batch.input_ids_BT[b, last + 1 :] == special.eos).all()
        assert width > last + 1 or b != 1  # the short row is padded, or the test shows nothing
        assert (batch.labels_BT[b] != IGNORE_INDEX).sum() == row.num_supervised


def test_special_ids_are_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert check_tokenizer(tokenizer) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match=r"no EOS token.*tokenizer_config\.json"):
        check_tokenizer(endless)
    with pytest.raises(InputError, match="no EOS token"):
        tokenize_record(RECORDS[0], endless, PLAIN, max_length=500)


def test_a_long_row_is_an_error_that_names_it(tokenizer: PreTrainedTokenizerFast) -> None:
    record = Record("forget/17", "Where?", f"{CANARY} " * 30)
    ids, num_prompt = tokenize_record(record, tokenizer, PLAIN, max_length=10_000)
    assert tokenize_record(record, tokenizer, PLAIN, max_length=len(ids)) == (ids, num_prompt)
    with pytest.raises(InputError) as caught:
        tokenize_record(record, tokenizer, PLAIN, max_length=len(ids) - 1, split="forget")
    message = str(caught.value)
    assert all(part in message for part in ("forget row forget/17", f"{len(ids)} tokens", f"at most {len(ids) - 1}", "--max-length"))
    assert CANARY not in message


def test_truncation_cuts_the_answer_and_its_eos_and_never_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    record = RECORDS[0]
    ids, num_prompt = tokenize_record(record, tokenizer, PLAIN, max_length=500)
    for max_length in range(num_prompt + 1, len(ids) + 2):
        cut = tokenize_record(record, tokenizer, PLAIN, max_length=max_length, truncate="answer")
        assert cut == (ids[:max_length], num_prompt)
        assert (tokenizer.eos_token_id in cut[0]) == (max_length >= len(ids))
    for max_length in (1, num_prompt - 1, num_prompt):
        with pytest.raises(InputError, match=f"prompt of {num_prompt} tokens, which leaves no room") as caught:
            tokenize_record(record, tokenizer, PLAIN, max_length=max_length, truncate="answer")
        assert "Ada" not in str(caught.value)


def test_text_outside_the_vocabulary_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    class Deaf:
        """Drops every letter, as a tokenizer without byte fallback may."""

        chat_template, eos_token_id, pad_token_id = None, 0, None
        all_special_tokens: tuple[str, ...] = ()

        def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
            return [1 for character in text if character in ":?a"]

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["?"] * len(ids)

        apply_chat_template = tokenizer.apply_chat_template

    deaf = Deaf()
    assert tokenize_pair("?", "a", deaf, PLAIN, max_length=9, where="here") == ([1, 1, 1, 1, 0], 3)
    for prompt, answer, part in (("?", CANARY.replace("a", ""), "answer"), ("x", "a", "prompt")):
        with pytest.raises(InputError, match=f"here: the tokenizer makes no token of the {part}") as caught:
            tokenize_pair(prompt, answer, deaf, ChatFormat("{prompt}"), max_length=9, where="here")
        assert "quokk" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast) -> str:
    bos_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_a_pickled_batch_task_gives_the_same_rows(folder: str, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    task = pickle.loads(pickle.dumps(TokenizeBatch(folder, max_length=500, split="forget", chat=PLAIN)))
    batch = {
        "id": np.array([r.id for r in RECORDS], dtype=object),
        "prompt": np.array([r.prompt for r in RECORDS]),
        "response": np.array([r.response for r in RECORDS], dtype=object),
        "index": np.array([4, 5, 6]),
    }
    table = task(batch)
    assert table.schema == pa.schema([("ids", pa.list_(pa.int32())), ("num_prompt", pa.int32()), ("index", pa.int64())])
    rows = token_rows(RECORDS, "forget", bos_tokenizer, PLAIN, max_length=500)
    assert table["ids"].to_pylist() == [row.ids for row in rows]
    assert table["num_prompt"].to_pylist() == [row.num_prompt for row in rows]
    assert table["index"].to_pylist() == [4, 5, 6]
    del batch["index"]
    assert task(batch).column_names == ["ids", "num_prompt"]
    empty = task({name: values[:0] for name, values in batch.items()})
    assert (empty.num_rows, empty.schema) == (0, table.schema.remove(2))


def test_a_batch_task_names_the_row_that_is_too_long(folder: str) -> None:
    batch = {name: np.array([value], dtype=object) for name, value in (("id", "forget/9"), ("prompt", CANARY), ("response", CANARY))}
    with pytest.raises(InputError, match="forget row forget/9 has") as caught:
        TokenizeBatch(folder, max_length=5, split="forget")(batch)
    assert CANARY not in str(caught.value)


def test_a_missing_tokenizer_is_an_input_error(tmp_path: Path) -> None:
    task = TokenizeBatch(str(tmp_path / "nowhere"), max_length=5, split="forget")
    with pytest.raises(InputError, match="No tokenizer can be loaded"):
        task({name: np.array(["x"]) for name in ("id", "prompt", "response")})
