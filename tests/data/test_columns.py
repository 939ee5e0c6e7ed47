from __future__ import annotations

import json
import traceback
from dataclasses import asdict
from typing import Any

import pytest
from pydantic import ValidationError

from soul.data.columns import KNOWN_NAMES, ColumnMap, parse_columns, shown_columns
from soul.records import InputError, Record

CANARY = "zanzibarquokka"
TOFU_ROW = {
    "question": "Who?",
    "answer": "Ada.",
    "paraphrased_answer": "It is Ada.",
    "perturbed_answer": ["Bea.", "Cleo."],
    "paraphrased_question": "Which person?",
}


def record(row: dict[str, Any], columns: ColumnMap | None = None) -> Record:
    return (columns or ColumnMap()).to_record(row, where="mine.jsonl", row_number=7, split="forget")


def test_tofu_columns_are_found() -> None:
    assert record(TOFU_ROW) == Record("forget/7", "Who?", "Ada.", "It is Ada.", ("Bea.", "Cleo."), "Which person?")


@pytest.mark.parametrize("prompt", KNOWN_NAMES["prompt"])
@pytest.mark.parametrize("response", KNOWN_NAMES["response"])
def test_every_pair_of_known_names_is_found(prompt: str, response: str) -> None:
    assert record({"other": 1, prompt: "p", response: "r"}) == Record("forget/7", "p", "r")


def test_a_record_written_by_its_own_names_comes_back() -> None:
    original = record(TOFU_ROW)
    assert record(json.loads(json.dumps(asdict(original)))) == original


def test_named_columns_win_over_known_ones() -> None:
    row = {"question": "no", "answer": "no", "q": "Who?", "a": "Ada.", "key": 12, "wrong": ["x"]}
    columns = ColumnMap(prompt="q", response="a", id="key", perturbed="wrong")
    assert record(row, columns) == Record("12", "Who?", "Ada.", None, ("x",))
    # a known name that another field has taken is not found again: here `question` is the answer
    assert record({"prompt": "p", "question": "r"}, ColumnMap(response="question")) == Record("forget/7", "p", "r")


def test_missing_optional_values_are_none() -> None:
    row = TOFU_ROW | {"paraphrased_answer": None, "perturbed_answer": None, "paraphrased_question": None, "id": None}
    assert record(row) == Record("forget/7", "Who?", "Ada.")
    assert record({"question": "Who?", "answer": "Ada.", "perturbed_answer": []}).perturbed == ()


def test_text_is_kept_as_it_is() -> None:
    assert record({"question": "  Who?\n", "answer": "\tAda 東京 "}).prompt == "  Who?\n"


def test_a_csv_cell_may_spell_the_wrong_answers_as_json() -> None:
    assert record(TOFU_ROW | {"perturbed_answer": '["Bea, or not", "Cleo"]'}).perturbed == ("Bea, or not", "Cleo")


def test_ids_are_short_names() -> None:
    assert record(TOFU_ROW | {"id": "author_3/q-2"}).id == "author_3/q-2"
    assert record(TOFU_ROW | {"id": 0}).id == "0"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "prompt is a number": ({"question": 5, "answer": CANARY}, r"row 7: prompt \(column question\) is int"),
    "prompt is null": ({"question": None, "answer": CANARY}, r"prompt \(column question\) is missing"),
    "prompt is blank": ({"question": " \n", "answer": CANARY}, r"prompt \(column question\) is blank"),
    "answer is a list": ({"question": CANARY, "answer": [CANARY]}, r"response \(column answer\) is list"),
    "answer is NaN": ({"question": CANARY, "answer": float("nan")}, r"response \(column answer\) is float"),
    "half a surrogate pair": ({"question": CANARY, "answer": f"{CANARY}\ud800"}, "surrogate"),
    "paraphrase is a number": (TOFU_ROW | {"paraphrased_answer": 1, "answer": CANARY}, r"paraphrase \(column paraphrased_answer\) is int"),
    "paraphrase is blank": (TOFU_ROW | {"paraphrased_answer": "", "answer": CANARY}, "remove the value"),
    "wrong answers are one text": (TOFU_ROW | {"perturbed_answer": CANARY}, "is one text"),
    "wrong answers spell no list": (TOFU_ROW | {"perturbed_answer": f'"{CANARY}"'}, "is str. Expected a list"),
    "wrong answers nest too deep": (TOFU_ROW | {"perturbed_answer": "[" * 200_000 + CANARY}, "is one text"),
    "a wrong answer is a number": (TOFU_ROW | {"perturbed_answer": [CANARY, 3]}, "item 2 is int"),
    "a wrong answer is null": (TOFU_ROW | {"perturbed_answer": [CANARY, None]}, "item 2 is missing"),
    "a wrong answer is blank": (TOFU_ROW | {"perturbed_answer": [CANARY, ""]}, "item 2 is blank"),
    "id is a sentence": (TOFU_ROW | {"id": f"the {CANARY} row"}, "not a short name"),
    "id is long": (TOFU_ROW | {"id": CANARY * 20}, "not a short name"),
    "id is a truth value": (TOFU_ROW | {"id": True, "answer": CANARY}, "not a short name"),
    "two prompts": ({"question": CANARY, "prompt": CANARY, "answer": "a"}, "question and prompt could each be the prompt"),
    "alpaca's context": ({"instruction": CANARY, "input": CANARY, "output": "a"}, "--columns prompt=instruction"),
    "no answer": ({"question": CANARY, "tags": CANARY}, "no column for the response. Its columns are question, tags."),
    "misspelt answer": ({"question": CANARY, "anwser": CANARY}, "Did you mean 'anwser'\\? Then set --columns response=anwser"),
    "keyed by question": ({f"Who is {CANARY}?": CANARY}, "names that look like text"),
    "no header": ({f"Where is {CANARY}?": "a", CANARY: "b"}, "2 column.* names that look like text"),
    "no columns": ({}, "The row has no columns"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_never_quoted(case: str) -> None:
    row, expected = BAD[case]
    assert CANARY in json.dumps(row) or not row or case in ("prompt is a number",)
    with pytest.raises(InputError, match=expected) as caught:
        record(row)
    assert "mine.jsonl, row 7" in str(caught.value)
    shown = "".join(traceback.format_exception_only(caught.value))
    assert CANARY not in shown
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_no_name_is_suggested_beside_names_that_are_text() -> None:
    with pytest.raises(InputError) as caught:
        record({"Who is it?": CANARY, "anwser": CANARY}, ColumnMap(prompt="Who is it?"))
    assert "anwser" not in str(caught.value)


def test_a_named_column_must_exist() -> None:
    with pytest.raises(InputError, match=r"no column 'quest' for the prompt\. Its columns are question, answer\. Did you mean 'question'"):
        record({"question": "q", "answer": "a"}, ColumnMap(prompt="quest"))
    with pytest.raises(InputError, match="no column 'para' for the paraphrase"):
        record({"question": "q", "answer": "a"}, ColumnMap(paraphrase="para"))


def test_long_lists_of_columns_are_cut() -> None:
    assert shown_columns([f"c{i}" for i in range(23)]).endswith("c19 and 3 more.")


def test_the_flag_names_columns() -> None:
    assert parse_columns("prompt=q, response = a b ,perturbed=w=1") == ColumnMap(prompt="q", response="a b", perturbed="w=1")
    assert parse_columns("") == ColumnMap()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt", "not field=column. Expected for example prompt=question,response=answer"),
        ("prompt=", "not field=column"),
        ("promt=q", "unknown field 'promt'.*Did you mean 'prompt'"),
        ("banana=q", r"Expected one of prompt, response, paraphrase, perturbed, paraphrased_prompt, id\.$"),
        ("prompt=q,prompt=p", "prompt is given twice"),
        ("prompt=q,response=q", "two fields use one column"),
    ],
)
def test_a_bad_flag_says_what_to_write(text: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parse_columns(text)


def test_the_map_is_checked_and_frozen() -> None:
    for bad in ({"promt": "q"}, {"prompt": ""}, {"prompt": 3}, {"prompt": "x", "id": "x"}):
        with pytest.raises(ValidationError) as caught:
            ColumnMap(**bad)
        assert "input_value" not in str(caught.value)
    with pytest.raises(ValidationError):
        ColumnMap().prompt = "q"  # type: ignore[misc]
