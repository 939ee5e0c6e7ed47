"""Which rows belong together because they are about one author or one person, and halves that share none of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# What ids are called that come from a row's number: TOFU's subsets ask twenty questions about each author, one behind the other.
TWENTY_EACH: Final = re.compile(r"(full|(forget|retain|holdout)\d\d)(_perturbed)?")
NUMBERED: Final = re.compile(r"forget|retain|refusal|holdout|(real_authors|world_facts|forget\d*|retain\d*)(_perturbed)?")
QUESTIONS: Final = 20


def group_of(record_id: str) -> str:
    """What a row is about: the part of its id before the last slash ("alice/3"), its author in TOFU's subsets, else the row alone."""
    head, _, tail = record_id.rpartition("/")
    if TWENTY_EACH.fullmatch(head) and tail.isdigit():
        return f"{head}/author-{(int(tail) - 1) // QUESTIONS}"
    if not head or NUMBERED.fullmatch(head):
        return record_id
    return head


def groups_of(record_ids: Sequence[str]) -> tuple[int, ...]:
    """A number for each row's group, from 0 in the order in which the groups first come."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(group_of(record_id), len(numbers)) for record_id in record_ids)


@dataclass(frozen=True, slots=True)
class Halves:
    """Row numbers, in order. `share_groups`: all rows are of one group, so that both halves had to have rows of it."""

    selection: tuple[int, ...]
    report: tuple[int, ...]
    share_groups: bool


def halves(groups: Sequence[int]) -> Halves:
    """Whole groups, the larger ones first, each to the half with fewer rows; a single group's rows one by one."""
    sizes: dict[int, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    if len(sizes) == 1:
        rows = range(len(groups))
        return Halves(tuple(rows[0::2]), tuple(rows[1::2]) or tuple(rows), share_groups=True)  # a single row is both
    counts, chosen = [0, 0], [set[int](), set[int]()]
    for group in sorted(sizes, key=lambda group: -sizes[group]):
        half = int(counts[1] < counts[0])
        chosen[half].add(group)
        counts[half] += sizes[group]
    selection, report = (tuple(row for row, group in enumerate(groups) if group in part) for part in chosen)
    return Halves(selection, report, share_groups=False)
