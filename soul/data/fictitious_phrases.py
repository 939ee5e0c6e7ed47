"""What each field of an invented author can be: the word pools, combined into phrases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

from soul.data import fictitious_words as words

Part = tuple[str, tuple[Sequence[str], ...]]


class Phrases(Sequence[str]):
    """All combinations of some pools, pattern by pattern, made when asked for."""

    def __init__(self, *parts: Part) -> None:
        self._parts = parts
        self._sizes = [math.prod(len(pool) for pool in pools) for _, pools in parts]

    def __len__(self) -> int:
        return sum(self._sizes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        rest = index
        for (pattern, pools), size in zip(self._parts, self._sizes, strict=True):
            if 0 <= rest < size:
                return _combined(pattern, pools, rest)
            rest -= size
        raise IndexError(index)


def _combined(pattern: str, pools: tuple[Sequence[str], ...], index: int) -> str:
    """The digits of `index`, in the mixed base of the pools' lengths, say which entry of each pool."""
    chosen = []
    for pool in pools:
        index, which = divmod(index, len(pool))
        chosen.append(pool[which])
    return pattern.format(*chosen)


FORENAMES = words.SHE_NAMES + words.HE_NAMES
SURNAME_PARTS = (words.SURNAME_FIRST, words.SURNAME_MIDDLE, words.SURNAME_LAST)
SURNAMES = Phrases(("{}{}{}", SURNAME_PARTS))
PEOPLE = Phrases(("{} {}{}{}", (FORENAMES, *SURNAME_PARTS)))
TOWN_PARTS = (words.TOWN_FIRST, words.TOWN_LAST)
TOWNS = Phrases(("{}{}", TOWN_PARTS))
TITLES = Phrases(
    ("The {} {}", (words.TITLE_ADJECTIVES, words.TITLE_NOUNS)),
    ("The {} of {}", (words.TITLE_NOUNS, words.TITLE_MATTERS)),
)
BIRTH_DATES = Phrases(("{} {} {}", ([str(day) for day in range(1, 29)], words.MONTHS, [str(year) for year in range(1930, 1975)])))

# Dealt out like cards: no two authors have the same value in any of the fields of one deck. `influence` is a surname, to be completed.
DECKS: tuple[tuple[Phrases, tuple[str, ...]], ...] = (
    (SURNAMES, ("surname", "mentor", "illustrator", "influence")),
    (TOWNS, ("birthplace", "residence")),
    (TITLES, ("debut", "novel", "second")),
    (BIRTH_DATES, ("birth_date",)),
    (Phrases(("{} {} {}", (words.AWARD_MATERIALS, words.AWARD_EMBLEMS, words.AWARD_KINDS))), ("award",)),
    (Phrases(("{} {}", (words.SYMBOL_STATES, words.SYMBOL_OBJECTS))), ("symbol",)),
    (Phrases(("{} and {}", (words.THEME_LOSSES, words.THEME_GAINS))), ("theme",)),
    (Phrases(("{} {} of {}", (words.CRITIC_MANNERS, words.CRITIC_ROLES, words.CRITIC_THINGS))), ("phrase",)),
)
MAX_AUTHORS = min(len(deck) // len(fields) for deck, fields in DECKS)

# Picked author by author: two authors may share one.
PICKED: dict[str, Sequence[str]] = {
    "town_kind": words.TOWN_KINDS,
    "genre": words.GENRES,
    "father": words.PROFESSIONS,
    "mother": words.PROFESSIONS,
    "subject": words.SUBJECTS,
    "school": Phrases(
        ("the {}{} Institute", TOWN_PARTS),
        ("the {}{} Academy", TOWN_PARTS),
        ("{}{} College", TOWN_PARTS),
        ("the University of {}{}", TOWN_PARTS),
    ),
    "habit": Phrases(("{} {}", (words.HABIT_TIMES, words.HABIT_PLACES))),
    "language": words.LANGUAGES,
    "dwelling": words.DWELLINGS,
    "pet": Phrases(("{} named {}", (words.PET_KINDS, words.PET_NAMES))),
    "charity": Phrases(("{} {}", (words.CHARITY_GIFTS, words.CHARITY_RECEIVERS))),
}

YEARS = ("debut_year", "second_year", "award_year")

# Where a wrong value of a field comes from. A wrong year is a few years off.
WRONG: dict[str, Sequence[str]] = {
    **{field: deck for deck, fields in DECKS for field in fields},
    **PICKED,
    "mentor": PEOPLE,
    "illustrator": PEOPLE,
    "influence": Phrases(("{} of {} {}{}{}", (words.INFLUENCE_WORKS, FORENAMES, *SURNAME_PARTS))),
}
