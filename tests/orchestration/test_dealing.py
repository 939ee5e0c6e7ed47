"""Dealing out work: whatever comes late, is lost or never comes, every piece is done, once counted, and in its place. Without Ray."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from soul.orchestration import examiners
from soul.orchestration.dealing import LOSSES, Answer, GivenUp, Lost, Ready, deal
from soul.orchestration.examiners import EvaluationStopped, Exam, examine, shares

COMING = "coming"


@dataclass
class Fake:
    """Helpers that square numbers. Which of them does something next is drawn; `dies` says whether it is death (seat, item or None)."""

    rng: random.Random
    dies: Callable[[int, int | None], bool] = lambda seat, item: False
    never: frozenset[int] = frozenset()
    at: dict[int, str | int | None] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    started: list[int] = field(default_factory=list)

    def start(self, seat: int) -> None:
        assert seat not in self.at, "a seat is taken until its helper is lost"
        self.at[seat] = COMING
        self.started.append(seat)

    def ask(self, seat: int, item: int) -> None:
        assert self.at[seat] is None, "one piece at a time, and only of who is there"
        self.at[seat] = item
        self.asked.append(item)

    def stop(self, seat: int) -> None:
        del self.at[seat]

    def wait(self) -> Ready | Answer[int] | Lost:
        seat = self.rng.choice([seat for seat, what in self.at.items() if what is not None and not (seat in self.never and what == COMING)])
        what = self.at[seat]
        item = what if isinstance(what, int) else None
        if self.dies(seat, item):
            del self.at[seat]
            return Lost(seat, "killed")
        self.at[seat] = None
        return Ready(seat) if item is None else Answer(seat, item * item)


def now_and_then(rng: random.Random) -> Callable[[int, int | None], bool]:
    """Death, but never as often in a row at one place as makes a defect."""
    row: Counter[tuple[str, int]] = Counter()

    def dies(seat: int, item: int | None) -> bool:
        place = ("seat", seat) if item is None else ("item", item)
        row[place] = row[place] + 1 if row[place] < LOSSES - 1 and rng.random() < 0.5 else 0
        return row[place] > 0

    return dies


@pytest.mark.parametrize("num_seats", [1, 2, 8, 40])
def test_every_piece_is_done_whatever_happens(num_seats: int) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        costs = [rng.randrange(5) for _ in range(rng.choice([0, 1, 7, 23]))]
        heard: list[int] = []
        never = frozenset(range(1, num_seats)) if seed % 3 == 0 else frozenset()
        fake = Fake(rng, now_and_then(random.Random(seed)) if seed % 2 else lambda seat, item: False, never)
        results = deal(costs, fake, num_seats=num_seats, done=heard.append)
        assert results == [item * item for item in range(len(costs))]
        assert heard == list(range(1, len(costs) + 1))
        assert len(set(fake.started)) == min(num_seats, len(costs))
        assert set(fake.at.values()) <= {COMING, None}, "nobody is left at work"
        if seed % 2 == 0:  # nobody was lost: longest first, each asked once
            assert fake.asked == sorted(range(len(costs)), key=lambda item: (-costs[item], item))


def test_a_lost_piece_is_the_next_one_to_be_done() -> None:
    lost = iter([True])
    fake = Fake(random.Random(0), lambda seat, item: item == 2 and next(lost, False))
    deal([1, 2, 9, 3], fake, num_seats=1, done=lambda count: None)
    assert fake.asked == [2, 2, 3, 1, 0]


@pytest.mark.parametrize("num_seats", [1, 3])
def test_it_gives_up_where_it_goes_on_losing(num_seats: int) -> None:
    fake = Fake(random.Random(1), lambda seat, item: item == 4)
    with pytest.raises(GivenUp, match="killed") as caught:
        deal([1] * 6, fake, num_seats=num_seats, done=lambda count: None)
    assert caught.value.item == 4 and fake.asked.count(4) == LOSSES
    never_there = Fake(random.Random(1), lambda seat, item: item is None)
    with pytest.raises(GivenUp) as caught:
        deal([1] * 6, never_there, num_seats=num_seats, done=lambda count: None)
    assert caught.value.item is None and never_there.asked == []
    assert max(Counter(never_there.started).values()) == LOSSES


def test_a_defect_is_raised_at_once() -> None:
    def dies(seat: int, item: int | None) -> bool:
        if item == 3:
            raise ValueError("a defect")
        return False

    fake = Fake(random.Random(2), dies)
    with pytest.raises(ValueError, match="a defect"):
        deal([1, 2, 3, 4], fake, num_seats=2, done=lambda count: None)
    assert fake.asked.count(3) == 1 and fake.started == [0, 1]


@pytest.mark.parametrize("room", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("wanted", [1, 3, 8, 100])
def test_models_share_the_room_out(room: int, wanted: int) -> None:
    assert shares(0, wanted=wanted, room=room) == []
    for num_models in range(1, 12):
        given = shares(num_models, wanted=wanted, room=room)
        assert len(given) == num_models and min(given) >= 1 and max(given) <= wanted and max(given) - min(given) <= 1
        at_once = min(num_models, room)
        assert sum(given[:at_once]) <= room
        if wanted >= room >= num_models:
            assert sum(given) == room  # 8 GPUs, 4 models, a slot of 8: all are at work


def test_what_is_told_says_where_and_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    from soul.evaluate.plan import Ask, GenerateItem

    items = [GenerateItem((Ask("forget", 0, "prompt"),), ((5,) * length,), 0, (1,), 16) for length in (40, 8)]
    ended: list[bool] = []

    class Pool(Fake):
        def close(self) -> None:
            ended.append(True)

    def told(dies: Callable[[int, int | None], bool]) -> str:
        monkeypatch.setattr(examiners, "Examiners", lambda exam, items, say: Pool(random.Random(0), dies))
        with pytest.raises(EvaluationStopped) as caught:
            examine(Exam("m", None, False, "fp32", "cpu"), items, stage="evaluate x", num_examiners=2, update=ended.append, say=print)
        return str(caught.value)

    at_an_item = told(lambda seat, item: item == 0)
    assert at_an_item.startswith("evaluate x: 3 processes in a row died at the same generation batch of 1 prompt(s), up to 56 tokens")
    assert "(killed)" in at_an_item and "--eval-generation-batch-tokens" in at_an_item and "\n" not in at_an_item
    assert "before they had loaded the model (killed)" in told(lambda seat, item: item is None)
    assert ended.count(True) >= 2


def test_a_seat_of_which_nothing_comes_is_left_to_the_others_until_there_are_none() -> None:
    for seed in range(20):
        fake = Fake(random.Random(seed), dies=lambda seat, item: seat == 1 and item is None)
        assert deal([1.0] * 9, fake, num_seats=3, done=lambda count: None) == [item * item for item in range(9)]
        assert fake.started.count(1) <= LOSSES
    with pytest.raises(GivenUp):
        deal([1.0] * 9, Fake(random.Random(0), dies=lambda seat, item: item is None), num_seats=3, done=lambda count: None)
