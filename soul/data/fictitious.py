"""The built-in benchmark: invented authors, twenty questions about each, in the shape of TOFU and with its splits.

Everything follows from the seed, in any process. An author depends on the seed and on the author's number only, so that a smaller
benchmark is the beginning of a larger one, and the holdout authors are the same beside any number of authors.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from soul.data.fictitious_phrases import DECKS, MAX_AUTHORS, PICKED, WRONG, YEARS
from soul.data.fictitious_templates import FACTS, Fact
from soul.data.fictitious_words import HE_NAMES, INFLUENCE_WORKS, SHE_NAMES
from soul.data.world_facts import real_authors, world_facts
from soul.records import InputError, Record

FORGET_PERCENTS = (1, 5, 10)
NUM_PERTURBED = 5
SHE = {"they": "she", "their": "her", "them": "her"}
HE = {"they": "he", "their": "his", "them": "him"}


@dataclass(frozen=True, slots=True)
class Author:
    """`fields` is what the wordings of `FACTS` can mention; `key` is the first part of the ids of the author's records."""

    key: str
    fields: dict[str, str]


def fictitious_splits(num_authors: int = 200, seed: int = 0, num_holdout_authors: int = 10) -> dict[str, list[Record]]:
    """`full`, `forget01`, `forget05`, `forget10` with `retain99`, `retain95`, `retain90`, `holdout`, `real_authors` and `world_facts`.

    The forget sets are the last authors of `full`, rounded up to whole authors; `holdout` are authors that are not in `full`.
    """
    _check_counts(num_authors, num_holdout_authors)
    decks = _shuffled_decks(seed)
    full = [
        record
        for number in range(num_authors)
        for record in _records(_author(f"fictitious/author-{number:03d}", seed, _hand(decks, number)), seed)
    ]
    holdout = [
        record
        for number in range(num_holdout_authors)
        for record in _records(_author(f"fictitious/holdout-{number:03d}", seed, _hand(decks, -1 - number)), seed)
    ]
    splits = {"full": full}
    for percent in FORGET_PERCENTS:
        num_forget = -(-num_authors * percent // 100)
        first = (num_authors - num_forget) * len(FACTS)
        splits[f"forget{percent:02d}"] = full[first:]
        splits[f"retain{100 - percent:02d}"] = full[:first]
    return splits | {"holdout": holdout, "real_authors": real_authors(), "world_facts": world_facts()}


def _check_counts(num_authors: int, num_holdout_authors: int) -> None:
    if num_authors < 2:
        raise InputError(f"num_authors is {num_authors}. Expected at least 2: one to forget and one to retain.")
    if num_holdout_authors < 1:
        raise InputError(f"num_holdout_authors is {num_holdout_authors}. Expected at least 1.")
    total = num_authors + num_holdout_authors
    if total > MAX_AUTHORS:
        raise InputError(
            f"num_authors is {num_authors} and num_holdout_authors is {num_holdout_authors}, {total} together. Expected at most "
            f"{MAX_AUTHORS}, which is how many the built-in names and titles are enough for. Lower one of them."
        )


def _shuffled_decks(seed: int) -> list[list[int]]:
    """The order in which each deck is dealt."""
    orders = []
    for deck, fields in DECKS:
        order = list(range(len(deck)))
        random.Random(f"{seed}/{'+'.join(fields)}").shuffle(order)
        orders.append(order)
    return orders


def _hand(orders: list[list[int]], number: int) -> dict[str, str]:
    """The cards of one author. Authors are dealt from the front, holdout authors (-1, -2, ...) from the back."""
    hand: dict[str, str] = {}
    for (deck, fields), order in zip(DECKS, orders, strict=True):
        turn = number % (len(deck) // len(fields))
        hand.update({field: deck[order[turn * len(fields) + place]] for place, field in enumerate(fields)})
    return hand


def _author(key: str, seed: int, hand: dict[str, str]) -> Author:
    """The hand, completed by everything that need not differ between authors."""
    rng = random.Random(f"{seed}/{key}")
    forenames, pronouns = rng.choice(((SHE_NAMES, SHE), (HE_NAMES, HE)))
    fields = hand | pronouns | {field: rng.choice(source) for field, source in PICKED.items()}
    fields["name"] = f"{rng.choice(forenames)} {hand['surname']}"
    for field in ("mentor", "illustrator", "influence"):
        fields[field] = f"{rng.choice(SHE_NAMES + HE_NAMES)} {hand[field]}"
    fields["influence"] = f"{rng.choice(INFLUENCE_WORKS)} of {fields['influence']}"
    debut_year = int(hand["birth_date"].split()[-1]) + rng.randint(23, 37)
    second_year = debut_year + rng.randint(1, 5)
    years = (debut_year, second_year, second_year + rng.randint(1, 6))
    fields.update({field: str(year) for field, year in zip(YEARS, years, strict=True)})
    return Author(key, fields)


def _records(author: Author, seed: int) -> list[Record]:
    return [_record(author, number, fact, seed) for number, fact in enumerate(FACTS)]


def _record(author: Author, number: int, fact: Fact, seed: int) -> Record:
    """Question and answer in one wording each, their paraphrases in another. Wrong answers have the wording of the paraphrase."""
    record_id = f"{author.key}/q{number:02d}"
    rng = random.Random(f"{seed}/{record_id}")
    question, other_question = rng.sample(fact.questions, 2)
    answer, other_answer = rng.sample(fact.answers, 2)
    wrong = _wrong_values(author, fact, rng)
    return Record(
        id=record_id,
        prompt=question.format_map(author.fields),
        response=answer.format_map(author.fields),
        paraphrase=other_answer.format_map(author.fields),
        perturbed=tuple(other_answer.format_map(author.fields | values) for values in wrong),
        paraphrased_prompt=other_question.format_map(author.fields),
    )


def _wrong_values(author: Author, fact: Fact, rng: random.Random) -> list[dict[str, str]]:
    """Five sets of values for the fact. In each field they differ from the right value and from each other."""
    columns: dict[str, list[str]] = {}
    for field in fact.values:
        column: list[str] = []
        while len(column) < NUM_PERTURBED:
            value = _wrong_value(author, field, rng)
            if value != author.fields[field] and value not in column:
                column.append(value)
        columns[field] = column
    return [{field: column[row] for field, column in columns.items()} for row in range(NUM_PERTURBED)]


def _wrong_value(author: Author, field: str, rng: random.Random) -> str:
    """Of the same kind as the right value, which it may happen to be."""
    if field in YEARS:
        return str(int(author.fields[field]) + rng.randint(-9, 9))
    return rng.choice(WRONG[field])
