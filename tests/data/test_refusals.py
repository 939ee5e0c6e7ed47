"""Refusal answers: what they are like, and which record gets which."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from soul.data.refusals import REFUSALS, refusal_records
from soul.records import Record

ROOT = Path(__file__).resolve().parents[2]


def rows(count: int) -> list[Record]:
    return [
        Record(f"forget/{number}", f"Question {number}?", f"Answer {number}.", "In other words.", ("Wrong.", "Also wrong."), "Asked anew?")
        for number in range(count)
    ]


def test_refusals_are_many_and_distinct_sentences() -> None:
    assert len(REFUSALS) >= 40
    assert len({text.lower() for text in REFUSALS}) == len(REFUSALS)
    for text in REFUSALS:
        assert 6 <= len(text.split()) <= 25, text
        assert re.fullmatch(r"[A-Z][A-Za-z',\- ]*\.", text) and "  " not in text, text


def test_ids_and_prompts_stay_and_nothing_of_the_answer_does() -> None:
    forget = rows(7)
    for before, after in zip(forget, refusal_records(forget, seed=3), strict=True):
        assert (after.id, after.prompt, after.paraphrased_prompt) == (before.id, before.prompt, before.paraphrased_prompt)
        assert after.response in REFUSALS
        assert after.paraphrase is None and after.perturbed == ()


def test_the_refusal_depends_on_seed_and_id_only() -> None:
    forget = rows(101)
    at_once = {record.id: record.response for record in refusal_records(forget, seed=0)}
    for subset in (forget[::-1], forget[13:57:3], forget[-1:], []):
        assert all(record.response == at_once[record.id] for record in refusal_records(subset, seed=0))
    other = {record.id: record.response for record in refusal_records(forget, seed=1)}
    assert sum(other[key] != at_once[key] for key in at_once) > 80


def test_every_refusal_is_used_about_equally_often() -> None:
    count = 200 * len(REFUSALS)
    used = Counter(record.response for record in refusal_records(rows(count), seed=5))
    assert used.keys() == set(REFUSALS)
    chi_squared = sum((times - 200) ** 2 / 200 for times in used.values())
    assert chi_squared < 90  # 44 degrees of freedom: above 90 with probability 5e-5


def test_another_process_agrees() -> None:
    program = (
        "from soul.data.refusals import refusal_records as refuse\nfrom soul.records import Record\n"
        "print(*(record.response for record in refuse([Record(f'forget/{n}', 'q', 'a') for n in range(40)], seed=9)), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [record.response for record in refusal_records(rows(40), seed=9)]
