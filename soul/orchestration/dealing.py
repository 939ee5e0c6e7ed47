"""Work dealt out to helpers who may come late and may be lost: longest first, one piece at a time, and never lost with its helper.

Knows nothing of Ray: a `Pool` starts helpers on numbered seats and says what happens to them.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

R = TypeVar("R")
LOSSES = 3  # in a row: two may be machines that go away, the third is no accident


@dataclass(frozen=True, slots=True)
class Ready:
    """The helper on this seat has come."""

    seat: int


@dataclass(frozen=True, slots=True)
class Answer(Generic[R]):
    """The helper on this seat has done its piece."""

    seat: int
    result: R


@dataclass(frozen=True, slots=True)
class Lost:
    """The helper on this seat is gone, with what it was at; `reason` is one line."""

    seat: int
    reason: str


class Pool(Protocol[R]):
    """Helpers on numbered seats. A failure of the work itself is raised by `wait` as what it is."""

    def start(self, seat: int) -> None:
        """Ask for a helper, in place of one that is lost. It may come late, or never; nobody waits here."""

    def ask(self, seat: int, item: int) -> None:
        """Give the helper, who has nothing to do, a piece of work."""

    def wait(self) -> Ready | Answer[R] | Lost:
        """Wait for the next thing to happen on any seat."""

    def stop(self, seat: int) -> None:
        """There is nothing left for this helper to do."""


class GivenUp(Exception):
    """Helpers were lost `LOSSES` times in a row: at the same piece of work, or, where `item` is None, on their way to the same seat."""

    def __init__(self, item: int | None, reason: str) -> None:
        super().__init__(reason)
        self.item, self.reason = item, reason


def deal(costs: Sequence[float], pool: Pool[R], *, num_seats: int, done: Callable[[int], None]) -> list[R]:
    """The results of all pieces, in their order, whoever did them. `done` hears after every piece how many are done.

    Raises:
        GivenUp: it goes on losing helpers at the same place.
    """
    waiting = sorted(range(len(costs)), key=lambda item: (costs[item], -item))  # the next one is at the end
    at: dict[int, int] = {}  # what the helper on a seat is at
    results: dict[int, R] = {}
    losses: Counter[tuple[str, int]] = Counter()
    seats = set(range(min(num_seats, len(costs))))
    for seat in seats:
        pool.start(seat)
    while len(results) < len(costs):
        event = pool.wait()
        seat, item = event.seat, at.pop(event.seat, None)
        if isinstance(event, Lost):
            where = ("seat", seat) if item is None else ("item", item)
            losses[where] += 1
            if item is not None:
                bisect.insort(waiting, item, key=lambda item: (costs[item], -item))
            if losses[where] < LOSSES:
                pool.start(seat)
                continue
            seats.discard(seat)  # its work is left to those on the other seats
            if item is not None or not seats:
                raise GivenUp(item, event.reason)
            continue
        losses["seat", seat] = 0
        if isinstance(event, Answer):
            assert item is not None  # who has nothing to do answers nothing
            results[item] = event.result
            done(len(results))
        if waiting:
            at[seat] = waiting.pop()
            pool.ask(seat, at[seat])
        else:
            seats.discard(seat)
            pool.stop(seat)  # what is lost from now on waits for the helper in its own place
    return [results[item] for item in range(len(costs))]
