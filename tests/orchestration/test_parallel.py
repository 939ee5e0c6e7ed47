"""Several waits at once: results in order, no more at a time than there are slots, and a failure that nobody waits behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from soul.orchestration.parallel import run_together


class Gauge:
    """Counts how many of its calls are under way, and how many ever were at once."""

    def __init__(self) -> None:
        self.lock, self.now, self.most, self.started = threading.Lock(), 0, 0, 0

    def call(self, value: int, seconds: float) -> Callable[[], int]:
        def work() -> int:
            with self.lock:
                self.now, self.started = self.now + 1, self.started + 1
                self.most = max(self.most, self.now)
            time.sleep(seconds)
            with self.lock:
                self.now -= 1
            return value

        return work


@pytest.mark.parametrize(("num", "slots"), [(0, 2), (1, 2), (5, 1), (5, 2), (5, 3), (3, 8)])
def test_results_come_in_order_at_most_so_many_at_a_time(num: int, slots: int) -> None:
    gauge = Gauge()
    calls = [gauge.call(i, 0.02 * (num - i)) for i in range(num)]  # the last ends first
    assert run_together(calls, slots=slots) == list(range(num))
    assert gauge.started == num
    assert gauge.most == min(num, slots)


def failing() -> int:
    raise LookupError("the second one gave up")


@pytest.mark.parametrize("slots", [1, 2])
def test_the_first_failure_is_raised(slots: int) -> None:
    with pytest.raises(LookupError, match="the second one gave up"):
        run_together([Gauge().call(0, 0.01), failing], slots=slots)


def test_a_failure_waits_for_nothing_and_starts_nothing_more() -> None:
    gauge, release = Gauge(), threading.Event()

    def hanging() -> int:
        release.wait(20)
        return 0

    began = time.monotonic()
    try:
        with pytest.raises(LookupError):
            run_together([hanging, failing, *[gauge.call(i, 0.5) for i in range(3)]], slots=2)
        assert time.monotonic() - began < 5
    finally:
        release.set()
    time.sleep(0.7)
    assert gauge.started <= 1  # the slot that failed may have been given on before anyone could look
