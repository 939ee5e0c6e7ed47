"""Rows about one author stay together, and two halves share no author."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from soul.data.groups import group_of, groups_of, halves
from soul.data.sources import load_fictitious


@pytest.mark.parametrize(
    ("record_id", "group"),
    [
        ("fictitious/author-003/q07", "fictitious/author-003"),
        ("forget05/1", "forget05/author-0"),
        ("forget05/20", "forget05/author-0"),
        ("forget05/21", "forget05/author-1"),
        ("retain95/3800", "retain95/author-189"),
        ("forget/17", "forget/17"),  # own rows without ids: each its own
        ("retain/2", "retain/2"),
        ("world_facts_perturbed/4", "world_facts_perturbed/4"),
        ("alice/3", "alice"),  # own ids
        ("tickets/2024/17", "tickets/2024"),
        ("17", "17"),
    ],
)
def test_an_id_says_what_a_row_is_about(record_id: str, group: str) -> None:
    assert group_of(record_id) == group


def test_invented_authors_have_twenty_rows_each() -> None:
    rows = load_fictitious(num_authors=20, forget="forget10").splits["forget"]
    assert Counter(groups_of([row.id for row in rows])) == {0: 20, 1: 20}


@pytest.mark.parametrize("seed", range(20))
def test_halves_share_no_group_lose_no_row_and_are_about_equal(seed: int) -> None:
    dice = random.Random(seed)
    groups = [group for group in range(dice.randint(2, 12)) for _ in range(dice.randint(1, 30))]
    dice.shuffle(groups)
    found = halves(groups)
    one, other = ({groups[row] for row in half} for half in (found.selection, found.report))
    assert not one & other and one | other == set(groups) and not found.share_groups
    assert sorted(found.selection + found.report) == list(range(len(groups)))
    assert abs(len(found.selection) - len(found.report)) <= max(Counter(groups).values())


def test_one_group_has_rows_in_both_halves_and_says_so() -> None:
    found = halves([0] * 5)
    assert (found.selection, found.report, found.share_groups) == ((0, 2, 4), (1, 3), True)


def test_rows_of_groups_of_their_own_are_dealt_in_turn() -> None:
    found = halves(range(6))
    assert (found.selection, found.report) == ((0, 2, 4), (1, 3, 5))


def test_a_single_row_is_selected_on_and_reported() -> None:
    assert halves([0]).selection == halves([0]).report == (0,)
