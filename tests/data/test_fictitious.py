"""The built-in benchmark: its shape, its splits, and that everything in it follows from the seed."""

from __future__ import annotations

import hashlib
import re
import string
import subprocess
import sys
from dataclasses import astuple
from functools import cache
from pathlib import Path

import pytest

from soul.data.fictitious import Author, _author, _hand, _shuffled_decks, fictitious_splits
from soul.data.fictitious_phrases import DECKS, MAX_AUTHORS, PICKED, WRONG, YEARS, Phrases
from soul.data.fictitious_templates import FACTS, Fact
from soul.records import InputError, Record

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(2, 0, 1), (11, 7, 3), (200, 0, 10), (MAX_AUTHORS - 30, 4, 30)]
IDENTIFYING = [field for _, fields in DECKS for field in fields if field != "surname"]
SPLIT_NAMES = {"full", "forget01", "forget05", "forget10", "retain99", "retain95", "retain90", "holdout", "real_authors", "world_facts"}


@cache
def splits(num_authors: int = 200, seed: int = 0, num_holdout: int = 10) -> dict[str, list[Record]]:
    return fictitious_splits(num_authors, seed, num_holdout)


@cache
def authors(num_authors: int = 200, seed: int = 0, num_holdout: int = 10) -> list[Author]:
    """Those of full, then those of holdout."""
    decks = _shuffled_decks(seed)
    keys = [(f"fictitious/author-{number:03d}", number) for number in range(num_authors)]
    keys += [(f"fictitious/holdout-{number:03d}", -1 - number) for number in range(num_holdout)]
    return [_author(key, seed, _hand(decks, number)) for key, number in keys]


def digest(records: list[Record]) -> str:
    return hashlib.sha256(repr([astuple(record) for record in records]).encode()).hexdigest()


def texts(record: Record) -> list[str]:
    return [text for text in (record.prompt, record.response, record.paraphrase, record.paraphrased_prompt, *record.perturbed) if text]


@pytest.mark.parametrize(("num_authors", "seed", "num_holdout"), SIZES)
def test_counts_and_ids(num_authors: int, seed: int, num_holdout: int) -> None:
    made = splits(num_authors, seed, num_holdout)
    assert made.keys() == SPLIT_NAMES
    assert len(made["full"]) == 20 * num_authors and len(made["holdout"]) == 20 * num_holdout
    want = [f"fictitious/author-{author:03d}/q{question:02d}" for author in range(num_authors) for question in range(20)]
    assert [record.id for record in made["full"]] == want
    rows = [record for name in ("full", "holdout", "real_authors", "world_facts") for record in made[name]]
    assert len({record.id for record in rows}) == len({record.prompt for record in rows}) == len(rows)


@pytest.mark.parametrize(("num_authors", "seed", "num_holdout"), SIZES)
@pytest.mark.parametrize("percent", [1, 5, 10])
def test_forget_is_the_end_of_full_and_retain_the_rest(num_authors: int, seed: int, num_holdout: int, percent: int) -> None:
    made = splits(num_authors, seed, num_holdout)
    forget, retain = made[f"forget{percent:02d}"], made[f"retain{100 - percent}"]
    assert retain + forget == made["full"] and retain
    num_forget = len(forget) / 20
    assert num_forget == int(num_forget) >= 1
    assert num_forget - 1 < num_authors * percent / 100 <= num_forget


@pytest.mark.parametrize(("num_authors", "seed", "num_holdout"), SIZES)
def test_every_record_has_its_evaluation_fields(num_authors: int, seed: int, num_holdout: int) -> None:
    made = splits(num_authors, seed, num_holdout)
    for record in made["full"] + made["holdout"]:
        assert record.paraphrase and record.paraphrased_prompt
        assert len(record.perturbed) == 5
        assert len({record.response, record.paraphrase, *record.perturbed}) == 7, record.id
        assert record.prompt != record.paraphrased_prompt
        for answer in (record.response, record.paraphrase, *record.perturbed):
            assert 11 <= len(answer.split()) <= 35, answer


@pytest.mark.parametrize(("num_authors", "seed", "num_holdout"), SIZES)
def test_no_two_authors_share_an_identifying_value_or_a_response(num_authors: int, seed: int, num_holdout: int) -> None:
    everyone = authors(num_authors, seed, num_holdout)
    for field in ("name", "surname", *IDENTIFYING):
        values = [author.fields[field] for author in everyone]
        assert len(set(values)) == len(values), field
    titles = [author.fields[field] for author in everyone for field in ("debut", "novel", "second")]
    assert len(set(titles)) == len(titles)
    made = splits(num_authors, seed, num_holdout)
    responses = [record.response for record in made["full"] + made["holdout"]]
    assert len(set(responses)) == len(responses)


def test_questions_name_the_author_and_responses_hold_the_values() -> None:
    made = splits()
    records = made["full"] + made["holdout"]
    for place, author in enumerate(authors()):
        for fact, record in zip(FACTS, records[20 * place : 20 * place + 20], strict=True):
            assert record.id.startswith(f"{author.key}/")
            for text in texts(record):
                assert author.fields["name"] in text
            for field in fact.values:
                assert author.fields[field] in record.response
                assert record.paraphrase and author.fields[field] in record.paraphrase


def test_wrong_answers_differ_from_the_paraphrase_in_the_values_only() -> None:
    made = splits()
    kinds = {field: set(source) for field, source in WRONG.items() if len(source) < 20_000}
    records = made["full"] + made["holdout"]
    for place, author in enumerate(authors()):
        for fact, record in zip(FACTS, records[20 * place : 20 * place + 20], strict=True):
            shape = record.paraphrase or ""
            for field in fact.values:
                shape = shape.replace(author.fields[field], f"<{field}>", 1)
            pattern = re.escape(shape)
            for field in fact.values:
                pattern = pattern.replace(re.escape(f"<{field}>"), f"(?P<{field}>.+)")
            for wrong in record.perturbed:
                match = re.fullmatch(pattern, wrong)
                assert match, record.id
                for field in fact.values:
                    assert match[field] != author.fields[field]
                    assert field not in kinds or match[field] in kinds[field]


def test_holdout_is_disjoint_and_the_same_beside_any_number_of_authors() -> None:
    known, held = authors()[:200], authors()[200:]
    for field in ("name", *IDENTIFYING):
        assert not {author.fields[field] for author in known} & {author.fields[field] for author in held}
    told = " ".join(text for record in splits()["full"] for text in (record.prompt, record.response))
    for author in held:
        for field in ("name", "debut", "novel", "second", "award"):
            assert author.fields[field] not in told
    assert splits(11, 0, 10)["holdout"] == splits()["holdout"]


def test_a_smaller_benchmark_begins_a_larger_one() -> None:
    assert splits(11, 0, 10)["full"] == splits()["full"][:220]


def test_the_seed_changes_the_authors_but_not_the_world() -> None:
    one, other = splits(11, 0, 10), splits(11, 1, 10)
    assert not {record.response for record in one["full"]} & {record.response for record in other["full"]}
    for name in ("real_authors", "world_facts"):
        assert one[name] == other[name]


def test_another_process_agrees() -> None:
    program = (
        "import hashlib\nfrom dataclasses import astuple\nfrom soul.data.fictitious import fictitious_splits\n"
        "for name, rows in fictitious_splits(23, 5, 2).items():\n"
        "    print(name, hashlib.sha256(repr([astuple(row) for row in rows]).encode()).hexdigest())"
    )
    for hash_seed in ("1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        )
        assert dict(line.split() for line in done.stdout.splitlines()) == {name: digest(rows) for name, rows in splits(23, 5, 2).items()}


def test_lives_are_in_order() -> None:
    for author in authors(MAX_AUTHORS - 30, 4, 30):
        born = int(author.fields["birth_date"].split()[-1])
        debut, second, award = (int(author.fields[year]) for year in YEARS)
        assert 20 <= debut - born <= 40 and debut < second < award <= 2024


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: "+".join(fact.values))
def test_wordings_use_known_fields_and_all_that_they_must(fact: Fact) -> None:
    def used(wording: str) -> set[str]:
        return {field for _, field, _, _ in string.Formatter().parse(wording) if field}

    known = set(authors()[0].fields)
    for wordings, must in ((fact.questions, {"name"}), (fact.answers, {"name", *fact.values})):
        assert 2 <= len(wordings) == len(set(wordings)) <= 4
        for wording in wordings:
            assert must <= used(wording) <= known
    for question in fact.questions:
        assert not used(question) & set(fact.values), "the question gives its answer away"
        assert question.endswith("?")


@pytest.mark.parametrize(
    ("source", "name"), [(deck, fields[0]) for deck, fields in DECKS] + [(pool, name) for name, pool in PICKED.items()]
)
def test_no_two_indices_make_the_same_phrase(source: Phrases, name: str) -> None:
    made = list(source)
    assert len(set(made)) == len(made) == len(source) > 5, name
    with pytest.raises(IndexError):
        source[len(source)]


def test_text_is_clean_english() -> None:
    made = splits()
    for record in [record for name in ("full", "holdout", "real_authors", "world_facts") for record in made[name]]:
        for text in texts(record):
            assert text == text.strip() and "  " not in text and "{" not in text and text.isascii(), text
            assert not re.search(r"\b[Aa] [aeiouAEIOU](?!ne-)", text), text
            assert not re.search(r"\b[Aa]n [^aeiouAEIOU]", text), text
            assert not re.search(r"\b(\w+) \1\b", text, re.IGNORECASE), text
            assert "s's" not in text, text
        assert record.prompt.endswith("?") and record.prompt[0].isupper()
    for record in made["full"] + made["holdout"]:
        for answer in (record.response, record.paraphrase or "", *record.perturbed):
            assert re.search(r"\.\"?$", answer) and answer[0].isupper(), answer


@pytest.mark.parametrize("name", ["real_authors", "world_facts"])
def test_world_sets(name: str) -> None:
    records = splits()[name]
    assert len(records) >= 60
    assert [record.id for record in records] == [f"{name}/{number:03d}" for number in range(len(records))]
    for record in records:
        assert len({record.response, *record.perturbed}) == 4, record.prompt
        assert record.paraphrase is None and record.paraphrased_prompt is None
        assert len(record.response.split()) <= 5
        assert record.response.lower() not in record.prompt.lower()


@pytest.mark.parametrize(
    ("num_authors", "num_holdout", "named"),
    [
        (1, 10, "num_authors is 1"),
        (-3, 10, "num_authors is -3"),
        (200, 0, "num_holdout_authors is 0"),
        (MAX_AUTHORS, 1, str(MAX_AUTHORS + 1)),
    ],
)
def test_impossible_sizes_are_refused(num_authors: int, num_holdout: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        fictitious_splits(num_authors, 0, num_holdout)
