"""A few long waits at once: each call starts Ray work of its own and waits for it. An interrupt does not wait for any of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def run_together(calls: Sequence[Callable[[], T]], *, slots: int) -> list[T]:
    """The calls' results in order, at most `slots` at a time. The first failure is raised at once; the rest ends with Ray."""
    if slots <= 1 or len(calls) == 1:
        return [call() for call in calls]
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    finished: queue.Queue[tuple[int, T | None, BaseException | None]] = queue.Queue()
    for i in range(len(calls)):
        waiting.put(i)

    def work() -> None:
        while True:
            try:
                i = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put((i, calls[i](), None))
            except BaseException as error:  # handed to the waiting thread below, which raises it
                finished.put((i, None, error))
                return

    for _ in range(min(slots, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, T] = {}
    while len(results) < len(calls):
        try:
            i, value, error = finished.get(timeout=0.5)  # a timeout, so that Ctrl-C is noticed on every platform
        except queue.Empty:
            continue
        if error is not None:
            raise error
        results[i] = value  # type: ignore[assignment]
    return [results[i] for i in range(len(calls))]
