"""A gold standard has to be of the same rows, made the same way: what differs is named, without a row's text, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soul.cli import main
from soul.evaluate.eval_log import EvalLog, SplitLog
from soul.evaluate.logs import read_log, write_tofu_log
from soul.evaluate.same_rows import check_comparable, differences, not_compared, rows_digest
from soul.evaluate.score import score
from soul.evaluate.summary import score_log
from soul.records import InputError, Record

NUM_ROWS = 20
MADE = {"rouge_tokenizer": "r", "zlib": "zlib 1.3", "tokenizer": "t", "template": "c"}


def split(shift: float = 0.0, **changed: Any) -> SplitLog:
    nlls = tuple(0.5 + shift + 0.01 * row for row in range(NUM_ROWS))
    values: dict[str, Any] = {
        "keys": tuple(map(str, range(NUM_ROWS))),
        "answer_nll": nlls,
        "right_nll": nlls,
        "wrong_nlls": tuple((1.0, 1.2) for _ in nlls),
        "answer_tokens": tuple(range(5, 5 + NUM_ROWS)),
        "rows": rows_digest([Record(str(row), f"question {row}", "yes") for row in range(NUM_ROWS)]),
        "attacks": {"loss": nlls, "zlib": nlls},
    }
    return SplitLog(**(values | changed))


def log(**changed: Any) -> EvalLog:
    return EvalLog("a log", {"forget": split(**changed), "holdout": split(0.3)}, made_with=MADE)


OWN = log()
OTHER_ROWS = "zz"
BAD: dict[str, tuple[Callable[[], EvalLog], str]] = {
    "other questions": (lambda: log(rows=OTHER_ROWS), "forget: other questions or answers"),
    "other wrong answers": (lambda: log(wrong_nlls=((1.0,), *((1.0, 1.2),) * (NUM_ROWS - 1))), "1 of 20 rows have another number of wrong"),
    "other numbers": (lambda: log(keys=tuple(map(str, range(100, 120)))), "40 row number(s) in one only, first row 0"),
    "other tokens, no fingerprints": (
        lambda: log(rows=None, answer_tokens=(9,) * NUM_ROWS),
        "another number of answer tokens, first row 0",
    ),
    "another tokenizer": (lambda: replace(OWN, made_with=MADE | {"tokenizer": "u"}), "another tokenizer's vocabulary"),
    "another template": (lambda: replace(OWN, made_with=MADE | {"template": "d"}), "another chat template"),
    "other holdout rows": (lambda: replace(OWN, splits={**OWN.splits, "holdout": split(rows=OTHER_ROWS)}), "holdout: other questions"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_log_that_does_not_fit_is_refused_with_the_reason_and_compared_on_demand(name: str) -> None:
    make, words = BAD[name]
    gold = make()
    with pytest.raises(InputError) as error:
        check_comparable(OWN, gold)
    assert words in str(error.value) and "--allow-mismatch" in str(error.value) and "question 7" not in str(error.value)
    scores = score(OWN, retrained=gold)
    assert scores.forget_quality is None and scores.privleak is None
    assert words in scores.reasons["forget_quality"] and words in scores.reasons["privleak"]
    insisted = score_log(OWN, gold, allow_mismatch=True)
    assert insisted["forget_quality"] is not None and any(words in line for line in insisted["compared_despite"])


def test_the_same_rows_are_compared_also_where_a_log_says_less() -> None:
    assert score(OWN, retrained=log(shift=0.2)).forget_quality is not None
    bare = EvalLog("published", {"forget": split(0.2, rows=None)})
    assert not differences(OWN, bare) and score(OWN, retrained=bare).forget_quality is not None
    assert not_compared(OWN, bare) == ("forget.rows", "tokenizer", "template", "zlib")


def test_zlib_attacks_of_two_zlibs_are_not_compared() -> None:
    gold = replace(log(shift=0.2), made_with=MADE | {"zlib": "zlib 1.3.1 (zlib-ng 2.2)"})
    scores = score(OWN, retrained=gold)
    assert scores.privleak is not None and scores.privleak["zlib"] is None and scores.privleak["loss"] is not None
    assert "zlib-ng 2.2" in scores.reasons["privleak.zlib"]
    assert score(OWN, retrained=gold, allow_mismatch=True).privleak["zlib"] is not None  # type: ignore[index]


def test_the_digest_and_what_a_log_was_made_with_survive_the_file(tmp_path: Path) -> None:
    write_tofu_log(OWN, tmp_path / "a.json.gz")
    read = read_log(tmp_path / "a.json.gz")
    assert read.made_with == MADE and read.splits["forget"].rows == OWN.splits["forget"].rows


def test_soul_score_refuses_a_log_of_other_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tofu_log(OWN, tmp_path / "a.json")
    write_tofu_log(log(rows=OTHER_ROWS), tmp_path / "b.json")
    command = ["score", str(tmp_path / "a.json"), "--retrained", str(tmp_path / "b.json")]
    assert main(command) != 0
    assert "other questions or answers" in capsys.readouterr().err
    assert main([*command, "--allow-mismatch"]) == 0
    assert json.loads(capsys.readouterr().out)["compared_despite"]


def test_a_split_whose_answers_have_no_words_says_so() -> None:
    empty = replace(OWN, splits={"forget": split(rougeL_recall=(None, *(1.0,) * (NUM_ROWS - 1)))})
    assert score(empty).splits["forget"]["rougeL_recall"] == 1.0  # type: ignore[index]
